"""From per-example scores to means, intervals, tests and sentences. Imports no torch."""
