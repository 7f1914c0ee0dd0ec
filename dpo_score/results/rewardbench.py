"""`--rewardbench`: the benchmark's table of one policy, from the scores that are stored.

Pairs go to RewardBench's subsets and sections; sets of the best-of-n format to RewardBench 2. The subset of a row is
the name of its data set where that is a prior set of the benchmark, else its `subset` column, else the set's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo_score.data.dataset import Dataset
from dpo_score.errors import ConfigError
from dpo_score.metrics.rewardbench import ALIASES, PRIOR_SETS, Floats, Prompt, best_of_n, pair_summary, ratio, rounded
from dpo_score.storage.manifest import Manifest

RULES = ("avg", "sum", "norm")
"""What a reference-free score is made of; the first is RewardBench's default."""
WHOLE = ("best-worst", "all")
"""Pairings that give every right answer of a best-of-n prompt against every wrong one; the first is the default."""

COLUMNS = (
    *("row_id", "id", "dataset", "subset", "num_correct", "chosen_tokens", "rejected_tokens"),
    *(f"{role}_{side}_logps" for role in ("policy", "ref") for side in ("chosen", "rejected")),
    *(f"policy_{side}_token_logps" for side in ("chosen", "rejected")),
)
"""What `answers` reads of scores."""


@dataclass(frozen=True, slots=True)
class Answers:
    """One policy's scored pairs as RewardBench sees them, [n] each. `right`: right answers of the row's prompt."""

    row_ids: Sequence[str]
    ids: Sequence[str]
    subsets: Sequence[str]
    best_of_n: NDArray[np.bool_]
    right: Sequence[int | None]
    scores: Mapping[str, tuple[Floats, Floats]]
    """Rule → scores of chosen and rejected: "log-ratio" alone, or those of RULES that the columns allow."""

    @property
    def rule(self) -> str:
        return next(iter(self.scores))


@dataclass(frozen=True, slots=True)
class Setting:
    """`lists`: names of the best-of-n sets. `dtype`: in what RewardBench adds and subtracts; None = float64."""

    mode: str
    lists: frozenset[str]
    dtype: str | None

    @classmethod
    def of(cls, manifest: Manifest, mode: str, policy: str) -> Setting:
        """As a run of `mode` recorded it; corrected numbers are not rounded."""
        data, fields = manifest.identities.text["data"], manifest.identities.policies[policy]
        for name, found in data.items():
            _refuse_few_pairs(mode, name, found["format"]["name"], found.get("pairing", WHOLE[0]))
        lists = frozenset(name for name, found in data.items() if _is_list(found["format"]["name"]))
        dtype = (fields.get("numerics") or {}).get("dtype", "float32")
        return cls(mode, lists, str(dtype) if mode == "exact" else None)


def check_pairing(mode: str | None, datasets: Sequence[Dataset]) -> None:
    """ConfigError where a benchmark is asked and the pairing leaves out answers of a best-of-n set."""
    for dataset in datasets if mode else ():
        _refuse_few_pairs(mode, dataset.spec.name, dataset.format.full_name, dataset.spec.pairing)


def _refuse_few_pairs(mode: str | None, name: str, format_name: str, pairing: str) -> None:
    if _is_list(format_name) and pairing not in WHOLE:
        raise ConfigError(
            f"--rewardbench {mode}: data set {name!r} is best-of-n, where a right answer must beat every wrong one, "
            f"but --pairing {pairing} keeps one pair a prompt: leave it out, or say {' or '.join(WHOLE)} for this set"
        )


def _is_list(format_name: str) -> bool:
    return format_name.split("/")[0] == "best-of-n"


def summary(setting: Setting, tables: Iterator[pa.Table], rejected_rows: Sequence[str]) -> dict[str, Any]:
    """What summary.json holds under `rewardbench`. `rejected_rows`: row ids of all pairs that were not scored."""
    mode, found = setting.mode, answers(setting, tables)
    result: dict[str, Any] = {"mode": mode, "score": found.rule}
    pairs = np.flatnonzero(~found.best_of_n).tolist()
    if pairs:
        by_rule = {
            rule: pair_summary([found.subsets[i] for i in pairs], chosen[pairs], rejected[pairs], mode == "exact")
            for rule, (chosen, rejected) in found.scores.items()
        }
        result |= by_rule.pop(found.rule)
        if by_rule:
            result["other_scores"] = {rule: _brief(cell) for rule, cell in by_rule.items()}
    if found.best_of_n.any():
        whole, broken = prompts(found, rejected_rows)
        result["best_of_n"] = {**best_of_n(whole), "incomplete": broken}
    return result


