"""Does the work of a run, in order: prepare a plan, compute blocks, commit them, finish with summary and report.

In come a configuration and data, models and cache as the rooms below read them; out go the files of an output folder,
or tables in memory. It imports every room below it (results, report, logprobs, models, …) and never cli, api, export or
integrations; only this room decides the order in which effects happen.
"""
