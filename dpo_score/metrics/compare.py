"""Policies on the same pairs: joined by pair, and compared. Pure: in come scored rows, out comes strict JSON.

Rows are joined by pair_id, the k-th occurrence with the k-th, in the first policy's order; which values may be
subtracted follows from the policies' settings. A policy is ranked by its own accuracy, ties left out, and compared with
each other policy on the pairs that both rank; one that ties on more than half of the pairs, or of one run has scores of
fewer than half, takes no part. "Best" is picked from the same pairs, so its p values are adjusted as if every two
policies had been tested; differences to a baseline that was named beforehand are adjusted over the other policies
(Holm 1979), also where it is the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_score.losses.ops import Floats
from dpo_score.metrics.arrays import ScoreArrays, Texts
from dpo_score.metrics.intervals import cluster_sizes, effective_clusters
from dpo_score.metrics.paired_tests import (
    PolicyDifference,
    best_policy,
    differences_to,
    differences_to_best,
    flips,
    holm,
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
    """What rewards of a policy depend on besides its weights and the data."""

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
    """Policies whose rows are aligned: row i of each holds the same pair. `one_sided` only names those with any.

    `partial`: policies that are not among them, since they have scores of too few pairs, with how many they have.
    """

    policies: tuple[ScoredPolicy, ...]
    one_sided: tuple[OneSided, ...]
    partial: tuple[OneSided, ...] = ()

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


def align_policies(policies: Sequence[ScoredPolicy], of_one_run: bool = False) -> AlignedPolicies:
    """Join on pair_id. ValueError when no pair is common to all.

    `of_one_run`: the data are the same for all, so a policy with fewer than half of the pairs that another one has is
    left out, where two or more are left: it would leave few pairs to compare the others on.
    """
    if len(policies[0].pair_ids) and all(policy.pair_ids is policies[0].pair_ids for policy in policies):
        return AlignedPolicies(tuple(policies), ())  # one list of pairs for all: nothing to join
    import polars as pl

    partial: tuple[OneSided, ...] = ()
    least = LEAST_RANKED * max(len(policy.pair_ids) for policy in policies)
    whole = [policy for policy in policies if len(policy.pair_ids) >= least]
    if of_one_run and 2 <= len(whole) < len(policies):
        lacking = [policy for policy in policies if len(policy.pair_ids) < least]
        partial = tuple(OneSided(policy.name, len(policy.pair_ids), ()) for policy in lacking)
        policies = whole

    tables = [
        pl.DataFrame({"pair": _column(policy.pair_ids), f"row {place}": np.arange(len(policy.pair_ids))}).with_columns(
            pl.int_range(pl.len()).over("pair").alias("occurrence")
        )
        for place, policy in enumerate(policies)
    ]
    joined = tables[0]
    for table in tables[1:]:
        joined = joined.join(table, on=("pair", "occurrence"), how="inner", maintain_order="left")
    if not len(joined):
        raise ValueError("no pair is common to all policies")
    rows = [joined[f"row {place}"].to_numpy() for place in range(len(policies))]
    aligned = [selected(policy, found) for policy, found in zip(policies, rows, strict=True)]
    sides = [_one_sided(policy, found) for policy, found in zip(policies, rows, strict=True)]
    return AlignedPolicies(tuple(aligned), tuple(side for side in sides if side.pairs), partial)


def _column(texts: Sequence[str]) -> Any:
    """What polars takes as a column."""
    return texts.column if isinstance(texts, Texts) else texts


def _one_sided(policy: ScoredPolicy, joined: NDArray[np.int64]) -> OneSided:
    alone = np.setdiff1d(np.arange(len(policy.row_ids)), joined)
    return OneSided(policy.name, len(alone), tuple(policy.row_ids[row] for row in alone[:3]))


def selected(policy: ScoredPolicy, rows: NDArray[np.int64]) -> ScoredPolicy:
    """Some rows of a policy, in the order given."""
    return replace(
        policy,
        row_ids=_taken(policy.row_ids, rows),
        pair_ids=_taken(policy.pair_ids, rows),
        rows=policy.rows.take(rows),
        marks=[policy.marks[row] for row in rows.tolist()],
    )


def _taken(texts: Sequence[str], rows: NDArray[np.int64]) -> Sequence[str]:
    return Texts(texts.column.take(rows)) if isinstance(texts, Texts) else [texts[row] for row in rows.tolist()]


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
LEAST_RANKED = 0.5
"""The share of the pairs that a policy must rank, ties apart, to take part in the ranking."""


def compare_policies(aligned: AlignedPolicies, baseline: str | None = None) -> dict[str, Any]:
    """Everything that `compare` says. `baseline`: a policy among them, or None."""
    ranked = _ranked(aligned)
    best = best_policy(ranked) if ranked else None
    edges, clusters = margin_edges(aligned.policies), aligned.clusters
    sizes = cluster_sizes(clusters)
    anchor = baseline or best
    versus_baseline = {} if baseline is None else _versus_all(aligned, baseline)
    if best is not None and best == baseline:  # it was named beforehand, so no pick has to be allowed for
        items = [item for item in versus_baseline["accuracy"] if item["policy"] in ranked]
        versus_best = {"accuracy": items}
    else:
        versus_best = {} if best is None else _versus_best(aligned, ranked, best)
    found: dict[str, Any] = {
        "pairs": len(aligned),
        "groups": len(sizes),
        "effective_groups": effective_clusters(clusters),
        "largest_group": float(sizes.max()) / len(aligned),
        "one_sided": [
            {"policy": side.policy, "pairs": side.pairs, "first": list(side.first)} for side in aligned.one_sided
        ],
        "partial": [{"policy": one.policy, "pairs": one.pairs} for one in aligned.partial],
        "labelled_ties": int(np.count_nonzero(aligned.first.rows.flags["tied"])),
        "policies": [_levels(policy, edges) | {"ranked": policy.name in ranked} for policy in aligned.policies],
        "margin_edges": edges.tolist(),
        "best": best,
        "highest_margin": _highest_margin(aligned),
        "baseline": baseline,
        "versus_best": versus_best,
        "versus_baseline": versus_baseline,
        "subsets": {label: _by_group(aligned, label, anchor, baseline) for label in ("dataset", "subset")},
        "slices": {
            name: {"cut": how, "groups": _by_group(aligned, name, anchor, baseline)}
            for name, how in aligned.first.rows.groupings.items()
        },
    }
    found["collapses"] = _collapses(found)
    return found | {"sentence": summary_sentence(found)}


def _ranked(aligned: AlignedPolicies) -> dict[str, Floats]:
    """Outcomes (1, 0, NaN on a tie) of the policies that take part in the ranking; labelled ties do not count."""
    least = LEAST_RANKED * np.count_nonzero(~aligned.first.rows.flags["tied"])
    return {
        name: values
        for name, values in aligned.values("accuracy").items()
        if np.isfinite(values).any() and np.isfinite(values).sum() >= least
    }


def _highest_margin(aligned: AlignedPolicies) -> str | None:
    """The policy with the highest mean margin; None where margins depend on unlike settings or are missing."""
    first, *others = aligned.policies
    if any(refusal(first.settings, other.settings, "margins") for other in others):
        return None
    means = {policy.name: measure(policy.margins, None)["mean"] for policy in aligned.policies}
    known = {name: value for name, value in means.items() if value is not None}
    return max(known, key=lambda name: known[name]) if known else None


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
        "ties": int(np.count_nonzero(np.isnan(accuracy) & ~rows.flags["tied"])),
        **{metric: measure(per_pair(rows, metric), rows.repeated) for metric in DIFFERENCED[1:]},
        "histogram": counted(policy.margins, edges),
    }


def _versus_best(aligned: AlignedPolicies, ranked: Mapping[str, Floats], best: str) -> dict[str, Any]:
    """Accuracy of the ranked policies minus the best one's."""
    found = differences_to_best(ranked, aligned.first.rows.repeated, differ=share_difference)
    return {"accuracy": [_difference(aligned, item) for item in found if item.against == best]}


