"""Packs hold every response token exactly once, stay within their budget, and never depend on chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_score.logps.plan import fill, group_size, lay_out, plan, prompt_groups
from dpo_score.pairs.records import TokenSequence
from tests.logps.sequences import awkward, visible

HH = Path(__file__).parents[2].parent / "shared" / "data" / "hh_harmless_600.parquet"


def sequences_of(shapes):
    return [TokenSequence(np.full(p, p, np.int32), np.arange(r, dtype=np.int32)) for p, r in shapes]


shapes = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=40)


@given(shapes, st.integers(1, 100))
def test_every_sequence_is_in_one_pack_and_no_pack_is_too_large(shapes, budget):
    sequences = sequences_of(shapes)
    packs = plan(sequences, budget)
    assert sorted(i for pack in packs for i in pack) == list(range(len(sequences)))
    for pack in packs:
        members = [sequences[i] for i in pack]
        largest = max(group_size([members[i] for i in group]) for group in prompt_groups(members))
        assert len(lay_out(members).ids) <= max(budget, largest)


@given(shapes, st.integers(1, 100))
def test_the_plan_is_the_same_every_time(shapes, budget):
    assert plan(sequences_of(shapes), budget) == plan(sequences_of(shapes), budget)


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 100))
def test_never_more_bins_than_first_fit_decreasing(sizes, budget):
    bins: list[int] = []
    for size in sorted(sizes, reverse=True):
        for i, used in enumerate(bins):
            if used + size <= budget:
                bins[i] += size
                break
        else:
            bins.append(size)
    assert len(fill(sizes, budget)) <= len(bins)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_a_pack_reads_back_as_its_sequences(seed):
    """Following what each scored token may see, from its predecessor back, spells the sequence before it."""
    sequences = awkward(seed)
    layout = lay_out(sequences)
    seen, start = visible(layout), 0
    for sequence, count in zip(sequences, layout.counts, strict=True):
        whole = np.concatenate([sequence.prompt, sequence.response])
        for j, position in enumerate(sequence.scored_positions):
            row = layout.rows[layout.sources[start + j]]
            assert layout.targets[start + j] == whole[position]
            np.testing.assert_array_equal(layout.ids[np.flatnonzero(seen[row])], whole[:position])
            np.testing.assert_array_equal(layout.positions[np.flatnonzero(seen[row])], np.arange(position))
        start += count


def test_a_prompt_and_a_repeated_answer_stand_once():
    prompt, answer = np.arange(10, dtype=np.int32), np.arange(5, dtype=np.int32)
    layout = lay_out([TokenSequence(prompt, answer), TokenSequence(prompt, answer.copy())])
    assert len(layout.ids) == 15
    assert layout.counts == (5, 5)


def test_positions_start_again_behind_the_prompt():
    prompt = np.arange(3, dtype=np.int32)
    layout = lay_out([TokenSequence(prompt, np.array([7, 8])), TokenSequence(prompt, np.array([9]))])
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 3]


def test_empty_prompts_are_not_shared():
    none = np.zeros(0, np.int32)
    assert prompt_groups([TokenSequence(none, np.array([1])), TokenSequence(none, np.array([2]))]) == [(0,), (1,)]


def test_padding_is_a_segment_that_predicts_nothing():
    layout = lay_out([TokenSequence(np.arange(3), np.arange(2))], pad_to=16)
    assert len(layout.ids) == 16
    assert layout.rows.max() < 5
    assert not visible(layout)[:5, 5:].any()
    assert not visible(layout)[5:, :5].any()


@pytest.mark.skipif(not HH.exists(), reason="the shared data is not here")
def test_hh_fills_packs_of_4096_to_97_percent():
    import polars as pl

    rows = pl.read_parquet(HH)
    words = [(len(c.split()), len(r.split())) for c, r in rows.iter_rows()]
    sizes = [4 * max(pair) // 3 + min(pair) // 3 for pair in words]  # prompt + both answers, roughly, in tokens
    packs = fill(sizes, 4096)
    assert sum(sizes) / (4096 * len(packs)) >= 0.97 or len(packs) == -(-sum(sizes) // 4096)
