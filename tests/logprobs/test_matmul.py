"""The oneDNN switch is taken only where it is true fp32, and never left behind."""

from __future__ import annotations

import pytest
import torch

from dpo_score.logprobs import matmul as gemm


@pytest.fixture(autouse=True)
def fresh():
    gemm.onednn_is_true_fp32.cache_clear()
    yield
    gemm.onednn_is_true_fp32.cache_clear()


def flag():
    return torch.backends.mkldnn.matmul.fp32_precision


def test_the_flag_is_restored_even_after_an_error():
    before = flag()
    with pytest.raises(KeyError), gemm.onednn(True):
        raise KeyError
    assert flag() == before


def test_products_inside_are_true_fp32():
    a, b = torch.randn(64, 96), torch.randn(96, 80)
    with gemm.onednn(True):
        got = a @ b
    torch.testing.assert_close(got.double(), a.double() @ b.double(), atol=1e-4, rtol=1e-5)


def test_a_processor_with_matrix_tiles_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    before = flag()
    with gemm.onednn(True):
        assert flag() == before
    assert gemm.suffix("cpu", "float32") == ""


def test_a_product_that_is_not_fp32_forbids_it(monkeypatch):
    monkeypatch.setattr(gemm, "_worst_relative_error", lambda: 4e-3)
    assert not gemm.onednn_is_true_fp32()


def test_only_fp32_on_a_cpu_wants_it():
    assert gemm.suffix("cuda", "float32") == gemm.suffix("cpu", "bfloat16") == ""
