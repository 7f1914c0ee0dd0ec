"""What holds on every path: order, duplicates, progress, stopping, memory running out, 16 bits overflowing."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from dpo_score.data.types import TokenSequence
from dpo_score.errors import ConfigError, Interrupted, ModelError
from dpo_score.logprobs.scorer import PairScorer, token_costs
from dpo_score.logprobs.transfer import Returning
from dpo_score.logprobs.types import SequenceLogps, Unscored
from tests.families import family
from tests.logprobs.engine import numerics_for, sums
from tests.logprobs.sequences import awkward, ids

PATHS = ("plain", "fast")


@pytest.fixture(scope="module")
def llama():
    return family("llama")


def limited(scorer, tokens):
    """A device that runs out of memory above so many tokens."""
    compute = scorer._path.compute

    def fails(sequences):
        if sum(token_costs(sequences)) > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute(sequences)

    scorer._path.compute = fails
    return scorer


@pytest.mark.parametrize("path", PATHS)
def test_values_come_in_input_order_one_per_scored_position(llama, path):
    sequences = awkward()
    results = PairScorer(llama, numerics_for(llama, path)).score(sequences)
    assert [len(r.token_logps) for r in results] == [len(s.scored_positions) for s in sequences]
    backwards = PairScorer(llama, numerics_for(llama, path)).score(sequences[::-1])[::-1]
    np.testing.assert_allclose(sums(results), sums(backwards), atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_equal_plans_give_equal_bits(llama, path):
    first, second = (PairScorer(llama, numerics_for(llama, path)).score(awkward()) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.token_logps.tobytes() == b.token_logps.tobytes()


@pytest.mark.parametrize("path", PATHS)
def test_a_sequence_seen_twice_is_computed_once(llama, path):
    rng = np.random.default_rng(0)
    sequence = TokenSequence(ids(rng, 5), ids(rng, 5))
    scorer = PairScorer(llama, numerics_for(llama, path))
    first, second = scorer.score([sequence, TokenSequence(sequence.prompt.copy(), sequence.response.copy())])
    assert first is second
    assert scorer.forwards == 1


@pytest.mark.parametrize("path", PATHS)
def test_batch_tokens_changes_only_the_last_bits(llama, path):
    small, large = (
        sums(PairScorer(llama, numerics_for(llama, path, batch_tokens=n)).score(awkward())) for n in (16, 4096)
    )
    np.testing.assert_allclose(small, large, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_progress_counts_each_unique_token_once(llama, path):
    seen = []
    sequences = [s for s in awkward() if len(s.scored_positions)]
    PairScorer(llama, numerics_for(llama, path), on_progress=seen.append).score(sequences)
    assert sum(seen) == (12 + 9 + 5 + 13 + 1) + (1 + 7) + 6 + 2 + 80


def test_a_stop_is_heard_between_packs(llama):
    done = []
    scorer = PairScorer(llama, numerics_for(llama, "fast"), on_progress=done.append, should_stop=lambda: len(done) == 1)
    with pytest.raises(Interrupted):
        scorer.score(awkward())
    assert len(done) == 1


@pytest.mark.parametrize("path", PATHS)
def test_out_of_memory_splits_the_pack_and_says_so(llama, path):
    whole = PairScorer(llama, numerics_for(llama, path, batch_tokens=4096)).score(awkward())
    scorer = limited(PairScorer(llama, numerics_for(llama, path, batch_tokens=4096)), tokens=85)
    results = scorer.score(awkward())
    assert scorer.packs_split > 0
    assert "did not fit" in scorer.notes[0]
    np.testing.assert_allclose(sums(results), sums(whole), atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_a_row_too_large_alone_is_refused_alone(llama, path):
    results = limited(PairScorer(llama, numerics_for(llama, path, batch_tokens=4096)), tokens=60).score(awkward())
    refused = [r for r in results if isinstance(r, Unscored)]
    assert [r.code for r in refused] == ["too_large"]
    assert "80 tokens" in refused[0].reason


@pytest.mark.parametrize("path", PATHS)
def test_a_row_on_which_the_code_of_a_model_fails_ends_its_model_in_a_sentence(llama, path):
    scorer = PairScorer(llama, numerics_for(llama, path, batch_tokens=64))
    compute = scorer._path.compute

    def fails(sequences):
        if any(len(s.prompt) + len(s.response) == 80 for s in sequences):
            raise IndexError("index 81 is out of range\nwith more lines")
        return compute(sequences)

    scorer._path.compute = fails
    with pytest.raises(ModelError, match=r"failed on \d+ sequences of up to 80 tokens: IndexError: index 81 .*lines"):
        scorer.score(awkward())


def one_behind(model, **changes):
    """A scorer that queues packs as on a GPU."""
    scorer = PairScorer(model, numerics_for(model, "fast", **{"batch_tokens": 8, **changes}))
    scorer.runs_ahead = True
    return scorer


def test_packs_queued_ahead_give_the_bits_and_the_order_of_one_after_the_other(llama):
    told, said = [], []
    ahead = one_behind(llama)
    ahead._on_progress = told.append
    usual = PairScorer(llama, ahead.numerics, on_progress=said.append)
    found, expected = ahead.score(awkward()), usual.score(awkward())
    assert usual.forwards == ahead.forwards > 3
    assert [a.token_logps.tobytes() for a in found] == [b.token_logps.tobytes() for b in expected]
    assert told == said


def test_a_pack_is_queued_before_the_values_of_the_last_are_awaited(llama, monkeypatch):
    scorer, done = one_behind(llama), []
    start, arrived = scorer._path.start, Returning.arrived
    lay_out = scorer._path.lay_out
    main = threading.get_ident()

    def laid_out(sequences):
        assert threading.get_ident() != main
        return lay_out(sequences)

    def started(pack):
        done.append("start")
        return start(pack)

    monkeypatch.setattr(scorer._path, "lay_out", laid_out)
    monkeypatch.setattr(scorer._path, "start", started)
    monkeypatch.setattr(Returning, "arrived", lambda self: done.append("arrived") or arrived(self))
    scorer.score(awkward())
    packs = scorer.forwards
    assert done == ["start", *["start", "arrived"] * (packs - 1), "arrived"]


def test_a_queued_pack_that_does_not_fit_is_split_and_the_others_are_not(llama):
    scorer, usual = one_behind(llama), one_behind(llama).score(awkward())
    start, starts = scorer._path.start, []

    def fails(pack):
        starts.append(pack)
        if len(starts) in (2, 3):  # when it is queued, and whole once more
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return start(pack)

    scorer._path.start = fails
    np.testing.assert_allclose(sums(scorer.score(awkward())), sums(usual), atol=1e-5)
    assert scorer.packs_split == 1


def test_a_queued_pack_on_which_the_code_of_a_model_fails_ends_its_model_and_the_thread(llama):
    scorer = one_behind(llama)

    def fails(pack):
        raise IndexError("out of range")

    scorer._path.start = fails
    with pytest.raises(ModelError, match=r"the model's own code failed on .*IndexError: out of range"):
        scorer.score(awkward())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("layout")]


def test_overflow_among_queued_packs_is_redone_as_ever():
    model = overflowing(torch.float16)
    scorer = one_behind(model, batch_tokens=64, dtype="float16")
    usual = PairScorer(model, scorer.numerics)
    found, expected = scorer.score(awkward()), usual.score(awkward())
    assert scorer.forwards > 2
    assert "float32" in {getattr(result, "redone_dtype", None) for result in found}
    for a, b in zip(found, expected, strict=True):
        assert a == b or (a.redone_dtype, a.token_logps.tobytes()) == (b.redone_dtype, b.token_logps.tobytes())


def test_stopping_among_queued_packs_ends_the_thread(llama):
    scorer = one_behind(llama)
    scorer._should_stop = lambda: scorer.forwards > 1
    with pytest.raises(Interrupted):
        scorer.score(awkward())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("layout")]


def test_no_room_to_look_at_the_model_is_an_error_with_ways_out(llama, monkeypatch):
    def full(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("dpo_score.logprobs.scorer.model_parts", full)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM in float32 does not fit on cpu .*--device-map"):
        PairScorer(llama, numerics_for(llama, "fast"))


def test_other_errors_are_not_taken_for_memory(llama):
    scorer = PairScorer(llama, numerics_for(llama, "fast"))

    def breaks(sequences):
        raise RuntimeError("a shape is wrong")

    scorer._path.compute = breaks
    with pytest.raises(ModelError, match="shape"):
        scorer.score(awkward())


def overflowing(dtype):
    """A model whose second layer leaves fp16's range on the tokens of id 7, and stays in fp32's."""
    model = family("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 40.0
        model.model.layers[0].mlp.up_proj.weight.mul_(50)
        model.model.layers[0].mlp.gate_proj.weight.mul_(50)
        model.model.layers[0].mlp.down_proj.weight.mul_(50)
    return model.to(dtype)


@pytest.mark.parametrize("path", PATHS)
def test_a_pack_that_overflows_16_bits_is_redone_in_fp32_and_marked(path):
    model = overflowing(torch.float16)
    before = {name: p.data.clone() for name, p in model.named_parameters()}
    scorer = PairScorer(model, numerics_for(model, path, dtype="float16", batch_tokens=4096))
    results = [r for r in scorer.score(awkward()) if len(r.token_logps)]
    assert {r.redone_dtype for r in results} == {"float32"}
    assert "redone in float32" in scorer.notes[0]
    twin = overflowing(torch.float16).float()
    expected = PairScorer(twin, numerics_for(twin, path, batch_tokens=4096)).score(awkward())
    np.testing.assert_allclose(sums(results), sums([r for r in expected if len(r.token_logps)]), atol=1e-3, rtol=1e-6)
    assert all(torch.equal(p.data, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_in_fp32_is_a_value_of_its_own(path):
    model = family("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.inf
    good = TokenSequence(np.array([1, 2]), np.array([3, 4]))
    bad = TokenSequence(np.array([1, 7]), np.array([3, 4]))
    results = PairScorer(model, numerics_for(model, path)).score([good, bad])
    assert isinstance(results[0], SequenceLogps)
    assert isinstance(results[1], Unscored)
    assert results[1].code == "nonfinite_logp"


def test_an_unknown_statistic_is_named_with_its_neighbour(llama):
    with pytest.raises(ConfigError, match="entropy"):
        PairScorer(llama, numerics_for(llama, "plain"), stats=("entrpy",))


def test_threads_and_fp32_products_are_restored(llama):
    threads, products = torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision
    PairScorer(llama, numerics_for(llama, "fast", threads=threads + 1)).score(awkward())
    assert torch.get_num_threads() == threads
    assert torch.backends.mkldnn.matmul.fp32_precision == products
