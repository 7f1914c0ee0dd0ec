"""Policies on the same pairs: the join, what may be subtracted, and the comparison as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_score.metrics.compare import METRICS, align_policies, compare_policies, counted, margin_edges, refusal
from tests.metrics.scored import SETTINGS, policies, scored


def test_the_k_th_occurrence_meets_the_k_th() -> None:
    a = scored("a", [1, 2, 3, 4], pair_ids=["x", "y", "x", "z"])
    b = scored("b", [5, 6, 7, 8], pair_ids=["x", "x", "x", "y"])
    aligned = align_policies([a, b])
    assert aligned["a"].pair_ids == aligned["b"].pair_ids == ["x", "y", "x"]
    assert aligned.values("margins_nats")["a"].tolist() == [1, 2, 3]
    assert aligned.values("margins_nats")["b"].tolist() == [5, 8, 6]
    assert [(side.policy, side.pairs, side.first) for side in aligned.one_sided] == [
        ("a", 1, ("0:3",)),
        ("b", 1, ("0:2",)),
    ]


@given(st.lists(st.lists(st.sampled_from("pqr"), min_size=1, max_size=6), min_size=1, max_size=4))
@settings(deadline=None)
def test_joined_rows_hold_the_same_pairs_in_the_first_order(sides: list[list[str]]) -> None:
    policies = [scored(str(i), [0.0] * len(ids), pair_ids=ids) for i, ids in enumerate(sides)]
    counts = {pair: min(ids.count(pair) for ids in sides) for pair in "pqr"}
    if not any(counts.values()):
        with pytest.raises(ValueError, match="no pair"):
            align_policies(policies)
        return
    aligned = align_policies(policies)
    assert {tuple(policy.pair_ids) for policy in aligned.policies} == {tuple(aligned.first.pair_ids)}
    assert {pair: aligned.first.pair_ids.count(pair) for pair in "pqr"} == counts
    left_out = {side.policy: side.pairs for side in aligned.one_sided}
    assert all(len(ids) == len(aligned) + left_out.get(str(i), 0) for i, ids in enumerate(sides))


ids = st.lists(st.sampled_from("abcd"), max_size=12)


@given(ids, ids)
@settings(max_examples=60, deadline=None)
def test_a_join_pairs_kth_with_kth_and_accounts_for_every_row(ids_a: list[str], ids_b: list[str]) -> None:
    if not set(ids_a) & set(ids_b):
        return
    aligned = align_policies(
        [scored(name, [0.0] * len(own), pair_ids=own) for name, own in (("a", ids_a), ("b", ids_b))]
    )
    both_a, both_b = ([int(row_id.removeprefix("0:")) for row_id in aligned[name].row_ids] for name in "ab")
    alone = {side.policy: side.pairs for side in aligned.one_sided}
    assert len(set(both_a)) + alone.get("a", 0) == len(ids_a)
    assert len(set(both_b)) + alone.get("b", 0) == len(ids_b)
    assert both_a == sorted(both_a)
    for a, b in zip(both_a, both_b, strict=True):
        assert ids_a[a] == ids_b[b]
        assert ids_a[:a].count(ids_a[a]) == ids_b[:b].count(ids_b[b])
    for name in "abcd":
        assert sum(ids_a[a] == name for a in both_a) == min(ids_a.count(name), ids_b.count(name))


def test_accuracy_is_nothing_on_a_tie() -> None:
    values = align_policies([scored("a", [1.0, 0.0, -1.0])]).values("accuracy")["a"]
    assert values[[0, 2]].tolist() == [1.0, 0.0]
    assert np.isnan(values[1])


@pytest.mark.parametrize("metric", METRICS)
def test_like_settings_may_be_subtracted(metric: str) -> None:
    assert refusal(SETTINGS, SETTINGS, metric) is None


@pytest.mark.parametrize(
    ("field", "refused"),
    [
        ("reference", {"margins", "margins_nats", "loss", "chosen_rewards", "rejected_rewards"}),
        ("template", {"margins", "margins_nats", "loss", "chosen_rewards", "rejected_rewards"}),
        ("truncation", {"margins", "margins_nats", "loss", "chosen_rewards", "rejected_rewards"}),
        ("dtype", {"margins", "margins_nats", "loss", "chosen_rewards", "rejected_rewards"}),
        ("beta", {"margins", "loss", "chosen_rewards", "rejected_rewards"}),
        ("loss", {"loss"}),
    ],
)
def test_unlike_settings_refuse_what_rests_on_them(field: str, refused: set[str]) -> None:
    other = replace(SETTINGS, **{field: 0.5 if field == "beta" else "other"})
    assert {metric for metric in METRICS if refusal(SETTINGS, other, metric)} == refused


def test_a_better_policy_is_told_apart_and_equals_are_not() -> None:
    aligned = align_policies(policies(0, 400, {"weak": 0.0, "good": 0.6, "twin": 0.62}))
    found = compare_policies(aligned, baseline="weak")
    tied = {item["policy"]: item["tied"] for item in found["versus_best"]["accuracy"]}
    assert found["best"] in ("good", "twin")
    assert tied["weak"] is False
    assert sum(tied.values()) == 1
    assert {item["policy"] for item in found["versus_baseline"]["margins"]} == {"good", "twin"}
    assert all(item["mean"] > 0 for item in found["versus_baseline"]["accuracy"])
    assert "cannot be told from it" in found["sentence"]
    assert "weak is worse" in found["sentence"]
    assert "Against weak, " in found["sentence"]


def test_the_result_is_strict_json() -> None:
    found = compare_policies(align_policies([scored("flat", [0.0, 0.0]), scored("a", [1.0, -1.0])]), baseline="flat")
    json.dumps(found, allow_nan=False)


def test_slices_have_levels_for_every_policy_and_their_own_clusters() -> None:
    columns = {"lang": ["de", "fr", None, "de"]}
    prompts = ["p", "q", "r", "p"]
    made = [
        scored(name, nats, prompts=prompts, slices=columns) for name, nats in (("a", [1, 2, 3, 4]), ("b", [-1] * 4))
    ]
    found = compare_policies(align_policies(made), baseline="a")["slices"]["lang"]
    assert found["cut"] == "each of its values"
    assert {name: group["pairs"] for name, group in found["groups"].items()} == {"de": 2, "fr": 1, "(no value)": 1}
    german = found["groups"]["de"]["policies"]
    assert german["a"]["margins_nats"]["mean"] == 2.5
    assert german["a"]["margins_nats"]["ci95"] is None, "one prompt is one cluster"
    assert german["b"]["loss"]["mean"] == pytest.approx(np.log1p(np.exp(0.1)))
    assert german["b"]["versus_baseline"]["mean"] == -1.0


def test_won_and_lost_rows_add_up() -> None:
    aligned = align_policies([scored("a", [1, 1, -1, -1, 0]), scored("b", [1, -1, 1, -1, 1])])
    item = compare_policies(aligned, baseline="a")["versus_baseline"]["accuracy"][0]
    assert (item["won"], item["lost"], item["both_right"], item["both_wrong"]) == (1, 1, 1, 1)
    assert item["n"] == 4


def test_unlike_things_are_not_subtracted_but_accuracy_is() -> None:
    a, b = scored("a", [1, -1, 2]), scored("b", [2, 1, 2], settings=replace(SETTINGS, beta=0.5))
    found = compare_policies(align_policies([a, b]), baseline="a")["versus_baseline"]
    assert found["margins"][0]["mean"] is None
    assert "β" in found["margins"][0]["reason"]
    assert found["margins_nats"][0]["mean"] is not None
    assert found["accuracy"][0]["mean"] is not None


def test_only_ties_are_said_to_be_ties() -> None:
    found = compare_policies(align_policies([scored("same", [0.0, 0.0])]))
    assert found["best"] is None
    assert "tie" in found["sentence"]


def test_a_baseline_of_ties_is_said_to_be_one() -> None:
    """As the reference itself is: nothing can be said of differences to it, least of all that there are none."""
    found = compare_policies(
        align_policies([scored("base", [0.0] * 30), scored("dpo", [1.0] * 25 + [-1.0] * 5)]), baseline="base"
    )
    assert found["versus_baseline"]["accuracy"][0]["mean"] is None
    assert "base ties on every pair, so no accuracy can be set against it." in found["sentence"]
    assert "beyond noise" not in found["sentence"]
    assert "highest" not in found["sentence"], "only one policy ranks anything"


def test_a_baseline_that_shares_no_ranked_pair_is_not_called_equal() -> None:
    halves = scored("base", [0.0] * 10 + [1.0] * 10), scored("dpo", [1.0] * 10 + [0.0] * 10)
    found = compare_policies(align_policies(halves), baseline="dpo")["sentence"]
    assert "beyond noise" not in found
    assert (
        "No pair is without a tie in both base and another."
        in compare_policies(align_policies(halves[::-1]), "base")["sentence"]
    )


def test_equal_rankings_do_not_make_the_smallest_differences_visible() -> None:
    nats = [1.0] * 25 + [-1.0] * 5
    found = compare_policies(align_policies([scored("a", nats), scored("b", [2.0 * x for x in nats])]), baseline="a")
    assert "difference of 0.0 points" not in found["sentence"]
    assert "a true difference of 26.2 points" in found["sentence"]
    few = compare_policies(align_policies([scored("a", [1.0, -1.0]), scored("b", [2.0, -1.0])]))
    assert "true difference" not in few["sentence"]


def test_chance_is_named() -> None:
    aligned = align_policies([scored("coin", [1.0, -1.0] * 20)])
    assert "cannot be told from guessing" in compare_policies(aligned)["sentence"]
    assert "guessing would do better" in compare_policies(align_policies([scored("bad", [-1.0] * 40)]))["sentence"]


@pytest.mark.parametrize("nats", [[0.0], [1.0, 2.0, 3.0], [-5.0, 1e6], list(range(-50, 50))])
def test_every_margin_falls_in_one_bin(nats: list[float]) -> None:
    policy = scored("a", nats)
    edges = margin_edges([policy])
    assert edges[0] <= 0.0 <= edges[-1]
    assert np.all(np.diff(edges) > 0)
    assert sum(counted(policy.margins, edges)) == len(nats)
