"""Which pairs to train on: what each rule of selection would keep, and how near the pairs lie to the policies.

Pure. The numbers are those of `dpo-score select OUT --rule all --keep 25%`, made here from the pairs
of the page; only the random control is another draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_score.metrics.compare import AlignedPolicies, per_pair
from dpo_score.metrics.selection import Candidates, Judge, Selection, Settings, comparable_rules, select_pairs
from dpo_score.metrics.selection_comparison import compare_rules, diagnose_on_policy
from dpo_score.report import charts
from dpo_score.report.content import Cell, bounds, percent, signed

KEPT = 0.25
LEAST, MOST = 40, 50_000
"""Pairs: with fewer a quarter says little; with more the page would wait, and `dpo-score select` says the same."""
DRAWN = 400
SUBSETS = charts.PARTS
SHOWN = ("margin:high", "difficulty", "on-policy", "random")
"""Rules whose pairs are drawn as points."""


def training_set(aligned: AlignedPolicies) -> dict[str, Any] | None:
    """What the section shows; None where there are too few or too many pairs, or no policy moves any."""
    if not LEAST <= len(aligned) <= MOST or not any(np.any(policy.margins != 0.0) for policy in aligned.policies):
        return None
    candidates = _candidates(aligned)
    settings = Settings(keep=round(KEPT * int((~candidates.tied).sum())))
    rules = comparable_rules(candidates, settings)
    found = compare_rules(candidates, rules, settings)
    applied = [rule for rule in found["rules"] if "overlap" in rule]
    names = [rule["rule"] for rule in applied]
    if "random" not in names:
        return None  # one prompt holds more pairs than a rule keeps, so there is no control
    return {
        "keep": settings.keep,
        "rows": [_row(rule) for rule in applied] + [_row({"rule": "all pairs", "teaches": "", **found["all"]})],
        "overlap": charts.heat_map(
            [[rule["overlap"][name] for name in names] for rule in applied],
            names,
            "share, in percent, of the pairs of a rule (row) that another rule (column) keeps too",
        ),
        "scatters": _scatters(candidates, settings, [r for r in rules if r.name in SHOWN and r.name in names]),
        **_mix(applied, found["all"]),
        **_near(diagnose_on_policy(candidates)),
    }


def _candidates(aligned: AlignedPolicies) -> Candidates:
    """The pairs of the page in the form that the rules read."""
    rows = aligned.first.rows
    names = rows.present("subset")
    place = {name: names.index(name) if name in names else -1 for name in rows.names["subset"]}
    places = np.array([place[name] for name in rows.names["subset"]], np.int64)
    judges = [
        Judge(
            policy.name,
            policy.rows.values["margins_nats"],
            per_pair(policy.rows, "margins"),
            policy.rows.values["policy_chosen_logps"],
            policy.rows.values["policy_rejected_logps"],
        )
        for policy in aligned.policies
    ]
    keys, prompts = np.unique(rows.clusters, return_inverse=True)
    return Candidates(
        row_ids=aligned.first.row_ids,
        prompts=prompts,
        prompt_keys=[str(key) for key in keys.tolist()],
        subsets=places[rows.labels["subset"]],
        subset_names=names,
        chosen_tokens=rows.values["chosen_tokens"].astype(np.float64),
        rejected_tokens=rows.values["rejected_tokens"].astype(np.float64),
        tied=rows.flags["tied"],
        judges=judges,
        reference_chosen_logps=rows.values["ref_chosen_logps"],
    )


def _row(rule: Cell) -> dict[str, Any]:
    return {
        "rule": rule["rule"],
        "kept": f"{rule['kept']:,}",
        "accuracy": _share(rule["accuracy"]),
        "margin": _number(rule["margins_nats"]),
        "length": _number(rule["length_difference"], 0),
        "suspect": _share(rule["suspect"]),
        "saturated": _share(rule["saturated"]),
        "teaches": rule["teaches"],
    }


def _share(cell: Cell) -> dict[str, str]:
    return {"value": percent(cell["value"]), "interval": bounds(cell["ci95"], 100, 0)}


def _number(cell: Cell, digits: int = 2) -> dict[str, str]:
    return {"value": signed(cell["value"], digits), "interval": bounds(cell["ci95"], 1, digits)}


def _scatters(candidates: Candidates, settings: Settings, rules: Sequence[Any]) -> list[dict[str, Any]]:
    """Length difference against margin: the kept pairs of a rule over all pairs, an even sample of both."""
    margin = np.mean(np.stack([judge.margins_nats for judge in candidates.judges]), axis=0)
    length = candidates.length_difference
    there = np.flatnonzero(np.isfinite(margin) & np.isfinite(length))
    if not len(there):
        return []
    x, y = np.quantile(length[there], (0.01, 0.99)), np.quantile(margin[there], (0.01, 0.99))
    bounds = (*charts.padded(x.tolist()), *charts.padded(y.tolist()))

    def points(rows: np.ndarray[Any, np.dtype[np.int64]]) -> list[tuple[float, float]]:
        drawn = rows[:: max(1, len(rows) // DRAWN)]
        inside = [(float(length[r]), float(margin[r])) for r in drawn.tolist()]
        return [(a, b) for a, b in inside if bounds[0] <= a <= bounds[1] and bounds[2] <= b <= bounds[3]]

    found = []
    for rule in rules:
        kept: Selection = select_pairs(candidates, rule, settings)
        own = there[kept.kept[there]]
        title = f"kept by {rule.name}: margin in nats (up) by tokens of chosen minus rejected (across)"
        drawn = charts.scatter([("rest", points(there)), ("all", points(own))], title, bounds)
        found.append({"rule": rule.name, "keeps": rule.keeps, "svg": drawn})
    return found


def _mix(applied: Sequence[Cell], whole: Cell) -> dict[str, Any]:
    """Subset shares as bars: the largest subsets of the whole set by colour, the others unfilled."""
    names = list(whole["subsets"])[:SUBSETS]
    if len(whole["subsets"]) < 2:
        return {"mix": [], "mix_legend": []}
    rows = [*applied, {"rule": "all pairs", **whole}]
    drawn = [
        {
            "rule": rule["rule"],
            "svg": charts.stacked_bar(
                [_part(rule, name)["value"] for name in names],
                ", ".join(f"{name} {_said(_part(rule, name))}" for name in names),
            ),
        }
        for rule in rows
    ]
    return {"mix": drawn, "mix_legend": [(name, charts.part_swatch(index)) for index, name in enumerate(names)]}


def _part(rule: Cell, subset: str) -> Cell:
    """The share of a subset among the pairs of a rule."""
    found: Cell = rule["subsets"].get(subset, {"value": 0.0, "ci95": None})
    return found


def _said(cell: Cell) -> str:
    interval = f" ({bounds(cell['ci95'], 100, 0)})" if cell["ci95"] else ""
    return f"{100 * cell['value']:.0f} %{interval}"


def _near(found: Mapping[str, Cell]) -> dict[str, Any]:
    """Distance from the policy, displacement and saturation: a row a policy, and a row a subset of the last one."""
    last = list(found)[-1]
    return {
        "near": [_near_row(name, cell) for name, cell in found.items()],
        "near_last": last,
        "near_subsets": [_near_row(name, cell) for name, cell in list(found[last]["subsets"].items())[:12]],
    }


def _near_row(name: str, cell: Cell) -> dict[str, Any]:
    return {
        "name": name,
        "chosen": _number(cell["chosen"]),
        "rejected": _number(cell["rejected"]),
        "displaced": _share(cell["displaced"]),
        "saturated": _share(cell["saturated"]),
    }
