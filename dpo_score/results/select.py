"""`dpo-score select OUT`: which pairs a rule would keep for training, from stored scores alone. Loads no model.

In: an output folder, or a frame of its columns; a rule. Out: for every row of OUT whether it is kept, its score, its
rank and the reason, and the comparison of all rules side by side. The rules are in `metrics/selection.py`; the data
set of the kept pairs is written by `export/selected.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo_score.errors import ConfigError, UsageError, nearest
from dpo_score.heap import return_memory
from dpo_score.losses.ops import Floats
from dpo_score.metrics.selection import (
    Candidates,
    Judge,
    Reason,
    Rule,
    Selection,
    Settings,
    comparable_rules,
    describe,
    parse_rule,
    select_pairs,
)
from dpo_score.metrics.selection_comparison import DEFINITIONS, compare_rules, diagnose_on_policy
from dpo_score.metrics.suspect_labels import near_duplicates
from dpo_score.results.run_folder import chosen_names, open_out, parts
from dpo_score.results.source_text import plain_text, text_source
from dpo_score.storage.base import Store
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.manifest import Manifest

PAIR_COLUMNS = (
    "row_id",
    "dataset",
    "source_file",
    "source_row",
    "pair_id",
    "prompt_digest",
    "subset",
    "chosen_tokens",
    "rejected_tokens",
    "tied",
    "ref_chosen_logps",
    "ref_rejected_logps",
)
WHERE = ("row_id", "dataset", "source_file", "source_row", "pair_id", "subset")
"""Columns of the result that say where a row comes from."""
AT_ONCE = 65_536
"""Rows whose ids are parsed at a time."""
FEW_TEXTS = ("dataset", "source_file")
"""Texts that many rows share, held once each."""
JUDGE_COLUMNS = ("margins_nats", "margins", "policy_chosen_logps", "policy_rejected_logps")
SQUARES = ("policy_chosen_log_sum_sq_probs", "policy_rejected_log_sum_sq_probs")
OUT_OF_FOLD = "each pair is judged by the policy that did not train on its fold"
MAYBE_TRAINED = "they may have trained on these pairs; --folds judges each pair by a policy that did not"


@dataclass(frozen=True, slots=True)
class Folds:
    """Which policy judges which fold. `column`: a stored column that holds each pair's fold."""

    column: str
    policy_of: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class RunRows:
    """Every row of OUT. `pairs`: the scored ones, as the rules read them; `frame`: their columns, in the same order;
    `rejects`: the others, with `code`; `identity`: digests of what OUT was computed from."""

    pairs: Candidates
    frame: pl.DataFrame
    rejects: pl.DataFrame
    policies: Sequence[str]
    identity: Mapping[str, Any]

    @property
    def rows(self) -> int:
        return len(self.frame) + len(self.rejects)


def parse_keep(text: str | int | float | None, pairs: int) -> int | None:
    """`--keep`: a number of pairs, or a share of the scored ones such as 10%. Raises ConfigError."""
    if text is None:
        return None
    given = str(text).strip().replace(",", "").replace("_", "")
    try:
        share = given.endswith("%")
        value = float(given.removesuffix("%"))
    except ValueError:
        raise ConfigError(f"--keep {text}: write a number of pairs (500) or a share of the scored ones (10%)") from None
    if not np.isfinite(value) or value <= 0 or (share and value > 100) or (not share and value != int(value)):
        raise ConfigError(f"--keep {text}: write a whole number of pairs from 1, or a share over 0 % and at most 100 %")
    return int(pairs * value / 100.0 + 0.5) if share else int(value)


def parse_folds(column: str | None, given: str | None) -> Folds | None:
    """`--folds COLUMN --policy-of-fold 0=a,1=b`. Raises ConfigError when one is given without the other."""
    if column is None and given is None:
        return None
    if column is None or given is None:
        raise ConfigError("--folds COLUMN and --policy-of-fold FOLD=POLICY,… belong together: give both")
    found = dict(item.partition("=")[::2] for item in given.split(",") if item.strip())
    policy_of = {fold.strip(): policy.strip() for fold, policy in found.items()}
    if not policy_of or not all(policy_of) or not all(policy_of.values()):
        raise ConfigError(f"--policy-of-fold {given}: write FOLD=POLICY, separated by commas")
    return Folds(column, policy_of)


