"""Settings are what numerics ask for inside the block, and what they were before it afterwards.

What kept host memory saves is in tests/benchmarks/README.md: how many pages a heap faults in depends on all that was
ever allocated in it, so no test counts them.
"""

from __future__ import annotations

import pytest
import torch

from dpo_score.logprobs import torch_settings
from dpo_score.logprobs.torch_settings import KEEP, REDUCED, USUAL, exact_cuda_products

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


class Heard:
    """Stands for glibc and notes what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[int, int]] = []

    def mallopt(self, name: int, value: int) -> int:
        self.said.append((name, value))
        return 1


def test_thresholds_are_raised_inside_and_lowered_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    monkeypatch.setattr(torch_settings, "_glibc", lambda: heard)

    def fail_inside() -> None:
        with torch_settings.host_memory_kept():
            assert heard.said == list(KEEP.items())
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail_inside()
    assert heard.said == [*KEEP.items(), *USUAL.items()]
    assert all(KEEP[name] > USUAL[name] for name in KEEP)


@pytest.mark.skipif(torch_settings._glibc() is None, reason="not glibc: nothing to keep")
@pytest.mark.parametrize("thresholds", [KEEP, USUAL], ids=["keep", "usual"])
def test_glibc_takes_these_values(thresholds: dict[int, int]) -> None:
    libc = torch_settings._glibc()
    try:
        assert all(libc.mallopt(name, value) == 1 for name, value in thresholds.items())
    finally:
        torch_settings._set(libc, USUAL)


def test_where_there_is_no_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_settings, "_glibc", lambda: None)
    with torch_settings.host_memory_kept() as nothing:
        assert nothing is None
