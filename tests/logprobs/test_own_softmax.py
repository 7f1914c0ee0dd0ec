"""A log-softmax in the model's own dtype, bit for bit what a program does that never leaves that dtype."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_score.data.types import TokenSequence
from dpo_score.logprobs.numerics import with_own_softmax
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.models.numerics import Kernel, Numerics
from tests.rewardbench_oracle import twin_logps
from tests.tiny import tiny_model

SEQUENCE = TokenSequence(np.arange(40, 60, dtype=np.int32), np.arange(90, 75, -1, dtype=np.int32))


def numerics(dtype: str) -> Numerics:
    return Numerics("cpu", "cpu", dtype, "plain", "model", False, 4096, 1)


def logps(dtype: str, own: bool) -> list[float]:
    torch.set_num_threads(1)
    model = tiny_model().to(getattr(torch, dtype))
    chosen = with_own_softmax(numerics(dtype)) if own else numerics(dtype)
    return [float(x) for x in PairScorer(model, chosen).score([SEQUENCE])[0].token_logps]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_are_those_of_a_program_in_that_dtype(dtype: str) -> None:
    ids = [*SEQUENCE.prompt.tolist(), *SEQUENCE.response.tolist()]
    own = logps(dtype, own=True)
    assert own == twin_logps(tiny_model().to(getattr(torch, dtype)), ids, len(SEQUENCE.prompt))
    assert own != logps(dtype, own=False)


def test_float32_is_left_as_it_is() -> None:
    fast = replace(numerics("float32"), path="fast", kernel="bmm")
    assert with_own_softmax(fast) == fast
    assert with_own_softmax(numerics("bfloat16")).kernel == Kernel.MODEL_OWN_SOFTMAX
