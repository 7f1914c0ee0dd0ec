"""The fast path: packs with shared prompts through the model's body, and a tiled head on the tokens that predict.

Every token of a block is computed once: no padding on a CPU, one prompt for all its responses, no logits that were
not asked for. The numbers are those of the plain path to rounding; self_check.py asks the loaded model whether they
are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpo_score.data.types import TokenSequence
from dpo_score.logprobs.attention import interface as attention
from dpo_score.logprobs.attention.bmm import BmmPack
from dpo_score.logprobs.attention.flash_flex import CudaPack
from dpo_score.logprobs.attention.sdpa import CpuPack
from dpo_score.logprobs.lengths import fresh_rope, length_rules, row_length
from dpo_score.logprobs.lm_head import compiled_fold_is_right, token_values
from dpo_score.logprobs.numerics import one_by_one
from dpo_score.logprobs.packing import Index, Pack, bucket, lay_out, pack_size, plan
from dpo_score.logprobs.padded import PaddedPath
from dpo_score.logprobs.transfer import Copies, Returning, copying, to_device
from dpo_score.logprobs.types import Values
from dpo_score.models.numerics import Kernel, Numerics
from dpo_score.models.parts import ModelParts


@dataclass(frozen=True, slots=True, eq=False)
class PackOnDevice:
    """A pack where it is computed: `ids`, `positions` [1, T], `rows` [N], `targets` [n]; `sources` [n] on the host."""

    sources: Index
    counts: tuple[int, ...]
    attention: attention.PreparedPack
    ids: Tensor
    positions: Tensor
    rows: Tensor
    targets: Tensor
    copies: Copies


class PackedPath:
    """Scores packs with a model whose attention goes through `attention.interface` while packs run.

    `notes`: one sentence for each thing that is not used although it was asked for.
    """

    def __init__(self, parts: ModelParts, numerics: Numerics, stats: Sequence[str] = ()) -> None:
        if parts.head is None:
            raise attention.Unshareable("its logits are not those of a linear head on its hidden states")
        self.parts = parts
        self.head = parts.head
        self.numerics = numerics
        self.stats = tuple(stats)
        self.rules = length_rules(parts.model.config.to_dict())
        self.forwards = 0
        self.notes: list[str] = []
        self._model_itself = PaddedPath(parts, one_by_one(numerics), stats)
        self._own_attention: dict[str, str] | None = None
        self._compiled_head = numerics.compile and self._check_compiled_head()
        if numerics.compile:
            compile_layers(parts.body)

    def _check_compiled_head(self) -> bool:
        """Whether the head may use generated code: it need not, and must not where that gives wrong sums."""
        device, head = self.parts.out_device, self.head
        if self.numerics.dtype == "float32" or self.stats or head.weight is None:
            return False
        widens = device.type == "cuda" or head.bias is not None
        products = torch.float32 if widens else getattr(torch, self.numerics.dtype)
        right = compiled_fold_is_right(head.scale, head.cap, products, device)
        if not right:
            self.notes.append("code generated here for the head gave wrong sums in a check: it is not used")
        return right

    def plan(self, sequences: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
        """Indices of `sequences` by pack; a pack holds only rows that may share a forward."""
        packs = []
        for some in self.rules.apart(sequences):
            packs += [
                tuple(some[i] for i in pack) for pack in plan([sequences[i] for i in some], self.numerics.batch_tokens)
            ]
        return packs

    @contextmanager
    def session(self) -> Iterator[None]:
        """The model's attention is taken over once for all packs inside the block."""
        if self._own_attention is not None:
            yield
            return
        with attention.installed(self.parts.model) as self._own_attention:
            try:
                yield
            finally:
                self._own_attention = None

    def compute(self, sequences: Sequence[TokenSequence]) -> list[Values]:
        """One pack: the values of every sequence, in order. Rows of a length that was not tried have packs of their
        own, which the model computes as it was loaded."""
        if self.is_alone(sequences):
            return self._by_model_itself(sequences)
        return self.start(self.lay_out(sequences)).arrived()

    def is_alone(self, sequences: Sequence[TokenSequence]) -> bool:
        """Whether the model computes a pack itself, so that it is not laid out."""
        return any(map(self.rules.is_alone, sequences))

    def _by_model_itself(self, sequences: Sequence[TokenSequence]) -> list[Values]:
        self.forwards += 1
        if self._own_attention is None:
            return self._model_itself.compute(sequences)
        with attention.as_loaded(self.parts.model, self._own_attention):
            return self._model_itself.compute(sequences)

    def lay_out(self, sequences: Sequence[TokenSequence]) -> PackOnDevice:
        """A pack ready to be computed. A thread may do this ahead: it runs nothing of the model."""
        pack = lay_out(sequences, self._padded_size(sequences), self._longest_row(sequences))
        device, out = self.parts.device, self.parts.out_device
        with torch.inference_mode(), copying(device) as copies:
            return PackOnDevice(
                sources=pack.sources,
                counts=pack.counts,
                attention=prepared_pack(pack, self.numerics.kernel, device),
                ids=to_device(pack.ids, device)[None],
                positions=to_device(pack.positions, device)[None],
                rows=to_device(pack.rows, out),
                targets=to_device(pack.targets, out),
                copies=copies,
            )

    def start(self, pack: PackOnDevice) -> Returning:
        """Queue a pack on the device. `pack` must live until its values have arrived."""
        self.forwards += 1
        pack.copies.wait()
        with torch.inference_mode(), self.session():
            return Returning(self.device_values(pack), pack.counts)

    def device_values(self, pack: PackOnDevice) -> dict[str, Tensor]:
        """The values of a pack on the device, without waiting for it."""
        with attention.sharing(pack.attention):
            hidden_TH = self._hidden(pack)
        rows_NH = hidden_TH[pack.rows]
        return token_values(self.head, rows_NH, pack.sources, pack.targets, self.stats, self._compiled_head)

    def _padded_size(self, sequences: Sequence[TokenSequence]) -> int:
        """On a GPU packs have few sizes, for which kernels are chosen and tuned; elsewhere padding is only work."""
        gpu = self.numerics.device_kind == "cuda"
        return bucket(pack_size(sequences), self.numerics.batch_tokens) if gpu else 0

    def _longest_row(self, sequences: Sequence[TokenSequence]) -> int:
        """0 where the model does not ask for it."""
        return max(map(row_length, sequences), default=0) if self.rules else 0

    def _hidden(self, pack: PackOnDevice) -> Tensor:
        """Hidden states [T, H] of the pack."""
        if self.rules:
            fresh_rope(self.parts.model)
        return self.parts.hidden(pack.ids, position_ids=pack.positions)[0]


