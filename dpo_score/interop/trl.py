"""`DPOTrainerWithRefLogps` at its former address: see `dpo_score.integrations.trl`."""

from dpo_score.integrations.trl import DPOTrainerWithRefLogps

__all__ = ["DPOTrainerWithRefLogps"]
