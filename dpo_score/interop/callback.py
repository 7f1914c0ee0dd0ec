"""`PreferenceMetrics` at its former address: see `dpo_score.integrations.callback`."""

from dpo_score.integrations.callback import PreferenceMetrics

__all__ = ["PreferenceMetrics"]
