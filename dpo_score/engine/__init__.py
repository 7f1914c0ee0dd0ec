"""Does the work of a run, in order: prepare, plan, compute blocks, commit them, finish."""
