"""From a data set or a finished run to data sets that other programs read.

Rows, what stage one committed and a finished OUT come in; Parquet with reference log-probs, RewardBench's JSON files
and uploads to the hub go out. This package may not import the command line, the public functions or integrations.
"""