def parse_score_columns(given: str | None) -> tuple[str, str] | None:
    """`--score-columns CHOSEN,REJECTED`. Raises ConfigError."""
    if given is None:
        return None
    names = [name.strip() for name in given.split(",")]
    if len(names) != 2 or not all(names):
        raise ConfigError(f"--score-columns {given}: name two columns, of the chosen and rejected answer")
    return names[0], names[1]


def read_run(out: str, policies: Sequence[str] | None, columns: Iterable[str], folds: Folds | None) -> RunRows:
    """The rows of a run, one element a pair, in the order of the data.

    `policies`: names, or None for all; with folds, those that judge one. `columns`: what a rule reads besides; a
    column that differs between policies is the mean over them, and NAME.COLUMN that of one. A policy that did not
    score a pair leaves its values null. Raises UsageError, ConfigError.
    """
    store, manifest = open_out(out)
    asked = policies if folds is None else tuple(dict.fromkeys(folds.policy_of.values()))
    names = chosen_names(store, manifest, ",".join(asked or ()), out)
    wanted = dict.fromkeys((*columns, *([folds.column] if folds else [])))
    frame = _joined(_tables(store, names, wanted, out))
    judges = [_judge(frame, name) for name in names]
    if folds is not None:
        judges = [_out_of_fold(frame, judges, folds)]
    frame = _with_means(frame, names, wanted)
    pairs = _candidates(frame, judges)  # holds the numbers of the rules, and each prompt once
    frame = frame.select(c for c in frame.columns if c in WHERE or c in wanted or _bare(c, names) in wanted)
    pairs = replace(pairs, stored=frame)
    return_memory()
    return RunRows(pairs, frame, _rejects(store, names, frame), names, _identity(manifest, names))


def _tables(store: Store, names: Sequence[str], wanted: Iterable[str], out: str) -> dict[str, pl.DataFrame]:
    """The scores of each policy; what is true of a pair is read of the first one where all have the same rows."""
    first = _scores(store, names[0], names, wanted, out, PAIR_COLUMNS)
    found = {names[0]: first}
    for name in names[1:]:
        found[name] = _scores(store, name, names, wanted, out, ("row_id",))
        if not found[name]["row_id"].equals(first["row_id"]):
            found[name] = _scores(store, name, names, wanted, out, PAIR_COLUMNS)
    return found


def _scores(
    store: Store, policy: str, names: Sequence[str], wanted: Iterable[str], out: str, of_pairs: Sequence[str]
) -> pl.DataFrame:
    """The columns of one policy that are needed; those that are its own are named POLICY.COLUMN."""
    found = []
    for name in parts(store, policy):
        with store.open_table(name) as file:
            there = file.schema_arrow.names
        own = [c for c in (*JUDGE_COLUMNS, *SQUARES) if c in there]
        extra = [c for c in (_bare(c, names) for c in wanted) if c not in (*PAIR_COLUMNS, *own)]
        _check_stored(extra, there, out)
        kept = [c for c in (*of_pairs, *own, *dict.fromkeys(extra)) if c in there]
        found.append(pl.DataFrame(pl.from_arrow(store.read_table(name, kept).replace_schema_metadata(None))))
    frame = pl.concat(found, how="diagonal_relaxed")
    few = [name for name in FEW_TEXTS if name in frame.columns and name not in wanted]
    frame = frame.with_columns(pl.col(few).cast(pl.Categorical))
    del found
    return_memory()
    shared = [*PAIR_COLUMNS, "id", "group_id"]
    return frame.rename({name: f"{policy}.{name}" for name in frame.columns if name not in shared})


