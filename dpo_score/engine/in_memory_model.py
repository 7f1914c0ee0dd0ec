"""Models that a program has loaded already, scored where they are and left as they were found.

Promises: training modes, gradient flags, gradients and the active adapter are afterwards what they were before; no
dropout while scoring. Does not: cache (nothing says what the weights are), or copy a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_score.config.schema import ComputeSpec
from dpo_score.data.types import TokenSequence
from dpo_score.engine.model_logprobs import BlockLogprobs
from dpo_score.errors import ModelError
from dpo_score.logprobs.numerics import Numerics, resolve_numerics
from dpo_score.logprobs.types import SequenceLogps, Unscored
from dpo_score.models.resolve import ModelSource
from dpo_score.storage.cache.cache import CacheEntry


@dataclass(frozen=True, slots=True, eq=False)
class InMemoryModel:
    """A transformers or PEFT model; `bare`: with its adapters switched off."""

    model: Any
    bare: bool = False

    @property
    def source(self) -> ModelSource:
        """A source without files: equal exactly for the same object in the same guise."""
        digest = f"held:{id(self.model)}:{'bare' if self.bare else 'as it is'}"
        name = type(self.model).__name__
        return ModelSource(name, Path(), None, None, self.model.config.to_dict(), (), digest, digest, False)

    def numerics(self, compute: ComputeSpec) -> Numerics:
        """The model's own dtype and device, and the path that proves right on it."""
        from dpo_score.logprobs.self_check import settle

        own = {"device": str(self.model.device), "dtype": str(self.model.dtype).removeprefix("torch.")}
        size = sum(parameter.numel() for parameter in self.model.parameters())
        asked = resolve_numerics(compute.model_copy(update=own), self.model.config.to_dict(), size)
        with self.as_found():
            settled, _ = settle(self.model, replace(asked, compile=False))
        return settled

    @contextmanager
    def as_found(self) -> Iterator[None]:
        """Evaluation mode, adapters off where `bare`; everything put back afterwards."""
        if self.bare and not hasattr(self.model, "disable_adapter"):
            raise ModelError("reference 'base': the policy is no PEFT model, so it has no adapters to switch off")
        modes = [(module, module.training) for module in self.model.modules()]
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with self.model.disable_adapter() if self.bare else nullcontext():
                self.model.eval()
                yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


class InMemoryLogprobs:
    """Values of one held model."""

    def __init__(self, loaded: InMemoryModel, numerics: Numerics, stats: Sequence[str] = ()) -> None:
        self._loaded, self._numerics, self._stats = loaded, numerics, tuple(stats)

    def block(self, name: str, sequences: Sequence[TokenSequence], sample: int = 0) -> BlockLogprobs:
        from dpo_score.logprobs.scorer import PairScorer

        self._refuse_unknown_ids(sequences)
        with self._loaded.as_found():
            results = PairScorer(self._loaded.model, self._numerics, self._stats).score(sequences)
        redone = frozenset(i for i, r in enumerate(results) if isinstance(r, SequenceLogps) and r.redone_dtype)
        return BlockLogprobs([_entry(result) for result in results], redone)

    def _refuse_unknown_ids(self, sequences: Sequence[TokenSequence]) -> None:
        rows = int(self._loaded.model.get_input_embeddings().weight.shape[0])
        largest = max((int(ids.max()) for s in sequences for ids in (s.prompt, s.response) if len(ids)), default=0)
        if largest >= rows:
            raise ModelError(
                f"{type(self._loaded.model).__name__}: token id {largest} lies beyond its {rows} embedding rows; it "
                "was made for another tokenizer: name its own with tokenizer=…"
            )


def _entry(result: SequenceLogps | Unscored) -> CacheEntry | Unscored:
    return CacheEntry(result.token_logps, dict(result.stats)) if isinstance(result, SequenceLogps) else result