def _brief(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {name: cell[name] for name in ("sections", "leaderboard")}


def answers(setting: Setting, tables: Iterator[pa.Table]) -> Answers:
    """The stored scores of a policy, with subsets named as the benchmark names them."""
    table = pa.concat_tables([part.replace_schema_metadata(None) for part in tables])
    datasets, own = table["dataset"].to_pylist(), _texts(table, "subset")
    return Answers(
        row_ids=table["row_id"].to_pylist(),
        ids=_texts(table, "id"),
        subsets=[_subset(name, subset) for name, subset in zip(datasets, own, strict=True)],
        best_of_n=np.array([name in setting.lists for name in datasets], bool),
        right=_column(table, "num_correct"),
        scores=_scores(table, setting.dtype),
    )


def _column(table: pa.Table, name: str) -> list[Any]:
    return table[name].to_pylist() if name in table.column_names else [None] * table.num_rows


def _texts(table: pa.Table, name: str) -> list[str]:
    return ["" if value is None else str(value) for value in _column(table, name)]


def _subset(dataset: str, subset: str) -> str:
    if dataset in PRIOR_SETS or not subset:
        return dataset
    return ALIASES.get(subset, subset)


def _scores(table: pa.Table, dtype: str | None) -> dict[str, tuple[Floats, Floats]]:
    policy, reference = _pair(table, "policy_{}_logps"), _pair(table, "ref_{}_logps")
    if not np.isnan(reference[0]).all():
        return {"log-ratio": (ratio(policy[0], reference[0], dtype), ratio(policy[1], reference[1], dtype))}
    sums = tuple(values if dtype is None else rounded(values, dtype) for values in policy)
    counts = _pair(table, "{}_tokens")
    found = {"avg": (sums[0] / counts[0], sums[1] / counts[1]), "sum": (sums[0], sums[1])}
    if "policy_chosen_token_logps" in table.column_names:
        norms = [_norms(table[f"policy_{side}_token_logps"]) for side in ("chosen", "rejected")]
        found["norm"] = (norms[0], norms[1])
    if dtype is None:
        return found
    return {rule: (rounded(chosen, dtype), rounded(rejected, dtype)) for rule, (chosen, rejected) in found.items()}


def _pair(table: pa.Table, name: str) -> tuple[Floats, Floats]:
    """The column of both sides as float64, null as NaN."""
    columns = (table[name.format(side)].cast(pa.float64()) for side in ("chosen", "rejected"))
    chosen, rejected = (column.to_numpy(zero_copy_only=False) for column in columns)
    return chosen, rejected


def _norms(column: pa.ChunkedArray) -> Floats:
    """−‖token log-probs‖₂ of every row."""
    return np.array([-float(np.linalg.norm(np.asarray(row, np.float64))) for row in column.to_pylist()])


# --- RewardBench 2 ----------------------------------------------------------------------------------------------


def prompts(found: Answers, rejected_rows: Sequence[str]) -> tuple[list[Prompt], int]:
    """The prompts whose every answer was scored, and how many are not among them.

    A prompt's pairs are its right answers times its wrong ones, the wrong ones running fastest.
    """
    chosen, rejected = found.scores[found.rule]
    groups: dict[str, list[int]] = {}
    for index in np.flatnonzero(found.best_of_n).tolist():
        groups.setdefault(_source(found.row_ids[index]), []).append(index)
    lost = {_source(row_id) for row_id in rejected_rows}
    whole = []
    for source, rows in groups.items():
        right = found.right[rows[0]] or 1
        if source in lost or len(rows) % right:
            lost.add(source)
            continue
        wrong = len(rows) // right
        scores_right, scores_wrong = chosen[rows[::wrong]].tolist(), rejected[rows[:wrong]].tolist()
        whole.append(Prompt(found.ids[rows[0]], found.subsets[rows[0]], scores_right, scores_wrong))
    return whole, len(groups.keys() & lost)


def _source(row_id: str) -> str:
    """`file:row` of `file:row:part`."""
    return ":".join(row_id.split(":")[:2])
