"""What a comparison says, in plain sentences. Pure: reads the dictionary that compare.py makes, computes nothing new.

It claims a difference only where the adjusted p is below 5 %, and says what the set is too small to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]
NAMED = 3
"""More policies than this are counted, not named."""


def summary_sentence(found: Found) -> str:
    """Two to five sentences on a compare_policies, as one paragraph."""
    return " ".join(sentences(found))


def sentences(found: Found) -> list[str]:
    """The same one by one; the first says who is ahead."""
    if found["best"] is None:
        return ["Every pair is a tie for every policy: there is nothing to rank."]
    return [_best(found), *_apart(found), *_baseline(found), *_resolution(found)]


def _best(found: Found) -> str:
    best = next(policy for policy in found["policies"] if policy["name"] == found["best"])
    accuracy, count = best["accuracy"], sum(policy["accuracy"]["value"] is not None for policy in found["policies"])
    rank = f", the highest of {count}" if count > 1 else ""
    text = f"{best['name']} ranks {percent(accuracy['value'])} of {accuracy['n']:,} pairs as labelled"
    return f"{text}{interval(accuracy['ci95'])}{rank}{_chance(accuracy['ci95'])}."


def interval(ci95: Sequence[float] | None) -> str:
    return "" if ci95 is None else f" (95 % interval {100 * ci95[0]:.1f} to {100 * ci95[1]:.1f})"


def _chance(ci95: Sequence[float] | None) -> str:
    if ci95 is None or ci95[0] > 0.5:
        return ""
    return "; guessing would do better" if ci95[1] < 0.5 else "; it cannot be told from guessing"


def _apart(found: Found) -> list[str]:
    """Which policies cannot be told from the best, and which are worse."""
    items = found["versus_best"].get("accuracy", [])
    tied = [item for item in items if item["tied"]]
    worse = [item for item in items if not item["tied"]]
    sentences = []
    if tied:
        sentences.append(f"{_names(tied)} cannot be told from it.")
    if worse:
        reason = f"{points(worse[0]['mean'])}, adjusted p {p_value(worse[0]['p_adjusted'])}" if len(worse) == 1 else ""
        sentences.append(
            f"{_names(worse)} {'is' if len(worse) == 1 else 'are'} worse{f' ({reason})' if reason else ''}."
        )
    return sentences


def _names(items: Sequence[Found]) -> str:
    names = [str(item["policy"]) for item in items]
    if len(names) > NAMED:
        return f"{len(names)} others"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _baseline(found: Found) -> list[str]:
    items = found["versus_baseline"].get("accuracy", [])
    if items and all(item["mean"] is None for item in items):
        return [_nothing_in_common(found)]
    better = [item for item in items if item["mean"] is not None and not item["tied"] and item["mean"] > 0]
    worse = [item for item in items if item["mean"] is not None and not item["tied"] and item["mean"] < 0]
    if not items or found["best"] == found["baseline"]:
        return []
    if not better and not worse:
        return [f"No policy differs from {found['baseline']} beyond noise."]
    parts = [
        f"{_names(some)} {'is' if len(some) == 1 else 'are'} {word}"
        for some, word in ((better, "higher"), (worse, "lower"))
        if some
    ]
    return [f"Against {found['baseline']}, {' and '.join(parts)} beyond noise."]


def _nothing_in_common(found: Found) -> str:
    """Why no accuracy can be set against the baseline's."""
    baseline = next(policy for policy in found["policies"] if policy["name"] == found["baseline"])
    if baseline["accuracy"]["value"] is None:
        return f"{baseline['name']} ties on every pair, so no accuracy can be set against it."
    return f"No pair is without a tie in both {baseline['name']} and another."


def _resolution(found: Found) -> list[str]:
    """The smallest difference the set finds four times in five, over the comparisons made."""
    items = [*found["versus_best"].get("accuracy", []), *found["versus_baseline"].get("accuracy", [])]
    sizes = [item["detectable"] for item in items if item.get("detectable")]
    if not sizes:
        return []
    size = f"{100 * max(sizes):.1f} points"
    return [f"These pairs show a true difference of {size} four times in five; a smaller one is easily missed."]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, with a true minus sign."""
    return "–" if value is None else f"{100 * value:+.1f} points".replace("-", "−")


def p_value(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
