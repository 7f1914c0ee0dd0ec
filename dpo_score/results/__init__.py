"""Reads an output folder: its state, its numbers, and what can be computed from them without a model."""
