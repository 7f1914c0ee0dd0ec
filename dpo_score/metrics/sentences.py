"""The summary sentences of a comparison, and how its numbers are written.

In: the dictionary that compare.py makes. Out: plain sentences of which every word and number can be read off that
dictionary; nothing new is computed. A difference is claimed only where the adjusted p is below 5 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_score.metrics.intervals import LARGE_CLUSTER

Found = Mapping[str, Any]
NAMED = 3
"""More policies than this are counted, not named."""


def summary_sentence(found: Found) -> str:
    """Two to eight sentences on a comparison, as one paragraph."""
    return " ".join(sentences(found))


def sentences(found: Found) -> list[str]:
    """The same one by one: first what collapsed in one subset, then who is ahead, then what limits all this."""
    if found["best"] is None:
        return [*_collapsed(found), _nothing_to_rank(found), *_left_out(found), *_baseline(found), *_clusters(found)]
    return [
        *_collapsed(found),
        *_best(found),
        *_apart(found),
        *_left_out(found),
        *_baseline(found),
        *_few_pairs(found),
        *_resolution(found),
        *_clusters(found),
    ]


def _nothing_to_rank(found: Found) -> str:
    if found["labelled_ties"] == found["pairs"]:
        return "The data calls every pair a tie: there is nothing to rank."
    if all(policy["accuracy"]["value"] is None for policy in found["policies"]):
        return "Every pair is a tie for every policy: there is nothing to rank."
    return "Every policy ties on more than half of the pairs: there is nothing to rank."


def _collapsed(found: Found) -> list[str]:
    """What is worse in one subset though not overall: it is easily overlooked, so it is said first."""
    listed = found.get("collapses", [])
    if not listed:
        return []
    one = listed[0]
    shares = f"{percent(one['accuracy'])} against {percent(one['accuracy_against'])}"
    overall = "higher over all pairs" if one["overall"] == "higher" else "not told apart from it over all pairs"
    more = f", and so in {len(listed) - 1} more" if len(listed) > 1 else ""
    return [
        f"In {one['label']} {one['group']}, {one['policy']} is {points(abs(one['mean']), signed=False)} below "
        f"{one['against']} ({shares}, adjusted p {p_value(one['p_adjusted'])}), though {overall}{more}."
    ]


def _best(found: Found) -> list[str]:
    """Who has the highest accuracy; where nobody can be told from it, that comes first."""
    best, items = _policy(found, found["best"]), found["versus_best"].get("accuracy", [])
    accuracy, count = best["accuracy"], len(items) + 1
    ties = f", {best['ties']:,} ties left out" if best["ties"] else ""
    pairs = f"{percent(accuracy['value'])} of {accuracy['n']:,} pairs as labelled{ties}{interval(accuracy['ci95'])}"
    if count > 1 and all(item["tied"] and item["mean"] is not None for item in items):
        subject = _names([found["best"], *(item["policy"] for item in items)], "policies")
        ahead = f"{found['best']} ranks {pairs}, {_highest(found, count)}{_chance(accuracy['ci95'])}"
        return [f"{subject} cannot be told apart by accuracy: {ahead}{_margin_leader(found)}."]
    rank = f", {_highest(found, count)}" if count > 1 else ""
    return [f"{best['name']} ranks {pairs}{rank}{_chance(accuracy['ci95'])}."]


def _highest(found: Found, count: int) -> str:
    top = _policy(found, found["best"])["accuracy"]["value"]
    equal = [
        policy["name"]
        for policy in found["policies"]
        if policy["ranked"] and policy["name"] != found["best"] and policy["accuracy"]["value"] == top
    ]
    return f"the highest of {count}" + (f" with {_names(equal)}" if equal else "")


def _margin_leader(found: Found) -> str:
    """Which policy has the highest mean margin, where it is another one."""
    leader = found["highest_margin"]
    if leader is None or leader == found["best"]:
        return ""
    return f"; {leader} has the highest mean margin"


def interval(ci95: Sequence[float] | None) -> str:
    return "" if ci95 is None else f" (95 % interval {100 * ci95[0]:.1f} to {100 * ci95[1]:.1f})"


def _chance(ci95: Sequence[float] | None) -> str:
    if ci95 is None or ci95[0] > 0.5:
        return ""
    return "; guessing would do better" if ci95[1] < 0.5 else "; it cannot be told from guessing"


def _left_out(found: Found) -> list[str]:
    """The policies that take no part, because they tie too often or have too few scores, and the data's own ties."""
    spoken = []
    unranked = [policy for policy in found["policies"] if not policy["ranked"]]
    if unranked and len(unranked) < len(found["policies"]):
        ties = f"{unranked[0]['ties']:,} of {found['pairs'] - found['labelled_ties']:,} pairs"
        names = _names([policy["name"] for policy in unranked])
        spoken.append(
            f"{names} ties on {ties} and is not ranked."
            if len(unranked) == 1
            else f"{names} tie on more than half of the pairs and are not ranked."
        )
    partial = found["partial"]
    if partial:
        pairs = f"scores of {partial[0]['pairs']:,}" if len(partial) == 1 else "scores of less than half of the"
        has, is_ = ("has", "is") if len(partial) == 1 else ("have", "are")
        spoken.append(f"{_names([one['policy'] for one in partial])} {has} {pairs} pairs only and {is_} not compared.")
    if 0 < found["labelled_ties"] < found["pairs"]:
        spoken.append(
            f"The data calls {found['labelled_ties']:,} of {found['pairs']:,} pairs a tie: they are left out."
        )
    return spoken


