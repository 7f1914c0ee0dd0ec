"""A lineup → levels, paired differences and a sentence, as strict JSON. Pure; the arithmetic is in comparison.py.

Policies are ranked by accuracy. "Best" is picked from the same pairs, so its p values are adjusted as if every pair
of policies had been tested; differences to a baseline named beforehand are adjusted over the other policies (Holm
1979). Differences that would subtract unlike things are null with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_score.losses.ops import Floats
from dpo_score.metrics.compare import METRICS, Lineup, Scored, per_pair, refusal
from dpo_score.metrics.paired_tests import (
    Versus,
    against,
    best_policy,
    flips,
    not_worse_than_best,
    paired_difference,
    share_difference,
)
from dpo_score.metrics.sentences import verdict
from dpo_score.metrics.summary import measure, share

DIFFERENCED = ("accuracy", "margins", "margins_nats", "loss")
MEANS = tuple(metric for metric in METRICS if metric != "accuracy")
HISTOGRAM_BINS = 24


def matchup(lineup: Lineup, baseline: str | None = None) -> dict[str, Any]:
    """Everything that `compare` says. `baseline`: a policy of the lineup, or None."""
    best = best_policy(_rankable(lineup)) if _rankable(lineup) else None
    edges = margin_edges(lineup.policies)
    found: dict[str, Any] = {
        "pairs": len(lineup),
        "groups": len(np.unique(lineup.clusters)),
        "one_sided": [
            {"policy": side.policy, "pairs": side.pairs, "first": list(side.first)} for side in lineup.one_sided
        ],
        "policies": [_levels(policy, edges) for policy in lineup.policies],
        "margin_edges": edges.tolist(),
        "best": best,
        "baseline": baseline,
        "versus_best": {} if best is None else _versus_best(lineup, best),
        "versus_baseline": {} if baseline is None else _versus_all(lineup, baseline),
        "subsets": {
            "dataset": _by_group(lineup, "dataset", baseline),
            "subset": _by_group(lineup, "subset", baseline),
        },
        "slices": {
            name: {"cut": how, "groups": _by_group(lineup, name, baseline)}
            for name, how in lineup.first.rows.cuts.items()
        },
    }
    return found | {"sentence": verdict(found)}


def _rankable(lineup: Lineup) -> dict[str, Floats]:
    """Accuracy of the policies that have any pair without a tie."""
    return {name: values for name, values in lineup.values("accuracy").items() if np.isfinite(values).any()}


def margin_edges(policies: Sequence[Scored]) -> Floats:
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


def _levels(policy: Scored, edges: Floats) -> dict[str, Any]:
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


def _versus_best(lineup: Lineup, best: str) -> dict[str, Any]:
    """Accuracy against the best, with what cannot be told from it."""
    found = not_worse_than_best(_rankable(lineup), lineup.first.rows.repeated, differ=share_difference)
    return {"accuracy": [_versus(lineup, item) for item in found if item.against == best]}


def _versus_all(lineup: Lineup, baseline: str) -> dict[str, Any]:
    return {metric: _versus_baseline(lineup, baseline, metric) for metric in DIFFERENCED}


def _versus_baseline(lineup: Lineup, baseline: str, metric: str) -> list[dict[str, Any]]:
    """Every other policy minus the baseline; what must not be subtracted is null with the reason."""
    anchor, values = lineup[baseline], lineup.values(metric)
    refused = {policy.name: refusal(anchor.settings, policy.settings, metric) for policy in lineup.policies}
    usable = {name: value for name, value in values.items() if refused[name] is None}
    differ = share_difference if metric == "accuracy" else paired_difference
    found = {item.policy: item for item in against(baseline, usable, lineup.first.rows.repeated, differ=differ)}
    return [
        _versus(lineup, found[name]) if name in found else {"policy": name, "mean": None, "reason": refused[name]}
        for name in lineup.names
        if name != baseline
    ]


def _versus(lineup: Lineup, item: Versus) -> dict[str, Any]:
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
        **_flips(lineup, item.policy, item.against),
    }
    return found if d.reason is None else found | {"reason": d.reason}


def _flips(lineup: Lineup, policy: str, other: str) -> dict[str, Any]:
    right = {name: per_pair(lineup[name].rows, "accuracy") for name in (policy, other)}
    found = flips(right[policy], right[other], lineup.first.rows.repeated)
    return {
        "won": found.won,
        "lost": found.lost,
        "both_right": found.both_right,
        "both_wrong": found.both_wrong,
        "mcnemar_p": found.p,
    }


def _by_group(lineup: Lineup, label: str, baseline: str | None) -> dict[str, Any]:
    """group → policy → its levels, with the accuracy difference to the baseline."""
    groups = lineup.groups(label)
    return {name: _group(lineup, mask, baseline) for name, mask in groups.items()}


def _group(lineup: Lineup, mask: NDArray[np.bool_], baseline: str | None) -> dict[str, Any]:
    clusters = lineup.clusters[mask]
    right = {name: values[mask] for name, values in lineup.values("accuracy").items()}
    found: dict[str, Any] = {
        policy.name: {
            "accuracy": share(right[policy.name], clusters, "every pair is a tie"),
            **{metric: measure(per_pair(policy.rows, metric)[mask], clusters) for metric in MEANS},
        }
        for policy in lineup.policies
    }
    for item in against(baseline, right, clusters, differ=share_difference) if baseline else []:
        d = item.difference
        ci95 = None if d.low is None or d.high is None else [d.low, d.high]
        versus = {"n": d.n, "mean": d.mean, "ci95": ci95, "p": d.p}
        found[item.policy]["versus_baseline"] = versus if ci95 is not None else versus | {"reason": d.reason}
    return {"pairs": int(mask.sum()), "policies": found}
