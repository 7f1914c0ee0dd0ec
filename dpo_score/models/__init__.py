"""Finds, checks and loads models, adapters and checkpoints.

In come names (a folder, a hub id, a .gguf file, a checkpoint of a trainer); out come a `ModelSource`, checked and
addressed by its content, and from that a model ready to score. Imports `tokenization`, `data`, `storage` and `config`,
never `logprobs` or anything above it.
"""
