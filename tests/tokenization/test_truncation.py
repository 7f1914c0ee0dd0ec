"""Where the answer begins, and what a cut leaves, against slow twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_score.data.types import NOWHERE, EncodedPair, Pair, Problem, TokenIds
from dpo_score.tokenization.truncation import SideLimits, boundary, cut, cut_apart, scored_count, shared_ids

id_lists = st.lists(st.integers(0, 3), max_size=12)


def ids(values: Any) -> Any:
    return np.array(list(values), dtype=np.int32)


def tokens(n: int, c: int, r: int, **masks: Any) -> TokenIds:
    return TokenIds(ids(range(n)), ids(range(100, 100 + c)), ids(range(200, 200 + r)), **masks)


@given(id_lists, id_lists, id_lists)
def test_the_boundary_is_the_shorter_shared_prefix(p: list[int], pc: list[int], pr: list[int]) -> None:
    def shared(a: list[int], b: list[int]) -> int:
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    assert shared_ids(ids(p), ids(pc)) == shared(p, pc)
    assert boundary(ids(p), ids(pc), ids(pr)) == min(shared(p, pc), shared(p, pr))


def sequence(found: TokenIds, side: Any) -> tuple[list[int], list[int]]:
    kept = EncodedPair(Pair(NOWHERE, "", "", ""), found).sequence(side)
    return [*kept.prompt, *kept.response], kept.scored_positions.tolist()


@given(n=st.integers(0, 8), c=st.integers(1, 8), r=st.integers(1, 8), limit=st.integers(2, 12), end=st.booleans())
def test_a_cut_leaves_the_slice_and_its_completion_mask(n: int, c: int, r: int, limit: int, end: bool) -> None:
    """The twin: slice the whole sequence and its 0/1 mask, as TRL's collator does."""
    whole = tokens(n, c, r)
    found = cut(whole, limit, "keep_end" if end else "keep_start")
    if isinstance(found, Problem):
        assert found.code == "prompt_too_long"
        assert n >= limit
        assert not end
        return
    part = slice(-limit, None) if end else slice(None, limit)
    for side, answer, truncated in (
        ("chosen", whole.chosen, found.chosen_truncated),
        ("rejected", whole.rejected, found.rejected_truncated),
    ):
        flat = [*whole.prompt, *answer]
        mask = ([0] * n + [1] * len(answer))[part]
        assert sequence(found, side) == (flat[part], [i for i, scored in enumerate(mask) if scored and i > 0])
        assert truncated is (len(flat) > limit)


def test_nothing_is_cut_without_a_limit_or_within_it() -> None:
    whole = tokens(3, 4, 5)
    for found in (cut(whole, None, "keep_start"), cut(whole, 8, "reject")):
        assert isinstance(found, TokenIds)
        assert found is whole
        assert not found.chosen_truncated


@pytest.mark.parametrize(("limit", "code"), [(3, "prompt_too_long"), (7, "too_long")])
def test_reject_rejects(limit: int, code: str) -> None:
    found = cut(tokens(3, 4, 5), limit, "reject")
    assert isinstance(found, Problem)
    assert found.code == code


def test_masks_are_cut_along() -> None:
    mask = np.array([True, False, True, True])
    found = cut(tokens(2, 4, 1, chosen_mask=mask, prompt_mask=np.array([False, True])), 4, "keep_start")
    assert isinstance(found, TokenIds)
    assert found.chosen_mask is not None
    assert found.chosen_mask.tolist() == [True, False]
    assert sequence(found, "chosen") == ([0, 1, 100, 101], [1, 2])


@pytest.mark.parametrize(
    ("prompt", "prompt_mask", "side", "mask", "count"),
    [
        (2, None, 3, None, 3),
        (0, None, 3, None, 2),
        (0, None, 1, None, 0),
        (0, None, 3, [False, True, False], 1),
        (0, None, 3, [True, False, False], 0),
        (2, [True, True], 2, [False, True], 2),
    ],
)
def test_scored_tokens_are_counted_without_the_very_first(
    prompt: int, prompt_mask: Any, side: int, mask: Any, count: int
) -> None:
    masks = [None if m is None else np.array(m) for m in (prompt_mask, mask)]
    assert scored_count(ids(range(prompt)), masks[0], ids(range(side)), masks[1]) == count


@given(
    sizes=st.tuples(*3 * [st.integers(0, 8)]),
    most=st.tuples(*2 * [st.none() | st.integers(1, 9)]),
    end=st.booleans(),
)
def test_an_encoder_and_its_decoder_are_cut_apart(sizes: Any, most: Any, end: bool) -> None:
    """The twin: slice each list and its mask by its own limit."""
    whole = tokens(*sizes, prompt_mask=np.arange(sizes[0]) % 2 == 0, chosen_mask=np.arange(sizes[1]) % 3 == 0)
    found = cut_apart(whole, SideLimits(*most), "keep_end" if end else "keep_start")
    assert isinstance(found, TokenIds)

    def part(values: Any, limit: int | None) -> list[Any]:
        return list(values) if limit is None else list(values)[-limit:] if end else list(values)[:limit]

    for name, limit in (("prompt", most[0]), ("chosen", most[1]), ("rejected", most[1])):
        assert list(getattr(found, name)) == part(getattr(whole, name), limit)
        mask = getattr(whole, f"{name}_mask")
        assert mask is None or list(getattr(found, f"{name}_mask")) == part(mask, limit)
    over = [limit is not None and size > limit for size, limit in zip(sizes, (most[0], *2 * [most[1]]), strict=True)]
    assert (found.chosen_truncated, found.rejected_truncated) == (over[0] or over[1], over[0] or over[2])
