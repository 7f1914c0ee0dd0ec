"""Generated code is compared with float64 before the head uses it, and left alone where it is wrong."""

from __future__ import annotations

import pytest
import torch

from dpo_score.logprobs import lm_head
from dpo_score.logprobs import packed as fast
from dpo_score.logprobs.lm_head import Fold
from dpo_score.logprobs.numerics import _can_compile
from dpo_score.logprobs.scorer import PairScorer
from tests.families import family
from tests.logprobs.engine import numerics_for
from tests.logprobs.sequences import awkward

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.skipif(not _can_compile("cpu"), reason="no C++ compiler here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (3.0, 5.0)])
def test_what_is_generated_here_is_right(dtype, scale, cap):
    assert lm_head.compiled_fold_is_right(scale, cap, dtype, CPU)


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
    monkeypatch.setattr(lm_head, "compiled_fold", lambda scale, cap: wrong)
    assert not lm_head.compiled_fold_is_right.__wrapped__(1.0, None, torch.bfloat16, CPU)


def test_sums_that_are_only_written_otherwise_pass(monkeypatch):
    monkeypatch.setattr(
        lm_head,
        "compiled_fold",
        lambda scale, cap: lambda tile, top, mass: (top.clamp(min=0), mass + tile.double().exp().sum(1).float()),
    )
    assert lm_head.compiled_fold_is_right.__wrapped__(1.0, None, torch.bfloat16, CPU)


def test_a_head_whose_generated_code_is_wrong_does_without_and_says_so(monkeypatch):
    monkeypatch.setattr(fast, "compile_layers", lambda body: None)
    monkeypatch.setattr(fast, "compiled_fold_is_right", lambda *given: False)
    monkeypatch.delattr(Fold, "add_products")
    model = family("llama", dtype=torch.bfloat16)
    scorer = PairScorer(model, numerics_for(model, "fast", dtype="bfloat16", compile=True))
    assert len(scorer.score(awkward())) == len(awkward())
    assert "not used" in scorer.notes[0]
