"""TRL's DPOTrainer on reference log-probabilities that `dpo-score precompute` wrote.

The trainer is the one of `load_ref_logps.py`, which also lies beside every data set that is written; here it raises
this package's errors. Checked against the installed TRL by the tests.
"""

from __future__ import annotations

from dpo_score.errors import ConfigError
from dpo_score.integrations import load_ref_logps

__all__ = ["DPOTrainerWithRefLogps", "load", "teach_trl"]
load, teach_trl = load_ref_logps.load, load_ref_logps.teach_trl


class DPOTrainerWithRefLogps(load_ref_logps.DPOTrainerWithRefLogps):
    """`DPOTrainerWithRefLogps(model, args=DPOConfig(…), train_dataset=…, contract=DIR)`: DIR is the folder
    that was written, and may be given as `train_dataset`, too.

    Trains on the data set's `ref_chosen_logps` and `ref_rejected_logps`, loads no reference model, and raises
    ConfigError, naming each field with both values, before the first step when they do not belong to this trainer.
    """

    refusal = ConfigError
