"""One model whose weights are divided over several processes of this machine (tensor parallelism).

In come the settings of a model loader; out goes a group of processes that load, check and compute the same model, each
with its part of the weights. Imports `dpo_score.models` beside it, never `logprobs`: rank 0 names the steps, and
`logprobs/rank_worker.py` carries them out in the other ranks.
"""
