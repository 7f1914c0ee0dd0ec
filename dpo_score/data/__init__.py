"""What a preference row means: files, folders, URLs and hub data sets in, typed rows (`Pair` or `Rejected`) out.

The files of a set are chosen (layout.py, files.py, hub.py), read row by row (row_reader.py), recognised (formats/) and
numbered (dataset.py). Imports no torch and no tokenizer.
"""
