"""TRL's DPOTrainer on reference log-probabilities that `dpo-score precompute` wrote.

The trainer is the one of `load_ref_logps.py`, which also lies beside every data set that is written; here it raises
this package's errors. Checked against the installed TRL by the tests.
"""

from __future__ import annotations

from dpo_score.errors import ConfigError
from dpo_score.integrations import load_ref_logps

__all__ = ["DPOTrainerWithRefLogps"]


class DPOTrainerWithRefLogps(load_ref_logps.DPOTrainerWithRefLogps):
    """`DPOTrainerWithRefLogps(model, args=DPOConfig(…), train_dataset=…, contract=DIR)`: DIR is what was written.

    Trains on the data set's `ref_chosen_logps` and `ref_rejected_logps`, loads no reference model, and raises
    ConfigError, naming each field with both values, before the first step when they do not belong to this trainer.
    """

    refusal = ConfigError
