"""Score tables as arrays: what a slice may and may not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dpo_score.metrics.arrays import without_texts
from dpo_score.metrics.compare import AlignedPolicies, align_policies, compare_policies
from dpo_score.metrics.gate import failed_conditions, parse_condition
from dpo_score.metrics.summary import summarise
from tests.metrics.scored import scored
from tests.metrics.test_summary import scores

MANY = [f"s{i % 40:02d}" for i in range(400)]


def aligned(subsets: list[str | None], **slices: list[Any]) -> AlignedPolicies:
    draw = np.random.default_rng(3)
    nats = np.where(draw.random(len(subsets)) < 0.7, 1.0, -1.0)
    return align_policies([scored("x", nats.tolist(), subsets=subsets, slices=slices)])


@pytest.mark.parametrize("subsets", [MANY, [None] * 5 + ["q"] * 5 + ["p"] * 5])
@pytest.mark.parametrize("label", ["subset", "dataset"])
def test_a_slice_by_subset_or_data_set_changes_neither(subsets: list[str | None], label: str) -> None:
    columns = {"subset": subsets, "dataset": ["d"] * len(subsets)}
    plain, sliced = compare_policies(aligned(subsets)), compare_policies(aligned(subsets, **{label: columns[label]}))
    assert sliced["subsets"] == plain["subsets"]
    assert list(sliced["subsets"]["subset"]) == sorted({name for name in subsets if name})
    assert sliced["slices"][label]["groups"] == plain["subsets"][label]


def test_conditions_find_every_subset_by_either_name() -> None:
    for text in ("accuracy[s39] < 1.01", "accuracy[subset=s39] < 1.01"):
        assert failed_conditions(parse_condition(text), aligned(MANY, subset=MANY), None)
    worst = parse_condition("accuracy[worst_subset].high < 0.99")
    assert failed_conditions(worst, aligned(MANY, subset=MANY), None) == failed_conditions(worst, aligned(MANY), None)


def test_a_summary_by_subset_has_the_same_subsets_and_means() -> None:
    subsets = [*MANY[:50], None]
    table = scores([1.0, -1.0, 1.0] * 17, subset=subsets)
    plain, sliced = summarise([table]), summarise([table], slices=["subset", "length"])
    assert sliced["subsets"] == plain["subsets"]
    assert sliced["macro"]["subsets"] == plain["macro"]["subsets"]
    assert list(sliced["slices"]) == list(sliced["slice_cuts"]) == ["subset", "length"]
    assert {name: cell["scored"] for name, cell in sliced["slices"]["subset"].items()} == {
        name: MANY[:50].count(name) for name in MANY[:40]
    }
    assert "without one are in none" in sliced["slice_cuts"]["subset"]["how"]


def test_groups_of_texts_can_be_had_without_the_texts() -> None:
    columns = {
        "said": ["how do I", None, "", "good dog"],
        "depth": [1, 2, 3, 4],
        "safe": [True, False, None, True],
        "marks": [["no_eos"], [], ["no_eos"], None],
    }
    (policy,) = aligned(["a", "b", "a", "b"], **columns).policies
    rows = without_texts(policy.rows.take(np.arange(4)))
    shown = {name: rows.present(name) for name in columns}
    assert shown == {
        "said": ["(empty)", "group 1", "group 2", "(no value)"],
        "depth": ["1", "2", "3", "4"],
        "safe": ["false", "true", "(no value)"],
        "marks": ["(empty)", "no_eos", "(no value)"],
    }
    assert rows.present("subset") == ["a", "b"]
    assert rows.groupings["said"] == "each of its values; numbered"
    assert rows.labels["said"].tolist() == policy.rows.labels["said"].tolist()
