"""Finds, checks and loads models, adapters and checkpoints."""
