"""The package as a library: the commands as functions, and `score` for pairs and models that are in memory.

Options are those of the command line by their names (`max_length=512`, `loss_param=["ld_alpha=0.5"]`). Mistakes raise
`dpo_score.errors.DpoScoreError`. Importing this file imports neither torch nor transformers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_score.config.load import load_config
from dpo_score.config.schema import BY_NAME, RunConfig
from dpo_score.errors import ConfigError, nearest

if TYPE_CHECKING:
    import polars as pl

    from dpo_score.engine.finish import Outcome
    from dpo_score.engine.in_memory import InMemoryModel
    from dpo_score.export.precompute import PrecomputeOutcome

__all__ = ["precompute", "rescore", "run", "score", "select"]

OF_RUNS = frozenset(
    {"blocks", "data", "data_revision", "emit_ids", "engine", "limit", "log_to", "max_bad_rows", "out", "ray_address"}
    | {"rewardbench", "sample", "slice", "split", "strict_env", "workers"}
)
"""Options that say something of files, folders or workers: pairs in memory have none."""

LISTS = ("data", "policy", "loss_param", "slice")


def run(pipeline: str | None = None, *, restart: bool = False, quiet: bool = True, **options: Any) -> Outcome:
    """`dpo-score run`: score every policy into `out`; the same call again resumes.

    `.summary` holds the numbers, `.failures` the policies that could not be scored, `.raise_failures()` raises them.
    """
    from dpo_score.engine.executors import choose as engines
    from dpo_score.engine.progress import Progress

    return engines.run(configured(pipeline, options), Progress(quiet), restart=restart)


def configured(pipeline: str | None, options: Mapping[str, Any]) -> RunConfig:
    """The configuration that a command line with these options gives; options that are None are not set."""
    given = {}
    for name, value in options.items():
        if name not in BY_NAME:
            raise ConfigError(f"unknown option {name!r}: {nearest(name, BY_NAME)}")
        plain = os.fspath(value) if isinstance(value, os.PathLike) else value
        given[name] = [plain] if name in LISTS and isinstance(plain, str) else plain
    return load_config(pipeline, {name: value for name, value in given.items() if value is not None})


def precompute(
    pipeline: str | None = None,
    *,
    to: str = "trl",
    rename: str | None = None,
    restart: bool = False,
    quiet: bool = True,
    **options: Any,
) -> PrecomputeOutcome:
    """`dpo-score precompute`: fill the cache with reference log-probs and, with `out`, write the data set with them."""
    from dpo_score.engine.progress import Progress
    from dpo_score.export import precompute as stage

    return stage.precompute(configured(pipeline, options), Progress(quiet), restart=restart, to=to, rename=rename)


def rescore(
    out: str | Path,
    loss: str | Iterable[str] = "sigmoid",
    beta: float | Iterable[float] | None = None,
    *,
    label_smoothing: float | None = None,
    loss_param: Sequence[str] = (),
    reference_policy: str | None = None,
) -> dict[str, Any]:
    """`dpo-score rescore`: every loss × beta over the log-probs that `out` holds, without a model."""
    from dpo_score.results import rescore as grid

    losses = loss if isinstance(loss, str) else ",".join(loss)
    betas = [beta] if isinstance(beta, int | float) else beta
    listed = None if betas is None else ",".join(str(value) for value in betas)
    return grid.rescore(str(out), losses, listed, label_smoothing, loss_param, reference_policy)


def select(
    source: str | Path | pl.DataFrame,
    *,
    rule: str,
    keep: int | str | None = None,
    policies: str | Sequence[str] | None = None,
    per_token: bool = False,
    scaled: bool = False,
    by_subset: bool = False,
    length_match: bool = False,
    dedupe: bool = False,
    score_columns: tuple[str, str] | None = None,
    folds: tuple[str, Mapping[str, str]] | None = None,
    seed: int = 0,
) -> pl.DataFrame:
    """Which pairs a rule would keep for training: one row for every row of `source`, and why it is in or out.

    Args:
        source: the folder of a run, or a frame of its score columns (as `score` returns them).
        rule: "margin:high", "difficulty", "random", … or an expression over the columns, as for `dpo-score select`.
        keep: how many pairs, or a share of the scored ones such as "10%"; None with a rule that is a filter.
        policies: those that judge (default: all). folds: a column and {fold: the policy that did not train on it}.

    Returns: a polars frame with row_id, select_score (higher is kept first), select_rank (1 first), kept, reason, code.
    Raises: UsageError, ConfigError, in one sentence.

    >>> import polars as pl
    >>> margins = pl.DataFrame({"margins_nats": [3.0, -1.0, 2.0], "margins": [0.3, -0.1, 0.2]})
    >>> scores = margins.with_columns(policy_chosen_logps=-1.0, policy_rejected_logps=-2.0)
    >>> select(scores, rule="margin:high", keep=2)["kept"].to_list()
    [True, False, True]
    """
    from dpo_score.results.select import Request
    from dpo_score.results.select import select as apply

    request = Request(
        rule,
        keep,
        policies if policies is None or isinstance(policies, str) else ",".join(policies),
        per_token,
        scaled,
        by_subset,
        length_match,
        dedupe,
        ",".join(score_columns) if score_columns else None,
        folds[0] if folds else None,
        ",".join(f"{fold}={name}" for fold, name in folds[1].items()) if folds else None,
        seed,
    )
    return apply(os.fspath(source) if isinstance(source, str | Path) else source, request).frame


def score(
    pairs: Any, *, policy: Any, reference: Any = None, tokenizer: Any = None, quiet: bool = True, **options: Any
) -> pl.DataFrame:
    """Score columns of `pairs`, in their order: one row a pair, null where it could not be scored (see `status`).

    pairs: a polars or pyarrow table, a datasets.Dataset or dicts, in any form of `dpo-score formats`. policy and
    reference: a folder, hub id or MODEL+ADAPTER, or a loaded model, which is left as it was found; reference "base" is
    a loaded PEFT policy without its adapters. policy may be a mapping, name → model: then the first column is `policy`.
    tokenizer: a loaded one or a name (default: the reference's, else the policy's). Log-probs: sums, nats, float64.
    """
    import polars as pl

    with tempfile.TemporaryDirectory(prefix="dpo-score-") as folder:
        found = _scored(pairs, policy, reference, tokenizer, quiet, options, Path(folder))
    frames = {name: pl.DataFrame(pl.from_arrow(table)) for name, table in found.items()}
    if not isinstance(policy, Mapping):
        return frames["policy"]
    named = [frame.select(pl.lit(name).alias("policy"), pl.all()) for name, frame in frames.items()]
    return pl.concat(named, how="diagonal_relaxed")


def _scored(
    pairs: Any, policy: Any, reference: Any, tokenizer: Any, quiet: bool, options: dict[str, Any], folder: Path
) -> dict[str, Any]:
    from dpo_score.engine.context import open_context
    from dpo_score.engine.in_memory import scored_tables, written
    from dpo_score.engine.progress import Progress
    from dpo_score.storage.open import open_store

    _refuse_options_of_runs(options)
    policies = dict(policy) if isinstance(policy, Mapping) else {"policy": policy}
    loaded = _loaded(policies, reference)
    settings = {
        **options,
        "data": [f"pairs={written(pairs, folder)}"],
        "policy": [f"{name}={'held' if name in loaded else os.fspath(model)}" for name, model in policies.items()],
        **({"reference": os.fspath(reference)} if reference is not None and "" not in loaded else {}),
        **({"tokenizer": os.fspath(tokenizer)} if isinstance(tokenizer, str | Path) else {}),
    }
    config = configured(None, settings)
    context = open_context(config, Progress(quiet), open_store(folder / "out"))
    if config.compute.tensor_parallel > 1:
        raise ConfigError("score computes in one process: for tensor_parallel, write the pairs to a file and use run")
    return scored_tables(config, context, loaded, None if isinstance(tokenizer, str | Path) else tokenizer)


def _refuse_options_of_runs(options: Mapping[str, Any]) -> None:
    for name in OF_RUNS & {name for name, value in options.items() if value is not None}:
        raise ConfigError(
            f"score() takes no {name!r}, which says something of files, folders or workers: leave it out (a part of "
            "the pairs is given by giving that part), or call dpo_score.run on a file"
        )


def _loaded(policies: Mapping[str, Any], reference: Any) -> dict[str, InMemoryModel]:
    """The models among policies and reference that are objects, not names; "" is the reference."""
    from dpo_score.engine.in_memory import InMemoryModel

    loaded = {name: InMemoryModel(model) for name, model in policies.items() if not isinstance(model, str | Path)}
    if reference == "base" and len(loaded) != 1:
        raise ConfigError('reference "base": give one loaded PEFT model as the policy, whose base is meant')
    if reference == "base":
        loaded[""] = InMemoryModel(next(iter(loaded.values())).model, bare=True)
    elif reference is not None and not isinstance(reference, str | Path):
        loaded[""] = InMemoryModel(reference)
    return loaded
