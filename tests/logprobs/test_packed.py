"""The fast path's own machinery: which layers are compiled, and that compiled layers change nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_score.data.types import TokenSequence
from dpo_score.logprobs import packed as fast
from dpo_score.logprobs.lm_head import Fold
from dpo_score.logprobs.noise_floor import noise_floor
from dpo_score.logprobs.numerics import _can_compile
from dpo_score.logprobs.packed import PackedPath, decoder_layers
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.models.parts import model_parts
from tests.families import family
from tests.logprobs.engine import numerics_for, sums
from tests.logprobs.sequences import awkward


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


LARGEST = {"bfloat16": 0.1, "float16": 0.0125}
"""Nats a token: 32 units of the format's last place, for logits of up to about ten."""


@pytest.mark.parametrize("kernel", ["bmm", "sdpa"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "mistral", "gemma3_text"])
def test_in_16_bits_fast_and_plain_agree_and_are_as_near_to_fp32(name, dtype, kernel):
    """The fast path's error against fp32 arithmetic is at most 1.5 times the plain path's, as verify.py asks of it."""
    model, twin = (family(name, dtype=getattr(torch, dtype)) for _ in range(2))
    exact = token_logps(twin.float(), numerics_for(twin, "plain"))
    fast = token_logps(model, numerics_for(model, "fast", dtype=dtype, kernel=kernel))
    plain = token_logps(model, numerics_for(model, "plain", dtype=dtype))
    assert np.abs(fast - plain).max() <= LARGEST[dtype]
    assert np.std(fast - exact) <= 1.5 * np.std(plain - exact)
    assert np.std(plain - exact) > 1e-5, "the formats differ, or nothing is compared"


def token_logps(model, numerics):
    return np.concatenate([result.token_logps for result in PairScorer(model, numerics).score(awkward())])


@pytest.mark.parametrize(("device_kind", "padded"), [("cpu", [49, 79]), ("cuda", [64, 128])])
def test_only_a_gpu_pads_and_to_a_bucket_not_to_the_whole_budget(monkeypatch, device_kind, padded):
    model = family("llama")
    sizes = []
    kept = fast.lay_out
    monkeypatch.setattr(fast, "lay_out", lambda *args: sizes.append(kept(*args)) or sizes[-1])
    path = PackedPath(model_parts(model), numerics_for(model, "fast", device_kind=device_kind, batch_tokens=512))
    packs = [awkward()[:9], [awkward()[10]]]
    values = [value["logp"] for pack in packs for value in path.compute(pack)]
    assert [len(pack.ids) for pack in sizes] == padded
    plain = PairScorer(model, numerics_for(model, "plain")).score([s for pack in packs for s in pack])
    np.testing.assert_allclose([v.sum() for v in values], sums(plain), atol=1e-4)


def test_half_of_a_pack_that_did_not_fit_is_smaller_than_the_whole():
    model = family("llama")
    path = PackedPath(model_parts(model), numerics_for(model, "fast", device_kind="cuda", batch_tokens=4096))
    whole = [TokenSequence(np.arange(200, dtype=np.int32), np.full(50, i, np.int32)) for i in range(70)]
    assert path._padded_size(whole) == 3840
    assert path._padded_size(whole[:35]) == 2048


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


@pytest.mark.slow
@pytest.mark.skipif(not _can_compile("cpu"), reason="no C++ compiler here")
def test_a_compiled_job_in_16_bits_compiles_its_head_too(monkeypatch):
    folded = []
    kept = Fold.add_products
    monkeypatch.setattr(Fold, "add_products", lambda fold, *given: folded.append(1) or kept(fold, *given))
    model = family("llama", dtype=torch.bfloat16)
    eager = numerics_for(model, "fast", dtype="bfloat16")
    difference = token_logps(model, replace(eager, compile=True)) - token_logps(model, eager)
    assert folded
    assert np.abs(difference).max() <= LARGEST["bfloat16"]
