"""Log-probabilities against an independent scorer: float64, one sequence at a time, the model's own full logits."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from dpo_score.data.types import TokenSequence
from dpo_score.logprobs.numerics import may_share
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.logprobs.types import STATS, SequenceLogps
from tests.families import OVERRIDES, VISION, family
from tests.logprobs.engine import numerics_for
from tests.logprobs.sequences import awkward, ids

FAMILIES = (*(name for name in OVERRIDES if name != "bert"), *VISION)
PLAIN_ONLY = ("bloom", "mpt", "falcon", "mamba", "qwen3_next", "falcon_h1", "jamba", "lfm2", "llama4_text")
SHARED = tuple(name for name in FAMILIES if name not in PLAIN_ONLY)


def exact_twin(model):
    """The same weights in float64; experts one by one, because grouped products know no float64."""
    twin = copy.deepcopy(model).double()
    twin.set_experts_implementation("eager")
    return twin


def exact(model, sequence):
    """float64 log-probabilities of the scored tokens, and their statistics, straight from the definition."""
    whole = torch.from_numpy(np.concatenate([sequence.prompt, sequence.response]).astype(np.int64))
    with torch.inference_mode():
        logp = torch.log_softmax(model(input_ids=whole[None], use_cache=False).logits[0].double(), -1)
    at = torch.from_numpy(sequence.scored_positions)
    rows = logp[at - 1]
    return {
        "logp": rows[torch.arange(len(at)), whole[at]].numpy(),
        "log_sum_sq_probs": (2 * rows).exp().sum(-1).log().numpy(),
        "entropy": -(rows.exp() * rows).sum(-1).numpy(),
        "top1": (rows.argmax(-1) == whole[at]).double().numpy(),
    }


def assert_close(results, sequences, twin):
    for result, sequence in zip(results, sequences, strict=True):
        assert isinstance(result, SequenceLogps)
        if len(sequence.scored_positions) == 0:
            assert len(result.token_logps) == 0
            continue
        expected = exact(twin, sequence)
        total = float(expected["logp"].sum())
        assert abs(float(result.token_logps.sum(dtype=np.float64)) - total) <= max(1e-4, 2e-7 * abs(total))
        np.testing.assert_allclose(result.token_logps, expected["logp"], atol=1e-4, rtol=0)
        for name in STATS:
            np.testing.assert_allclose(result.stats[name], expected[name], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_path_equals_float64(name):
    model, sequences = family(name), awkward()
    results = PairScorer(model, numerics_for(model, "plain"), STATS).score(sequences)
    assert_close(results, sequences, exact_twin(model))


@pytest.mark.parametrize("name", SHARED)
def test_fast_path_equals_float64(name):
    model, sequences = family(name), awkward()
    results = PairScorer(model, numerics_for(model, "fast"), STATS).score(sequences)
    assert_close(results, sequences, exact_twin(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fast_path_is_a_candidate_exactly_where_it_fits(name):
    assert may_share(family(name).config.to_dict()) == (name in SHARED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_rows_of_8k_tokens(name):
    rng = np.random.default_rng(0)
    prompt = ids(rng, 7000)
    sequences = [TokenSequence(prompt, ids(rng, n)) for n in (1192, 40)]
    model = family(name, max_position_embeddings=16384)
    results = PairScorer(model, numerics_for(model, "fast", batch_tokens=4096), STATS).score(sequences)
    assert_close(results, sequences, exact_twin(model))
