"""What intervals, tests, gates and sentences do on data whose truth is known.

    python -m tests.metrics.simulate [--runs 1000] [--seed 0] [PART …]

Prints coverage, family-wise error, power and false alarms by design, beside the value that is promised. A part is a
function of PARTS. tests/metrics/test_simulate.py runs a small seeded share of it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dpo_score.metrics.compare import align_policies
from dpo_score.metrics.diagnostics import calibration, length_controlled_accuracy
from dpo_score.metrics.gate import failed_conditions, parse_condition
from dpo_score.metrics.intervals import mean_interval, share_interval
from dpo_score.metrics.paired_tests import differences_to, differences_to_best, paired_difference, share_difference
from tests.metrics.scored import scored

Draw = np.random.Generator


@dataclass(frozen=True, slots=True)
class Line:
    """One design: what was found in `runs` runs beside what is promised, with the range that chance allows."""

    part: str
    design: str
    found: float
    promised: str
    low: float
    high: float

    @property
    def kept(self) -> bool:
        return self.low <= self.found <= self.high


def line(part: str, design: str, hits: float, runs: int, low: float, high: float) -> Line:
    """`low`, `high`: the promise; three standard errors of so many runs are allowed beside it."""
    room = {bound: 3.0 * math.sqrt(max(bound * (1.0 - bound), 0.0) / runs) for bound in (low, high)}
    promised = (
        f"{low:.3f} … {high:.3f}" if low > 0.0 and high < 1.0 else f"≥ {low:.3f}" if low > 0.0 else f"≤ {high:.3f}"
    )
    return Line(part, design, hits / runs, promised, low - room[low], high + room[high])


# --- clusters --------------------------------------------------------------------------------------------------------


def cluster_sizes(kind: str, groups: int, draw: Draw) -> np.ndarray:
    """Pairs of each prompt: 8 each, lognormal(1.6, 1), Pareto (1.5), or one prompt that holds half of all."""
    if kind == "even":
        return np.full(groups, 8)
    if kind == "uneven":
        return np.maximum(1, np.round(draw.lognormal(1.6, 1.0, groups))).astype(int)
    if kind == "Pareto":
        return np.minimum(2000, np.ceil(2.0 * (1.0 + draw.pareto(1.5, groups)))).astype(int)
    return np.array([4 * groups, *[4] * (groups - 1)])


def clustered_values(kind: str, groups: int, law: str, draw: Draw) -> tuple[np.ndarray, np.ndarray, float]:
    """Values, clusters and the true mean. Shares have an intraclass correlation of 0.3, margins a cluster sd of 0.7."""
    sizes = cluster_sizes(kind, groups, draw)
    clusters = np.repeat(np.arange(groups), sizes)
    n = len(clusters)
    if law.startswith("share"):
        truth = float(law.split()[1])
        rates = draw.beta(truth * 7 / 3, (1 - truth) * 7 / 3, groups)  # 1/(a + b + 1) = 0.3
        return (draw.random(n) < rates[clusters]) * 1.0, clusters, truth
    return 0.7 * draw.normal(size=groups)[clusters] + draw.normal(size=n), clusters, 0.0


def clusters(runs: int, seed: int) -> Iterator[Line]:
    """Coverage of 95 % intervals where prompts repeat."""
    for law in ("share 0.7", "share 0.9", "share 0.97", "mean"):
        for kind in ("even", "uneven", "Pareto", "one big"):
            for groups in (5, 10, 30, 100):
                draw, hits = np.random.default_rng(seed), 0
                for _ in range(runs):
                    values, labels, truth = clustered_values(kind, groups, law, draw)
                    found = (share_interval if law != "mean" else mean_interval)(values, labels)
                    hits += found.low is None or found.low <= truth <= (found.high or 0.0)
                least = 0.91 if (law, kind) == ("share 0.97", "even") else 0.94
                yield line("coverage", f"{law}, {kind}, {groups} prompts", hits, runs, least, 1.0)


def cluster_differences(runs: int, seed: int) -> Iterator[Line]:
    """False p < 5 % of a difference that is not there, where prompts are of uneven size."""
    for kind in ("uneven", "Pareto", "one big"):
        for groups in (10, 30, 100):
            draw, margins, shares = np.random.default_rng(seed), 0, 0
            for _ in range(runs):
                labels = np.repeat(np.arange(groups), cluster_sizes(kind, groups, draw))
                margins += (paired_difference(*two_policies("margins", 0.0, labels, draw), labels).p or 1.0) < 0.05
                shares += (share_difference(*two_policies("accuracy", 0.0, labels, draw), labels).p or 1.0) < 0.05
            yield line("false alarms", f"margins, {kind}, {groups} prompts", margins, runs, 0.0, 0.05)
            yield line("false alarms", f"accuracy, {kind}, {groups} prompts", shares, runs, 0.0, 0.05)


# --- skewed margins --------------------------------------------------------------------------------------------------


def contaminated(draw: Draw, n: int) -> np.ndarray:
    """Standard normal margins, of which one in twenty comes from N(5, 5²)."""
    return np.where(draw.random(n) < 0.05, 5.0 + 5.0 * draw.normal(size=n), draw.normal(size=n))


def skewed(runs: int, seed: int) -> Iterator[Line]:
    """Coverage of a mean of independent margins; of normal ones too, which the correction must leave alone."""
    laws: dict[str, tuple[Callable[[Draw, int], np.ndarray], float]] = {
        "normal": (lambda draw, n: draw.normal(size=n), 0.0),
        "t, 3 df": (lambda draw, n: draw.standard_t(3, n), 0.0),
        "gamma, shape 0.5": (lambda draw, n: draw.gamma(0.5, 2.0, n), 1.0),
        "normal, 5 % of N(5, 5²)": (contaminated, 0.05 * 5.0),
        "lognormal, σ 1": (lambda draw, n: draw.lognormal(0.0, 1.0, n), math.exp(0.5)),
        "lognormal, σ 1.5": (lambda draw, n: draw.lognormal(0.0, 1.5, n), math.exp(1.125)),
    }
    for name, (law, truth) in laws.items():
        for n in (
            (50, 200, 1000) if law is contaminated else (20, 50, 200, 1000)
        ):  # few of 20 are from N(5, 5²), or none
            draw, hits = np.random.default_rng(seed), 0
            for _ in range(runs):
                found = mean_interval(law(draw, n))
                hits += (found.low or 0.0) <= truth <= (found.high or 0.0)
            least = 0.94 if name in ("normal", "t, 3 df") else 0.90
            yield line("coverage", f"mean of {n}, {name}", hits, runs, least, 1.0)


# --- families of policies --------------------------------------------------------------------------------------------


def outcomes(draw: Draw, shares: np.ndarray, n: int, shared: float = 0.5) -> np.ndarray:
    """0/1 outcomes (policies, n): latent normal, `shared` the correlation between policies."""
    from scipy import special

    latent = math.sqrt(shared) * draw.normal(size=n) + math.sqrt(1 - shared) * draw.normal(size=(len(shares), n))
    return (latent < special.ndtri(shares)[:, None]) * 1.0


def as_policies(right: np.ndarray) -> dict[str, np.ndarray]:
    return {f"p{index}": values for index, values in enumerate(right)}


def families(runs: int, seed: int) -> Iterator[Line]:
    """Equal policies: how often any is called different from the best, or from a baseline."""
    for k in (2, 6, 12):
        for n in (140, 1000):
            draw, best, baseline = np.random.default_rng(seed), 0, 0
            for _ in range(runs):
                values = as_policies(outcomes(draw, np.full(k, 0.7), n))
                best += any(not one.tied for one in differences_to_best(values, differ=share_difference))
                baseline += any(not one.tied for one in differences_to("p0", values, differ=share_difference))
            yield line("family-wise error", f"{k} equal policies, {n} pairs, to the best", best, runs, 0.0, 0.05)
            yield line("family-wise error", f"{k} equal policies, {n} pairs, to a baseline", baseline, runs, 0.0, 0.05)


def detectable(runs: int, seed: int) -> Iterator[Line]:
    """One policy differs by what is printed as detectable: how often it is found, in its family."""
    for k in (2, 6, 12):
        for n in (140, 1000):
            for anchor in ("best", "baseline"):
                draw, promised = np.random.default_rng(seed), detectable_by(k, n, anchor, seed)
                hits, shares = 0, np.full(k, 0.65)
                shares[0] += promised if anchor == "best" else 0.0
                shares[1] -= 0.0 if anchor == "best" else promised
                for _ in range(runs):
                    values = as_policies(outcomes(draw, shares, n))
                    if anchor == "best":
                        family = k * (k - 1) // 2
                        found = differences_to("p0", values, family=family, differ=share_difference)
                        hits += not found[int(draw.integers(len(found)))].tied
                    else:
                        hits += not differences_to("p0", values, differ=share_difference)[0].tied
                design = f"{k} policies, {n} pairs, {100 * promised:.1f} points to the {anchor}"
                yield line("power", design, hits, runs, 0.80, 1.0)


def detectable_by(k: int, n: int, anchor: str, seed: int) -> float:
    """What is printed: the median over some data sets of the largest over the comparisons."""
    draw, printed = np.random.default_rng(seed + 1), []
    for _ in range(40):
        values = as_policies(outcomes(draw, np.full(k, 0.65), n))
        family = k * (k - 1) // 2 if anchor == "best" else None
        found = differences_to("p0", values, family=family, differ=share_difference)
        printed.append(max(one.difference.detectable or 1.0 for one in found))
    return float(np.median(printed))


def detectable_clustered(runs: int, seed: int) -> Iterator[Line]:
    """The same of two policies whose pairs share prompts, of even and of uneven size, for margins and for accuracy."""
    for kind in ("even", "uneven"):
        for groups in (10, 30, 100):
            for metric, differ in (("margins", paired_difference), ("accuracy", share_difference)):
                draw = np.random.default_rng(seed)
                labels = np.repeat(np.arange(groups), cluster_sizes(kind, groups, draw))
                equal = [differ(*two_policies(metric, 0.0, labels, draw), labels) for _ in range(200)]
                printed = float(np.median([one.detectable or 1.0 for one in equal]))
                shift = printed if metric == "margins" else shift_of(printed)
                drawn = (differ(*two_policies(metric, shift, labels, draw), labels) for _ in range(runs))
                hits = sum((one.p or 1.0) < 0.05 for one in drawn)
                yield line("power", f"{metric}, {kind}, {groups} prompts, {printed:.3f}", hits, runs, 0.75, 1.0)


def two_policies(metric: str, shift: float, labels: np.ndarray, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Margins of two policies with a prompt's part in each, the first higher by `shift`; or whether they are right."""
    a, b = (0.5 * draw.normal(size=labels.max() + 1)[labels] + draw.normal(size=len(labels)) for _ in range(2))
    return (a + shift, b) if metric == "margins" else ((a + shift > -0.5) * 1.0, (b > -0.5) * 1.0)


