"""`dpo-score select OUT`: which pairs a rule would keep for training, from stored scores alone. Loads no model.

In: an output folder, or a frame of its columns; a rule. Out: for every row of OUT whether it is kept, its score, its
rank and the reason, and the comparison of all rules side by side. The rules are in `metrics/selection.py`; the data
set of the kept pairs is written by `export/selected.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dpo_score.errors import ConfigError, UsageError, nearest
from dpo_score.heap import return_memory
from dpo_score.losses.ops import Floats
from dpo_score.metrics.selection import (
    EVERYTHING,
    JUDGED,
    REFERENCE,
    SQUARES,
    TOKENS,
    UNREAD,
    Candidates,
    Judge,
    Reason,
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

OF_THE_PAIR = ("row_id", "prompt_digest", "subset", "tied")
"""Columns that every rule reads."""
KEY = ("prompt_high", "prompt_low")
"""The two halves of a prompt's digest as numbers: a third of the memory of its text."""
WHERE = ("row_id", "dataset", "source_file", "source_row", "pair_id", "subset")
"""Columns of the result that say where a row comes from."""
SHARED = frozenset((*OF_THE_PAIR, *WHERE, *REFERENCE, *TOKENS, *KEY, "id", "group_id"))
"""Columns that are the same in the scores of all policies; of the others each policy has its own, POLICY.COLUMN."""
OUT_OF_FOLD = "each pair is judged by the policy that did not train on its fold"
MAYBE_TRAINED = "they may have trained on these pairs; --folds judges each pair by a policy that did not"


@dataclass(frozen=True, slots=True)
class Folds:
    """Which policy judges which fold. `column`: a stored column that holds each pair's fold."""

    column: str
    policy_of: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class RunRows:
    """Every row of OUT.

    `pairs`: the scored ones, as the rules read them, in the order of the data; `where`: their columns WHERE in pieces,
    read from OUT each time it is called; `rejects`: the other rows, with `code`; `identity`: digests of what OUT was
    computed from.
    """

    pairs: Candidates
    where: Callable[[], Iterator[pl.DataFrame]]
    rejects: pl.DataFrame
    policies: Sequence[str]
    identity: Mapping[str, Any]

    @property
    def rows(self) -> int:
        return len(self.pairs) + len(self.rejects)


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


def read_run(
    out: str, policies: Sequence[str] | None, reads: Sequence[str], named: Sequence[str], folds: Folds | None
) -> RunRows:
    """The rows of a run, one element a pair, in the order of the data.

    `policies`: names, or None for all; with folds, those that judge one. `reads`: what rules read of each judge;
    `named`: columns that the user named; one that differs between policies is the mean over them, and NAME.COLUMN that
    of one. A policy that did not score a pair leaves its values null. Only these columns are held; where a row comes
    from is read again, block by block, when it is written. Raises UsageError, ConfigError.
    """
    store, manifest = open_out(out)
    asked = policies if folds is None else tuple(dict.fromkeys(folds.policy_of.values()))
    names = chosen_names(store, manifest, ",".join(asked or ()), out)
    named = list(dict.fromkeys((*named, *([folds.column] if folds else []))))
    stored = list(dict.fromkeys(_bare(column, names) for column in named))
    blocks = _blocks(store, names)
    _check_stored(store, blocks, stored, out)
    columns = dict.fromkeys((*OF_THE_PAIR, *reads, *stored))
    read = (_compact(_read(store, block, columns)) for block in blocks)
    pairs = _candidates(pl.concat(read, how="diagonal_relaxed"), names, reads, named, folds)
    rejects = _rejects(store, names, pairs.row_ids)
    return_memory()

    def where() -> Iterator[pl.DataFrame]:
        return (_read(store, block, WHERE) for block in blocks)

    return RunRows(pairs, where, rejects, names, _identity(manifest, names))


