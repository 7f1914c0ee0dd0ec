"""Encoder-decoder models (T5, BART): the prompt goes to the encoder, the response is the decoder's labels.

Every label is scored from the one before it, the first from the decoder's start token: nothing is shifted away. A
prompt is encoded once for the responses it shares a microbatch with. Padded, and read through the model's own logits,
which exist for the responses alone. A scored token inside a prompt has no probability here and comes out as NaN, as
do the tokens after an empty prompt, which an encoder cannot read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_score.data.types import TokenSequence
from dpo_score.errors import ModelError
from dpo_score.logprobs.lm_head import read_logits
from dpo_score.logprobs.packing import prompt_groups
from dpo_score.logprobs.padded import pad
from dpo_score.logprobs.transfer import split
from dpo_score.logprobs.types import Values
from dpo_score.models.numerics import Numerics
from dpo_score.models.parts import ModelParts


def start_token(model: Any) -> int:
    """What a decoder reads before the first label: `decoder_start_token_id`, or where a configuration has none (T5Gemma
    2), what the model itself puts before labels."""
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        with suppress(ValueError, TypeError):
            start = model.prepare_decoder_input_ids_from_labels(torch.zeros(1, 1, dtype=torch.long))[0, 0]
    if start is None:
        raise ModelError(
            f"{type(model).__name__} has no decoder_start_token_id in its config.json: nothing to begin with"
        )
    return int(start)


LOGITS = 2**26
"""Most logits of a microbatch (256 MB in fp32), unless a single row has more."""


class EncoderDecoderPath:
    """Scores responses with the decoder of a model whose encoder has read the prompt."""

    def __init__(self, model: Any, numerics: Numerics, stats: Sequence[str] = ()) -> None:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.parts = ModelParts(model, model.base_model, None, False)
        self.start = start_token(model)
        self.numerics = numerics
        self.label_tokens = max(1, LOGITS // int(model.get_output_embeddings().weight.shape[0]))
        self.stats = tuple(stats)
        self.forwards = 0

    def plan(self, sequences: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
        """Indices by microbatch: prompts longest first, the responses of a prompt together."""
        if self.numerics.one_row:
            return [(i,) for i in range(len(sequences))]
        groups = sorted(prompt_groups(sequences), key=lambda g: (-len(sequences[g[0]].prompt), g))
        batches: list[list[int]] = [[]]
        for index in (i for group in groups for i in group):
            if batches[-1] and not self._fits([sequences[i] for i in (*batches[-1], index)]):
                batches.append([])
            batches[-1].append(index)
        return [tuple(batch) for batch in batches if batch]

    def _fits(self, batch: Sequence[TokenSequence]) -> bool:
        labels = len(batch) * max(len(s.response) for s in batch)
        prompts = len(batch) * max(len(s.prompt) for s in batch)
        return labels + prompts <= self.numerics.batch_tokens and labels <= self.label_tokens

    @contextmanager
    def session(self) -> Iterator[None]:
        """Nothing to prepare: the model runs as it was loaded."""
        yield

    def compute(self, sequences: Sequence[TokenSequence]) -> list[Values]:
        """One microbatch: the values of every sequence, in order."""
        self.forwards += 1
        with torch.inference_mode():
            logits_BTV = self._logits(sequences)
            places = [s.scored_positions - len(s.prompt) for s in sequences]
            rows = np.repeat(np.arange(len(sequences)), [len(p) for p in places])
            at = np.maximum(np.concatenate(places), 0)
            targets = np.concatenate([s.response[np.maximum(p, 0)] for s, p in zip(sequences, places, strict=True)])
            values = read_logits(
                logits_BTV[self._tensor(rows), self._tensor(at)].float(), self._tensor(targets), self.stats
            )
        done = split(values, [len(p) for p in places])
        return [_without_prompt(v, s, p) for v, s, p in zip(done, sequences, places, strict=True)]

    def _logits(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """[B, labels, V] for the responses, right-padded."""
        device = self.parts.device
        groups = prompt_groups(sequences)
        of = np.empty(len(sequences), np.int64)
        for number, group in enumerate(groups):
            of[list(group)] = number
        prompts = pad([sequences[group[0]].prompt for group in groups], device)
        labels = pad([np.concatenate([[self.start], s.response[:-1]]) for s in sequences], device)
        mask = prompts.get("attention_mask", torch.ones_like(prompts["ids"]))
        encoded = self.parts.model.get_encoder()(input_ids=prompts["ids"], attention_mask=mask)
        chosen = self._tensor(of)
        encoded["last_hidden_state"] = encoded[0][chosen]  # in the record of its own kind, which some models insist on
        return self.parts.model(  # type: ignore[no-any-return]
            input_ids=prompts["ids"][chosen],  # read already; FSMT hides later labels only where it is given
            encoder_outputs=encoded,
            attention_mask=mask[chosen],
            decoder_input_ids=labels["ids"],
            decoder_attention_mask=labels.get("attention_mask"),
            use_cache=False,
        ).logits

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.parts.device)


def _without_prompt(values: Values, sequence: TokenSequence, places: np.ndarray[Any, Any]) -> Values:
    """NaN where a decoder has nothing to say: inside the prompt, and after an empty one."""
    silent = (places < 0) | (len(sequence.prompt) == 0)
    return {name: np.where(silent, np.float32(np.nan), array) for name, array in values.items()}
