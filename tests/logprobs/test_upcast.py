"""A widened model is the fp32 model, one layer at a time, and is itself again afterwards."""

from __future__ import annotations

import pytest
import torch

from dpo_score.logprobs.upcast import NARROW, widened
from tests.families import family

IDS = torch.arange(5, 25)[None]


@torch.inference_mode()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@torch.inference_mode()
def hidden(model):
    return model.base_model(input_ids=IDS, use_cache=False).last_hidden_state


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3_moe", "gpt_oss", "mamba", "llava"])
def test_it_computes_what_the_fp32_model_computes(name, dtype):
    narrow = family(name, dtype=dtype)
    wide = family(name, dtype=dtype).float()
    with widened(narrow):
        got = hidden(narrow)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, hidden(wide), atol=2e-5, rtol=1e-5)


def test_the_weights_are_the_same_objects_afterwards():
    model = family("llama", dtype=torch.float16)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    expected = logits(model)
    with widened(model):
        logits(model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert torch.equal(logits(model), expected)


def test_an_error_inside_leaves_the_weights_as_they_were():
    model = family("llama", dtype=torch.float16)

    def fails(*_):
        raise RuntimeError("inside")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="inside"), widened(model):
        logits(model)
    handle.remove()
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_at_most_one_layer_is_wide():
    model = family("llama", dtype=torch.float16, num_hidden_layers=6)
    wide = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(
            lambda *_: wide.append(sum(p.dtype == torch.float32 for p in model.model.layers.parameters()))
        )
    with widened(model):
        logits(model)
    assert wide == [len(list(model.model.layers[0].parameters()))] * 6