def _bare(column: str, names: Sequence[str]) -> str:
    """COLUMN of POLICY.COLUMN."""
    for name in names:
        if column.startswith(f"{name}."):
            return column.removeprefix(f"{name}.")
    return column


def _check_stored(columns: Iterable[str], there: Sequence[str], out: str) -> None:
    for column in columns:
        if column not in there:
            flag = "--stats wpo" if column in SQUARES else f"--keep-columns {column}"
            raise ConfigError(
                f"{out} does not store the column {column!r}: {nearest(column, there)}; `dpo-score run … {flag}` "
                "stores it (the log-probs are in the cache, nothing is computed twice)"
            )


def _joined(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """One row a pair that any policy scored, in the order of the data."""
    first, *others = tables.values()
    frame = first
    for table in others:
        if table["row_id"].equals(frame["row_id"]):
            frame = frame.hstack(table.select(name for name in table.columns if name not in frame.columns))
            continue
        shared = [name for name in table.columns if name in frame.columns and name != "row_id"]
        frame = frame.join(table, on="row_id", how="full", coalesce=True, suffix=" of another")
        frame = frame.with_columns(pl.coalesce(name, f"{name} of another").alias(name) for name in shared)
        frame = frame.drop(f"{name} of another" for name in shared)
    places = pl.concat(_row_places(frame["row_id"].slice(start, AT_ONCE)) for start in range(0, len(frame), AT_ONCE))
    order = places.with_row_index("row").sort(pl.exclude("row"), nulls_last=False, maintain_order=True)["row"]
    return frame if order.is_sorted() else frame[order]  # a copy takes as much as the frame


def _row_places(row_ids: pl.Series) -> pl.DataFrame:
    """The numbers of each row_id, up to three: data set, row, pair of the row."""
    place = pl.col("row_id").str.split(":").list
    return row_ids.to_frame("row_id").select(
        place.get(i, null_on_oob=True).cast(pl.Int64, strict=False).alias(str(i)) for i in range(3)
    )


def _with_means(frame: pl.DataFrame, names: Sequence[str], wanted: Iterable[str]) -> pl.DataFrame:
    """COLUMN beside every POLICY.COLUMN: the mean over policies of numbers, the first policy's value of others."""
    for column in dict.fromkeys(c for c in wanted if c not in frame.columns):
        own = [f"{name}.{column}" for name in names if f"{name}.{column}" in frame.columns]
        if own:
            numeric = all(frame[name].dtype.is_numeric() for name in own)
            value = pl.mean_horizontal(own, ignore_nulls=False) if numeric else pl.coalesce(own)
            frame = frame.with_columns(value.alias(column))
    return frame


def _numbers(frame: pl.DataFrame, name: str) -> Floats:
    if name not in frame.columns:
        return np.full(len(frame), np.nan)
    values: Floats = frame[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    return values


def _judge(frame: pl.DataFrame, policy: str) -> Judge:
    values = [_numbers(frame, f"{policy}.{name}") for name in JUDGE_COLUMNS]
    squares = [_numbers(frame, f"{policy}.{name}") if f"{policy}.{name}" in frame.columns else None for name in SQUARES]
    return Judge(policy, *values, *squares)


def _out_of_fold(frame: pl.DataFrame, judges: Sequence[Judge], folds: Folds) -> Judge:
    """One judge made of all: each pair has the values of the policy that its fold names. Raises UsageError."""
    owner = next((c for c in (folds.column, f"{judges[0].name}.{folds.column}") if c in frame.columns), folds.column)
    values = frame[owner].cast(pl.String)
    unknown = [fold for fold in values.unique().drop_nulls().sort().to_list() if fold not in folds.policy_of]
    if unknown or values.null_count():
        missing = f"fold {unknown[0]!r}" if unknown else "a null fold"
        count = int((values == unknown[0]).sum()) if unknown else values.null_count()
        raise UsageError(
            f"--policy-of-fold names no policy for {missing} of column {folds.column!r} ({count:,} pairs): add "
            f"{unknown[0] if unknown else 'FOLD'}=POLICY, or leave these rows out of the data"
        )
    masks = [(values == fold).to_numpy() for fold in folds.policy_of]
    by_name = {judge.name: judge for judge in judges}
    chosen = [by_name[name] for name in folds.policy_of.values()]

    def mixed(field: str) -> Any:
        columns = [getattr(judge, field) for judge in chosen]
        if any(column is None for column in columns):
            return None
        return np.select(masks, columns, default=np.nan)

    fields = ("margins_nats", "margins", "chosen_logps", "rejected_logps")
    squares = ("chosen_log_sum_sq_probs", "rejected_log_sum_sq_probs")
    return Judge("out of fold", *(mixed(field) for field in (*fields, *squares)))


def _candidates(frame: pl.DataFrame, judges: Sequence[Judge]) -> Candidates:
    tied = frame["tied"].fill_null(False).cast(pl.Boolean).to_numpy() if "tied" in frame.columns else None
    keys = frame["prompt_digest" if "prompt_digest" in frame.columns else "row_id"]
    prompts, prompt_keys = _places(keys.cast(pl.String).fill_null(""))
    without = pl.Series([None], dtype=pl.String).new_from_index(0, len(frame))
    subsets, subset_names = _places(frame["subset"] if "subset" in frame.columns else without)
    return Candidates(
        row_ids=frame["row_id"],
        prompts=prompts,
        prompt_keys=prompt_keys,
        subsets=subsets,
        subset_names=subset_names.to_list(),
        chosen_tokens=_numbers(frame, "chosen_tokens"),
        rejected_tokens=_numbers(frame, "rejected_tokens"),
        tied=np.zeros(len(frame), np.bool_) if tied is None else tied.astype(np.bool_),
        judges=judges,
        stored=frame,
        reference_chosen_logps=_numbers(frame, "ref_chosen_logps"),
    )


def _places(column: pl.Series) -> tuple[NDArray[np.int64], pl.Series]:
    """Each text's place among the different texts in order, −1 for null; and these texts."""
    codes = pc.dictionary_encode(column.cast(pl.String).to_arrow())
    order = pc.sort_indices(codes.dictionary).to_numpy()
    place = np.empty(len(order) + 1, np.int64)
    place[order], place[-1] = np.arange(len(order)), -1
    rows = pc.fill_null(codes.indices, len(order)).to_numpy(zero_copy_only=False)
    return place[rows], pl.Series(codes.dictionary.take(pa.array(order)), dtype=pl.String)


def _rejects(store: Store, names: Sequence[str], frame: pl.DataFrame) -> pl.DataFrame:
    """The rows of OUT that none of these policies scored, one line each, with the code."""
    columns = ["row_id", "dataset", "source_file", "source_row", "code"]
    kinds = ("data", "reference", *names)
    files = [file for kind in kinds for file in store.list(f"rejects/{kind}") if file.endswith(".parquet")]
    tables = [
        pl.DataFrame(pl.from_arrow(store.read_table(file, columns).replace_schema_metadata(None))) for file in files
    ]
    if not tables:
        return pl.DataFrame(schema=dict.fromkeys(columns, pl.String)).with_columns(pl.col("source_row").cast(pl.Int64))
    found = pl.concat(tables).unique("row_id", keep="first", maintain_order=True)
    return found.join(frame.select("row_id"), on="row_id", how="anti", maintain_order="left")


def _identity(manifest: Manifest, names: Sequence[str]) -> dict[str, Any]:
    """What OUT was computed from, as digests."""
    identities = manifest.identities
    return {
        "text": digest(identities.text),
        "reference": digest(identities.reference),
        "policies": {name: digest(identities.policies[name]) for name in names},
    }


# --- what comes out ---------------------------------------------------------------------------------------------------


def selection_frame(run: RunRows, selection: Selection) -> pl.DataFrame:
    """One row for every row of OUT: row_id, where it comes from, select_score, select_rank, kept, reason, code."""
    where = [c for c in WHERE if c in run.frame.columns]
    words = {reason: str(reason) for reason in Reason}
    texts = [pl.col(name).cast(pl.String) for name in FEW_TEXTS if name in where]
    scored = run.frame.select(where).with_columns(
        *texts,
        pl.Series("select_score", selection.scores, nan_to_null=True),
        pl.Series("select_rank", np.where(selection.ranks > 0, selection.ranks, -1)).replace(-1, None),
        pl.Series("kept", selection.kept),
        pl.Series("reason", [words[reason] for reason in selection.reasons]),
        pl.lit(None, pl.String).alias("code"),
    )
    others = run.rejects.with_columns(
        pl.lit(False).alias("kept"), pl.lit(str(Reason.NOT_SCORED)).alias("reason"), pl.col("code").cast(pl.String)
    )
    return pl.concat([scored, others], how="diagonal_relaxed")


def summary(run: RunRows, selection: Selection, settings: Settings, folds: Folds | None) -> dict[str, Any]:
    """selection.json: the rule, its parameters, threshold, counts by reason, who judged, what OUT was."""
    counts = selection.counts()
    if len(run.rejects):
        counts[str(Reason.NOT_SCORED)] = len(run.rejects)
    return {
        **describe(selection.rule),
        "keep": settings.keep,
        "threshold": selection.threshold,
        "rows": run.rows,
        "counts": counts,
        "settings": {
            "per_token": settings.per_token,
            "scaled": settings.scaled,
            "by_subset": settings.by_subset,
            "length_match": settings.length_match,
            "dedupe": settings.duplicates is not None,
            "score_columns": settings.score_columns,
            "seed": settings.seed,
        },
        "policies": list(run.policies),
        "folds": None if folds is None else {"column": folds.column, "policy_of_fold": dict(folds.policy_of)},
        "judged": MAYBE_TRAINED if folds is None else OUT_OF_FOLD,
        "out": run.identity,
    }


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """What `dpo-score select` was asked for. `policies`: those that judge, None for all."""

    rule: str
    keep: str | int | float | None = None
    policies: Sequence[str] | None = None
    per_token: bool = False
    scaled: bool = False
    by_subset: bool = False
    length_match: bool = False
    dedupe: bool = False
    score_columns: tuple[str, str] | None = None
    folds: Folds | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Selected:
    """The outcome of one rule. `frame`: one row for every row of OUT (`selection_frame`); `summary`: selection.json."""

    frame: pl.DataFrame
    summary: Mapping[str, Any]

    def __repr__(self) -> str:
        counts = self.summary["counts"]
        return f"<Selected {counts.get('kept', 0):,} of {self.summary['rows']:,} rows by {self.summary['rule']}>"


def select(source: str | pl.DataFrame, request: Request) -> Selected:
    """Apply one rule to a run, or to a frame of score columns. Raises UsageError, ConfigError."""
    rule = parse_rule(request.rule)
    run = _rows(source, request, rule)
    settings = settings_of(request, run, source)
    if settings.keep is None and not rule.is_filter:
        raise ConfigError(f"--rule {rule.name} puts pairs in order: say how many to keep (--keep 10%, or a number)")
    selection = select_pairs(run.pairs, rule, settings)
    return Selected(selection_frame(run, selection), summary(run, selection, settings, request.folds))


def compare(source: str | pl.DataFrame, request: Request) -> dict[str, Any]:
    """`--rule all`: every rule on the same pairs, and how near the pairs lie to each policy. Raises as `select`."""
    run = _rows(source, request, None)
    if request.keep is None:
        raise ConfigError("--rule all compares sets of one size: say how many each keeps (--keep 10%, or a number)")
    settings = settings_of(request, run, source)
    found = compare_rules(run.pairs, comparable_rules(run.pairs, settings), settings)
    return {
        "keep": settings.keep,
        "rows": run.rows,
        "scored": len(run.frame),
        "policies": list(run.policies),
        "judged": MAYBE_TRAINED if request.folds is None else OUT_OF_FOLD,
        **found,
        "on_policy": diagnose_on_policy(run.pairs),
        "definitions": dict(DEFINITIONS),
    }


def _rows(source: str | pl.DataFrame, request: Request, rule: Rule | None) -> RunRows:
    columns = [*(rule.columns if rule else ()), *(request.score_columns or ())]
    if isinstance(source, str):
        return read_run(source, request.policies, columns, request.folds)
    return from_frame(source, request.policies, columns, request.folds)


def settings_of(request: Request, run: RunRows, source: str | pl.DataFrame) -> Settings:
    """The typed settings of a request; near-duplicates of prompts are looked for here, when they are asked for."""
    return Settings(
        keep=parse_keep(request.keep, len(run.frame)),
        per_token=request.per_token,
        scaled=request.scaled,
        by_subset=request.by_subset,
        length_match=request.length_match,
        score_columns=request.score_columns,
        duplicates=duplicate_keys(run, source) if request.dedupe else None,
        seed=request.seed,
    )


def duplicate_keys(run: RunRows, source: str | pl.DataFrame) -> list[str]:
    """For each pair the row id of the first pair whose prompt is nearly the same. Reads the texts of the data again.

    Raises UsageError where the data are gone or have changed, for prompts are not stored in OUT.
    """
    if not isinstance(source, str):
        raise ConfigError("dedupe reads the prompts of the data: give the folder of a run instead of a frame")
    store, manifest = open_out(source)
    found = text_source(store, manifest)
    if isinstance(found, str):
        raise UsageError(f"--dedupe reads the prompts again, and {found}")
    of_prompt = run.pairs.prompts.tolist()
    first_row = dict(zip(reversed(of_prompt), reversed(list(run.pairs.row_ids)), strict=True))
    pairs = found.pairs(first_row.values())
    known = [prompt for prompt, row_id in first_row.items() if row_id in pairs][::-1]
    same_as = near_duplicates([plain_text(pairs[first_row[prompt]].prompt) for prompt in known])
    key = {own: known[other] for own, other in zip(known, same_as, strict=True) if other is not None}
    return [first_row[key.get(prompt, prompt)] for prompt in of_prompt]


def from_frame(
    frame: pl.DataFrame, policies: Sequence[str] | None, columns: Iterable[str], folds: Folds | None
) -> RunRows:
    """A frame of score columns, as `dpo_score.score` returns it: one policy, or several named by a column `policy`."""
    if folds is not None:
        raise ConfigError("folds name the policies of a run: give the folder of a run instead of a frame")
    several = "policy" in frame.columns
    known = [str(name) for name in frame["policy"].unique(maintain_order=True)] if several else ["policy"]
    names = list(policies or known)
    for name in names:
        if name not in known:
            raise UsageError(f"the frame has no policy {name!r}; {nearest(name, known)}")
    tables = {}
    for name in names:
        own = frame.filter(pl.col("policy") == name).drop("policy") if several else frame
        if "row_id" not in own.columns:
            own = own.with_row_index("row_id").with_columns(pl.format("0:{}", "row_id").alias("row_id"))
        for needed in JUDGE_COLUMNS:
            if needed not in own.columns:
                raise UsageError(
                    f"the frame has no column {needed!r}: give score columns, as dpo_score.score returns them"
                )
        shared = [*PAIR_COLUMNS, "id", "group_id"]
        tables[name] = own.rename({c: f"{name}.{c}" for c in own.columns if c not in shared})
    scored = pl.col(f"{names[0]}.policy_chosen_logps").is_not_null()
    joined = _joined(tables)
    rejects = joined.filter(~scored).select("row_id", pl.lit(None, pl.String).alias("code"))
    joined = _with_means(joined.filter(scored), names, columns)
    judges = [_judge(joined, name) for name in names]
    return RunRows(_candidates(joined, judges), joined, rejects, names, {})
