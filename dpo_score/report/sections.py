"""Who is ahead, by how much, and how sure that is: tiles, levels and paired differences of a report. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_score.metrics.compare import per_pair
from dpo_score.metrics.sentences import p_value
from dpo_score.metrics.summary import share
from dpo_score.report import charts as figures
from dpo_score.report.content import Cell, Facts, Palette, bounds, percent, signed

HEADINGS = {"accuracy": "Accuracy", "margins": "Margin", "margins_nats": "Margin in nats", "loss": "Loss"}


def tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """(label, value, note) of the numbers that decide."""
    best = next((policy for policy in facts.found["policies"] if policy["name"] == facts.found["best"]), None)
    listed = [("pairs compared", f"{facts.found['pairs']:,}", _groups_note(facts.found))]
    if best is not None:
        accuracy, margin = best["accuracy"], best["margins"]
        listed = [
            (f"accuracy of {best['name']}", percent(accuracy["value"]), f"95 %: {bounds(accuracy['ci95'], 100, 1)}"),
            ("its mean margin", signed(margin["mean"]), f"95 %: {bounds(margin['ci95'])}"),
            *listed,
        ]
    doubted = f"of {facts.audit.pairs:,}: every policy ranks them against the label"
    return [*listed, ("labels in doubt", f"{facts.audit.against:,}", doubted)]


def _groups_note(found: Cell) -> str:
    if found["groups"] == found["pairs"]:
        return "each with a prompt of its own"
    return f"in {found['groups']:,} groups; intervals allow for it"


def levels(facts: Facts, colours: Palette) -> list[dict[str, Any]]:
    """One row a policy."""
    against = {item["policy"]: item for item in facts.found["versus_best"].get("accuracy", [])}
    rows = []
    for policy in facts.found["policies"]:
        colour, title = colours.colours[policy["name"]], f"margins of {policy['name']}"
        rows.append(
            {
                "name": policy["name"],
                "swatch": figures.swatch(colour),
                "best": policy["name"] == facts.found["best"],
                "accuracy": percent(policy["accuracy"]["value"]),
                "interval": bounds(policy["accuracy"]["ci95"], 100, 1),
                "standing": _standing(policy["name"], facts.found["best"], against),
                "ties": policy["ties"],
                "margin": signed(policy["margins"]["mean"]),
                "nats": signed(policy["margins_nats"]["mean"]),
                "loss": "–" if policy["loss"]["mean"] is None else f"{policy['loss']['mean']:.3f}",
                "histogram": figures.tiny_histogram(policy["histogram"], colour, title),
            }
        )
    return rows


def asides(facts: Facts) -> list[str]:
    """What the pairs that were cut, and labelled ties, change about the levels."""
    flags, policies = facts.lineup.first.rows.flags, facts.lineup.policies
    lines = []
    cut = flags["truncated"]
    if cut.any() and not cut.all():
        shares = [share(per_pair(policy.rows, "accuracy")[~cut], policy.rows.clusters[~cut]) for policy in policies]
        listed = ", ".join(f"{p.name} {percent(s['value'])}" for p, s in zip(policies, shares, strict=True))
        lines.append(f"{int(cut.sum()):,} pairs were cut to fit; accuracy without them: {listed}.")
    if flags["tied"].any():
        lines.append(f"{int(flags['tied'].sum()):,} pairs that the data calls a tie are left out of accuracy.")
    return lines


def _standing(name: str, best: str | None, against: Mapping[str, Cell]) -> str:
    if name == best:
        return "best"
    item = against.get(name)
    if item is None or item["mean"] is None:
        return "not ranked"
    return "not told apart" if item["tied"] else "worse"


def differences(facts: Facts) -> list[dict[str, Any]]:
    """Groups of paired differences: to the best, and to the baseline."""
    found, groups = facts.found, []
    best = found["versus_best"].get("accuracy", [])
    if best and found["best"] != found["baseline"]:
        rows = [_difference(item, 100) for item in best]
        groups.append({"title": f"Accuracy, minus the best ({found['best']})", "rows": rows})
    for metric, items in found["versus_baseline"].items():
        rows = [_difference(item, 100 if metric == "accuracy" else 1) for item in items]
        groups.append({"title": f"{HEADINGS[metric]}, minus the baseline ({found['baseline']})", "rows": rows})
    return groups if any(group["rows"] for group in groups) else []


def _difference(item: Cell, scale: float) -> dict[str, Any]:
    if item["mean"] is None:
        return {"policy": item["policy"], "reason": item.get("reason") or "cannot be had"}
    unit = " points" if scale == 100 else ""
    return {
        "policy": item["policy"],
        "difference": signed(scale * item["mean"], 1 if scale == 100 else 3) + unit,
        "interval": bounds(item["ci95"], scale, 1 if scale == 100 else 3),
        "p": p_value(item["p"]),
        "adjusted": p_value(item["p_adjusted"]),
        "won": item["won"] if unit else "",
        "lost": item["lost"] if unit else "",
        "detectable": "–" if item["detectable"] is None else f"{scale * item['detectable']:.2f}",
    }
