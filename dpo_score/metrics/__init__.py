"""What scores say: means and shares with intervals, paired comparisons, release gates, diagnostics, and sentences.

In: score tables, or arrays of one number a pair. Out: strict JSON and plain sentences; nothing here reads or writes a
file. May import losses, config, errors and escape; torch never. `import scipy` loads a part of it (`scipy.stats`) only
when that part is used, so commands that need none start fast.
"""
