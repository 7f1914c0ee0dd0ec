"""Proves an output folder: counts, checksums and derived columns."""
