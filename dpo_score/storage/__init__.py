"""Everything that is written: atomic files, commit records, identities, manifests, locks, on disk or in object stores.

In come tables, bytes and records; out come files that are whole or absent, and the answer to which of them still hold.
Imports config, errors and escape alone; no torch, and nothing that knows what a column means.
"""