def shift_of(share: float) -> float:
    """The shift of a N(0, 1.25) value that raises the share above −0.5 by so much."""
    from scipy import special

    spread = math.sqrt(1.25)
    return float(spread * special.ndtri(min(0.999, special.ndtr(0.5 / spread) + share)) - 0.5)


# --- gates -----------------------------------------------------------------------------------------------------------


def gates(runs: int, seed: int) -> Iterator[Line]:
    """Equal policies before a release gate: how often it fires."""
    condition = parse_condition("diff.accuracy.high < 0")
    for k in (1, 12):
        for n in (140, 1000):
            draw, fires = np.random.default_rng(seed), 0
            for _ in range(runs):
                right = 2.0 * outcomes(draw, np.full(k + 1, 0.7), n) - 1.0
                aligned = align_policies([scored(name, values) for name, values in as_policies(right).items()])
                fires += bool(failed_conditions(condition, aligned, "p0"))
            yield line("gate fires", f"diff.accuracy.high < 0, {k} equal policies, {n} pairs", fires, runs, 0.0, 0.05)
    subsets = [f"s{i % 23}" for i in range(500)]
    for text, most in (("accuracy[worst_subset].high < 0.6", 0.05), ("diff.accuracy[worst_subset].high < 0", 0.05)):
        draw, fires, condition = np.random.default_rng(seed), 0, parse_condition(text)
        for _ in range(runs):
            right = 2.0 * outcomes(draw, np.full(2, 0.75), 500) - 1.0
            made = [scored(name, values, subsets=subsets) for name, values in as_policies(right).items()]
            fires += bool(failed_conditions(condition, align_policies(made), "p0"))
        yield line("gate fires", f"{text}, 23 equal subsets of 22 pairs", fires, runs, 0.0, most)


