"""4-bit weights on CPUs stay as they were read, and an adapter is not put over any that did not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dpo_score.errors import ModelError
from dpo_score.models.quantized import keep_four_bits_unpacked, refuse_packed


def four_bits(packed: bool) -> nn.Module:
    """What a layer of bitsandbytes shows of itself."""
    layer = nn.Linear(2, 2)
    layer.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
    layer.weight.quant_state = SimpleNamespace(packing_format_for_cpu=packed)  # type: ignore[attr-defined]
    return nn.Sequential(nn.Linear(2, 2), layer)


def test_packing_is_off_where_it_is_known() -> None:
    model = four_bits(packed=False)
    keep_four_bits_unpacked(model)
    assert model[1].support_avx512bf16_for_cpu is False  # type: ignore[index]
    assert not hasattr(model[0], "support_avx512bf16_for_cpu")  # type: ignore[index]


def test_an_adapter_over_packed_weights_is_refused() -> None:
    refuse_packed(four_bits(packed=False), "lora")
    with pytest.raises(ModelError, match=r"lora is an adapter over 4-bit weights .* has packed"):
        refuse_packed(four_bits(packed=True), "lora")


def test_unpacked_weights_survive_a_state_dict() -> None:
    """The reason: bitsandbytes itself, with and without its packing."""
    layers = pytest.importorskip("bitsandbytes").nn
    layer = layers.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu").eval()
    keep_four_bits_unpacked(layer)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = layer(x)
        layer.state_dict()
        assert torch.equal(layer(x), before)
