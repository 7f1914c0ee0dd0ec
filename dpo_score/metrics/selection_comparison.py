"""Rules of selection side by side: what each would keep of the same pairs, and what that would teach. Pure.

Every number describes the kept pairs as the policies see them; none says which training set is best, which only
training tells. Intervals are those of a sample of as many pairs from the same source, clustered by prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_score.errors import ConfigError
from dpo_score.losses.ops import Floats, sigmoid
from dpo_score.metrics.intervals import Interval, effective_clusters, mean_interval, share_interval, wilson
from dpo_score.metrics.selection import (
    Candidates,
    Rule,
    Selection,
    Settings,
    closeness,
    describe,
    label_probability,
    select_pairs,
)

SATURATED = 0.1
"""A pair whose DPO weight σ(−margin) is below this moves a policy by less than a tenth of what it could."""
OVER = 1.5
"""A subset or a kind of pair is called out when the kept set has this many times its share of the whole set."""
DEFINITIONS: Mapping[str, str] = {
    "chosen": "mean log-probability per token of the chosen answers under the policy, in nats: how far they lie from "
    "what it writes itself (WPO, arXiv 2406.11827)",
    "rejected": "the same of the rejected answers",
    "displaced": "share of pairs whose chosen answer is less probable than under the reference although the margin "
    "grew (likelihood displacement, arXiv 2410.08847; by training step: arXiv 2502.07599)",
    "saturated": f"share of pairs with a DPO weight σ(−margin) under {SATURATED}: learnt already (arXiv 2305.18290, "
    "section 4)",
}
"""What each number of `diagnose_on_policy` is, in a sentence with its source."""
Mask = NDArray[np.bool_]


def compare_rules(candidates: Candidates, rules: Sequence[Rule], settings: Settings) -> dict[str, Any]:
    """`{"all": measures of every pair that is no labelled tie, "rules": one entry a rule}`.

    A rule that admits fewer pairs than `settings.keep` keeps what it admits; one that cannot be applied says why.
    `overlap`: the share of the rule's kept pairs that each other rule keeps too; a count over these pairs, no estimate.
    """
    kept: dict[str, Mask] = {}
    refused: dict[str, str] = {}
    for rule in rules:
        try:
            kept[rule.name] = _selected(candidates, rule, settings).kept
        except ConfigError as error:
            refused[rule.name] = str(error)
    whole = measures(candidates, ~candidates.tied)
    entries = []
    for rule in rules:
        if rule.name in refused:
            entries.append({**describe(rule), "kept": 0, "reason": refused[rule.name]})
            continue
        own = measures(candidates, kept[rule.name])
        overlap = {name: _overlap(kept[rule.name], other) for name, other in kept.items()}
        entries.append({**describe(rule), **own, "overlap": overlap, "teaches": teaches(own, whole)})
    return {"all": whole, "rules": entries}


def _selected(candidates: Candidates, rule: Rule, settings: Settings) -> Selection:
    """The rule with the number asked for, or with all that it admits where that is fewer."""
    if not rule.is_filter or settings.keep is None:
        return select_pairs(candidates, rule, settings)
    free = Settings(**{name: getattr(settings, name) for name in Settings.__slots__} | {"keep": None})
    admitted = select_pairs(candidates, rule, free)
    if int(admitted.kept.sum()) <= settings.keep:
        return admitted
    return select_pairs(candidates, rule, settings)


def _overlap(own: Mask, other: Mask) -> float | None:
    return float((own & other).sum() / own.sum()) if own.any() else None


def measures(candidates: Candidates, kept: Mask) -> dict[str, Any]:
    """What a set of pairs looks like. Every share and mean is {"value", "ci95"}, clustered by prompt.

    accuracy: pairs ranked as labelled, the mean over policies. margins_nats: the mean implicit margin.
    length_difference: tokens of the chosen answer minus those of the rejected one. suspect: pairs that every policy
    ranks against the label. saturated: pairs whose DPO weight is under SATURATED for every policy.
    closeness: mean log-prob per token of both answers (or the WPO alignment), the sum of the two sides.
    effective_groups: the number of prompts, less where a few of them hold most pairs.
    """
    rows = np.flatnonzero(kept)
    clusters = candidates.prompts[rows]
    right, margins, near = [], [], []
    for judge in candidates.judges:
        margin = judge.margins_nats[rows]
        right.append(np.where(margin == 0.0, np.nan, (margin > 0.0).astype(np.float64)))
        right[-1][~np.isfinite(margin)] = np.nan
        margins.append(margin)
        near.append(closeness(candidates, judge)[rows])
    with np.errstate(invalid="ignore"):
        suspect = label_probability(candidates, len(candidates.judges), against=True)[rows]
        weight = np.stack([sigmoid(-judge.margins)[rows] for judge in candidates.judges])
    return {
        "kept": len(rows),
        "effective_groups": effective_clusters(clusters),
        "accuracy": _share(np.mean(np.stack(right), axis=0), clusters),
        "margins_nats": _mean(np.mean(np.stack(margins), axis=0), clusters),
        "length_difference": _mean(candidates.length_difference[rows], clusters),
        "chosen_tokens": _mean(candidates.chosen_tokens[rows], clusters),
        "suspect": _share(_indicator(suspect > 0.5, suspect), clusters),
        "saturated": _share(_indicator(np.max(weight, axis=0) < SATURATED, weight[0]), clusters),
        "closeness": _mean(np.mean(np.stack(near), axis=0), clusters),
        "subsets": _mix(candidates, rows, effective_clusters(clusters)),
    }


def _indicator(holds: Mask, value: Floats) -> Floats:
    return np.where(np.isfinite(value), holds.astype(np.float64), np.nan)


def _mean(values: Floats, clusters: NDArray[np.int64]) -> dict[str, Any]:
    there = np.isfinite(values)
    return _stated(mean_interval(values[there], clusters[there]) if there.any() else None)


def _share(values: Floats, clusters: NDArray[np.int64]) -> dict[str, Any]:
    there = np.isfinite(values)
    return _stated(share_interval(values[there], clusters[there]) if there.any() else None)


def _stated(interval: Interval | None) -> dict[str, Any]:
    if interval is None:
        return {"value": None, "ci95": None}
    return {"value": interval.value, "ci95": None if interval.low is None else [interval.low, interval.high]}


def _mix(candidates: Candidates, rows: NDArray[np.int64], prompts: float) -> dict[str, dict[str, Any]]:
    """The share of each subset among some rows, largest first; nothing where the data has no subsets.

    Intervals are Wilson's at the effective number of prompts, since a prompt's pairs are of one subset.
    """
    counts = np.bincount(candidates.subsets[rows] + 1, minlength=len(candidates.subset_names) + 1)[1:].tolist()
    named = [(name, count / len(rows)) for name, count in zip(candidates.subset_names, counts, strict=True) if count]
    return {
        name: {"value": share, "ci95": list(wilson(share * prompts, prompts))}
        for name, share in sorted(named, key=lambda item: (-item[1], item[0]))
    }


def teaches(own: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """One sentence about what a kept set would teach that the whole set would not; from the intervals alone."""
    if not own["kept"]:
        return "It keeps no pair."
    found = [*_length_says(own, whole), *_margin_says(own, whole), *_label_says(own, whole), *_mix_says(own, whole)]
    return "; ".join(found).capitalize() + "." if found else "Much the same as the whole set, only fewer pairs."


def _length_says(own: Mapping[str, Any], whole: Mapping[str, Any]) -> list[str]:
    value, ci95, all_pairs = (
        own["length_difference"]["value"],
        own["length_difference"]["ci95"],
        whole["length_difference"],
    )
    if value is None or ci95 is None or ci95[0] <= all_pairs["value"] <= ci95[1]:
        return []
    direction = "longer" if value > all_pairs["value"] else "shorter"
    return [
        f"{direction} answers (chosen {value:+.0f} tokens against rejected, {all_pairs['value']:+.0f} in the whole set)"
    ]


def _margin_says(own: Mapping[str, Any], whole: Mapping[str, Any]) -> list[str]:
    accuracy, saturated = own["accuracy"], own["saturated"]["value"]
    value, ci95, usual = accuracy["value"], accuracy["ci95"], whole["accuracy"]["value"]
    if saturated is not None and saturated > 0.5:
        return [f"little more: {saturated:.0%} of the pairs are learnt already (weight under {SATURATED:g})"]
    if value is not None and value < 0.5:
        return [f"to turn round what the policies prefer (they rank {value:.0%} as labelled)"]
    if value is None or ci95 is None or usual is None or ci95[0] <= usual <= ci95[1]:
        return []
    what = "mostly what the policies prefer already" if value > usual else "more of what the policies rank wrongly"
    return [f"{what} (they rank {value:.0%} as labelled, {usual:.0%} in the whole set)"]


def _label_says(own: Mapping[str, Any], whole: Mapping[str, Any]) -> list[str]:
    value, ci95, usual = own["suspect"]["value"], own["suspect"]["ci95"], whole["suspect"]["value"]
    if not value or ci95 is None or usual is None or ci95[0] <= usual * OVER:
        return []
    return [
        f"wrong labels, if every policy is right about them ({value:.0%} are disputed, {usual:.0%} in the whole set)"
    ]


def _mix_says(own: Mapping[str, Any], whole: Mapping[str, Any]) -> list[str]:
    """The subset that is most over its share of the whole set, where chance does not explain it."""
    z = NormalDist().inv_cdf(1.0 - 0.025 / max(len(own["subsets"]), 1))  # Bonferroni: each subset is a chance to err
    over = []
    for name, cell in own["subsets"].items():
        share, usual = cell["value"], whole["subsets"][name]["value"]
        prompts = own["effective_groups"]
        if share > OVER * usual and wilson(share * prompts, prompts, z)[0] > usual:
            over.append((share / usual, share, name))
    if not over:
        return []
    _, share, name = max(over)
    return [f"more of {name} ({share:.0%}, {whole['subsets'][name]['value']:.0%} in the whole set)"]


def diagnose_on_policy(candidates: Candidates) -> dict[str, Any]:
    """How near the pairs lie to what each policy writes itself: DEFINITIONS for each policy, and for its subsets."""
    known = candidates.reference_chosen_logps
    reference = np.full(len(candidates), np.nan) if known is None else known
    groups = {"": np.ones(len(candidates), np.bool_)}
    groups |= {name: candidates.subsets == place for place, name in enumerate(candidates.subset_names)}
    clusters = candidates.prompts
    found: dict[str, Any] = {}
    for judge in candidates.judges:
        chosen = judge.chosen_logps / np.where(candidates.chosen_tokens > 0, candidates.chosen_tokens, np.nan)
        rejected = judge.rejected_logps / np.where(candidates.rejected_tokens > 0, candidates.rejected_tokens, np.nan)
        with np.errstate(invalid="ignore"):
            moved = _indicator(
                (judge.chosen_logps < reference) & (judge.margins_nats > 0), judge.chosen_logps - reference
            )
            weight = sigmoid(-judge.margins)
            saturated = _indicator(weight < SATURATED, weight)
        cells = {
            name: {
                "pairs": int(mask.sum()),
                "chosen": _mean(chosen[mask], clusters[mask]),
                "rejected": _mean(rejected[mask], clusters[mask]),
                "displaced": _share(moved[mask], clusters[mask]),
                "saturated": _share(saturated[mask], clusters[mask]),
            }
            for name, mask in groups.items()
        }
        found[judge.name] = {**cells.pop(""), "subsets": cells}
    return found
