"""Columns in groups: every row in one, numbers in bins that say what they hold, rare texts together."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_score.metrics.groups import (
    BINS,
    DISTINCT,
    EMPTY,
    MOST,
    NO_VALUE,
    OTHERS,
    by_length,
    cut,
    group_numbers,
    group_texts,
    numbered,
)


def groups(column: list[object], type_: pa.DataType | None = None) -> dict[str, list[int]]:
    """group → its rows, in the order of the groups; empty ones left out."""
    found = cut(pa.chunked_array([pa.array(column, type_)]))
    rows = {name: np.flatnonzero(found.codes == place).tolist() for place, name in enumerate(found.names)}
    return {name: held for name, held in rows.items() if held}


def test_few_numbers_are_groups_of_their_own_in_their_order() -> None:
    assert groups([10, 2, None, 2]) == {"2": [1, 3], "10": [0], NO_VALUE: [2]}
    assert groups([0.5, -1.25, math.nan, 0.5]) == {"-1.25": [1], "0.5": [0, 3], NO_VALUE: [2]}


def test_many_numbers_are_cut_at_their_quartiles_and_named_by_what_is_inside() -> None:
    assert {name: len(rows) for name, rows in groups(list(range(100))).items()} == {
        "0 to 24": 25,
        "25 to 49": 25,
        "50 to 74": 25,
        "75 to 99": 25,
    }
    assert group_numbers(np.arange(100.0)).how == "bins between its quartiles"


def test_bins_whose_short_names_are_alike_are_spelt_out() -> None:
    values = 1.0 + np.arange(40) * 1e-9
    found = group_numbers(values)
    assert len(set(found.names)) == len(found.names)
    assert found.names[0] == "1 to 1.000000009"


def test_few_numbers_whose_short_names_are_alike_are_spelt_out() -> None:
    assert groups([20231.1, 20231.2, 5.0, 20231.1]) == {"5": [2], "20231.1": [0, 3], "20231.2": [1]}


def test_whole_numbers_beyond_what_floats_hold_are_cut_too() -> None:
    assert {name: len(rows) for name, rows in groups([2**60, 5, 2**60 + 1]).items()} == {"5": 1, str(2**60): 2}


def test_a_value_that_most_rows_share_is_in_one_bin() -> None:
    values = np.array([7.0] * 500 + [float(i) for i in range(20)])
    found = group_numbers(values)
    assert len(np.unique(found.codes[values == 7.0])) == 1
    assert found.codes.max() < len(found.names) - 1


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=200))
@settings(max_examples=100, deadline=None)
def test_bins_hold_every_number_once_and_follow_each_other(values: list[float]) -> None:
    numbers = np.array(values)
    found = group_numbers(numbers)
    assert ((found.codes >= 0) & (found.codes < len(found.names))).all()
    assert (np.isnan(numbers) == (found.codes == len(found.names) - 1)).all()
    bins = [numbers[found.codes == place] for place in range(len(found.names) - 1)]
    filled = [held for held in bins if len(held)]
    assert len(filled) == len(bins), "no bin is empty"
    assert all(low.max() < high.min() for low, high in itertools.pairwise(filled))
    assert len(set(found.names)) == len(found.names)
    assert len(bins) <= max(DISTINCT, BINS)


def test_texts_stand_in_order_and_the_missing_ones_apart() -> None:
    assert groups(["b", "a", None, "b", ""]) == {"(empty)": [4], "a": [1], "b": [0, 3], NO_VALUE: [2]}


def test_of_many_texts_the_rare_ones_are_pooled() -> None:
    texts = [f"t{i:03}" for i in range(MOST) for _ in range(2)] + [f"rare {i}" for i in range(70)]
    found = group_texts(texts)
    pooled = found.names.index(OTHERS)
    assert int((found.codes == pooled).sum()) == 70
    assert found.how == f"the {MOST} most frequent of its 100 values"


def test_a_text_that_reads_like_the_pool_is_in_the_pool() -> None:
    found = group_texts([OTHERS, OTHERS, "a", None])
    assert len(set(found.names)) == len(found.names)
    assert [found.names[code] for code in found.codes] == [OTHERS, OTHERS, "a", NO_VALUE]


def test_only_texts_are_quoted() -> None:
    columns: list[list[object]] = [["a"], [["a"]], [{"k": 1}], [1], [0.5], [True]]
    assert [cut(pa.chunked_array([pa.array(column)])).quotes for column in columns] == [True] * 3 + [False] * 3


def test_numbered_names_keep_what_is_no_text_of_the_data() -> None:
    assert numbered(("a", "b", EMPTY, OTHERS, NO_VALUE)) == ("group 1", "group 2", EMPTY, OTHERS, NO_VALUE)


def test_long_texts_are_cut() -> None:
    (name,) = groups(["x" * 500, "x" * 500])
    assert len(name) == 80


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([True, False, None], {"false": [1], "true": [0], NO_VALUE: [2]}),
        ([["a", "b"], [], None], {"(empty)": [1], "a, b": [0], NO_VALUE: [2]}),
        ([{"k": 1}, None], {'{"k": 1}': [0], NO_VALUE: [1]}),
        ([None, None], {NO_VALUE: [0, 1]}),
    ],
)
def test_other_types_are_shown_as_text(column: list[object], expected: dict[str, list[int]]) -> None:
    assert groups(column) == expected


def test_lengths_double() -> None:
    found = by_length(np.array([1.0, 32.0, 33.0, 2048.0, 2049.0, math.nan]))
    assert [found.names[code] for code in found.codes] == [
        "up to 32",
        "up to 32",
        "33 to 64",
        "1025 to 2048",
        "over 2048",
        NO_VALUE,
    ]
