"""Proves an output folder: counts, checksums, repeated values and everything that can be computed again.

In comes OUT; out goes one finding for each file that is damaged, missing, unknown, or at odds with another file. It
imports what reads OUT and what computes losses and summaries, loads no model, and finishes its report whatever a file
holds.
"""
