"""The tiled head against the full logits in float64: bias, scale, cap, statistics, tiles of every width."""

from __future__ import annotations

import pytest
import torch

from dpo_score.logprobs import lm_head as tiled
from dpo_score.logprobs import packed as fast
from dpo_score.logprobs.lm_head import Fold, read_logits, token_values
from dpo_score.logprobs.numerics import _can_compile
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.logprobs.types import STATS
from dpo_score.models.parts import Head
from tests.families import family
from tests.logprobs.engine import numerics_for
from tests.logprobs.sequences import awkward

CPU = torch.device("cpu")


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
        torch.randint(0, rows, (targets,), generator=generator).numpy(),
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
    hidden[source[0]] = torch.inf
    got = token_values(a_head(), hidden, source, target)["logp"]
    assert torch.equal(~torch.isfinite(got), torch.from_numpy(source == source[0]))


@torch.inference_mode()
def test_wide_hidden_states_meet_narrow_weights_in_fp32():
    head, (hidden, source, target) = a_head(dtype=torch.float16), some_rows()
    got, expected = token_values(head, hidden, source, target), exact(head, hidden, source, target)
    torch.testing.assert_close(got["logp"].double(), expected["logp"], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_no_rows_no_values():
    empty = torch.zeros(0, dtype=torch.long)
    assert len(token_values(a_head(), torch.zeros(0, 16), empty.numpy(), empty, STATS)["entropy"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not _can_compile("cpu"), reason="no C++ compiler here")
@pytest.mark.parametrize(("bias", "scale", "cap"), [(False, 1.0, None), (True, 3.0, 5.0)])
@torch.inference_mode()
def test_compiled_code_folds_products_of_16_bits_as_the_eager_one_does(monkeypatch, bias, scale, cap):
    folded = []
    kept = Fold.add_products
    monkeypatch.setattr(Fold, "add_products", lambda fold, *given: folded.append(1) or kept(fold, *given))
    monkeypatch.setitem(tiled.COMPILED_TILES, "cpu", (32, 128))
    head, rows = a_head(bias, scale, cap, dtype=torch.bfloat16), some_rows(dtype=torch.bfloat16)
    if bias:
        head.module.bias[:256] = -torch.inf  # two whole tiles
        rows = (*rows[:2], rows[2] % 45 + 256)
    rows[0][rows[1][0]] = torch.inf  # a row that has overflowed
    got, expected = token_values(head, *rows, compiled=True)["logp"], token_values(head, *rows)["logp"]
    overflowed = rows[1] == rows[1][0]
    torch.testing.assert_close(got[~overflowed], expected[~overflowed], atol=1e-6, rtol=1e-6)
    assert not torch.isfinite(got[overflowed]).any()
    assert len(folded) == 2 * 3, "tiles"


@torch.inference_mode()
def test_what_compiled_code_does_not_know_is_folded_without_it(monkeypatch):
    monkeypatch.delattr(Fold, "add_products")
    token_values(a_head(), *some_rows(), compiled=True)
    halves = a_head(dtype=torch.bfloat16), *some_rows(dtype=torch.bfloat16)
    assert set(token_values(*halves, STATS, compiled=True)) == {"logp", *STATS}


# Generated code is compared with float64 before the head uses it, and left alone where it is wrong


@pytest.mark.slow
@pytest.mark.skipif(not _can_compile("cpu"), reason="no C++ compiler here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (3.0, 5.0)])
def test_what_is_generated_here_is_right(dtype, scale, cap):
    assert tiled.compiled_fold_is_right(scale, cap, dtype, CPU)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda tile, top, mass: (tile.float().amax(1), tile.float().exp().sum(1)),
        lambda tile, top, mass: (top.clamp(min=0), mass + tile[:, :-1].float().exp().sum(1)),
        lambda tile, top, mass: (top.clamp(min=0), mass * torch.nan),
    ],
    ids=["forgets the tiles before", "forgets a column", "not a number"],
)
def test_wrong_sums_are_seen(monkeypatch, wrong):
    monkeypatch.setattr(tiled, "compiled_fold", lambda scale, cap: wrong)
    assert not tiled.compiled_fold_is_right.__wrapped__(1.0, None, torch.bfloat16, CPU)


def test_sums_that_are_only_written_otherwise_pass(monkeypatch):
    monkeypatch.setattr(
        tiled,
        "compiled_fold",
        lambda scale, cap: lambda tile, top, mass: (top.clamp(min=0), mass + tile.double().exp().sum(1).float()),
    )
    assert tiled.compiled_fold_is_right.__wrapped__(1.0, None, torch.bfloat16, CPU)


def test_a_head_whose_generated_code_is_wrong_does_without_and_says_so(monkeypatch):
    monkeypatch.setattr(fast, "compile_layers", lambda body: None)
    monkeypatch.setattr(fast, "compiled_fold_is_right", lambda *given: False)
    monkeypatch.delattr(Fold, "add_products")
    model = family("llama", dtype=torch.bfloat16)
    scorer = PairScorer(model, numerics_for(model, "fast", dtype="bfloat16", compile=True))
    assert len(scorer.score(awkward())) == len(awkward())
    assert "not used" in scorer.notes[0]
