"""One file a family of preference formats: which columns a format needs, which side is better, how a row is read.

In come the shapes of a set's columns and its rows as plain values; out come `Pair` records or the `Problem` of a row.
It may import the data's types and column shapes, and nothing that opens files, tokenizes or computes.
"""
