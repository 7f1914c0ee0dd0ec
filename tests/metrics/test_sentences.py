"""The summary sentence and the table it stands over never disagree, whatever the policies are."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_score.metrics.compare import align_policies, compare_policies, selected
from dpo_score.metrics.sentences import p_value, percent, points, sentences, signed
from tests.metrics.scored import scored

NAMES = ("alpha", "beta", "gamma", "delta", "omega")


def compared(right: dict[str, np.ndarray], baseline: str | None = None, **columns: Any) -> dict[str, Any]:
    """A comparison of policies with these outcomes: 1 right, −1 wrong, 0 a tie; NaN: the pair has no score."""
    policies = []
    for name, nats in right.items():
        whole = scored(name, np.nan_to_num(nats), **columns)
        policies.append(selected(whole, np.flatnonzero(~np.isnan(nats))) if np.isnan(nats).any() else whole)
    aligned = align_policies(policies, of_one_run=True)
    return compare_policies(aligned, baseline if baseline in aligned.names else None)


# --- every word is in the table -------------------------------------------------------------------------------------

PATTERNS = (
    r"In (?P<label>\w+) (?P<group>[\w ]+), (?P<lower>\w+) is (?P<by>[\d.]+ points) below (?P<upper>\w+) "
    r"\((?P<a>[\d.]+ %) against (?P<b>[\d.]+ %), adjusted p (?P<p>[\d.< ]+)\), though "
    r"(?P<overall>higher|not told apart from it) over all pairs(?:, and so in (?P<more>\d+) more)?\.",
    r"(?:(?P<all>.+) cannot be told apart by accuracy: )?(?P<best>\w+) ranks (?P<share>[\d.]+ %) of "
    r"(?P<n>[\d,]+) pairs as labelled(?:, (?P<ties>[\d,]+) ties left out)?"
    r"(?: \(95 % interval (?P<low>[\d.]+) to (?P<high>[\d.]+)\))?"
    r"(?:, the highest of (?P<count>\d+)(?: with (?P<equal>[\w, ]+?))?)?"
    r"(?P<chance>; it cannot be told from guessing|; guessing would do better)?"
    r"(?:; (?P<leader>\w+) has the highest mean margin)?\.",
    r"(?P<unranked>\w+) ties on (?P<tied>[\d,]+) of (?P<pairs>[\d,]+) pairs and is not ranked\.",
    r"(?P<left_out>[\w, ]+) tie on more than half of the pairs and are not ranked\.",
    r"(?P<even>[\w, ]+) cannot be told from it\.",
    r"(?P<worse>[\w, ]+?) (?:is|are) worse(?: \((?P<less>−[\d.]+ points), adjusted p (?P<p_worse>[\d.< ]+)\))?\.",
    r"On the pairs that both rank, (?P<better>[\w, ]+?) (?:is|are) better"
    r"(?: \((?P<gain>\+[\d.]+ points), adjusted p (?P<p_better>[\d.< ]+)\))?\.",
    r"(?P<alone>[\w, ]+) ranks? no pair that (?P<whom>\w+) ranks, so they cannot be compared\.",
    r"Against (?P<against>\w+), (?:(?P<higher>[\w, ]+?) (?:is|are) higher)?(?: and )?"
    r"(?:(?P<lower_ones>[\w, ]+?) (?:is|are) lower)? beyond noise\.",
    r"No policy differs from (?P<from_whom>\w+) beyond noise\.",
    r"On the (?P<few>[\d,]+) pairs that (?P<of_whom>\w+) ranks, no policy differs from it beyond noise\.",
    r"(?P<tie_all>\w+) ties on every pair, so no accuracy can be set against it\.",
    r"No pair is without a tie in both (?P<nobody>\w+) and another\.",
    r"The median margin of (?P<carried>\w+) is (?P<median>[+−][\d.]+); few pairs carry its mean of "
    r"(?P<mean>[+−][\d.]+)\.",
    r"These pairs show a true difference of (?P<sizes>.+) four times in five; a smaller one is easily missed\.",
    r"One prompt or group holds (?P<largest>\d+) % of the pairs: all pairs count as about (?P<effective>[\d.]+) "
    r"independent groups\.",
    r"(?P<few_scores>\w+) has scores of (?P<few_pairs>[\d,]+) pairs only and is not compared\.",
    r"(?P<several_few>[\w, ]+) have scores of less than half of the pairs only and are not compared\.",
    r"The data calls (?P<called>[\d,]+) of (?P<of_all>[\d,]+) pairs a tie: they are left out\.",
    r"The data calls every pair a tie: there is nothing to rank\.",
    r"Every pair is a tie for every policy: there is nothing to rank\.",
    r"Every policy ties on more than half of the pairs: there is nothing to rank\.",
)


def named(text: str | None, items: list[dict[str, Any]], others: str = "others") -> None:
    """A list of names in a sentence is exactly these policies, or how many they are."""
    expected = [item["policy"] for item in items]
    if text is None:
        assert not expected
    elif text.endswith(f" {others}"):
        assert int(text.split()[0]) == len(expected) > 3
    else:
        assert re.split(r", | and ", text) == expected


def check(found: dict[str, Any]) -> None:
    """Parse every sentence and look each of its words up in the table."""
    policies = {policy["name"]: policy for policy in found["policies"]}
    versus = {item["policy"]: item for item in found["versus_best"].get("accuracy", [])}
    baseline = {item["policy"]: item for item in found["versus_baseline"].get("accuracy", [])}
    known = [item for item in versus.values() if item["mean"] is not None]
    if found["best"] is not None and found["best"] == found["baseline"]:
        assert versus == {name: item for name, item in baseline.items() if policies[name]["ranked"]}, (
            "one table is shown"
        )
    said: dict[str, str | None] = {}
    for sentence in sentences(found):
        match = next((m for pattern in PATTERNS if (m := re.fullmatch(pattern, sentence))), None)
        assert match is not None, sentence
        said |= {key: value for key, value in match.groupdict().items() if value is not None}
        if "best" in match.groupdict():
            check_best(match.groupdict(), found, policies, versus)
    get = said.get
    if found["best"] is not None:
        unranked = [{"policy": name} for name, policy in policies.items() if not policy["ranked"]]
        named(get("unranked") or get("left_out"), unranked)
        even = [item for item in known if item["tied"]]
        named(get("even"), even if len(even) < len(versus) else [])
        named(get("worse"), [item for item in known if not item["tied"] and item["mean"] < 0])
        named(get("better"), [item for item in known if not item["tied"] and item["mean"] > 0])
        named(get("alone"), [item for item in versus.values() if item["mean"] is None])
    if get("unranked"):
        assert said["tied"] == f"{policies[said['unranked']]['ties']:,}"
        assert said["pairs"] == f"{found['pairs'] - found['labelled_ties']:,}"
    named(get("few_scores") or get("several_few"), found["partial"])
    if get("few_pairs"):
        assert said["few_pairs"] == f"{found['partial'][0]['pairs']:,}"
    if get("called"):
        assert (said["called"], said["of_all"]) == (f"{found['labelled_ties']:,}", f"{found['pairs']:,}")
    for who, size, p in (("worse", "less", "p_worse"), ("better", "gain", "p_better")):
        if get(size):
            item = versus[said[who]]
            assert (said[size], said[p]) == (points(item["mean"]), p_value(item["p_adjusted"]))
    if get("against"):
        told = [item for item in baseline.values() if item["mean"] is not None and not item["tied"]]
        named(get("higher"), [item for item in told if item["mean"] > 0])
        named(get("lower_ones"), [item for item in told if item["mean"] < 0])
    if get("from_whom") or get("of_whom"):
        assert all(item["tied"] for item in baseline.values())
    if get("lower"):
        one = found["collapses"][0]
        assert (said["label"], said["group"], said["lower"], said["upper"]) == (
            one["label"],
            one["group"],
            one["policy"],
            one["against"],
        )
        cells = found["subsets"][one["label"]][one["group"]]["policies"]
        shares = [percent(cells[name]["accuracy"]["value"]) for name in (one["policy"], one["against"])]
        assert [said["a"], said["b"]] == shares
        assert one["mean"] < 0
        assert one["p_adjusted"] < 0.05
        assert said["by"] == points(-one["mean"], signed=False)
    if get("carried"):
        margins = policies[said["carried"]]["margins"]
        assert (said["median"], said["mean"]) == (signed(margins["quantiles"]["p50"]), signed(margins["mean"]))
    for size, name in re.findall(r"([\d.]+) points to (\w+)", get("sizes") or ""):
        items = versus if name == found["best"] else baseline
        sizes = [i["detectable"] for i in items.values() if i.get("against") == name and i.get("detectable")]
        assert float(size) == pytest.approx(100 * max(sizes), abs=0.051)
    if get("largest"):
        assert found["largest_group"] > 0.1
        assert said["effective"] == f"{found['effective_groups']:.1f}"


def check_best(said: dict[str, Any], found: dict[str, Any], policies: dict[str, Any], versus: dict[str, Any]) -> None:
    """The best has the highest accuracy of those that take part, and the numbers of its line in the table."""
    best = policies[said["best"]]
    cell = best["accuracy"]
    assert said["best"] == found["best"]
    ranked = {name: policy["accuracy"]["value"] for name, policy in policies.items() if policy["ranked"]}
    assert cell["value"] == max(ranked.values())
    assert (said["share"], said["n"]) == (percent(cell["value"]), f"{cell['n']:,}")
    assert (said["ties"] or "0") == f"{best['ties']:,}"
    if said["count"]:
        assert int(said["count"]) == len(ranked) == len(versus) + 1
    equal = [name for name, value in ranked.items() if value == cell["value"] and name != said["best"]]
    named(said["equal"], [{"policy": name} for name in equal])
    if said["all"]:
        assert all(item["tied"] for item in versus.values())
        named(said["all"], [{"policy": name} for name in (found["best"], *versus)], "policies")
    if said["low"]:
        assert [float(said["low"]), float(said["high"])] == pytest.approx([100 * x for x in cell["ci95"]], abs=0.051)
    if said["leader"]:
        top = max(policies.values(), key=lambda policy: policy["margins"]["mean"])
        assert policies[said["leader"]]["margins"]["mean"] == top["margins"]["mean"]
    if cell["ci95"] is not None:
        low, high = cell["ci95"]
        verdict = "; it cannot be told from guessing" if low <= 0.5 <= high else None
        assert said["chance"] == ("; guessing would do better" if high < 0.5 else verdict)


@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(4, 120),
    st.sampled_from([None, 0, 1]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_word_of_the_sentence_is_in_the_table(
    seed: int, count: int, pairs: int, baseline: int | None, clustered: bool, heavy: bool
) -> None:
    """Random policies of any accuracy and any share of ties, with subsets and prompts of any size."""
    draw = np.random.default_rng(seed)
    difficulty, right = draw.normal(size=pairs), {}
    for name in NAMES[:count]:
        nats = draw.normal(draw.normal(0.3, 1.0), 1.0) + difficulty + 0.5 * draw.normal(size=pairs)
        nats = np.exp(2 * np.abs(nats)) * np.sign(nats) if heavy else nats
        right[name] = np.where(draw.random(pairs) < draw.choice([0.0, 0.0, 0.3, 0.9]), 0.0, nats)
        right[name][: int(pairs * draw.choice([0.0, 0.0, 0.2, 0.7]))] = np.nan
    names = list(right)
    prompts = [f"p{k}" for k in draw.geometric(0.2, pairs)] if clustered else None
    columns: dict[str, Any] = {
        "prompts": prompts,
        "subsets": [("safety", "chat", "math")[k] for k in draw.integers(0, 3, pairs)],
        "slices": {"tied": (draw.random(pairs) < draw.choice([0.0, 0.0, 0.6, 1.0])).tolist()},
    }
    check(compared(right, names[min(baseline, count - 1)] if baseline is not None else None, **columns))


# --- what went wrong once -------------------------------------------------------------------------------------------


def outcomes(right: int, wrong: int, ties: int = 0) -> np.ndarray:
    return np.repeat([1.0, -1.0, 0.0], [right, wrong, ties])


def test_a_policy_that_ties_on_most_pairs_does_not_decide_who_is_best() -> None:
    draw = np.random.default_rng(0)
    right = {
        "early": draw.permutation(outcomes(3, 1, 496)),
        "mid": draw.permutation(outcomes(300, 200)),
        "late": draw.permutation(outcomes(449, 51)),
    }
    right["mid"][right["early"] != 0.0] = 1.0
    right["late"][right["early"] != 0.0] = -1.0
    found = compared(right)
    check(found)
    assert found["best"] == "late"
    assert sentences(found)[1:3] == [
        f"mid is worse ({points(found['versus_best']['accuracy'][0]['mean'])}, adjusted p < 0.001).",
        "early ties on 496 of 500 pairs and is not ranked.",
    ]
    alone = compared({name: right[name] for name in ("mid", "late")})
    assert alone["best"] == "late"
    assert alone["versus_best"]["accuracy"][0]["mean"] == found["versus_best"]["accuracy"][0]["mean"]


def test_a_policy_with_scores_of_few_pairs_is_named_and_leaves_the_others_their_pairs() -> None:
    early = outcomes(250, 50)
    early[:250] = np.nan
    found = compared({"early": early, "mid": outcomes(180, 120), "late": outcomes(260, 40)})
    check(found)
    assert (found["pairs"], found["best"]) == (300, "late")
    assert "early has scores of 50 pairs only and is not compared." in found["sentence"]


def test_ties_of_the_data_are_not_ties_of_a_policy() -> None:
    right = {"a": outcomes(80, 20, 200), "b": outcomes(50, 50, 200)}
    found = compared(right, slices={"tied": [False] * 100 + [True] * 200})
    check(found)
    assert (found["best"], found["policies"][0]["ties"]) == ("a", 0)
    assert "The data calls 200 of 300 pairs a tie: they are left out." in found["sentence"]
    every = compared(right, slices={"tied": [True] * 300})
    assert every["sentence"] == "The data calls every pair a tie: there is nothing to rank."


def test_three_right_of_a_thousand_ties_is_not_the_best() -> None:
    found = compared({"tie": outcomes(3, 0, 997), "other": outcomes(950, 50)})
    assert found["best"] == "other"
    assert "tie ties on 997 of 1,000 pairs and is not ranked." in found["sentence"]


def test_policies_without_a_pair_in_common_are_ranked_and_not_compared() -> None:
    half = np.arange(500) < 250
    a, b = np.where(half, 0.0, outcomes(300, 200)), np.where(half, outcomes(450, 50), 0.0)
    found = compared({"a": a, "b": b})
    check(found)
    assert found["best"] == "b"
    assert "a ranks no pair that b ranks, so they cannot be compared." in found["sentence"]


def test_a_collapse_in_one_subset_is_said_before_the_gain_over_all() -> None:
    draw = np.random.default_rng(1)
    subsets = ["chat"] * 900 + ["safety"] * 100
    old = np.where(draw.random(1000) < np.repeat([0.7, 0.75], [900, 100]), 1.0, -1.0)
    new = np.where(draw.random(1000) < np.repeat([0.838, 0.3], [900, 100]), 1.0, -1.0)
    for baseline in ("base", None):
        found = compared({"base": old, "new": new}, baseline, subsets=subsets)
        check(found)
        assert sentences(found)[0].startswith("In subset safety, new is ")
        assert "though higher over all pairs." in sentences(found)[0]
    assert found["subsets"]["subset"]["safety"]["policies"]["base"]["versus_best"]["p_adjusted"] < 1e-6


def test_subset_p_values_are_adjusted_over_subsets_and_policies() -> None:
    draw = np.random.default_rng(2)
    subsets = [f"s{i % 23}" for i in range(690)]
    right = {name: np.where(draw.random(690) < 0.75, 1.0, -1.0) for name in ("base", "a", "b")}
    found = compared(right, "base", subsets=subsets)
    items = [
        cell["versus_baseline"]
        for group in found["subsets"]["subset"].values()
        for cell in group["policies"].values()
        if "versus_baseline" in cell
    ]
    assert len(items) == 46
    least = min(items, key=lambda item: item["p"])
    assert least["p_adjusted"] == pytest.approx(min(1.0, 46 * least["p"]))
    assert not found["collapses"]


def test_one_prompt_that_holds_half_of_the_pairs_is_warned_of() -> None:
    prompts = ["empty"] * 100 + [f"p{i // 4}" for i in range(100)]
    found = compared({"a": outcomes(150, 50)}, prompts=prompts)
    check(found)
    assert (
        "One prompt or group holds 50 % of the pairs: all pairs count as about 3.8 independent groups."
        in (found["sentence"])
    )


def test_where_nobody_can_be_told_apart_nobody_is_crowned() -> None:
    draw = np.random.default_rng(3)
    base = draw.normal(0.5, 1.0, 140)
    right = {name: base + 0.2 * draw.normal(size=140) for name in ("a", "b", "c")}
    found = compared(right)
    check(found)
    assert sentences(found)[0].startswith(("a, b and c cannot", "b, a and c cannot", "c, a and b cannot"))


def test_a_mean_that_one_pair_carries_is_said_to_be() -> None:
    found = compared({"a": np.append(np.full(199, -2.0), 4000.0)})
    check(found)
    assert "The median margin of a is −0.20; few pairs carry its mean of +1.80." in found["sentence"]
