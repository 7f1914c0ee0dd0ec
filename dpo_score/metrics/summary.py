"""Score tables of one policy → the numbers of summary.json. Strict JSON: no NaN, null where a number cannot be had.

Per policy: overall, per dataset, per subset, per slice. Accuracy leaves ties out and counts them; TRL's own
metric names carry TRL's rules (a tie is wrong). Intervals are at 95 %, cluster-robust wherever a prompt or group
repeats (intervals.py). Deterministic: exactly rounded sums, rows in the order of the tables. Memory: arrays.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_score.losses.ops import Floats
from dpo_score.metrics.arrays import ScoreArrays, collect
from dpo_score.metrics.diagnostics import diagnose
from dpo_score.metrics.intervals import (
    Clusters,
    cluster_sizes,
    deviation,
    effective_clusters,
    mean,
    mean_interval,
    quantiles,
    share_interval,
)

NO_REFERENCE = "scored without a reference"
NO_LENGTHS = "token counts are not stored"
MEANS = ("margins", "margins_nats", "loss", "chosen_rewards", "rejected_rewards")


def summarise(
    tables: Iterable[pa.Table], *, rejects: Iterable[pa.Table] = (), slices: Sequence[str] = ()
) -> dict[str, Any]:
    """The summary of one policy from its score tables, read once in order.

    `rejects`: reject tables (columns dataset, code) of data, reference and this policy, for the counts.
    `slices`: further columns to group by (groups.py says how); `slice_cuts` holds how, and the order.
    """
    rows = collect(tables, rejects=rejects, slices=slices)
    datasets = {name: _cell_of(rows, "dataset", name) for name in _all_datasets(rows)}
    subsets = {name: _groups(_only(rows, "dataset", name), "subset") for name in datasets}
    sliced = {name: _groups(rows, name) for name in slices}
    return {
        "overall": cell(rows) | counts(rows, rows.rejected.total(), _by_code(rows)),
        "datasets": datasets,
        "subsets": subsets,
        "slices": sliced,
        "slice_cuts": {name: {"how": how, "groups": list(sliced[name])} for name, how in rows.groupings.items()},
        "diagnosis": diagnose(rows),
        "macro": {
            "datasets": _macro(list(datasets.values())),
            "subsets": _macro([value for group in subsets.values() for value in group.values()]),
            "slices": {name: _macro(list(groups.values())) for name, groups in sliced.items()},
        },
    }


def counts(rows: ScoreArrays, rejected: int, by_code: dict[str, int] | None) -> dict[str, Any]:
    """n = scored + rejected."""
    return {"n": len(rows) + rejected, "scored": len(rows), "rejected": by_code}


def cell(rows: ScoreArrays) -> dict[str, Any]:
    """All numbers of one group of scored rows."""
    v, clusters = rows.values, rows.repeated
    margins = v["chosen_rewards"] - v["rejected_rewards"]
    return {
        "loss": measure(v["loss"], clusters, "no loss could be computed")
        | {"overflow": int(np.count_nonzero(rows.flags["overflow"]))},
        "margins": measure(margins, clusters),
        "margins_nats": measure(v["margins_nats"], clusters, NO_REFERENCE),
        "chosen_rewards": measure(v["chosen_rewards"], clusters),
        "rejected_rewards": measure(v["rejected_rewards"], clusters),
        **accuracies(rows, margins),
        "ranking": ranking(rows),
        "truncated": int(np.count_nonzero(rows.flags["truncated"])),
        "without_truncated": _without_truncated(rows, margins),
        "clustered": clusters is not None,
        "clusters": _clusters(rows),
        **_trl(rows, margins),
    }


def _clusters(rows: ScoreArrays) -> dict[str, Any]:
    sizes = cluster_sizes(rows.clusters)
    largest = float(sizes.max()) / len(rows) if len(rows) else None
    return {"groups": len(sizes), "effective": effective_clusters(rows.clusters), "largest": largest}


def measure(values: Floats, clusters: Clusters | None, reason: str = "no value") -> dict[str, Any]:
    """Mean, standard deviation, 95 % interval of the mean and quantiles of the values that are there."""
    there = np.isfinite(values)
    kept = values[there]
    if not len(kept):
        return {"n": 0, "mean": None, "std": None, "ci95": None, "quantiles": None, "reason": reason}
    interval = mean_interval(kept, None if clusters is None else clusters[there])
    found: dict[str, Any] = {
        "n": len(kept),
        "mean": interval.value,
        "std": deviation(kept),
        "ci95": None if interval.low is None else [interval.low, interval.high],
        "method": interval.method,
        "quantiles": quantiles(kept),
    }
    return found if interval.reason is None else found | {"reason": interval.reason}


def share(outcomes: Floats, clusters: Clusters | None, reason: str = "no pair to count") -> dict[str, Any]:
    """A share of 1s among 0/1 outcomes with its interval; NaN outcomes are left out."""
    there = np.isfinite(outcomes)
    if not there.any():
        return {"n": 0, "value": None, "ci95": None, "method": None, "reason": reason}
    interval = share_interval(outcomes[there], None if clusters is None else clusters[there])
    found: dict[str, Any] = {
        "n": int(there.sum()),
        "value": interval.value,
        "ci95": None if interval.low is None else [interval.low, interval.high],
        "method": interval.method,
    }
    return found if interval.reason is None else found | {"reason": interval.reason}


def order(better: Floats, worse: Floats) -> Floats:
    """1 where `better` > `worse`, 0 where smaller, NaN on a tie or where one is missing."""
    return np.where(better > worse, 1.0, np.where(better < worse, 0.0, np.nan))


def accuracies(rows: ScoreArrays, margins: Floats) -> dict[str, Any]:
    """The share of pairs ranked right, and how many are ties of the rewards or of the labels."""
    v = rows.values
    labelled = rows.flags["tied"]
    outcomes = np.where(labelled, np.nan, order(v["chosen_rewards"], v["rejected_rewards"]))
    return {
        "accuracy": share(outcomes, rows.repeated, "every pair is a tie" if len(rows) else "no pair to count"),
        "ties": int(np.count_nonzero((v["chosen_rewards"] == v["rejected_rewards"]) & ~labelled)),
        "labelled_ties": int(np.count_nonzero(labelled)),
    }


def ranking(rows: ScoreArrays) -> dict[str, Any]:
    """How often a plain rule prefers chosen, ties left out: each model alone by sum and per token, and length.

    `flipped_right`, `flipped_wrong`: pairs that the policy's sum ranks right and the reference's wrong, and reverse.
    """
    v, clusters = rows.values, rows.repeated
    chosen_n, rejected_n = v["chosen_tokens"], v["rejected_tokens"]
    found: dict[str, Any] = {}
    for model, prefix, reason in (("reference", "ref", NO_REFERENCE), ("policy", "policy", "not stored")):
        chosen, rejected = v[f"{prefix}_chosen_logps"], v[f"{prefix}_rejected_logps"]
        found[f"{model}_sum"] = share(order(chosen, rejected), clusters, reason)
        found[f"{model}_per_token"] = share(order(chosen / chosen_n, rejected / rejected_n), clusters, reason)
    sums = [order(v[f"{prefix}_chosen_logps"], v[f"{prefix}_rejected_logps"]) for prefix in ("policy", "ref")]
    found |= {"flipped_right": _flipped(*sums), "flipped_wrong": _flipped(*sums[::-1])}
    found["longer_wins"] = share(order(chosen_n, rejected_n), clusters, NO_LENGTHS)
    found["shorter_wins"] = share(order(rejected_n, chosen_n), clusters, NO_LENGTHS)
    return found


def _flipped(now: Floats, before: Floats) -> int | None:
    """Pairs right by `now` and wrong by `before`; None where nothing can be compared."""
    both = np.isfinite(now) & np.isfinite(before)
    return int(np.count_nonzero((now == 1.0) & (before == 0.0))) if both.any() else None


def _without_truncated(rows: ScoreArrays, margins: Floats) -> dict[str, Any] | None:
    """Accuracy and margin over the pairs that were not cut; null when none was."""
    whole = ~rows.flags["truncated"]
    if whole.all():
        return None
    kept = rows.take(np.flatnonzero(whole))
    return {
        "accuracy": accuracies(kept, margins[whole])["accuracy"],
        "margins": measure(margins[whole], kept.repeated, "every pair was cut"),
    }


def _trl(rows: ScoreArrays, margins: Floats) -> dict[str, float | None]:
    """The metrics that TRL's DPOTrainer logs, by its rules: a tie counts as 0 in rewards/accuracies."""
    v = rows.values
    right = np.where(np.isfinite(margins), (margins > 0.0) * 1.0, np.nan)
    return {
        "rewards/chosen": finite_mean(v["chosen_rewards"]),
        "rewards/rejected": finite_mean(v["rejected_rewards"]),
        "rewards/accuracies": finite_mean(right),
        "rewards/margins": finite_mean(margins),
        "logps/chosen": finite_mean(v["policy_chosen_logps"]),
        "logps/rejected": finite_mean(v["policy_rejected_logps"]),
    }


