"""The tiled head against the full logits in float64: bias, scale, cap, statistics, tiles of every width."""

from __future__ import annotations

import pytest
import torch

from dpo_score.logps import head as tiled
from dpo_score.logps.anatomy import Head
from dpo_score.logps.head import token_values
from dpo_score.logps.plain import read_logits
from dpo_score.logps.results import STATS


def a_head(bias=False, scale=1.0, cap=None, dtype=torch.float32, plain=True):
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 301, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.mul_(8)
    return Head(linear, linear.weight if plain else None, linear.bias if plain else None, scale, cap)


def some_rows(rows=37, targets=60, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(rows, 16, generator=generator).to(dtype),
        torch.randint(0, rows, (targets,), generator=generator),
        torch.randint(0, 301, (targets,), generator=generator),
    )


def exact(head, hidden, source, target):
    raw = hidden.double() @ head.module.weight.double().T
    raw = (raw + head.module.bias.double() if head.module.bias is not None else raw) * head.scale
    return read_logits((head.cap * torch.tanh(raw / head.cap) if head.cap else raw)[source], target, STATS)


@pytest.mark.parametrize("tile", [(1, 1), (8, 64), (1024, 2048), (5, 301)])
@pytest.mark.parametrize(("bias", "scale", "cap"), [(False, 1.0, None), (True, 0.25, None), (True, 3.0, 5.0)])
@pytest.mark.parametrize("plain", [True, False])
@torch.inference_mode()
def test_equals_full_logits(monkeypatch, tile, bias, scale, cap, plain):
    monkeypatch.setitem(tiled.TILES, "cpu", tile)
    head, rows = a_head(bias, scale, cap, plain=plain), some_rows()
    got, expected = token_values(head, *rows, STATS), exact(head, *rows)
    for name in ("logp", *STATS):
        torch.testing.assert_close(got[name].double(), expected[name].double(), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_vocabulary_entry_of_minus_infinity_is_only_impossible():
    """Some models forbid ids with a bias of −inf, a whole tile of them included."""
    head, (hidden, source, target) = a_head(bias=True), some_rows()
    head.module.bias[:256] = -torch.inf
    target = target % 45 + 256
    got, expected = token_values(head, hidden, source, target, STATS), exact(head, hidden, source, target)
    assert torch.isfinite(got["entropy"]).all()
    for name in ("logp", "log_sum_sq_probs", "entropy"):
        torch.testing.assert_close(got[name].double(), expected[name].double(), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_overflow_is_not_hidden():
    hidden, source, target = some_rows()
    hidden[3] = torch.inf
    got = token_values(a_head(), hidden, source, target)["logp"]
    assert torch.equal(~torch.isfinite(got), source == 3)


@torch.inference_mode()
def test_wide_hidden_states_meet_narrow_weights_in_fp32():
    head, (hidden, source, target) = a_head(dtype=torch.float16), some_rows()
    got, expected = token_values(head, hidden, source, target), exact(head, hidden, source, target)
    torch.testing.assert_close(got["logp"].double(), expected["logp"], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_no_rows_no_values():
    empty = torch.zeros(0, dtype=torch.long)
    assert len(token_values(a_head(), torch.zeros(0, 16), empty, empty, STATS)["entropy"]) == 0