def prepared_pack(pack: Pack, kernel: Kernel, device: torch.device) -> attention.PreparedPack:
    """The pack as its kernel wants it."""
    if device.type == "cuda":
        return CudaPack.of(pack, device, kernel)
    return CpuPack(pack) if kernel == Kernel.SDPA else BmmPack(pack)


def compile_layers(body: nn.Module) -> None:
    """Compile each decoder layer for itself, once for all token counts: seconds to start, where a whole model takes
    minutes. Layers that are already compiled are left alone."""
    for layer in decoder_layers(body):
        if layer._compiled_call_impl is None:
            layer.compile(dynamic=True)


def uncompile_layers(body: nn.Module) -> None:
    """Undo `compile_layers`: the layers run as written."""
    for layer in decoder_layers(body):
        layer._compiled_call_impl = None


def decoder_layers(body: nn.Module) -> list[nn.Module]:
    """The layers of the largest stack in a body that no other stack holds (a list of experts is inside a layer)."""
    stacks = [m for m in body.modules() if isinstance(m, nn.ModuleList)]
    inner = {id(part) for stack in stacks for part in stack.modules() if part is not stack}
    outer = [list(stack) for stack in stacks if id(stack) not in inner]
    return max(outer, key=lambda layers: sum(p.numel() for layer in layers for p in layer.parameters()), default=[])