# --- calibration and length ------------------------------------------------------------------------------------------


def calibrations(runs: int, seed: int) -> Iterator[Line]:
    """The interval of the calibration error, of policies that claim what they know, and twice as much.

    With `copies`, each pair stands several times under one prompt, so that it tells no more than once.
    """
    for stretch, copies in ((1.0, 1), (2.0, 1), (1.0, 5), (2.0, 5)):
        size = np.abs(np.random.default_rng(seed).normal(size=400_000))
        claimed, known = (1.0 / (1.0 + np.exp(-scale * size)) for scale in (stretch, 1.0))
        index = np.minimum(((claimed - 0.5) * 20).astype(int), 9)
        truth = float(np.abs(np.bincount(index, known - claimed)).sum()) / len(size) if stretch > 1.0 else 0.0
        for n in (50, 140, 1000) if copies == 1 else (140,):
            draw, hits, seen, expected = np.random.default_rng(seed), 0, [], []
            for _ in range(runs):
                x = np.abs(draw.normal(size=n))
                margins = np.repeat(stretch * np.where(draw.random(n) < 1.0 / (1.0 + np.exp(-x)), x, -x), copies)
                found = calibration(margins, clusters=np.repeat(np.arange(n), copies))
                low, high = found.ece_ci95 or (0.0, 0.0)
                hits += low <= truth <= high
                seen.append(found.ece or 0.0)
                expected.append(found.ece_if_calibrated or 0.0)
            pairs = f"{n} pairs" if copies == 1 else f"{n} prompts of {copies} equal pairs"
            design = f"ece of {pairs}, margins × {stretch:g}: {np.mean(seen):.3f}, calibrated {np.mean(expected):.3f}"
            yield line("coverage", design, hits, runs, 0.88, 1.0)


