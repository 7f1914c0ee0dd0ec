"""From stored log-probabilities to numbers: losses, derived columns, summaries, comparisons.

    losses.parse_loss ─▶ derive.derive_table (score tables) ─▶ metrics.summarise (summary.json)
                                                            └▶ comparison, calibration, length, health

Loads no model; only torch_loss.py imports torch.
"""
