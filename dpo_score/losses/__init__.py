"""The losses of preference optimization: from stored log-probabilities to loss, rewards and margins of every pair.

In: the log-probabilities that policy and reference gave to both answers of a pair, and a `LossSpec`. Out: one number a
pair, as arrays, as columns of a score table, or as torch tensors. May import config, errors and escape only; torch is
imported by torch.py alone, and elsewhere only when a caller passes a tensor.
"""