def _versus_all(aligned: AlignedPolicies, baseline: str) -> dict[str, Any]:
    """metric → every other policy minus the baseline; what must not be subtracted is null with the reason."""
    found: dict[str, Any] = {}
    for metric in DIFFERENCED:
        anchor, values = aligned[baseline], aligned.values(metric)
        refused = {policy.name: refusal(anchor.settings, policy.settings, metric) for policy in aligned.policies}
        usable = {name: value for name, value in values.items() if refused[name] is None}
        differ = share_difference if metric == "accuracy" else paired_difference
        items = differences_to(baseline, usable, aligned.first.rows.repeated, differ=differ)
        known = {item.policy: _difference(aligned, item) for item in items}
        found[metric] = [
            known.get(name, {"policy": name, "mean": None, "reason": refused[name]})
            for name in aligned.names
            if name != baseline
        ]
    return found


def _difference(aligned: AlignedPolicies, item: PolicyDifference) -> dict[str, Any]:
    d = item.difference
    changed = flips(*(per_pair(aligned[name].rows, "accuracy") for name in (item.policy, item.against)))
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
        "won": changed.won,
        "lost": changed.lost,
        "both_right": changed.both_right,
        "both_wrong": changed.both_wrong,
    }
    return found if d.reason is None else found | {"reason": d.reason}


