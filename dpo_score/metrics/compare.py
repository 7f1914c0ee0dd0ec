"""Policies on the same pairs: joined by pair, k-th occurrence with k-th, as aligned arrays. Pure.

Promises: the joined rows keep the first policy's order; what stands on one side only is counted; which values may be
subtracted follows from the policies' settings alone. Reads no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_score.losses.ops import Floats
from dpo_score.metrics.arrays import ScoreArrays
from dpo_score.metrics.paired_tests import (
    PolicyDifference,
    against,
    best_policy,
    differences_to_best,
    flips,
    paired_difference,
    share_difference,
)
from dpo_score.metrics.sentences import summary_sentence
from dpo_score.metrics.summary import measure, order, share

METRICS: Mapping[str, str] = {
    "accuracy": "share of pairs whose chosen answer has the higher reward; ties left out",
    "margins": "mean of chosen reward − rejected reward, β·(Δc − Δr) (arXiv 2305.18290, section 4)",
    "margins_nats": "mean of Δc − Δr, the margin before β, in nats",
    "loss": "mean of the loss that was asked for",
    "chosen_rewards": "mean of β·Δc, Δc = log π(chosen) − log ρ(chosen)",
    "rejected_rewards": "mean of β·Δr, Δr = log π(rejected) − log ρ(rejected)",
}
"""What policies are compared by, one sentence each."""
LOWER_IS_BETTER = frozenset({"loss"})


@dataclass(frozen=True, slots=True)
class ScoringSettings:
    """What rewards of a policy rest on besides its weights and the data."""

    reference: str
    beta: float
    loss: str
    truncation: str
    template: str
    dtype: str
    has_reference: bool = True

    def differences(self, other: ScoringSettings) -> list[str]:
        """Names of the fields in which two settings differ."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]


@dataclass(frozen=True, slots=True, eq=False)
class ScoredPolicy:
    """One policy's scored rows, in order: `row_ids`, `pair_ids`, `marks` and `rows` have one length."""

    name: str
    step: int | None
    row_ids: Sequence[str]
    pair_ids: Sequence[str]
    rows: ScoreArrays
    marks: Sequence[Sequence[str] | None]
    settings: ScoringSettings

    @property
    def margins(self) -> Floats:
        return per_pair(self.rows, "margins")


@dataclass(frozen=True, slots=True)
class OneSided:
    """Pairs of one policy that not all others have: how many, and the first few row ids."""

    policy: str
    pairs: int
    first: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AlignedPolicies:
    """Policies whose rows are aligned: row i of each holds the same pair. `one_sided` only names those with any."""

    policies: tuple[ScoredPolicy, ...]
    one_sided: tuple[OneSided, ...]

    @property
    def names(self) -> list[str]:
        return [policy.name for policy in self.policies]

    @property
    def first(self) -> ScoredPolicy:
        return self.policies[0]

    def __len__(self) -> int:
        return len(self.first.rows)

    def __getitem__(self, name: str) -> ScoredPolicy:
        return next(policy for policy in self.policies if policy.name == name)

    def values(self, metric: str) -> dict[str, Floats]:
        """policy → one number per pair, NaN where it has none."""
        return {policy.name: per_pair(policy.rows, metric) for policy in self.policies}

    @property
    def clusters(self) -> NDArray[np.int64]:
        return self.first.rows.clusters

    def groups(self, label: str) -> dict[str, NDArray[np.bool_]]:
        """name → which pairs belong to it, for dataset, subset or a slice; the empty name left out."""
        rows = self.first.rows
        return {name: rows.labels[label] == rows.names[label].index(name) for name in rows.present(label)}


def per_pair(rows: ScoreArrays, metric: str) -> Floats:
    """One of METRICS for every row, NaN where it has none; accuracy is 1, 0, or NaN on a tie."""
    v = rows.values
    if metric == "accuracy":
        return np.where(rows.flags["tied"], np.nan, order(v["chosen_rewards"], v["rejected_rewards"]))
    return v["chosen_rewards"] - v["rejected_rewards"] if metric == "margins" else v[metric]


def align_policies(policies: Sequence[ScoredPolicy]) -> AlignedPolicies:
    """Join on pair_id. ValueError when no pair is common to all."""
    keys = [_numbered(policy.pair_ids) for policy in policies]
    common = set(keys[0]).intersection(*(set(found) for found in keys[1:]))
    if not common:
        raise ValueError("no pair is common to all policies")
    ranked = {key: place for place, key in enumerate(key for key in keys[0] if key in common)}
    joined = [_taken(policy, found, ranked) for policy, found in zip(policies, keys, strict=True)]
    sides = [_one_sided(policy, found, ranked) for policy, found in zip(policies, keys, strict=True)]
    return AlignedPolicies(tuple(joined), tuple(side for side in sides if side.pairs))


