"""Shared attention against a dense masked softmax in float64, and the CUDA paths' tables against the same mask."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from dpo_score.logprobs.attention import flash_flex as attention_gpu
from dpo_score.logprobs.attention import interface as attention
from dpo_score.logprobs.attention import sdpa as attention_sdpa
from dpo_score.logprobs.attention.bmm import bmm_attention
from dpo_score.logprobs.attention.sdpa import CpuPack
from dpo_score.logprobs.packing import BUCKETS, lay_out
from tests.families import family
from tests.logprobs.sequences import awkward, visible


def dense(query, key, value, mask, scale, softcap, sinks):
    """softmax(cap·tanh(scale·q·k / cap) + mask) v with an optional sink logit per head, term by term."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = query @ key.transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    probs = torch.softmax(scores, -1)[..., : mask.shape[1]]
    return (probs @ value).transpose(0, 1)


def states(heads, key_heads, T, D, E, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, T, D), (key_heads, T, D), (key_heads, T, E))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("window", [0, 1, 5, 16, 33, 500])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("heads", "key_heads", "E"), [(4, 2, 8), (3, 3, 8), (6, 1, 12)])
def test_equals_dense_masked_attention(window, softcap, sinks, heads, key_heads, E):
    pack = lay_out(awkward(longest=150))
    query, key, value = states(heads, key_heads, len(pack.ids), 8, E)
    logits = torch.linspace(-2, 2, heads) if sinks else None
    got = bmm_attention(query, key, value, pack.segments, 0.3, window, softcap, logits)
    expected = dense(query, key, value, torch.from_numpy(visible(pack, window)), 0.3, softcap, logits)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 5, 16, 33, 500])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("most", [attention_sdpa.MASK, 2])
def test_fused_kernel_equals_dense_masked_attention(window, heads, key_heads, most, monkeypatch):
    monkeypatch.setattr(attention_sdpa, "MASK", most)
    monkeypatch.setattr(attention_sdpa, "LEAST_QUERIES", 64)
    pack = lay_out(awkward(longest=150))
    query, key, value = states(heads, key_heads, len(pack.ids), 8, 8)
    got = CpuPack(pack).attend(query[None], key[None], value[None], None, 0.3, window, 0.0)[0]
    expected = dense(query, key, value, torch.from_numpy(visible(pack, window)), 0.3, 0.0, None)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("softcap", "sinks", "E"), [(2.0, False, 8), (0.0, True, 8), (0.0, False, 12)])
def test_what_the_fused_kernel_lacks_goes_to_products(softcap, sinks, E):
    pack = lay_out(awkward())
    query, key, value = states(4, 2, len(pack.ids), 8, E)
    logits = torch.linspace(-2, 2, 4) if sinks else None
    got = CpuPack(pack).attend(query[None], key[None], value[None], logits, 0.3, 5, softcap)[0]
    expected = dense(query, key, value, torch.from_numpy(visible(pack, 5)), 0.3, softcap, logits)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)


def test_16_bits_are_as_close_as_their_format_allows():
    pack = lay_out(awkward())
    query, key, value = states(4, 2, len(pack.ids), 8, 8, torch.bfloat16)
    fused = CpuPack(pack).attend(query[None], key[None], value[None], None, 0.3, 0, 0.0)[0]
    expected = dense(query, key, value, torch.from_numpy(visible(pack)), 0.3, 0.0, None)
    for got in (bmm_attention(query, key, value, pack.segments, 0.3), fused):
        assert (got.double() - expected).abs().max() < 0.03


def test_long_rows_are_blocked(monkeypatch):
    """With a bound of a few scores the blocks are small and the values the same."""
    pack = lay_out(awkward(longest=300))
    query, key, value = states(4, 2, len(pack.ids), 8, 8)
    whole = bmm_attention(query, key, value, pack.segments, 0.3)
    monkeypatch.setattr("dpo_score.logprobs.attention.bmm.SCORES", 1)
    torch.testing.assert_close(bmm_attention(query, key, value, pack.segments, 0.3), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 20])
def test_flex_mask_is_the_pack_mask(window):
    """The analytic block mask, run through torch's own reference implementation of FlexAttention."""
    pack = lay_out(awkward(longest=150), pad_to=384)
    query, key, value = states(4, 2, len(pack.ids), 16, 16)
    prepared = attention_gpu.CudaPack.of(pack, torch.device("cpu"), "flex")
    sinks = torch.linspace(-1, 1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # uncompiled here, as torch says
        got = prepared._flex(query[None], key[None], value[None], sinks, 0.3, window, 2.0)[0]
    expected = dense(query, key, value, torch.from_numpy(visible(pack, window)), 0.3, 2.0, sinks)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)


def test_block_table_touches_every_visible_block_and_no_later_one():
    pack = lay_out(awkward(longest=400))
    counts, order = attention_gpu.block_table(pack)
    seen, size = visible(pack), attention_gpu.FLEX_BLOCK
    for q in range(len(counts)):
        listed = set(order[q, : counts[q]])
        needed = {k for k in range(len(counts)) if seen[q * size : (q + 1) * size, k * size : (k + 1) * size].any()}
        assert needed <= listed <= set(range(q + 1))


def test_flex_is_compiled_for_every_size_of_a_pack(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda _, dynamic: lambda: torch._dynamo.config.recompile_limit)
    assert attention_gpu.flex.__wrapped__()() >= 4 * BUCKETS


def test_variable_length_items_are_the_segments():
    """Gathered keys with cumulative lengths: the last query of an item aligns with its last key."""
    pack = lay_out(awkward())
    prepared = attention_gpu.CudaPack.of(pack, torch.device("cpu"), "varlen")
    seen = visible(pack)
    for i, s in enumerate(pack.segments):
        q0, q1 = prepared.queries[i : i + 2].tolist()
        k0, k1 = prepared.keys[i : i + 2].tolist()
        assert (q0, q1) == (s.start, s.start + s.length)
        for q in range(q0, q1):
            bottom_right = prepared.key_index[k0 : k1 - (q1 - 1 - q)].numpy()
            np.testing.assert_array_equal(np.sort(bottom_right), np.flatnonzero(seen[q]))


def test_what_a_layer_asks_for_beyond_the_known_is_refused():
    module = torch.nn.Module()
    query, key, value = (t[None] for t in states(2, 2, 4, 8, 8))
    with pytest.raises(attention.Unshareable, match="mask of its own"):
        attention.forward(module, query, key, value, torch.zeros(4, 4))
    with pytest.raises(attention.Unshareable, match="position_bias"):
        attention.forward(module, query, key, value, None, position_bias=torch.zeros(4, 4))
    with pytest.raises(attention.Unshareable, match="not causal"):
        attention.forward(module, query, key, value, None, is_causal=False)
    with pytest.raises(attention.Unshareable, match="batch of 2"):
        attention.forward(module, query.expand(2, -1, -1, -1), key, value, None)
    with pytest.raises(attention.Unshareable, match="training mode"):
        attention.forward(module, query, key, value, None, dropout=0.1)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_model_gets_its_own_attention_back(name):
    model = family(name)
    before = attention._implementations(model.config)
    with attention.installed(model):
        assert model.config.get_text_config()._attn_implementation == attention.NAME
    assert attention._implementations(model.config) == before
