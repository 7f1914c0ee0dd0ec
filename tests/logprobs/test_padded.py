"""Microbatches of the plain path, and models whose head is not a linear layer on hidden states."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_score.logprobs.padded import microbatches, pad
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.models.parts import model_parts
from tests.families import family
from tests.logprobs.engine import numerics_for, sums
from tests.logprobs.sequences import awkward


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 120))
def test_every_row_once_and_within_the_budget(lengths, budget):
    batches = microbatches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[i] for i in batch]
        assert len(batch) == 1 or len(batch) * max(sizes) <= budget


def test_padding_is_on_the_right_and_without_any_there_is_no_mask():
    rows = [np.array([1, 2, 3]), np.array([4])]
    inputs = pad(rows, torch.device("cpu"))
    assert inputs["ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in pad(rows[:1], torch.device("cpu"))


def test_a_head_that_does_more_than_we_know_is_read_through_its_own_logits():
    model = family("llama")
    whole = model.forward

    def squared(*args, **kwargs):
        out = whole(*args, **kwargs)
        out.logits = out.logits * out.logits.abs()
        return out

    model.forward = squared
    parts = model_parts(model)
    assert parts.head is None
    results = PairScorer(model, numerics_for(model, "plain")).score(awkward()[:1])
    ids = torch.from_numpy(np.concatenate([awkward()[0].prompt, awkward()[0].response]).astype(np.int64))
    with torch.inference_mode():
        logp = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
    expected = logp[11:-1].gather(1, ids[12:, None]).sum()
    np.testing.assert_allclose(sums(results), float(expected), atol=1e-4)


def test_an_adapter_is_seen_on_body_and_head():
    from peft import LoraConfig, get_peft_model

    base = sums(PairScorer(family("llama"), numerics_for(family("llama"), "plain")).score(awkward()))
    adapted = get_peft_model(
        family("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    plain, fast = (
        sums(PairScorer(adapted.eval(), numerics_for(adapted, p)).score(awkward())) for p in ("plain", "fast")
    )
    assert np.abs(plain - base).max() > 0.1
    np.testing.assert_allclose(fast, plain, atol=1e-4)
