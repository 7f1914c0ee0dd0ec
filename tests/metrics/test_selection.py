"""Rules of selection: known answers by hand on ten pairs, and what holds for every rule."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_score.errors import ConfigError
from dpo_score.metrics.intervals import wilson
from dpo_score.metrics.selection import Candidates, Judge, Reason, Settings, parse_rule, select_pairs
from dpo_score.metrics.selection_comparison import compare_rules, diagnose_on_policy

MARGINS = [5.0, -3.0, 0.5, 2.0, -0.25, 9.0, 1.0, -8.0, 0.0, 4.0]
OUTSIDE = [1.0, 1.0, -1.0, 3.0, 0.0, 2.0, -2.0, 4.0, 1.0, 0.0]


def pairs(margins: Any = MARGINS, *more: Any, **changes: Any) -> Candidates:
    """Ten pairs of ten prompts; row i has i + 1 tokens on the chosen side and 2 on the rejected one."""
    count = len(margins)
    judges = [
        Judge(
            f"p{i}",
            np.array(values, np.float64),
            0.1 * np.array(values, np.float64),
            np.linspace(-1.0, -10.0, count),
            np.linspace(-10.0, -1.0, count),
        )
        for i, values in enumerate((margins, *more))
    ]
    outside = np.resize(np.array(OUTSIDE), count)
    stored = pl.DataFrame(
        {
            "score_chosen": outside,
            "score_rejected": np.zeros(count),
            "margins": 0.1 * np.array(margins, np.float64),
        }
    )
    found = Candidates(
        row_ids=[f"0:{i}" for i in range(count)],
        prompts=np.arange(count),
        prompt_keys=[f"prompt {i}" for i in range(count)],
        subsets=np.arange(count) % 2,
        subset_names=["a", "b"],
        chosen_tokens=np.arange(1.0, count + 1.0),
        rejected_tokens=np.full(count, 2.0),
        tied=np.zeros(count, np.bool_),
        judges=judges,
        stored=stored,
        reference_chosen_logps=np.full(count, -5.0),
        reference_rejected_logps=np.full(count, -5.0),
    )
    return replace(found, **changes)


def kept(rule: str, candidates: Candidates | None = None, **settings: Any) -> list[int]:
    """The places of the kept pairs, first the one that is kept first."""
    found = select_pairs(candidates or pairs(), parse_rule(rule), Settings(**settings))
    return sorted(np.flatnonzero(found.kept).tolist(), key=lambda row: int(found.ranks[row]))


def test_each_rule_keeps_the_pairs_that_its_definition_names() -> None:
    assert kept("margin:high", keep=3) == [5, 0, 9]
    assert kept("margin:low", keep=3) == [7, 1, 4]
    assert kept("difficulty", keep=3) == [8, 4, 2]  # |0|, |-0.25|, |0.5|
    assert kept("margin:band=-1,1") == [6, 2, 8, 4]
    assert kept("margin:band=-1,1", keep=2) == [6, 2]
    assert kept("margin:band=-0.1,0.1", scaled=True) == [6, 2, 8, 4]


def test_dual_fuses_both_margins_as_probabilities() -> None:
    """All in the middle but three pairs: large in both, large in one, large in none."""
    candidates = pairs([0.0] * 7 + [1.0, 1.0, -1.0])
    stored = candidates.stored.with_columns(score_chosen=pl.Series([0.0] * 7 + [1.0, -1.0, -1.0]))
    found = select_pairs(
        replace(candidates, stored=stored),
        parse_rule("dual"),
        Settings(keep=10, score_columns=("score_chosen", "score_rejected")),
    )
    implicit, outside = np.array([0.0] * 7 + [1, 1, -1]), np.array([0.0] * 7 + [1, -1, -1])
    low_i, high_i = np.quantile(implicit, (0.01, 0.99))
    low_o, high_o = np.quantile(outside, (0.01, 0.99))
    p = (np.clip(implicit, low_i, high_i) - low_i) / (high_i - low_i)
    q = (np.clip(outside, low_o, high_o) - low_o) / (high_o - low_o)
    both, neither = p * q, (1 - p) * (1 - q)
    expected = np.where(both + neither == 0, 0.5, both / np.where(both + neither == 0, 1, both + neither))
    assert found.scores == pytest.approx(expected)
    assert found.ranks[7] == 1
    assert found.ranks[9] == 10


def test_agree_and_suspect_count_policies() -> None:
    candidates = pairs([1.0, 1.0, -1.0, -2.0], [1.0, -1.0, -1.0, -4.0], [2.0, 1.0, 1.0, -1.0])
    assert kept("agree", candidates) == [0]
    assert sorted(kept("agree=2", candidates)) == [0, 1]
    assert kept("suspect", candidates) == [3]
    assert sorted(kept("suspect=2", candidates)) == [2, 3]
    found = select_pairs(candidates, parse_rule("suspect"), Settings())
    assert found.scores[3] == pytest.approx(1.0 / (1.0 + math.exp(-0.1)))  # the least sure of the three: margin -0.1


def test_on_policy_is_the_wpo_weight_where_it_is_stored() -> None:
    candidates = pairs([0.0, 0.0])
    judge = candidates.judges[0]
    squares = {"chosen_log_sum_sq_probs": np.array([-2.0, -1.0]), "rejected_log_sum_sq_probs": np.array([-6.0, -4.0])}
    plain = select_pairs(candidates, parse_rule("on-policy"), Settings(keep=1))
    exact = select_pairs(
        replace(candidates, judges=[replace(judge, **squares)]), parse_rule("on-policy"), Settings(keep=1)
    )
    assert plain.scores.tolist() == [-1.0 / 1 + -10.0 / 2, -10.0 / 2 + -1.0 / 2]
    assert exact.scores.tolist() == [-1.0 + 2.0 - 5.0 + 3.0, -5.0 + 0.5 - 0.5 + 2.0]


def test_margins_per_token_are_divided_by_each_answers_own_tokens() -> None:
    found = select_pairs(pairs(), parse_rule("margin:high"), Settings(keep=1, per_token=True))
    chosen, rejected = np.linspace(-1.0, -10.0, 10) + 5.0, np.linspace(-10.0, -1.0, 10) + 5.0
    assert found.scores == pytest.approx(chosen / np.arange(1.0, 11.0) - rejected / 2.0)


def test_an_expression_is_a_filter_or_a_score() -> None:
    assert kept("score_chosen > 1 AND margins > 0") == kept("margins > 0 and 1 < score_chosen")
    assert sorted(kept("score_chosen > 1 AND margins > 0")) == [3, 5]
    assert kept("score_chosen - score_rejected", keep=2) == [7, 3]


@pytest.mark.parametrize(
    ("rule", "settings", "said"),
    [
        ("margn:high", {"keep": 1}, "margin:high"),
        ("margin:band=2,1", {}, "LOW,HIGH"),
        ("margin:band=a,b", {}, "LOW,HIGH"),
        ("agree=0", {}, "whole number"),
        ("agree=2", {}, "one policy"),
        ("dual", {"keep": 1}, "--score-columns"),
        ("score_chosn > 1", {}, "--keep-columns score_chosn"),
        ("score_chosen >", {}, "neither a rule"),
        ("score_chosen / 0 * 0", {"keep": 1}, "NaN for 10 pairs, the first is row 0:0"),
        ("'a' || 'b'", {"keep": 1}, "one number"),
        ("margin:high", {"keep": 11}, "10 pairs to choose from"),
    ],
)
def test_mistakes_are_one_sentence(rule: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        kept(rule, **settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_every_pair_has_one_reason() -> None:
    margins = [*MARGINS[:8], float("nan"), 4.0]
    tied = np.arange(10) == 0
    found = select_pairs(pairs(margins, tied=tied), parse_rule("margin:band=-1,9"), Settings(keep=2))
    assert [str(reason) for reason in found.reasons] == [
        "labelled_tie",
        "outside_rule",
        "below_cut",
        "below_cut",
        "below_cut",
        "kept",
        "below_cut",
        "outside_rule",
        "no_value",
        "kept",
    ]
    assert sum(found.counts().values()) == 10
    assert found.threshold == 4.0


def test_pairs_of_a_prompt_stay_together() -> None:
    prompts = np.array([0, 1, 0, 2, 0, 3, 4, 5, 6, 7])
    chosen = kept("margin:high", pairs(prompts=prompts), keep=4)
    assert chosen == [5, 9, 3, 0, 2, 4][:3]  # the mean of a is 1.75: three pairs, of which one would fit
    assert kept("margin:high", pairs(prompts=prompts), keep=6) == [5, 9, 3, 0, 2, 4]
    with pytest.raises(ConfigError, match="the first prompt alone has 3 pairs"):
        kept("margin:low", pairs([-9.0, 0, -9, 0, -9, 0, 0, 0, 0, 0], prompts=prompts), keep=2)


def test_of_near_duplicates_one_is_kept() -> None:
    keys = [*"abcdefgh", "x", "f"]
    found = select_pairs(pairs(), parse_rule("margin:high"), Settings(keep=3, duplicates=keys))
    assert np.flatnonzero(found.kept).tolist() == [0, 3, 5]
    assert found.reasons[9] == Reason.DUPLICATE_PROMPT


RULES = ("margin:high", "margin:low", "difficulty", "on-policy", "random")
margins = st.lists(st.floats(-20, 20, width=16), min_size=8, max_size=40)


@settings(max_examples=40, deadline=None)
@given(margins, st.sampled_from(RULES), st.booleans(), st.booleans(), st.integers(0, 3))
def test_kept_sets_are_nested_and_do_not_depend_on_the_order_of_rows(
    values: list[float], rule: str, by_subset: bool, length_match: bool, seed: int
) -> None:
    candidates = pairs(values)
    controls = {"by_subset": by_subset, "length_match": length_match, "seed": seed}
    sizes = sorted({1, len(values) // 3 or 1, len(values) // 2, len(values)})
    sets = [set(kept(rule, candidates, keep=keep, **controls)) for keep in sizes]
    assert [len(found) for found in sets] == sizes
    assert all(small <= large for small, large in itertools.pairwise(sets))
    turned = np.random.default_rng(0).permutation(len(values))
    moved = replace(
        candidates,
        row_ids=[candidates.row_ids[i] for i in turned],
        prompts=candidates.prompts[turned],
        subsets=candidates.subsets[turned],
        chosen_tokens=candidates.chosen_tokens[turned],
        rejected_tokens=candidates.rejected_tokens[turned],
        judges=[
            replace(
                j, **{f: getattr(j, f)[turned] for f in ("margins_nats", "margins", "chosen_logps", "rejected_logps")}
            )
            for j in candidates.judges
        ],
    )
    again = {int(turned[row]) for row in kept(rule, moved, keep=sizes[1], **controls)}
    assert again == sets[1]


@settings(max_examples=40, deadline=None)
@given(margins, st.floats(0.1, 0.9))
def test_shares_of_subsets_are_those_of_the_whole_set_within_one_pair(values: list[float], share: float) -> None:
    keep = max(1, int(len(values) * share))
    chosen = kept("margin:high", pairs(values), keep=keep, by_subset=True)
    for start in (0, 1):
        expected = keep * len(values[start::2]) / len(values)
        assert abs(sum(row % 2 == start for row in chosen) - expected) <= 1.0


def test_length_matching_takes_the_same_share_of_short_and_long_differences() -> None:
    """The margin grows with the length difference: unmatched, only the longest are kept."""
    candidates = pairs(list(np.arange(100.0)))
    free = np.array(kept("margin:high", candidates, keep=20))
    matched = np.array(kept("margin:high", candidates, keep=20, length_match=True))
    assert free.min() == 80
    assert np.histogram(matched, bins=10, range=(0, 100))[0].tolist() == [2] * 10


def test_a_random_draw_belongs_to_the_prompt_and_the_seed() -> None:
    assert kept("random", keep=4, seed=1) == kept("random", keep=4, seed=1)
    assert kept("random", keep=4, seed=1) != kept("random", keep=4, seed=2)


def test_rules_are_compared_on_the_same_pairs() -> None:
    candidates = pairs()
    rules = [parse_rule(name) for name in ("margin:high", "margin:low", "suspect", "agree=9")]
    found = compare_rules(candidates, rules, Settings(keep=4))
    high, low, suspect, impossible = found["rules"]
    assert high["accuracy"]["value"] == 1.0
    assert low["accuracy"]["value"] == 0.0
    assert high["margins_nats"]["value"] == 5.0
    assert high["overlap"] == {"margin:high": 1.0, "margin:low": 0.0, "suspect": 0.0}
    assert suspect["kept"] == 3
    assert suspect["suspect"]["value"] == 1.0
    assert suspect["overlap"]["margin:low"] == 1.0
    assert "one policy" in impossible["reason"]
    assert low["teaches"].startswith("To turn round what the policies prefer (they rank 0% as labelled)")
    assert high["teaches"] == "Much the same as the whole set, only fewer pairs."  # 4 of 4 beside 6 of 10 may be chance
    clear = compare_rules(pairs([*np.arange(0.1, 6.1, 0.1), *-np.arange(0.1, 4.1, 0.1)]), rules[:2], Settings(keep=50))[
        "rules"
    ]
    assert "mostly what the policies prefer already (they rank 100% as labelled, 60% in" in clear[0]["teaches"].lower()
    assert {name: cell["value"] for name, cell in found["all"]["subsets"].items()} == {"a": 0.5, "b": 0.5}
    low, high = found["all"]["subsets"]["a"]["ci95"]
    prompts = len(set(candidates.prompts.tolist()))
    assert (low, high) == pytest.approx(wilson(prompts / 2, prompts))


def test_many_pairs_of_few_prompts_are_no_evidence_of_another_mix() -> None:
    """The kept pairs are all of subset a: of sixty prompts, or of three with twenty pairs each."""
    margins = np.r_[np.arange(200.0, 140.0, -1.0), np.arange(140.0)]
    subsets = np.r_[np.zeros(60, np.int64), np.arange(140) % 2]
    of_few = np.r_[np.arange(60) // 20, np.arange(3, 143)]
    keys = [f"prompt {i}" for i in range(143)]
    alone = pairs(margins, subsets=subsets)
    together = pairs(margins, subsets=subsets, prompts=of_few, prompt_keys=keys)
    (many,), (few,) = (
        compare_rules(p, [parse_rule("margin:high")], Settings(keep=60))["rules"] for p in (alone, together)
    )
    assert many["subsets"]["a"]["value"] == few["subsets"]["a"]["value"] == 1.0
    assert (many["effective_groups"], few["effective_groups"]) == (60, 3)
    assert "more of a" in many["teaches"].lower()
    assert "more of a" not in few["teaches"].lower()


def test_on_policy_diagnosis_by_hand() -> None:
    found = diagnose_on_policy(pairs())["p0"]
    chosen = np.linspace(-1.0, -10.0, 10)
    assert found["chosen"]["value"] == pytest.approx(float(np.mean(chosen / np.arange(1.0, 11.0))))
    fell = (chosen < -5.0) & (np.array(MARGINS) > 0)
    assert found["displaced"]["value"] == pytest.approx(float(fell.mean()))
    assert found["saturated"]["value"] == 0.0
    assert set(found["subsets"]) == {"a", "b"}