def _numbered(pair_ids: Sequence[str]) -> list[tuple[str, int]]:
    """(pair, how many of it came before)."""
    seen: dict[str, int] = {}
    keys = []
    for pair_id in pair_ids:
        keys.append((pair_id, seen.get(pair_id, 0)))
        seen[pair_id] = seen.get(pair_id, 0) + 1
    return keys


def _taken(
    policy: ScoredPolicy, keys: Sequence[tuple[str, int]], ranked: Mapping[tuple[str, int], int]
) -> ScoredPolicy:
    """The policy's rows of the common pairs, in their order."""
    order_ = np.empty(len(ranked), np.int64)
    for row, key in enumerate(keys):
        if key in ranked:
            order_[ranked[key]] = row
    return selected(policy, order_)


def selected(policy: ScoredPolicy, rows: NDArray[np.int64]) -> ScoredPolicy:
    """Some rows of a policy, in the order given."""
    taken = rows.tolist()
    return ScoredPolicy(
        policy.name,
        policy.step,
        [policy.row_ids[row] for row in taken],
        [policy.pair_ids[row] for row in taken],
        policy.rows.take(rows),
        [policy.marks[row] for row in taken],
        policy.settings,
    )


def _one_sided(
    policy: ScoredPolicy, keys: Sequence[tuple[str, int]], ranked: Mapping[tuple[str, int], int]
) -> OneSided:
    alone = [policy.row_ids[row] for row, key in enumerate(keys) if key not in ranked]
    return OneSided(policy.name, len(alone), tuple(alone[:3]))


NATS_REST_ON = ("reference", "template", "truncation", "dtype", "has_reference")
REWARDS_REST_ON = (*NATS_REST_ON, "beta")
_RESTS_ON = {"accuracy": (), "margins_nats": NATS_REST_ON, "loss": (*REWARDS_REST_ON, "loss")}


def refusal(a: ScoringSettings, b: ScoringSettings, metric: str) -> str | None:
    """Why a metric of two policies must not be subtracted, or None. Accuracy may always be: it compares rankings."""
    rests_on = _RESTS_ON.get(metric, REWARDS_REST_ON)
    differing = [name for name in a.differences(b) if name in rests_on]
    if not differing:
        return None
    named = ", ".join({"beta": "β", "has_reference": "having a reference"}.get(name, name) for name in differing)
    return f"not subtracted: {named} {'differs' if len(differing) == 1 else 'differ'}"


DIFFERENCED = ("accuracy", "margins", "margins_nats", "loss")
MEANS = tuple(metric for metric in METRICS if metric != "accuracy")
HISTOGRAM_BINS = 24


def compare_policies(aligned: AlignedPolicies, baseline: str | None = None) -> dict[str, Any]:
    """Everything that `compare` says. `baseline`: a policy among them, or None."""
    best = best_policy(_rankable(aligned)) if _rankable(aligned) else None
    edges = margin_edges(aligned.policies)
    found: dict[str, Any] = {
        "pairs": len(aligned),
        "groups": len(np.unique(aligned.clusters)),
        "one_sided": [
            {"policy": side.policy, "pairs": side.pairs, "first": list(side.first)} for side in aligned.one_sided
        ],
        "policies": [_levels(policy, edges) for policy in aligned.policies],
        "margin_edges": edges.tolist(),
        "best": best,
        "baseline": baseline,
        "versus_best": {} if best is None else _versus_best(aligned, best),
        "versus_baseline": {} if baseline is None else _versus_all(aligned, baseline),
        "subsets": {
            "dataset": _by_group(aligned, "dataset", baseline),
            "subset": _by_group(aligned, "subset", baseline),
        },
        "slices": {
            name: {"cut": how, "groups": _by_group(aligned, name, baseline)}
            for name, how in aligned.first.rows.cuts.items()
        },
    }
    return found | {"sentence": summary_sentence(found)}


def _rankable(aligned: AlignedPolicies) -> dict[str, Floats]:
    """Accuracy of the policies that have any pair without a tie."""
    return {name: values for name, values in aligned.values("accuracy").items() if np.isfinite(values).any()}


def margin_edges(policies: Sequence[ScoredPolicy]) -> Floats:
    """Edges of one histogram for all: equal bins over the middle 99 % of all margins; 0 is an edge or inside."""
    margins = np.concatenate([policy.margins for policy in policies])
    margins = margins[np.isfinite(margins)]
    if not len(margins):
        return np.linspace(-1.0, 1.0, HISTOGRAM_BINS + 1)
    low, high = (float(edge) for edge in np.quantile(margins, (0.005, 0.995)))
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-12:
        low, high = -1.0, 1.0
    edges: Floats = np.linspace(low, high, HISTOGRAM_BINS + 1)
    return edges


