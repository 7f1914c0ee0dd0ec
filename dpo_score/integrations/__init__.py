"""For trainers: precomputed values in TRL's DPOTrainer, metrics while training, a comparison with TRL's own pass.

A data set that `precompute` wrote, a trainer or a finished OUT comes in; a trainer, logged metrics or a list of
differences goes out. Every package but the command line may be imported; `load_ref_logps.py` imports none of them,
because it is copied beside each data set.
"""
