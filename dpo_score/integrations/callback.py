"""A transformers callback: at each evaluation the model in training is scored on preference pairs, and logged.

    PreferenceMetrics.attach(trainer, pairs, reference="runs/sft", loss="sigmoid", beta=0.1)

Any `Trainer` of a causal language model will do. Promises: the numbers are those of `dpo_score.score` for the model as
it is at that step; weights, gradients, training modes and the active adapter are left as they were found; a metric
without a value is left out, never 0. Does not: work on a model that is sharded over processes (FSDP, DeepSpeed ZeRO-3).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from dpo_score.api import score
from dpo_score.errors import ConfigError

if TYPE_CHECKING:
    import polars as pl

MEANS = ("loss", "accuracy", "margins", "margins_nats", "chosen_rewards", "rejected_rewards")
"""Columns of a score whose means are logged; accuracy leaves ties out."""


class PreferenceMetrics(TrainerCallback):  # type: ignore[misc]
    """Logs `eval_<name>/accuracy`, `…/margins`, `…/loss` and so on at each evaluation, and adds them to its metrics.

    pairs, reference and options: as of `dpo_score.score` (a reference named by a folder or hub id is computed once and
    cached; one that is a loaded model is computed again each time; "base" is a PEFT model without its adapters).
    A metric can be `metric_for_best_model`. Raises ConfigError on a sharded model, at construction.
    """

    def __init__(self, trainer: Any, pairs: Any, *, reference: Any = None, name: str = "pairs", **options: Any) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ConfigError("PreferenceMetrics: the model is sharded over processes; score its checkpoints instead")
        self._trainer, self._pairs, self._reference = trainer, pairs, reference
        self._name, self._options = name, options

    @classmethod
    def attach(cls, trainer: Any, pairs: Any, **options: Any) -> PreferenceMetrics:
        """Make one and add it to `trainer`."""
        made = cls(trainer, pairs, **options)
        trainer.add_callback(made)
        return made

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Called by the trainer. Processes other than the first have the same weights and do nothing."""
        if not state.is_world_process_zero:
            return
        found = {f"eval_{self._name}/{key}": value for key, value in self.measure().items()}
        if metrics is not None:
            metrics.update(found)
        self._trainer.log(found)

    def measure(self) -> dict[str, float]:
        """The metrics of the trainer's model as it is now: means over scored pairs, and counts."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        options = {"tokenizer": self._trainer.processing_class, **self._options}
        return measured(score(self._pairs, policy=model, reference=self._reference, **options))


def measured(frame: pl.DataFrame) -> dict[str, float]:
    """Means of the columns of MEANS over the scored rows of a score, and how many rows were scored and rejected."""
    import polars as pl

    there = frame.filter(pl.col("status") == "scored")
    means = {name: there[name].cast(pl.Float64).mean() for name in MEANS if name in there.columns}
    found = {name: float(value) for name, value in means.items() if isinstance(value, float) and math.isfinite(value)}
    return {**found, "scored": float(there.height), "rejected": float(frame.height - there.height)}
