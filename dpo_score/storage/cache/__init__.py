"""Log-probabilities by content, for every run that asks for the same sequence of the same model."""