def counted(margins: Floats, edges: Floats) -> list[int]:
    """Pairs in each bin; what lies outside counts in the first or last."""
    kept = np.clip(margins[np.isfinite(margins)], edges[0], edges[-1])
    return [int(count) for count in np.histogram(kept, bins=edges)[0]]


def _levels(policy: ScoredPolicy, edges: Floats) -> dict[str, Any]:
    rows = policy.rows
    accuracy = per_pair(rows, "accuracy")
    return {
        "name": policy.name,
        "step": policy.step,
        "pairs": len(rows),
        "accuracy": share(accuracy, rows.repeated, "every pair is a tie"),
        "ties": int(np.count_nonzero(np.isnan(accuracy))),
        **{metric: measure(per_pair(rows, metric), rows.repeated) for metric in DIFFERENCED[1:]},
        "histogram": counted(policy.margins, edges),
    }


def _versus_best(aligned: AlignedPolicies, best: str) -> dict[str, Any]:
    """Accuracy against the best, with what cannot be told from it."""
    found = differences_to_best(_rankable(aligned), aligned.first.rows.repeated, differ=share_difference)
    return {"accuracy": [_versus(aligned, item) for item in found if item.against == best]}


def _versus_all(aligned: AlignedPolicies, baseline: str) -> dict[str, Any]:
    return {metric: _versus_baseline(aligned, baseline, metric) for metric in DIFFERENCED}


def _versus_baseline(aligned: AlignedPolicies, baseline: str, metric: str) -> list[dict[str, Any]]:
    """Every other policy minus the baseline; what must not be subtracted is null with the reason."""
    anchor, values = aligned[baseline], aligned.values(metric)
    refused = {policy.name: refusal(anchor.settings, policy.settings, metric) for policy in aligned.policies}
    usable = {name: value for name, value in values.items() if refused[name] is None}
    differ = share_difference if metric == "accuracy" else paired_difference
    found = {item.policy: item for item in against(baseline, usable, aligned.first.rows.repeated, differ=differ)}
    return [
        _versus(aligned, found[name]) if name in found else {"policy": name, "mean": None, "reason": refused[name]}
        for name in aligned.names
        if name != baseline
    ]


def _versus(aligned: AlignedPolicies, item: PolicyDifference) -> dict[str, Any]:
    d = item.difference
    found: dict[str, Any] = {
        "policy": item.policy,
        "against": item.against,
        "n": d.n,
        "mean": d.mean,
        "ci95": None if d.low is None or d.high is None else [d.low, d.high],
        "p": d.p,
        "p_adjusted": item.adjusted_p,
        "tied": item.tied,
        "detectable": d.detectable,
        "method": d.method,
        **_flips(aligned, item.policy, item.against),
    }
    return found if d.reason is None else found | {"reason": d.reason}


def _flips(aligned: AlignedPolicies, policy: str, other: str) -> dict[str, Any]:
    right = {name: per_pair(aligned[name].rows, "accuracy") for name in (policy, other)}
    found = flips(right[policy], right[other], aligned.first.rows.repeated)
    return {
        "won": found.won,
        "lost": found.lost,
        "both_right": found.both_right,
        "both_wrong": found.both_wrong,
        "mcnemar_p": found.p,
    }


def _by_group(aligned: AlignedPolicies, label: str, baseline: str | None) -> dict[str, Any]:
    """group → policy → its levels, with the accuracy difference to the baseline."""
    groups = aligned.groups(label)
    return {name: _group(aligned, mask, baseline) for name, mask in groups.items()}


def _group(aligned: AlignedPolicies, mask: NDArray[np.bool_], baseline: str | None) -> dict[str, Any]:
    clusters = aligned.clusters[mask]
    right = {name: values[mask] for name, values in aligned.values("accuracy").items()}
    found: dict[str, Any] = {
        policy.name: {
            "accuracy": share(right[policy.name], clusters, "every pair is a tie"),
            **{metric: measure(per_pair(policy.rows, metric)[mask], clusters) for metric in MEANS},
        }
        for policy in aligned.policies
    }
    for item in against(baseline, right, clusters, differ=share_difference) if baseline else []:
        d = item.difference
        ci95 = None if d.low is None or d.high is None else [d.low, d.high]
        versus = {"n": d.n, "mean": d.mean, "ci95": ci95, "p": d.p}
        found[item.policy]["versus_baseline"] = versus if ci95 is not None else versus | {"reason": d.reason}
    return {"pairs": int(mask.sum()), "policies": found}
