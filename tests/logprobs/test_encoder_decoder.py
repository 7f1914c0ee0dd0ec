"""Encoder-decoder models against their own loss: every label scored, prompts shared, padding unseen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from dpo_score.data.types import TokenSequence
from dpo_score.errors import ModelError
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.logprobs.self_check import check_model
from dpo_score.logprobs.types import STATS, SequenceLogps, Unscored
from tests.logprobs.engine import numerics_for
from tests.logprobs.sequences import ids

SIZES = {
    "t5": {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
}


@pytest.fixture(params=SIZES, scope="module")
def model(request):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, vocab_size=260, d_model=32, **SIZES[request.param])
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def some_sequences():
    rng = np.random.default_rng(0)
    shared = ids(rng, 9)
    return [TokenSequence(shared, ids(rng, n)) for n in (1, 6, 11)] + [
        TokenSequence(ids(rng, n), ids(rng, 5)) for n in (1, 20)
    ]


@torch.inference_mode()
def own_logps(model, sequence):
    """−loss per label, from the model's own shifting of labels."""
    prompt, labels = (torch.from_numpy(a.astype(np.int64))[None] for a in (sequence.prompt, sequence.response))
    logits = model.double()(input_ids=prompt, labels=labels).logits[0]
    model.float()
    return torch.log_softmax(logits, -1).gather(1, labels[0][:, None])[:, 0].numpy()


@pytest.mark.parametrize("budget", [8, 64, 4096])
def test_every_label_is_scored_as_the_model_scores_it(model, budget):
    sequences = some_sequences()
    scorer = PairScorer(model, numerics_for(model, "plain", batch_tokens=budget), STATS)
    for sequence, result in zip(sequences, scorer.score(sequences), strict=True):
        np.testing.assert_allclose(result.token_logps, own_logps(model, sequence), atol=2e-5)
        assert len(result.token_logps) == len(sequence.response)
        assert set(result.stats) == set(STATS)


def test_a_prompt_is_encoded_once_for_its_responses(model):
    rows = []
    handle = model.get_encoder().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    PairScorer(model, numerics_for(model, "plain", batch_tokens=4096)).score(some_sequences()[:3])
    handle.remove()
    assert rows == [1]


def test_only_labels_have_probabilities(model):
    mask = np.array([False, True, True, False])
    inside = TokenSequence(np.array([5, 6]), np.array([7, 8]), scored=mask)
    masked = TokenSequence(np.array([5, 6]), np.array([7, 8]), scored=np.array([False, False, False, True]))
    whole = TokenSequence(np.array([5, 6]), np.array([7, 8]))
    a, b, c = PairScorer(model, numerics_for(model, "plain")).score([inside, masked, whole])
    assert isinstance(a, Unscored)
    assert isinstance(b, SequenceLogps)
    np.testing.assert_allclose(b.token_logps, c.token_logps[1:], atol=1e-5)


def test_an_empty_prompt_cannot_be_encoded(model):
    (result,) = PairScorer(model, numerics_for(model, "plain")).score(
        [TokenSequence(np.zeros(0, np.int32), np.array([3, 4]))]
    )
    assert isinstance(result, Unscored)


def test_a_model_without_a_start_token_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.config, "decoder_start_token_id", None)
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        PairScorer(model, numerics_for(model, "plain"))


def test_a_decoder_that_reads_later_labels_is_refused(model, monkeypatch):
    decoder = model.get_decoder()
    forward = decoder.forward

    def with_later_labels(*args, **kwargs):
        output = forward(*args, **kwargs)
        output["last_hidden_state"] = output[0] + output[0].mean(1, keepdim=True)
        return output

    monkeypatch.setattr(decoder, "forward", with_later_labels)
    with pytest.raises(ModelError, match="is not causal"):
        check_model(model, numerics_for(model, "plain"))
