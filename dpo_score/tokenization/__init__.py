"""From a typed row to token ids and the mask of scored tokens."""
