"""`--fail-if`: a condition on compared policies, parsed and evaluated. Pure.

    expression = all { "or" all }            all = test { "and" test }
    test       = quantity op value           op  = "<" | "<=" | ">" | ">="
    quantity   = [ "diff." ] metric { "[" group "]" | "." bound }
    metric     = accuracy | margins | margins_nats | loss | chosen_rewards | rejected_rewards
    group      = worst_subset | the name of a subset or data set | COL=GROUP of a slice that was asked for
                 (in quotes where it holds a bracket)
    bound      = low | high | p              low, high: of the 95 % interval; p: two-sided, of diff only
    value      = number [ "%" ] | "baseline" [ "." bound ]

    accuracy.low < 0.6                       the interval reaches below 60 %
    diff.accuracy.high < 0                   worse than the baseline beyond noise
    accuracy[length=129 to 256].low < 0.5    of a slice
    accuracy[math].high < 0.5 or diff.accuracy[worst_subset].high < 0
    margins < baseline

`diff.` is a policy minus the baseline, paired. A condition is asked of every policy but the baseline and fires when
it holds for one. `worst_subset` is the subset with the lowest value (loss: the highest); because it is picked from
the data, its interval and p are those of all k subsets together (Bonferroni), so the gate does not fire on the noise
of many small subsets. What cannot be computed is an error, never a silent pass.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_score.errors import ConfigError, nearest
from dpo_score.scores.array import Floats
from dpo_score.scores.lineup import LOWER_IS_BETTER, METRICS, Lineup, refusal
from dpo_score.scores.statistics import (
    LEVEL,
    mean_interval,
    mean_test,
    repeats,
    share_interval,
    total,
    wilson,
)
from dpo_score.scores.student import normal_quantile, t_quantile

WORST = "worst_subset"
BOUNDS = ("value", "low", "high", "p")
OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_TEST = re.compile(r"(?P<left>.+?)\s*(?P<op><=|>=|<|>)\s*(?P<right>.+)", re.DOTALL)
_QUANTITY = re.compile(r"(?P<diff>diff\.)?(?P<metric>\w+)(?P<rest>(?:\[(?:\"[^\"]*\"|'[^']*'|[^\]]*)\]|\.\w+)*)")
_REST = re.compile(r"\[(?P<group>\"[^\"]*\"|'[^']*'|[^\]]*)\]|\.(?P<bound>\w+)")


@dataclass(frozen=True, slots=True)
class Quantity:
    """`group` None: all pairs. `bound`: one of BOUNDS."""

    metric: str
    diff: bool = False
    group: str | None = None
    bound: str = "value"

    def __str__(self) -> str:
        group = f"[{self.group}]" if self.group is not None else ""
        return f"{'diff.' if self.diff else ''}{self.metric}{group}{'' if self.bound == 'value' else '.' + self.bound}"


@dataclass(frozen=True, slots=True)
class Test:
    """`right`: a number, or which bound of the baseline's same quantity."""

    left: Quantity
    op: str
    right: float | str

    __test__ = False


Condition = tuple[tuple[Test, ...], ...]
"""Any of these groups holds whole."""


def parse_condition(text: str) -> Condition:
    """ConfigError naming the part that is not understood and what is known."""
    return tuple(tuple(_test(part) for part in _split(group, "and")) for group in _split(text, "or"))


def _split(text: str, word: str) -> list[str]:
    """At `word` between spaces, outside of brackets."""
    return [part.strip() for part in re.split(rf"\s+{word}\s+(?![^\[]*\])", text.strip())]


def _test(text: str) -> Test:
    match = _TEST.fullmatch(text)
    if match is None:
        raise ConfigError(f"--fail-if {text!r}: write QUANTITY < NUMBER, such as accuracy.low < 0.6")
    left = _quantity(match["left"].strip(), text)
    return Test(left, match["op"], _value(match["right"].strip(), left, text))


def _quantity(text: str, whole: str) -> Quantity:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ConfigError(f"--fail-if {whole!r}: {text!r} is not of the form [diff.]METRIC[group].bound")
    metric, group, bound = match["metric"], None, "value"
    if metric not in METRICS:
        raise ConfigError(f"--fail-if {whole!r}: unknown metric {metric!r}; {nearest(metric, METRICS)}")
    for part in _REST.finditer(match["rest"]):
        group = part["group"].strip("\"' ") if part["group"] is not None else group
        bound = part["bound"] or bound
    _check_bound(bound, bool(match["diff"]), whole)
    return Quantity(metric, bool(match["diff"]), group, bound)


def _check_bound(bound: str, diff: bool, whole: str) -> None:
    if bound not in BOUNDS or (bound == "p" and not diff):
        known = BOUNDS if diff else BOUNDS[:3]
        raise ConfigError(f"--fail-if {whole!r}: unknown bound .{bound}; {nearest(bound, known)}")


def _value(text: str, left: Quantity, whole: str) -> float | str:
    name, _, bound = text.partition(".")
    if name == "baseline":
        bound = bound or "value"
        if left.diff:
            raise ConfigError(f"--fail-if {whole!r}: diff is already against the baseline; compare it with a number")
        _check_bound(bound, False, whole)
        return bound
    try:
        return float(text[:-1]) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        raise ConfigError(f"--fail-if {whole!r}: {text!r} is neither a number nor `baseline`") from None


def needs_baseline(condition: Condition) -> bool:
    return any(test.left.diff or isinstance(test.right, str) for group in condition for test in group)


