"""What of the numerics this machine can do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpo_score.logprobs import matmul as gemm
from dpo_score.logprobs import torch_settings as settings
from dpo_score.logprobs.attention import flash_flex as attention_gpu
from dpo_score.logprobs.numerics import Numerics
from dpo_score.logprobs.torch_settings import in_effect, present

NUMERICS = Numerics("cpu", "cpu", "float32", "fast", "bmm+onednn", False, 4096, 1)


@pytest.mark.parametrize(("true_fp32", "kernel"), [(True, "bmm+onednn"), (False, "bmm")])
def test_products_run_through_onednn_only_where_they_are_true_fp32(
    true_fp32: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "onednn_is_true_fp32", lambda: true_fp32)
    assert in_effect(NUMERICS) == replace(NUMERICS, kernel=kernel)


@pytest.mark.parametrize("kernel", ["sdpa", "model", "model+own-softmax", "flex"])
def test_what_runs_anywhere_stays(kernel: str) -> None:
    assert in_effect(replace(NUMERICS, kernel=kernel)).kernel == kernel


@pytest.mark.parametrize(("here", "kernel"), [(True, "flex"), (False, "varlen")])
def test_a_gpu_without_the_flash_kernel_takes_what_it_has(
    here: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "present", lambda _: here)
    monkeypatch.setattr(attention_gpu, "kernel", lambda: "flex")
    on_gpu = replace(NUMERICS, device="cuda:0", device_kind="cuda", dtype="float16", kernel="varlen")
    assert in_effect(on_gpu).kernel == kernel


def test_which_devices_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert [present(name) for name in ("cpu", "cuda", "cuda:1", "cuda:2", "mps")] == [True, True, True, False, False]
