"""Log-probabilities by content, for every run that asks for the same sequence of the same model.

In come blocks of values with their keys (digests of token ids); out come the values of the keys that are known, from
files whose index is a SQLite database. A namespace is one model with one way of computing; a file answers in its own
namespace alone. Imports the storage package beside it and nothing above.
"""
