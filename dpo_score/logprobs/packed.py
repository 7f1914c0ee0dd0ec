"""The fast path: prefix-shared packs through the model's body, and a tiled head on the tokens that predict.

Every token of a block is computed once: no padding, one prompt for all its responses, no logits nobody asked for.
The numbers are those of the plain path to rounding; verify.py says whether that holds on the model at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_score.data.types import TokenSequence
from dpo_score.logprobs.attention import flash_flex as attention_gpu
from dpo_score.logprobs.attention import interface as attention
from dpo_score.logprobs.attention import sdpa as attention_sdpa
from dpo_score.logprobs.compiled_fold import is_right
from dpo_score.logprobs.lm_head import token_values
from dpo_score.logprobs.numerics import Numerics
from dpo_score.logprobs.packing import Layout, bucket, lay_out, pack_size, plan
from dpo_score.logprobs.padded import Values, split
from dpo_score.models.parts import ModelParts


class FastPath:
    """Scores packs with a model whose attention is taken over while a pack runs."""

    def __init__(self, anatomy: ModelParts, numerics: Numerics, stats: Sequence[str] = ()) -> None:
        if anatomy.head is None:
            raise attention.Unshareable("its logits are not those of a linear head on its hidden states")
        self.anatomy = anatomy
        self.head = anatomy.head
        self.numerics = numerics
        self.stats = tuple(stats)
        self.forwards = 0
        self.notes: list[str] = []
        self._compiled_head = numerics.compile and self._check_compiled_head()
        if numerics.compile:
            compile_layers(anatomy.body)

    def _check_compiled_head(self) -> bool:
        """Whether the head may use generated code: it need not, and must not where that does not add up."""
        device, head = self.anatomy.out_device, self.head
        if self.numerics.dtype == "float32" or self.stats or head.weight is None:
            return False
        widens = device.type == "cuda" or head.bias is not None
        products = torch.float32 if widens else getattr(torch, self.numerics.dtype)
        right = is_right(head.scale, head.cap, products, device)
        if not right:
            self.notes.append("code generated here for the head gave wrong sums in a check: it is not used")
        return right

    def plan(self, sequences: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
        """Indices of `sequences` by pack."""
        return plan(sequences, self.numerics.batch_tokens)

    def compute(self, sequences: Sequence[TokenSequence]) -> list[Values]:
        """One pack: the values of every sequence, in order."""
        layout = lay_out(sequences, self._padded_size(sequences))
        self.forwards += 1
        with torch.inference_mode(), attention.installed(self.anatomy.model):
            with attention.sharing(layout, self._prepared(layout)):
                hidden_TH = self._hidden(layout)
            out = self.anatomy.out_device
            rows, source, target = (_on(out, array) for array in (layout.rows, layout.sources, layout.targets))
            values = token_values(self.head, hidden_TH[rows], source, target, self.stats, self._compiled_head)
        return split(values, layout.counts)

    def _padded_size(self, sequences: Sequence[TokenSequence]) -> int:
        """On a GPU packs have few sizes, for which kernels are chosen and tuned; elsewhere padding is only work."""
        gpu = self.numerics.device_kind == "cuda"
        return bucket(pack_size(sequences), self.numerics.batch_tokens) if gpu else 0

    def _prepared(self, layout: Layout) -> Any:
        """The pack as the kernel wants it; None for the batched products, which need nothing but the layout."""
        if self.anatomy.device.type == "cuda":
            return attention_gpu.PreparedPack.of(layout, self.anatomy.device, self.numerics.kernel)
        return attention_sdpa.CpuPack(layout) if self.numerics.kernel.startswith("sdpa") else None

    def _hidden(self, layout: Layout) -> Tensor:
        """Hidden states [T, H] of the pack."""
        ids, positions = (_on(self.anatomy.device, array)[None] for array in (layout.ids, layout.positions))
        return self.anatomy.hidden(ids, position_ids=positions)[0]


def _on(device: torch.device, array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def compile_layers(body: nn.Module) -> None:
    """Compile each decoder layer for itself, once for all token counts: seconds to start, where a whole model takes
    minutes. Layers that are already compiled stay as they are."""
    for layer in decoder_layers(body):
        if layer._compiled_call_impl is None:
            layer.compile(dynamic=True)


def decoder_layers(body: nn.Module) -> list[nn.Module]:
    """The layers of the largest stack in a body that no other stack holds (a list of experts is inside a layer)."""
    stacks = [m for m in body.modules() if isinstance(m, nn.ModuleList)]
    inner = {id(part) for stack in stacks for part in stack.modules() if part is not stack}
    outer = [list(stack) for stack in stacks if id(stack) not in inner]
    return max(outer, key=lambda layers: sum(p.numel() for layer in layers for p in layer.parameters()), default=[])
