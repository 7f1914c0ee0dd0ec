"""Models with a state: a prompt is read once for its answers, and the values are those of each row by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpo_score.data.types import TokenSequence
from dpo_score.logprobs.forked import ForkedPath
from dpo_score.logprobs.numerics import may_fork
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.logprobs.self_check import check_model
from dpo_score.logprobs.types import STATS
from dpo_score.models.parts import model_parts
from tests.families import family
from tests.logprobs.engine import numerics_for
from tests.logprobs.sequences import awkward, ids
from tests.parity.test_fp64 import assert_close, exact_twin

HYBRIDS = ("qwen3_next", "falcon_h1", "lfm2")


@pytest.mark.parametrize("name", HYBRIDS)
def test_equals_float64(name):
    model, sequences = family(name), awkward()
    numerics = numerics_for(model, "fast", batch_tokens=256)
    assert numerics.kernel.forked
    assert check_model(model, numerics).numerics == numerics
    assert_close(PairScorer(model, numerics, STATS).score(sequences), sequences, exact_twin(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_it_is_as_near_to_fp32_as_the_plain_path(dtype):
    model = family("qwen3_next", dtype=getattr(torch, dtype))
    numerics = numerics_for(model, "fast", dtype=dtype)
    assert check_model(model, numerics).numerics == numerics


def test_a_prompt_is_read_once_and_batches_keep_within_the_budget():
    model = family("lfm2")
    path = ForkedPath(model_parts(model), numerics_for(model, "fast", batch_tokens=200))
    rng = np.random.default_rng(0)
    rows = []
    for length in (50, 40, 0, 45, 3, 0):
        prompt = ids(rng, length)
        rows += [TokenSequence(prompt, ids(rng, n)) for n in (9, 20)]
    batches = path.plan(rows)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        members = [rows[i] for i in batch]
        prompts = {s.prompt.tobytes(): len(s.prompt) for s in members}
        longest = max(prompts.values())
        assert len(prompts) * longest + len(members) * max(len(s.response) for s in members) <= 200
        assert longest == 0 or min(prompts.values()) > 0, "empty prompts have no state to go on from"
    home = {i: n for n, batch in enumerate(batches) for i in batch}
    assert all(home[i] == home[i + 1] for i in (0, 2, 6, 8)), "answers of one prompt share a batch"


@pytest.mark.parametrize("name", ["llama", "bloom", "llama4_text"])
def test_models_without_a_state_are_no_candidates(name):
    from transformers import AutoConfig

    assert not may_fork(AutoConfig.for_model(name).to_dict())


def test_a_model_whose_layers_do_not_go_on_from_a_state_takes_the_plain_path():
    model = family("mamba")
    check = check_model(model, numerics_for(model, "fast"))
    assert (check.numerics.path, check.numerics.one_row) == ("plain", False)
