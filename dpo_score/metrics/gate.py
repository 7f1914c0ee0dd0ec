"""`--fail-if`: a release gate, that is a condition on compared policies, parsed and evaluated. Pure.

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
it holds for one. A test that claims something beyond noise (`high <`, `low >`, `p <`) is asked of k policies at once,
so its bound is that of all k together (Bonferroni): equal policies make it fire in at most 5 % of cases, however many
they are. A test that demands a proof (`low <`, `high >`) is each policy's own, at 95 %.

`worst_subset` is the subset in which the number asked for is the lowest (loss: the highest); of p, the one that is most
surely worse, by its high (loss: low). Because it is picked from the data, its bounds and p are those of all subsets
together (Bonferroni too), so they neither fire on the noise of many small subsets nor overlook a large one beside them.
The bare number of the worst subset ignores noise, and `gate_notes` says so. A subset of which the number cannot be
computed, all its pairs of one prompt say, is not picked. Whatever else cannot be computed, no policy left to test
included, is an error, never a silent pass.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dpo_score.errors import ConfigError, nearest
from dpo_score.losses.ops import Floats
from dpo_score.metrics.compare import LOWER_IS_BETTER, METRICS, AlignedPolicies, refusal
from dpo_score.metrics.intervals import LEVEL, mean_interval, share_interval
from dpo_score.metrics.paired_tests import paired_difference, share_difference

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
        number = float(text[:-1]) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        raise ConfigError(f"--fail-if {whole!r}: {text!r} is neither a number nor `baseline`") from None
    if not math.isfinite(number):
        raise ConfigError(f"--fail-if {whole!r}: compare with a finite number, not {text!r}")
    return number


def gate_notes(condition: Condition) -> list[str]:
    """A sentence for each test of a condition that mistakes noise for a finding, with the test that does not."""
    notes = []
    for test in (test for group in condition for test in group):
        left = test.left
        if left.group == WORST and left.bound == "value":
            careful = replace(left, bound="high" if test.op in ("<", "<=") else "low")
            right = f"{test.right:g}" if isinstance(test.right, float) else f"baseline.{test.right}"
            notes.append(
                f"{left} is the lowest or highest of several numbers and ignores noise: with many subsets one lies far "
                f"off by chance; `{careful} {test.op} {right.removesuffix('.value')}` allows for it"
            )
    return list(dict.fromkeys(notes))


def needs_baseline(condition: Condition) -> bool:
    return any(test.left.diff or isinstance(test.right, str) for group in condition for test in group)


def failed_conditions(condition: Condition, aligned: AlignedPolicies, baseline: str | None) -> list[str]:
    """One sentence for each policy of which the condition holds; empty: the gate is open.

    ConfigError when a quantity cannot be had (an unknown group, too few pairs, unlike things to subtract), and when
    there is no policy besides the baseline.
    """
    found, tested = [], _tested(aligned, baseline)
    for policy in tested:
        for group in condition:
            sentences = [_holds(test, aligned, policy, baseline, len(tested)) for test in group]
            if all(sentences):
                found.append(f"{policy}: " + " and ".join(str(sentence) for sentence in sentences))
                break
    return found


def _tested(aligned: AlignedPolicies, baseline: str | None) -> list[str]:
    names = [name for name in aligned.names if name != baseline]
    if not names:
        raise ConfigError(
            f"--fail-if: {baseline} is the baseline and the only policy, so none is left to test; "
            "name others with --policies, or leave --baseline out"
        )
    return names


def _holds(test: Test, aligned: AlignedPolicies, policy: str, baseline: str | None, policies: int) -> str | None:
    """What was found, if the test holds. `policies`: of how many it is asked."""
    claims = {"<": ("high", "p"), "<=": ("high", "p"), ">": ("low",), ">=": ("low",)}[test.op]
    together = policies if test.left.bound in claims else 1
    left, note = _measured(test.left, aligned, policy, baseline, together)
    if isinstance(test.right, float):
        right, shown = test.right, f"{test.right:g}"
    else:
        assert baseline is not None
        same = Quantity(test.left.metric, False, test.left.group, test.right)
        right, _ = _measured(same, aligned, baseline, None, together)
        shown = f"{baseline}'s {right:.4g}"
    return f"{test.left}{note} is {left:.4g}, {test.op} {shown}" if OPERATORS[test.op](left, right) else None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a condition may ask of some pairs; None where it cannot be had, see `reason`."""

    value: float
    low: float | None
    high: float | None
    p: float | None = None
    reason: str | None = None