def lengths(runs: int, seed: int) -> Iterator[Line]:
    """Accuracy at equal length where the truth is ½: covered where lengths overlap, null where they do not."""
    for name, overlap in (("N(0, 100)", True), ("N(100, 100)", True), ("U(50, 300)", False), ("N(200, 100)", False)):
        draw, hits, given = np.random.default_rng(seed), 0, 0
        for _ in range(runs):
            n = 300
            gap = (
                draw.uniform(50, 300, n) if name.startswith("U") else draw.normal(float(name[2:].split(",")[0]), 100, n)
            )
            rejected = draw.integers(150, 400, n) * 1.0
            chosen = np.maximum(1.0, np.round(rejected + gap))
            found = length_controlled_accuracy(0.005 * (chosen - rejected) + draw.normal(size=n), chosen, rejected)
            given += found.accuracy is not None
            hits += found.accuracy is not None and (found.low or 0.0) <= 0.5 <= (found.high or 0.0)
        if overlap:
            yield line("coverage", f"at equal length, gap {name}", hits, max(given, 1), 0.92, 1.0)
        else:
            yield line("given", f"at equal length, gap {name}", given, runs, 0.0, 0.05)


PARTS: dict[str, Callable[[int, int], Iterator[Line]]] = {
    one.__name__: one
    for one in (
        clusters,
        cluster_differences,
        skewed,
        families,
        detectable,
        detectable_clustered,
        gates,
        calibrations,
        lengths,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="which parts (default: all)")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(f"{'':18}{'found':>7}  {'promised':16}")
    for name in asked.parts or PARTS:
        begun = time.perf_counter()
        for one in PARTS[name](asked.runs, asked.seed):
            mark = "" if one.kept else "  ← not kept"
            print(f"{one.part:18}{one.found:7.3f}  {one.promised:16}  {one.design}{mark}", flush=True)
        print(f"{'':18}({name}: {time.perf_counter() - begun:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
