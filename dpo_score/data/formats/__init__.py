"""One file a family of formats: how it is detected, which side is better, how a row is read."""