def _measured(
    quantity: Quantity, aligned: AlignedPolicies, policy: str, baseline: str | None, together: int
) -> tuple[float, str]:
    """The number, and for the worst subset a note that names it. `together`: how many bounds must hold at once."""
    sides = _sides(quantity, aligned, policy, baseline)
    if quantity.group == WORST:
        return _worst(quantity, _estimates(quantity.metric, sides, aligned, together))
    mask = np.ones(len(aligned), np.bool_) if quantity.group is None else _named(quantity.group, aligned)
    found = estimate(quantity.metric, [side[mask] for side in sides], aligned.clusters[mask], together)
    if found is None:
        whose = f"{policy} and {baseline}" if quantity.diff else policy
        ties = "; a tie has no accuracy" if quantity.metric == "accuracy" else ""
        raise ConfigError(f"--fail-if {quantity}: no pair has this value for {whose}{ties}")
    number: float | None = getattr(found, quantity.bound)
    if number is None:
        raise ConfigError(f"--fail-if {quantity}: {found.reason}")
    return number, ""


def _named(group: str, aligned: AlignedPolicies) -> NDArray[np.bool_]:
    """The pairs of a subset, a data set or a group of a slice."""
    sliced = {
        f"{label}={name}": mask
        for label in aligned.first.rows.groupings
        for name, mask in aligned.groups(label).items()
    }
    groups = {**sliced, **aligned.groups("dataset"), **aligned.groups("subset")}
    if group not in groups:
        raise ConfigError(f"--fail-if: no subset {group!r}; {nearest(group, groups)}")
    return groups[group]


def _sides(quantity: Quantity, aligned: AlignedPolicies, policy: str, baseline: str | None) -> list[Floats]:
    """The policy's values, and for a difference the baseline's."""
    values = aligned.values(quantity.metric)
    if not quantity.diff:
        return [values[policy]]
    assert baseline is not None
    reason = refusal(aligned[baseline].settings, aligned[policy].settings, quantity.metric)
    if reason is not None:
        raise ConfigError(f"--fail-if {quantity}: {policy} and {baseline} are {reason}")
    return [values[policy], values[baseline]]


def _estimates(metric: str, sides: Sequence[Floats], aligned: AlignedPolicies, together: int) -> dict[str, Estimate]:
    """Every subset's, as one of so many; those without a value are left out."""
    there = np.logical_and.reduce([np.isfinite(side) for side in sides])
    masks = {name: mask & there for name, mask in aligned.groups("subset").items() if (mask & there).any()}
    found = {
        name: estimate(metric, [side[mask] for side in sides], aligned.clusters[mask], together * len(masks))
        for name, mask in masks.items()
    }
    return {name: one for name, one in found.items() if one is not None}


def _worst(quantity: Quantity, found: Mapping[str, Estimate]) -> tuple[float, str]:
    """The number of the subset where it is the worst, of those that have it, and the subset's name as a note."""
    down = quantity.metric in LOWER_IS_BETTER
    ranked_by = quantity.bound if quantity.bound != "p" else "low" if down else "high"
    ranks: dict[str, float] = {name: getattr(one, ranked_by) for name, one in found.items() if _has(one, ranked_by)}
    if not ranks:
        reason = next((f": {one.reason}" for one in found.values()), "")
        raise ConfigError(f"--fail-if {quantity}: the data has no subset with a value{reason}")
    name = (max if down else min)(ranks, key=lambda group: ranks[group])
    number: float = getattr(found[name], quantity.bound)
    return number, f" ({name})"


def _has(found: Estimate, bound: str) -> bool:
    return getattr(found, bound) is not None


def estimate(metric: str, sides: Sequence[Floats], clusters: NDArray[np.int64], tests: int = 1) -> Estimate | None:
    """A metric's mean over the pairs that have it, or with two sides the first one's minus the second's.

    `tests`: how many intervals, or p values, must hold at once (Bonferroni). None without a pair.
    """
    there = np.logical_and.reduce([np.isfinite(side) for side in sides])
    kept, labels, level = [side[there] for side in sides], clusters[there], 1.0 - (1.0 - LEVEL) / tests
    if not there.any():
        return None
    if len(kept) == 1:
        interval = share_interval if metric == "accuracy" else mean_interval
        one = interval(kept[0], labels, level)
        return Estimate(one.value, one.low, one.high, None, one.reason)
    differ = share_difference if metric == "accuracy" else paired_difference
    found = differ(kept[0], kept[1], labels, level=level)
    p = None if found.p is None else min(1.0, tests * found.p)
    return None if found.mean is None else Estimate(found.mean, found.low, found.high, p, found.reason)