# --- groups of pairs -------------------------------------------------------------------------------------------------


def _by_group(aligned: AlignedPolicies, label: str, anchor: str | None, baseline: str | None) -> dict[str, Any]:
    """group → policy → its levels, with the accuracy difference to the anchor, adjusted over groups and policies.

    The difference is called `versus_baseline`, or `versus_best` where no baseline was named.
    """
    key = "versus_baseline" if baseline else "versus_best"
    found = {name: _group(aligned, mask, anchor, key) for name, mask in aligned.groups(label).items()}
    tested = [
        cell[key]
        for group in found.values()
        for cell in group["policies"].values()
        if cell.get(key, {}).get("p") is not None
    ]
    for cell, adjusted in zip(tested, holm([cell["p"] for cell in tested]), strict=True):
        cell["p_adjusted"] = adjusted
    return found


def _group(aligned: AlignedPolicies, mask: NDArray[np.bool_], anchor: str | None, key: str) -> dict[str, Any]:
    clusters = aligned.clusters[mask]
    right = {name: values[mask] for name, values in aligned.values("accuracy").items()}
    found: dict[str, Any] = {
        policy.name: {
            "accuracy": share(right[policy.name], clusters, "every pair is a tie"),
            **{metric: measure(per_pair(policy.rows, metric)[mask], clusters) for metric in MEANS},
        }
        for policy in aligned.policies
    }
    for item in differences_to(anchor, right, clusters, differ=share_difference) if anchor else []:
        d = item.difference
        ci95 = None if d.low is None or d.high is None else [d.low, d.high]
        versus = {"n": d.n, "mean": d.mean, "ci95": ci95, "p": d.p, "p_adjusted": None}
        found[item.policy][key] = versus if ci95 is not None else versus | {"reason": d.reason}
    return {"pairs": int(mask.sum()), "policies": found}


def _collapses(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups in which a policy ranks fewer pairs right than another beyond noise, though not so over all pairs.

    With a baseline: policies below it. Without: the best below another policy. The surest first.
    """
    best, baseline = found["best"], found["baseline"]
    key = "versus_baseline" if baseline else "versus_best"
    overall = {item["policy"]: item for item in found[key].get("accuracy", [])}
    kinds = {**found["subsets"], **{name: one["groups"] for name, one in found["slices"].items()}}
    listed = []
    for label, groups in kinds.items():
        for name, group in groups.items() if len(groups) > 1 else ():
            for policy, cell in group["policies"].items():
                item, whole = cell.get(key), overall.get(policy)
                if item is None or whole is None or item["p_adjusted"] is None or item["p_adjusted"] >= 0.05:
                    continue
                lower, other = (policy, baseline) if baseline else (best, policy)
                sign = 1.0 if baseline else -1.0
                if sign * item["mean"] >= 0.0 or (sign * whole["mean"] < 0.0 and not whole["tied"]):
                    continue
                shares = [group["policies"][one]["accuracy"]["value"] for one in (lower, other)]
                listed.append(
                    {
                        "label": label,
                        "group": name,
                        "policy": lower,
                        "against": other,
                        "mean": sign * item["mean"],
                        "p_adjusted": item["p_adjusted"],
                        "accuracy": shares[0],
                        "accuracy_against": shares[1],
                        "overall": "tied" if whole["tied"] else "higher",
                    }
                )
    return sorted(listed, key=lambda one: (one["p_adjusted"], one["mean"]))
