"""The fast path's own machinery: which layers are compiled, and that compiled layers change nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_score.logps.fast import decoder_layers
from dpo_score.logps.noise import noise_floor
from dpo_score.logps.numerics import _can_compile
from dpo_score.logps.scorer import PairScorer
from tests.families import family
from tests.logps.engine import numerics_for, sums
from tests.logps.sequences import awkward


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "llava"])
def test_decoder_layers_are_the_layers_of_the_text_model(name):
    model = family(name)
    layers = decoder_layers(model.base_model)
    assert len(layers) == model.config.get_text_config().num_hidden_layers
    assert len({type(layer) for layer in layers}) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fast_and_plain_agree_within_what_the_format_allows(dtype):
    model = family("llama", dtype=getattr(torch, dtype))
    results = PairScorer(model, numerics_for(model, "fast", dtype=dtype)).score(awkward())
    plain = PairScorer(model, numerics_for(model, "plain", dtype=dtype)).score(awkward())
    np.testing.assert_allclose(sums(results), sums(plain), atol=1e-4 if dtype == "float32" else 0.5)


@pytest.mark.slow
@pytest.mark.skipif(not _can_compile("cpu"), reason="no C++ compiler here")
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_layers_give_the_same_values(name):
    model = family(name)
    eager = numerics_for(model, "fast")
    expected = PairScorer(model, eager).score(awkward())
    compiled = PairScorer(model, replace(eager, compile=True)).score(awkward())
    np.testing.assert_allclose(sums(compiled), sums(expected), atol=1e-4)
    assert noise_floor(model, eager, awkward(), compiled).logp_max < 1e-4
