"""Settings are what numerics ask for inside the block, and what they were before it afterwards."""

from __future__ import annotations

import pytest
import torch

from dpo_score.logprobs.torch_settings import REDUCED, exact_cuda_products

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(params=["ieee", "tf32"])
def chosen(request):
    """What a program has chosen by torch's settings by operator, after which the older ones cannot be read."""
    kept = MATMUL.fp32_precision
    MATMUL.fp32_precision = request.param
    yield request.param
    MATMUL.fp32_precision = kept


def test_products_on_cuda_are_exact_inside_and_as_asked_for_after(chosen):
    flags = [getattr(MATMUL, name) for name in REDUCED]
    with exact_cuda_products("cuda"):
        assert MATMUL.fp32_precision == "ieee"
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert not any(getattr(MATMUL, name) for name in REDUCED)
    assert MATMUL.fp32_precision == chosen
    assert [getattr(MATMUL, name) for name in REDUCED] == flags


def test_elsewhere_nothing_is_changed():
    flags = [getattr(MATMUL, name) for name in REDUCED]
    with exact_cuda_products("cpu"):
        assert [getattr(MATMUL, name) for name in REDUCED] == flags
