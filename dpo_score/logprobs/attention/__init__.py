"""Attention over packed rows, one file a backend."""