def _apart(found: Found) -> list[str]:
    """Which policies cannot be told from the best, which are worse, and which are better on the pairs of both."""
    items = found["versus_best"].get("accuracy", [])
    known = [item for item in items if item["mean"] is not None]
    alone = [item["policy"] for item in items if item["mean"] is None]
    tied = [item for item in known if item["tied"]]
    spoken = []
    if tied and len(tied) < len(items):
        spoken.append(f"{_names([item['policy'] for item in tied])} cannot be told from it.")
    worse = [item for item in known if not item["tied"] and item["mean"] < 0]
    if worse:
        spoken.append(f"{_are(worse)} worse{_reason(worse)}.")
    better = [item for item in known if not item["tied"] and item["mean"] > 0]
    if better:
        spoken.append(f"On the pairs that both rank, {_are(better)} better{_reason(better)}.")
    if alone:
        verb = "ranks" if len(alone) == 1 else "rank"
        spoken.append(f"{_names(alone)} {verb} no pair that {found['best']} ranks, so they cannot be compared.")
    return spoken


def _are(items: Sequence[Found]) -> str:
    return f"{_names([item['policy'] for item in items])} {'is' if len(items) == 1 else 'are'}"


def _reason(items: Sequence[Found]) -> str:
    """The numbers behind one policy; several have theirs in the table."""
    if len(items) > 1:
        return ""
    return f" ({points(items[0]['mean'])}, adjusted p {p_value(items[0]['p_adjusted'])})"


def _names(names: Sequence[str], others: str = "others") -> str:
    if len(names) > NAMED:
        return f"{len(names)} {others}"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _policy(found: Found, name: str) -> Found:
    policy: Found = next(policy for policy in found["policies"] if policy["name"] == name)
    return policy


def _baseline(found: Found) -> list[str]:
    items = found["versus_baseline"].get("accuracy", [])
    if items and all(item["mean"] is None for item in items):
        return [_nothing_in_common(found)]
    if not items or found["best"] == found["baseline"]:
        return []
    better = [item for item in items if item["mean"] is not None and not item["tied"] and item["mean"] > 0]
    worse = [item for item in items if item["mean"] is not None and not item["tied"] and item["mean"] < 0]
    if not better and not worse:
        return [_no_difference(found)]
    parts = [f"{_are(some)} {word}" for some, word in ((better, "higher"), (worse, "lower")) if some]
    return [f"Against {found['baseline']}, {' and '.join(parts)} beyond noise."]


def _no_difference(found: Found) -> str:
    baseline = _policy(found, found["baseline"])
    if not baseline["ranked"]:
        pairs = f"the {baseline['accuracy']['n']:,} pairs that {baseline['name']} ranks"
        return f"On {pairs}, no policy differs from it beyond noise."
    return f"No policy differs from {baseline['name']} beyond noise."


def _nothing_in_common(found: Found) -> str:
    """Why no accuracy can be set against the baseline's."""
    baseline = _policy(found, found["baseline"])
    if baseline["accuracy"]["value"] is None:
        return f"{baseline['name']} ties on every pair, so no accuracy can be set against it."
    return f"No pair is without a tie in both {baseline['name']} and another."


def _few_pairs(found: Found) -> list[str]:
    """Where the mean margin of the best lies outside of the middle 90 % of its own margins."""
    margins = _policy(found, found["best"])["margins"]
    quantiles = margins["quantiles"]
    if not quantiles or quantiles["p5"] <= margins["mean"] <= quantiles["p95"]:
        return []
    return [
        f"The median margin of {found['best']} is {signed(quantiles['p50'])}; few pairs carry its mean of "
        f"{signed(margins['mean'])}."
    ]


def _resolution(found: Found) -> list[str]:
    """The smallest difference that is found four times in five in each comparison of a family."""
    spoken = []
    for key in ("best", "baseline"):
        items = found[f"versus_{key}"].get("accuracy", [])
        found_sizes = [item["detectable"] for item in items if item.get("detectable")]
        if found_sizes and not (key == "baseline" and found["best"] == found["baseline"]):
            spoken.append((found[key], f"{100 * max(found_sizes):.1f} points"))
    if not spoken:
        return []
    sizes = " and ".join(f"{size} to {name}" for name, size in spoken)
    return [f"These pairs show a true difference of {sizes} four times in five; a smaller one is easily missed."]


def _clusters(found: Found) -> list[str]:
    """A warning where one prompt or group holds much of the data."""
    if found["groups"] == found["pairs"] or found["largest_group"] <= LARGE_CLUSTER:
        return []
    return [
        f"One prompt or group holds {100 * found['largest_group']:.0f} % of the pairs: all pairs count as about "
        f"{found['effective_groups']:.1f} independent groups."
    ]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def points(value: float | None, signed: bool = True) -> str:
    """A difference of shares in percentage points, with a true minus sign."""
    if value is None:
        return "–"
    return (f"{100 * value:+.1f} points" if signed else f"{100 * value:.1f} points").replace("-", "−")


def signed(value: float | None, digits: int = 2) -> str:
    """A number with its sign, a true minus."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def p_value(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