def firing(condition: Condition, lineup: Lineup, baseline: str | None) -> list[str]:
    """One sentence for each policy of which the condition holds; empty: the gate is open.

    ConfigError when a quantity cannot be had (an unknown group, too few pairs, unlike things to subtract).
    """
    found = []
    for policy in lineup.names:
        if policy == baseline:
            continue
        for group in condition:
            sentences = [_holds(test, lineup, policy, baseline) for test in group]
            if all(sentences):
                found.append(f"{policy}: " + " and ".join(str(sentence) for sentence in sentences))
                break
    return found


def _holds(test: Test, lineup: Lineup, policy: str, baseline: str | None) -> str | None:
    """What was found, if the test holds."""
    left, note = _measured(test.left, lineup, policy, baseline)
    if isinstance(test.right, float):
        right, shown = test.right, f"{test.right:g}"
    else:
        assert baseline is not None
        same = Quantity(test.left.metric, False, test.left.group, test.right)
        right, _ = _measured(same, lineup, baseline, None)
        shown = f"{baseline}'s {right:.4g}"
    return f"{test.left}{note} is {left:.4g}, {test.op} {shown}" if OPERATORS[test.op](left, right) else None


def _measured(quantity: Quantity, lineup: Lineup, policy: str, baseline: str | None) -> tuple[float, str]:
    """The number, and for the worst subset a note that names it."""
    values = _values(quantity, lineup, policy, baseline)
    if quantity.group is None:
        return _estimate(quantity, values, lineup.clusters, 1), ""
    if quantity.group != WORST:
        groups = _named_groups(lineup)
        if quantity.group not in groups:
            raise ConfigError(f"--fail-if: no subset {quantity.group!r}; {nearest(quantity.group, groups)}")
        mask = groups[quantity.group]
        return _estimate(quantity, values[mask], lineup.clusters[mask], 1), ""
    name, mask, count = _worst(quantity, lineup.groups("subset"), values)
    return _estimate(quantity, values[mask], lineup.clusters[mask], count), f" ({name})"


def _named_groups(lineup: Lineup) -> dict[str, NDArray[np.bool_]]:
    """Every group that a condition may name."""
    sliced = {
        f"{label}={name}": mask for label in lineup.first.rows.cuts for name, mask in lineup.groups(label).items()
    }
    return {**sliced, **lineup.groups("dataset"), **lineup.groups("subset")}


def _values(quantity: Quantity, lineup: Lineup, policy: str, baseline: str | None) -> Floats:
    values = lineup.values(quantity.metric)
    if not quantity.diff:
        return values[policy]
    assert baseline is not None
    reason = refusal(lineup[baseline].settings, lineup[policy].settings, quantity.metric)
    if reason is not None:
        raise ConfigError(f"--fail-if {quantity}: {policy} and {baseline} are {reason}")
    return values[policy] - values[baseline]


def _worst(
    quantity: Quantity, groups: Mapping[str, NDArray[np.bool_]], values: Floats
) -> tuple[str, NDArray[np.bool_], int]:
    """The subset with the worst mean, and of how many."""
    means = dict(_means(groups, values))
    if not means:
        raise ConfigError(f"--fail-if {quantity}: the data has no subset with a value")
    pick = max if quantity.metric in LOWER_IS_BETTER else min
    name = pick(means, key=lambda group: means[group])
    return name, groups[name], len(means)


def _means(groups: Mapping[str, NDArray[np.bool_]], values: Floats) -> Iterator[tuple[str, float]]:
    for name, mask in groups.items():
        kept = values[mask & np.isfinite(values)]
        if len(kept):
            yield name, total(kept) / len(kept)


def _estimate(quantity: Quantity, values: Floats, clusters: NDArray[np.int64], tests: int) -> float:
    """One bound of the mean of the finite values; `tests`: how many intervals must hold at once."""
    there = np.isfinite(values)
    kept, labels = values[there], clusters[there]
    if not len(kept):
        raise ConfigError(f"--fail-if {quantity}: no pair has this value")
    is_share = quantity.metric == "accuracy" and not quantity.diff
    if quantity.bound == "value":
        return total(kept) / len(kept)
    if quantity.bound == "p":
        found = mean_test(kept, labels).p
        return _there(quantity, None if found is None else min(1.0, tests * found))
    low, high = share_bounds(kept, labels, tests) if is_share else mean_bounds(kept, labels, tests)
    return _there(quantity, low if quantity.bound == "low" else high)


def _there(quantity: Quantity, value: float | None) -> float:
    if value is None or not math.isfinite(value):
        raise ConfigError(f"--fail-if {quantity}: fewer than two independent groups of pairs")
    return value


def mean_bounds(values: Floats, clusters: NDArray[np.int64], tests: int = 1) -> tuple[float | None, float | None]:
    """The interval of a mean at level 1 − 0.05/tests (Bonferroni)."""
    if tests == 1:
        interval = mean_interval(values, clusters)
        return interval.low, interval.high
    test = mean_test(values, clusters)
    if test.error is None:
        return None, None
    half = t_quantile(1.0 - (1.0 - LEVEL) / (2 * tests), test.df) * test.error
    return test.mean - half, test.mean + half


def share_bounds(outcomes: Floats, clusters: NDArray[np.int64], tests: int = 1) -> tuple[float | None, float | None]:
    """The interval of a share at level 1 − 0.05/tests: `statistics.share_interval` with a wider quantile."""
    if tests == 1:
        interval = share_interval(outcomes, clusters)
        return interval.low, interval.high
    tail = 1.0 - (1.0 - LEVEL) / (2 * tests)
    n, share = float(len(outcomes)), total(outcomes) / len(outcomes)
    if not repeats(clusters):
        return wilson(total(outcomes), n, normal_quantile(tail))
    test = mean_test(outcomes, clusters)
    if test.error is None:
        return None, None
    effective = min(n, share * (1 - share) / test.error**2) if test.error > 0 else float(test.df + 1)
    return wilson(share * effective, effective, t_quantile(tail, test.df))