def finite_mean(values: Floats) -> float | None:
    """Mean of the values that are there; None where there is none."""
    value = mean(values[np.isfinite(values)])
    return value if math.isfinite(value) else None


def _only(rows: ScoreArrays, label: str, name: str) -> ScoreArrays:
    names = rows.names[label]
    inside = rows.labels[label] == (names.index(name) if name in names else -1)
    return rows if len(rows) and inside.all() else rows.take(np.flatnonzero(inside))


def _groups(rows: ScoreArrays, label: str) -> dict[str, Any]:
    """A cell for every name that occurs; rejects carry no subset, so they are not counted here."""
    groups = {name: _only(rows, label, name) for name in rows.present(label)}
    return {name: cell(group) | counts(group, 0, None) for name, group in groups.items()}


def _all_datasets(rows: ScoreArrays) -> list[str]:
    return sorted({*rows.names["dataset"], *(dataset for dataset, _ in rows.rejected)})


def _cell_of(rows: ScoreArrays, label: str, name: str) -> dict[str, Any]:
    group = _only(rows, label, name)
    by_code = _by_code(rows, name)
    return cell(group) | counts(group, sum(by_code.values()), by_code)


def _by_code(rows: ScoreArrays, dataset: str | None = None) -> dict[str, int]:
    codes = sorted({code for _, code in rows.rejected})
    found = {
        code: sum(n for (name, c), n in rows.rejected.items() if c == code and dataset in (None, name))
        for code in codes
    }
    return {code: n for code, n in found.items() if n}


def _macro(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Unweighted means over groups, each group counting once; null without groups."""
    means = {metric: [cell[metric]["mean"] for cell in cells] for metric in MEANS}
    kept = {
        metric: [value for value in values if value is not None]
        for metric, values in {"accuracy": [cell["accuracy"]["value"] for cell in cells], **means}.items()
    }
    return {"groups": len(cells)} | {
        metric: math.fsum(values) / len(values) if values else None for metric, values in kept.items()
    }
