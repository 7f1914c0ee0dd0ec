"""For TRL and the transformers Trainer: values that were precomputed, metrics while training, a comparison."""