class DigestKeys(Sequence[str]):
    """The digests of prompts as 32 hexadecimal digits each, held as their two halves."""

    def __init__(self, high: NDArray[np.uint64], low: NDArray[np.uint64]) -> None:
        self._high, self._low = high, low

    def __len__(self) -> int:
        return len(self._high)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return DigestKeys(self._high[place], self._low[place])
        return f"{int(self._high[place]):016x}{int(self._low[place]):016x}"

    def __iter__(self) -> Iterator[str]:
        for at in range(0, len(self), 1 << 14):  # a few at a time, as text they are large
            halves = np.stack((self._high[at : at + (1 << 14)], self._low[at : at + (1 << 14)]), axis=1)
            digits = halves.astype(">u8").tobytes().hex()
            yield from (digits[start : start + 32] for start in range(0, len(digits), 32))


def _compact(frame: pl.DataFrame) -> pl.DataFrame:
    """The same pairs with KEY in the place of prompt_digest, and subsets as categories."""
    key = "prompt_digest" if "prompt_digest" in frame.columns else "row_id"
    digests = frame[key].fill_null("")
    odd = ~digests.str.contains("^[0-9a-f]{32}$")
    if odd.any():  # row ids, for one, where an older run stored no digest
        other = [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in digests.filter(odd)]
        digests = digests.scatter(odd.arg_true(), other)
    halves = [digests.str.slice(at, 16).str.to_integer(base=16, dtype=pl.UInt64) for at in (0, 16)]
    frame = frame.drop("prompt_digest", strict=False).with_columns(
        half.alias(n) for n, half in zip(KEY, halves, strict=True)
    )
    return frame.with_columns(pl.col("subset").cast(pl.Categorical)) if "subset" in frame.columns else frame


def _blocks(store: Store, names: Sequence[str]) -> list[dict[str, str]]:
    """The parts of each block by policy, in the order of the data."""
    found: dict[str, dict[str, str]] = {}
    for policy in names:
        for part in parts(store, policy):
            found.setdefault(part.rsplit("/", 1)[-1], {})[policy] = part
    return [found[name] for name in sorted(found)]


def _check_stored(store: Store, blocks: Iterable[Mapping[str, str]], columns: Sequence[str], out: str) -> None:
    """ConfigError for a column asked for by name that a part lacks: it says which option of `run` stores it."""
    for part in (part for block in blocks for part in block.values()) if columns else ():
        there = _column_names(store, part)
        for column in columns:
            if column not in there:
                flag = "--stats wpo" if column in SQUARES else f"--keep-columns {column}"
                raise ConfigError(
                    f"{out} does not store the column {column!r}: {nearest(column, there)}; `dpo-score run … {flag}` "
                    "stores it (the log-probs are in the cache, nothing is computed twice)"
                )


def _column_names(store: Store, part: str) -> list[str]:
    with store.open_table(part) as file:
        names: list[str] = file.schema_arrow.names
    return names


def _bare(column: str, names: Sequence[str]) -> str:
    """COLUMN of POLICY.COLUMN; where one policy's name begins another's, the longer one's."""
    for name in sorted(names, key=len, reverse=True):
        if column.startswith(f"{name}."):
            return column.removeprefix(f"{name}.")
    return column


def _read(store: Store, block: Mapping[str, str], columns: Iterable[str]) -> pl.DataFrame:
    """One block: a row a pair that any policy scored, in the order of the data. Columns that OUT lacks are left out.

    What is true of a pair is read of the first policy, and of another one where it scored other rows.
    """
    tables: list[pl.DataFrame] = []
    for policy, part in block.items():
        own = ["row_id", *(name for name in columns if name not in SHARED)]
        table = _table(store, part, own if tables else columns)
        if tables and not table["row_id"].equals(tables[0]["row_id"]):
            table = _table(store, part, columns)
        tables.append(table.rename({name: f"{policy}.{name}" for name in table.columns if name not in SHARED}))
    return _joined(tables)


