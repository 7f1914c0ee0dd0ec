"""The fast path of models with a state (linear attention, Mamba, convolutions): a prompt is read once for its answers.

The prompts of a batch go through the model's body with its own cache; the state after each is copied for every answer
of it, and the answers go on from there. Prompts are padded on the left, so that all states end at the same place;
answers on the right. What a model does with padding before a prompt, and whether its layers go on from a state with
more than one token, is its own affair: self_check.py compares it with the ordinary way before anything is scored so.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_score.data.types import TokenSequence
from dpo_score.logprobs.attention.interface import Unshareable
from dpo_score.logprobs.lengths import length_rules
from dpo_score.logprobs.lm_head import token_values
from dpo_score.logprobs.numerics import one_by_one
from dpo_score.logprobs.packing import prompt_groups, response_inputs
from dpo_score.logprobs.padded import PaddedPath, is_worth_it
from dpo_score.logprobs.transfer import split, to_device
from dpo_score.logprobs.types import Values
from dpo_score.models.numerics import Numerics
from dpo_score.models.parts import ModelParts


class ForkedPath:
    """Scores batches of prompts with all of their answers.

    Shapes: G prompts of at most P tokens, N answers of at most R inputs, hidden size H.
    """

    def __init__(self, parts: ModelParts, numerics: Numerics, stats: Sequence[str] = ()) -> None:
        if parts.head is None:
            raise Unshareable("its logits are not those of a linear head on its hidden states")
        self.rules = length_rules(parts.model.config.to_dict())
        if self.rules:
            raise Unshareable("its positions depend on the length of the whole row, which a prompt alone does not have")
        self.parts = parts
        self.head = parts.head
        self.numerics = numerics
        self.stats = tuple(stats)
        self.forwards = 0
        self._model_itself = PaddedPath(parts, one_by_one(numerics), stats)
        accepted = inspect.signature(parts.body.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._cache = "cache_params" if "cache_params" in accepted else "past_key_values"

    def plan(self, sequences: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
        """Indices by batch: longest prompts first, all answers of a prompt together, padded size within the budget."""
        alone = [i for i, sequence in enumerate(sequences) if self.rules.is_alone(sequence)]
        shared = [i for i in range(len(sequences)) if not self.rules.is_alone(sequences[i])]
        groups = [tuple(shared[i] for i in group) for group in prompt_groups([sequences[i] for i in shared])]
        groups.sort(key=lambda g: (-len(sequences[g[0]].prompt), g))
        batches: list[list[int]] = []
        prompts, answers, longest, answer, tokens = 0, 0, 0, 0, 0
        for group in groups:
            prompt = len(sequences[group[0]].prompt)
            own = max(len(sequences[i].response) for i in group)
            wider = max(answer, own)
            real = prompt + sum(len(sequences[i].response) for i in group)
            size = (prompts + 1) * longest + (answers + len(group)) * wider
            fits = bool(batches) and is_worth_it(size, tokens + real, self.numerics.batch_tokens)
            if fits and (prompt > 0) == (longest > 0):
                batches[-1].extend(group)
                prompts, answers, answer, tokens = prompts + 1, answers + len(group), wider, tokens + real
            else:
                batches.append(list(group))
                prompts, answers, longest, answer, tokens = 1, len(group), prompt, own, real
        return [*map(tuple, batches), *((i,) for i in alone)]

    @contextmanager
    def session(self) -> Iterator[None]:
        """Nothing to prepare: the model's own layers run."""
        yield

    def compute(self, sequences: Sequence[TokenSequence]) -> list[Values]:
        """One batch: the values of every sequence, in order."""
        if any(map(self.rules.is_alone, sequences)):
            self.forwards += 1
            return self._model_itself.compute(sequences)
        groups = prompt_groups(sequences)
        of = np.empty(len(sequences), np.int64)
        for number, group in enumerate(groups):
            of[list(group)] = number
        prompts = [sequences[group[0]].prompt for group in groups]
        answers = [response_inputs(s) for s in sequences]
        self.forwards += 1
        with torch.inference_mode():
            hidden_TH, prompt_at, answer_at = self._hidden(prompts, answers, of)
            scored = [s.scored_positions for s in sequences]
            counts = [len(p) for p in scored]
            row = np.repeat(np.arange(len(sequences)), counts)
            before = np.concatenate(scored) - 1
            lengths = np.array([len(s.prompt) for s in sequences])[row]
            places = np.where(before < lengths, prompt_at[of[row]] + before, answer_at[row] + before - lengths)
            needed, sources = np.unique(places, return_inverse=True)
            targets = [np.concatenate([s.prompt, s.response])[p] for s, p in zip(sequences, scored, strict=True)]
            out = self.parts.out_device
            target_n = to_device(np.concatenate(targets).astype(np.int64), out)
            values = token_values(
                self.head, hidden_TH[to_device(needed, out)], sources.reshape(-1), target_n, self.stats
            )
        return split(values, counts)

    def _hidden(
        self, prompts: Sequence[np.ndarray[Any, Any]], answers: Sequence[np.ndarray[Any, Any]], of: np.ndarray[Any, Any]
    ) -> tuple[Tensor, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Hidden states of all tokens in one row, and where each prompt and each answer begins in it."""
        G, P = len(prompts), max(map(len, prompts))
        N, R = len(answers), max(map(len, answers))
        ids_GP, mask_GP = np.zeros((G, P), np.int64), np.zeros((G, P), np.int64)
        for line, prompt in enumerate(prompts):
            ids_GP[line, P - len(prompt) :] = prompt
            mask_GP[line, P - len(prompt) :] = 1
        ids_NR, mask_NR = np.zeros((N, R), np.int64), np.zeros((N, R), np.int64)
        for line, answer in enumerate(answers):
            ids_NR[line, : len(answer)] = answer
            mask_NR[line, : len(answer)] = 1
        parts, cache = [], None
        if P:
            state = self._body(ids_GP, mask_GP, np.maximum(np.cumsum(mask_GP, 1) - 1, 0), None, keep=R > 0)
            cache = getattr(state, self._cache) if R else None
            parts.append(state.last_hidden_state.flatten(0, 1))
        if R:
            if cache is not None:
                cache.reorder_cache(to_device(of, self.parts.device))
            own = np.array([len(prompts[g]) for g in of])[:, None]
            seen = np.concatenate([mask_GP[of], mask_NR], 1)
            state = self._body(ids_NR, seen, own + np.arange(R), cache, keep=cache is not None)
            parts.append(state.last_hidden_state.flatten(0, 1))
        starts = np.array([(g + 1) * P - len(prompt) for g, prompt in enumerate(prompts)])
        return torch.cat(parts).to(self.parts.out_device), starts, G * P + np.arange(N) * R

    def _body(
        self,
        ids: np.ndarray[Any, Any],
        mask: np.ndarray[Any, Any],
        positions: np.ndarray[Any, Any],
        cache: Any,
        keep: bool,
    ) -> Any:
        device = self.parts.device
        inputs: dict[str, Any] = {"position_ids": to_device(positions, device)} if self._takes_positions else {}
        if not mask.all():
            inputs["attention_mask"] = to_device(mask, device)
        if cache is not None:
            inputs[self._cache] = cache
        return self.parts.body(input_ids=to_device(ids, device), use_cache=keep, return_dict=True, **inputs)
