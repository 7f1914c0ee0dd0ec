"""From token ids to log-probabilities with a loaded model."""