def _table(store: Store, part: str, columns: Iterable[str]) -> pl.DataFrame:
    there = _column_names(store, part)
    table = store.read_table(part, [name for name in columns if name in there])
    return pl.DataFrame(pl.from_arrow(table.replace_schema_metadata(None)))


def _joined(tables: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """One row a pair that any policy scored, in the order of the data."""
    frame, *others = tables
    for table in others:
        if table["row_id"].equals(frame["row_id"]):
            frame = frame.hstack(table.select(name for name in table.columns if name not in frame.columns))
            continue
        shared = [name for name in table.columns if name in frame.columns and name != "row_id"]
        frame = frame.join(table, on="row_id", how="full", coalesce=True, suffix=" of another")
        frame = frame.with_columns(pl.coalesce(name, f"{name} of another").alias(name) for name in shared)
        frame = frame.drop(f"{name} of another" for name in shared)
    place = pl.col("row_id").str.split(":").list  # data set, row, pair of the row
    numbers = [place.get(i, null_on_oob=True).cast(pl.Int64, strict=False).alias(str(i)) for i in range(3)]
    places = frame.select(numbers).with_row_index("row")
    order = places.sort("0", "1", "2", nulls_last=False, maintain_order=True)["row"]
    return frame if order.is_sorted() else frame[order]


def _candidates(
    frame: pl.DataFrame, names: Sequence[str], reads: Sequence[str], named: Sequence[str], folds: Folds | None = None
) -> Candidates:
    """The pairs as arrays. `frame` has a policy's own columns as POLICY.COLUMN; `named` ones are kept as they are."""
    stored = frame.select(c for c in frame.columns if c in named or _bare(c, names) in named)
    prompts, prompt_keys = _places(*(frame[name].to_numpy() for name in KEY))
    frame = frame.drop(KEY)
    judges = [_judge(frame, name, reads) for name in names]
    without = pl.Series([None], dtype=pl.String).new_from_index(0, len(frame))
    subset = frame["subset"] if "subset" in frame.columns else without
    subsets = subset.unique().drop_nulls().cast(pl.String).sort()
    tied = frame["tied"].fill_null(False).cast(pl.Boolean).to_numpy() if "tied" in frame.columns else None
    return Candidates(
        row_ids=frame["row_id"],
        prompts=prompts,
        prompt_keys=prompt_keys,
        subsets=subset.cast(pl.Enum(subsets)).to_physical().cast(pl.Int32).fill_null(-1).to_numpy(),
        subset_names=subsets.to_list(),
        chosen_tokens=_numbers(frame, "chosen_tokens") if "chosen_tokens" in reads else UNREAD,
        rejected_tokens=_numbers(frame, "rejected_tokens") if "rejected_tokens" in reads else UNREAD,
        tied=np.zeros(len(frame), np.bool_) if tied is None else tied,
        judges=judges if folds is None else [_out_of_fold(stored, judges, folds)],
        stored=_with_means(stored, names, named),
        reference_chosen_logps=_numbers(frame, "ref_chosen_logps") if "ref_chosen_logps" in reads else None,
        reference_rejected_logps=_numbers(frame, "ref_rejected_logps") if "ref_rejected_logps" in reads else None,
    )


def _judge(frame: pl.DataFrame, policy: str, reads: Sequence[str]) -> Judge:
    values = [_numbers(frame, f"{policy}.{name}") if name in reads else UNREAD for name in JUDGED]
    squares = [_numbers(frame, f"{policy}.{name}") if f"{policy}.{name}" in frame.columns else None for name in SQUARES]
    return Judge(policy, *values, *squares)


def _numbers(frame: pl.DataFrame, name: str) -> Floats:
    """A column as float64, NaN for null, and for all where the frame has no such column."""
    if name not in frame.columns:
        return np.full(len(frame), np.nan)
    values: Floats = frame[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    return values


def _with_means(frame: pl.DataFrame, names: Sequence[str], named: Iterable[str]) -> pl.DataFrame:
    """COLUMN beside every POLICY.COLUMN: the mean over policies of numbers, the first policy's value of others."""
    for column in named:
        own = [f"{name}.{column}" for name in names if f"{name}.{column}" in frame.columns]
        if own and column not in frame.columns:
            numeric = all(frame[name].dtype.is_numeric() for name in own)
            value = pl.mean_horizontal(own, ignore_nulls=False) if numeric else pl.coalesce(own)
            frame = frame.with_columns(value.alias(column))
    return frame


def _out_of_fold(frame: pl.DataFrame, judges: Sequence[Judge], folds: Folds) -> Judge:
    """One judge made of all: each pair has the values of the policy that its fold names. Raises UsageError."""
    own = [folds.column, *(f"{judge.name}.{folds.column}" for judge in judges)]
    values = frame.select(pl.coalesce(name for name in own if name in frame.columns).cast(pl.String)).to_series()
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
        return UNREAD if any(column is UNREAD for column in columns) else np.select(masks, columns, default=np.nan)

    fields = ("margins_nats", "margins", "chosen_logps", "rejected_logps")
    squares = ("chosen_log_sum_sq_probs", "rejected_log_sum_sq_probs")
    return Judge("out of fold", *(mixed(field) for field in (*fields, *squares)))


def _places(high: NDArray[np.uint64], low: NDArray[np.uint64]) -> tuple[NDArray[np.int64], DigestKeys]:
    """Each digest's place among the different ones in order; and these."""
    order = np.lexsort((low, high))
    first = np.ones(len(order), np.bool_)
    first[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
    places = np.empty(len(order), np.int64)
    places[order] = np.cumsum(first) - 1
    kept = order[first]
    return places, DigestKeys(high[kept], low[kept])


def _rejects(store: Store, names: Sequence[str], scored: Sequence[str] | pl.Series) -> pl.DataFrame:
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
    row_ids = pl.Series("row_id", scored)
    after_all = row_ids.filter(row_ids.is_in(found["row_id"].implode()))  # few: a set of all would be large
    return found.filter(~pl.col("row_id").is_in(after_all.implode()))


def _identity(manifest: Manifest, names: Sequence[str]) -> dict[str, Any]:
    """What OUT was computed from, as digests."""
    identities = manifest.identities
    return {
        "text": digest(identities.text),
        "reference": digest(identities.reference),
        "policies": {name: digest(identities.policies[name]) for name in names},
    }


# --- what comes out ---------------------------------------------------------------------------------------------------


def selection_frames(run: RunRows, selection: Selection) -> Iterator[pl.DataFrame]:
    """One row for every row of OUT: row_id, where it comes from, select_score, select_rank, kept, reason, code.

    The scored rows come in the order of the data, in pieces; the others follow. UsageError where OUT holds other rows
    than those that were judged.
    """
    start, row_ids, kept = 0, pl.Series(run.pairs.row_ids), selection.kept
    changed = UsageError("the scores changed while pairs were selected, by another run: run the same command after it")
    for where in run.where():
        piece = slice(start, start + len(where))
        start = piece.stop
        if not where["row_id"].equals(row_ids[piece]):
            raise changed
        yield where.with_columns(
            pl.Series("select_score", selection.scores[piece], nan_to_null=True),
            pl.Series("select_rank", selection.ranks[piece]).replace(0, None),
            pl.Series("kept", kept[piece]),
            pl.Series("reason", selection.reasons_of(piece).tolist(), pl.String),
            pl.lit(None, pl.String).alias("code"),
        )
    if start != len(run.pairs):
        raise changed
    if len(run.rejects):
        yield run.rejects.with_columns(
            pl.lit(None, pl.Float64).alias("select_score"),
            pl.lit(None, pl.Int64).alias("select_rank"),
            pl.lit(False).alias("kept"),
            pl.lit(str(Reason.NOT_SCORED)).alias("reason"),
            pl.col("code").cast(pl.String),
        )


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
    """The outcome of one rule. `summary`: selection.json."""

    run: RunRows
    selection: Selection
    summary: Mapping[str, Any]

    def frames(self) -> Iterator[pl.DataFrame]:
        """`selection_frames`, for what needs no more than one piece at a time."""
        return selection_frames(self.run, self.selection)

    @property
    def frame(self) -> pl.DataFrame:
        """One row for every row of OUT."""
        return pl.concat(self.frames(), how="diagonal_relaxed")

    def __repr__(self) -> str:
        counts = self.summary["counts"]
        return f"<Selected {counts.get('kept', 0):,} of {self.summary['rows']:,} rows by {self.summary['rule']}>"


def select(source: str | pl.DataFrame, request: Request) -> Selected:
    """Apply one rule to a run, or to a frame of score columns. Raises UsageError, ConfigError."""
    rule = parse_rule(request.rule)
    if request.keep is None and not rule.is_filter:
        raise ConfigError(f"--rule {rule.name} puts pairs in order: say how many to keep (--keep 10%, or a number)")
    run = _rows(source, request, rule.reads(settings_of(request)), rule.columns)
    settings = _settled(request, run, source)
    selection = select_pairs(run.pairs, rule, settings)
    return Selected(run, selection, summary(run, selection, settings, request.folds))


def compare(source: str | pl.DataFrame, request: Request) -> dict[str, Any]:
    """`--rule all`: every rule on the same pairs, and how near the pairs lie to each policy. Raises as `select`."""
    if request.keep is None:
        raise ConfigError("--rule all compares sets of one size: say how many each keeps (--keep 10%, or a number)")
    run = _rows(source, request, EVERYTHING)
    settings = _settled(request, run, source)
    found = compare_rules(run.pairs, comparable_rules(run.pairs, settings), settings)
    return {
        "keep": settings.keep,
        "rows": run.rows,
        "scored": len(run.pairs),
        "policies": list(run.policies),
        "judged": MAYBE_TRAINED if request.folds is None else OUT_OF_FOLD,
        **found,
        "on_policy": diagnose_on_policy(run.pairs),
        "definitions": dict(DEFINITIONS),
    }


def _rows(source: str | pl.DataFrame, request: Request, reads: Sequence[str], named: Sequence[str] = ()) -> RunRows:
    named = (*named, *(request.score_columns or ()))
    reads = (*reads, *(TOKENS if request.length_match else ()))
    if isinstance(source, str):
        return read_run(source, request.policies, reads, named, request.folds)
    return from_frame(source, request.policies, named, request.folds)


def settings_of(request: Request) -> Settings:
    """How rules are applied, as far as it is known before the pairs are read."""
    return Settings(
        per_token=request.per_token,
        scaled=request.scaled,
        by_subset=request.by_subset,
        length_match=request.length_match,
        score_columns=request.score_columns,
        seed=request.seed,
    )


def _settled(request: Request, run: RunRows, source: str | pl.DataFrame) -> Settings:
    """`settings_of` with the number to keep, and the near-duplicates of prompts where they are asked for."""
    return replace(
        settings_of(request),
        keep=parse_keep(request.keep, len(run.pairs)),
        duplicates=duplicate_keys(run, source) if request.dedupe else None,
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
    frame: pl.DataFrame, policies: Sequence[str] | None, named: Sequence[str], folds: Folds | None
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
        for needed in JUDGED:
            if needed not in own.columns:
                raise UsageError(
                    f"the frame has no column {needed!r}: give score columns, as dpo_score.score returns them"
                )
        tables[name] = own.rename({c: f"{name}.{c}" for c in own.columns if c not in SHARED})
    joined = _joined(list(tables.values()))
    scored = pl.col(f"{names[0]}.policy_chosen_logps").is_not_null()
    rejects = joined.filter(~scored).select("row_id", pl.lit(None, pl.String).alias("code"))
    joined = joined.filter(scored)
    where = joined.select(name for name in WHERE if name in joined.columns)
    return RunRows(_candidates(_compact(joined), names, EVERYTHING, named), lambda: iter([where]), rejects, names, {})
