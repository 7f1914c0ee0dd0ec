"""`dpo-score export OUT --to trl|ids`: the data of a finished run as a data set with its reference log-probs.

It is `precompute` with the settings that OUT recorded, and so refuses what `precompute` refuses (exports.py): a
consumer that would split, mask or cut rows in another way than the run. The values come from the cache.
"""

from __future__ import annotations

from dpo_score.config.schema import LossSpec
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError
from dpo_score.export.precompute import PrecomputeOutcome, precompute
from dpo_score.losses.custom import is_custom
from dpo_score.results.run_folder import open_out
from dpo_score.results.source_text import stored_config


def export(out: str, to: str, folder: str | None, rename: str | None, progress: Progress) -> PrecomputeOutcome:
    """Write the data set below `folder`. Raises UsageError when OUT is no run, or its consumer would differ."""
    store, manifest = open_out(out)
    config = stored_config(store)
    if folder is None:
        raise ConfigError(f"--to {to} writes a data set: say where with --out DIR")
    if config.rewardbench == "exact":
        raise ConfigError(
            f"--to {to}: {out} was scored with --rewardbench exact, which adds and drops tokens that no trainer would. "
            "Run without it"
        )
    date = manifest.notes.get("date")
    text = config.text.model_copy(update={"date": date}) if config.text.date is None else config.text
    loss = LossSpec() if is_custom(config.loss.name) else config.loss  # code that OUT names is not run; it reads none
    given = {"out": folder, "policies": (), "rewardbench": None, "text": text, "loss": loss}
    wanted = config.model_copy(update=given)
    return precompute(wanted, progress, to=to, rename=rename)
