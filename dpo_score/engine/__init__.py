"""Does the work of a run, in order: prepare a plan, compute blocks, commit them, finish with summary and report.

In come a configuration and data, models and cache as the packages below read them; out go the files of an output
folder, or tables in memory. It imports every package below it (results, report, logprobs, models, …) and never cli,
api, export or integrations; only this package decides the order in which effects happen.
"""
