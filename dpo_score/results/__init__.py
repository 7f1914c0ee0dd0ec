"""Reads an output folder: its state, its numbers, and what can be computed from them without a model.

In comes OUT, through storage; out go records, tables and strict JSON: status, comparison, rescoring, audit, selection,
cards. May import every package below it down to storage, models only to find a tokenizer again; `noise.py` alone
measures with a model that its caller has loaded. Writes nothing but what was asked for (rescored/, audit.parquet) and
the cache's noise, and never imports engine, export or the command line.
"""
