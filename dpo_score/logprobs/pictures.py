"""Prompts with pictures: the plain way, and packs in which a tower sees every prompt's pictures once.

    plain    the model's whole wrapper, one sequence at a time, its own logits
    shared   for each prompt the wrapper makes what it hands its decoder (embeddings, positions, masks), and stops
             there; the decoder then takes packs of such prompts with their answers, as it takes packs of texts

What the wrapper hands over is taken as it stands and never computed again here. An argument that is not known, or a
mask that no kernel takes, is `Unshareable`: the model is scored in the plain way, and self_check.py says so.

Shapes: P tokens of a prompt, T of a pack, H hidden size, A axes of positions (3 where a picture has height and width).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dpo_score.data.types import Media, TokenSequence
from dpo_score.errors import ModelError
from dpo_score.logprobs import packing
from dpo_score.logprobs.attention import interface as attention
from dpo_score.logprobs.lm_head import CHUNK_LOGITS, read_logits, token_values
from dpo_score.logprobs.packed import PackedPath, prepared_pack
from dpo_score.logprobs.transfer import split, to_device
from dpo_score.logprobs.types import Values
from dpo_score.logprobs.upcast import is_wide
from dpo_score.models.parts import ModelParts
from dpo_score.tokenization.pictures import PictureInputs

if TYPE_CHECKING:
    from dpo_score.logprobs.scorer import Path

DECODERS = ("language_model", "text_model")
"""What wrappers call the part that takes embeddings of text and pictures together."""
SILENT = frozenset({"use_cache", "past_key_values", "return_dict", "output_attentions", "output_hidden_states"})
"""Arguments of a decoder that say how it is called, not with what."""
READ = frozenset({"inputs_embeds", "position_ids", "attention_mask", "visual_pos_masks", "deepstack_visual_embeds"})
NAMES = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")
"""Settings of a model that change no feature."""
NOT_KEPT = ("last_hidden_state", "hidden_states", "attentions")
"""What a tower gives beside the features that a wrapper puts among its embeddings."""


class PicturePath:
    """A path for texts, and beside it one for prompts with pictures. A pack holds only one of both."""

    def __init__(self, text: Path, pictures: PictureInputs, stats: Sequence[str] = ()) -> None:
        self.text, self.pictures = text, pictures
        self.parts = text.parts
        self._whole = WrapperPath(self.parts, pictures, stats)
        self._shared = SharedPictures(text, pictures) if isinstance(text, PackedPath) else None

    @property
    def forwards(self) -> int:
        shared = 0 if self._shared is None else self._shared.forwards
        return self.text.forwards + self._whole.forwards + shared

    def plan(self, sequences: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
        """Indices by pack, texts first. The files of the pictures are read, and their inputs begun, in this order."""
        texts = [i for i, s in enumerate(sequences) if s.media is None]
        packs = [tuple(texts[i] for i in pack) for pack in self.text.plan([sequences[i] for i in texts])]
        others = [i for i, s in enumerate(sequences) if s.media is not None]
        seen: list[tuple[int, ...]] = [(i,) for i in others]
        prompts = others
        if self._shared is not None:
            seen = [tuple(others[i] for i in p) for p in self._shared.plan([sequences[i] for i in others])]
            prompts = [p[group[0]] for p in seen for group in packing.prompt_groups([sequences[i] for i in p])]
        self.pictures.fetch([media for i in prompts if (media := sequences[i].media) is not None])
        return packs + seen

    @contextmanager
    def session(self) -> Iterator[None]:
        """Inputs of pictures are made ahead, and what was read is forgotten at the end."""
        with self.pictures.preparing():
            yield

    def compute(self, sequences: Sequence[TokenSequence]) -> list[Values]:
        """One pack: the values of every sequence, in order."""
        if sequences[0].media is None:
            with self.text.session():
                return self.text.compute(sequences)
        if self._shared is not None:
            return self._shared.compute(sequences)
        return [self._whole.values(sequence) for sequence in sequences]


class WrapperPath:
    """The plain way: the model as it is called with pictures, for one sequence."""

    def __init__(self, parts: ModelParts, pictures: PictureInputs, stats: Sequence[str] = ()) -> None:
        self.parts, self.pictures, self.stats = parts, pictures, tuple(stats)
        self.forwards = 0
        accepted = inspect.signature(parts.model.forward).parameters
        if "pixel_values" not in accepted:
            raise ModelError(
                f"the data have pictures, and {type(parts.model).__name__} takes none: name a vision-language model, "
                "or leave the pictures out with --ignore-columns"
            )
        self._few_logits = "logits_to_keep" in accepted

    def values(self, sequence: TokenSequence) -> Values:
        """The values of the sequence's scored tokens."""
        ids = np.concatenate([sequence.prompt, sequence.response]).astype(np.int64)
        positions = sequence.scored_positions
        kept = len(ids) - int(positions[0]) + 1
        some = {"logits_to_keep": kept} if self._few_logits else {}
        self.forwards += 1
        with torch.inference_mode():
            inputs = wrapper_inputs(self.parts, self.parts.model, self.pictures, ids, sequence.media)
            logits_TV = self.parts.model(**inputs, use_cache=False, **some).logits[0]
            out = logits_TV.device
            rows = torch.from_numpy(positions - 1 - (len(ids) - len(logits_TV))).to(out)
            target = torch.from_numpy(ids[positions]).to(out)
            step = max(1, CHUNK_LOGITS // logits_TV.shape[-1])
            wide = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
            done = [
                read_logits(logits_TV[rows[at : at + step]].to(wide), target[at : at + step], self.stats)
                for at in range(0, len(rows), step)
            ]
            values = {name: torch.cat([part[name] for part in done]) for name in done[0]}
        return split(values, [len(positions)])[0]


def wrapper_inputs(
    parts: ModelParts, module: Any, pictures: PictureInputs, ids: np.ndarray[Any, Any], media: Media | None
) -> dict[str, Any]:
    """What `module`, the wrapper or its body, is called with for one row of ids whose prompt has these pictures."""
    assert media is not None
    device, dtype = parts.device, torch.float32 if is_wide(parts.model) else parts.model.dtype
    inputs = {
        name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in pictures.of(media).items()
    }
    ids_1T = torch.from_numpy(ids)[None].to(device)
    inputs |= {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}
    accepted = inspect.signature(module.forward).parameters
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in accepted:
            inputs[name] = (ids_1T == pictures.processor.token_id).to(ids_1T.dtype)
    return inputs


# --- the shared way ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class PromptStates:
    """What the wrapper handed its decoder for one prompt.

    embeds: [P, H]. positions: [A, P], or None where it gave none. two_way: windowed → [P, P] bool, where a prompt is
    not causal throughout; absent kinds are causal. seen: [P] bool, the tokens that `deep` (a tensor a layer) is for.
    """

    embeds: Tensor
    positions: Tensor | None
    two_way: Mapping[bool, Tensor]
    seen: Tensor | None = None
    deep: tuple[Tensor, ...] = ()


class _Handed(Exception):
    """Ends a forward of the wrapper where its decoder would begin."""


class SharedPictures:
    """Packs of prompts with pictures through the decoder of a wrapper. `prompts_seen` counts passes of the tower:
    none for pictures that a model with the same tower has seen, as long as what it made of them is kept."""

    def __init__(self, text: PackedPath, pictures: PictureInputs) -> None:
        self._text, self.parts, self.pictures = text, text.parts, pictures
        self.forwards = self.prompts_seen = 0
        self._tower = ""
        decoder = next((part for name in DECODERS if (part := getattr(text.parts.body, name, None)) is not None), None)
        if decoder is None:
            raise attention.Unshareable(f"{type(text.parts.body).__name__} has no part that takes embeddings alone")
        if text.rules:
            raise attention.Unshareable("its positions depend on the length of the whole row")
        self.decoder = decoder
        if pictures.kept.room and hasattr(text.parts.body, "get_image_features"):
            self._tower = tower_digest(text.parts.body, decoder)

    def plan(self, sequences: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
        return packing.plan(sequences, self._text.numerics.batch_tokens)

    def compute(self, sequences: Sequence[TokenSequence]) -> list[Values]:
        """One pack: the values of every sequence, in order."""
        pack = packing.lay_out(sequences)
        groups = packing.prompt_groups(sequences)
        begins = np.cumsum([0, *(packing.group_size([sequences[i] for i in group]) for group in groups)])
        with torch.inference_mode():
            prompts = [self.prompt_states(sequences[group[0]]) for group in groups]
            self.forwards += 1
            hidden_TH = self._hidden(pack, prompts, begins.tolist())
            out = self.parts.out_device
            rows, target = to_device(pack.rows, out), to_device(pack.targets, out)
            head, stats = self._text.head, self._text.stats
            values = token_values(head, hidden_TH.to(out)[rows], pack.sources, target, stats)
        return split(values, pack.counts)

    def prompt_states(self, sequence: TokenSequence) -> PromptStates:
        """One pass of the tower and the projector; the decoder's arguments without the decoder's work."""
        handed: dict[str, Any] = {}

        def stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if args:
                raise attention.Unshareable("the wrapper hands its decoder arguments without names")
            handed.update(kwargs)
            raise _Handed

        ids = sequence.prompt.astype(np.int64)
        inputs = wrapper_inputs(self.parts, self.parts.body, self.pictures, ids, sequence.media)
        hook = self.decoder.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with self._seen_once(sequence.media):
                self.parts.body(**inputs, use_cache=False)
        except _Handed:
            return _states(handed)
        finally:
            hook.remove()
        raise attention.Unshareable("the wrapper did not call its decoder")

    @contextmanager
    def _seen_once(self, media: Media | None) -> Iterator[None]:
        """Inside, the body's features of these pictures are those that are kept; where there are none it makes them."""
        if not self._tower:
            self.prompts_seen += 1
            yield
            return
        body, kept, own = self.parts.body, self.pictures.kept, self.parts.body.get_image_features
        wide = is_wide(self.parts.model)
        calls = 0

        def features(*args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            key = (self._tower, media, str(self.parts.device), str(self.parts.model.dtype), wide, calls)
            known = kept.get(key)
            if known is not None:
                kind, fields = known
                return kind(**_each_tensor(fields, lambda tensor: tensor.to(self.parts.device)))
            self.prompts_seen += 1
            made = own(*args, **named)
            if isinstance(made, Mapping):
                fields = {name: value for name, value in made.items() if name not in NOT_KEPT}
                kept.put(key, (type(made), _each_tensor(fields, Tensor.cpu)), _bytes_of(fields))
            return made

        body.get_image_features = features
        try:
            yield
        finally:
            del body.get_image_features

    def _hidden(self, pack: packing.Pack, prompts: Sequence[PromptStates], begins: Sequence[int]) -> Tensor:
        """Hidden states [T, H] of a pack; `begins`: where each prompt begins, and the end of the pack."""
        device = self.parts.device
        spans = [slice(begin, begin + len(p.embeds)) for begin, p in zip(begins, prompts, strict=False)]
        ids = pack.ids.copy()
        for span in spans:
            ids[span] = 0  # the wrapper has embedded them
        embeds_TH = self.parts.model.get_input_embeddings()(to_device(ids, device)).clone()
        for span, prompt in zip(spans, prompts, strict=True):
            embeds_TH[span] = prompt.embeds.to(embeds_TH.dtype)
        positions = _positions(pack, prompts, begins)
        prepared = prepared_pack(pack, self._text.numerics.kernel, device)
        if any(prompt.two_way for prompt in prompts):
            marked = {span.start: prompt.two_way for span, prompt in zip(spans, prompts, strict=True)}
            prepared = TwoWayPack(pack, marked, device)
        with attention.installed(self.parts.model), attention.sharing(prepared):
            states = self.decoder(
                inputs_embeds=embeds_TH[None],
                position_ids=positions.to(device),
                use_cache=False,
                **_deep(pack, prompts, spans, device),
            )
        return states.last_hidden_state[0]  # type: ignore[no-any-return]


def tower_digest(body: Any, decoder: Any) -> str:
    """BLAKE2b (hex) of the weights and settings of all of a wrapper's body but its decoder; "" where weights are not
    in memory. Equal ones make the same features of the same pictures, whatever was trained behind them."""
    behind = {id(tensor) for tensor in (*decoder.parameters(), *decoder.buffers())}
    settings = {name: value for name, value in body.config.to_dict().items() if name not in ("text_config", *NAMES)}
    found = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in (*body.named_parameters(), *body.named_buffers()):
        if id(tensor) in behind:
            continue
        if tensor.is_meta:
            return ""
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed; in it are mappings, tuples, lists, tensors and what is none of them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _each_tensor(item, change) for name, item in value.items()}
    return type(value)(_each_tensor(item, change) for item in value) if isinstance(value, list | tuple) else value


def _bytes_of(value: Any) -> int:
    sizes: list[int] = []
    _each_tensor(value, lambda tensor: sizes.append(tensor.nbytes) or tensor)  # type: ignore[func-returns-value]
    return sum(sizes)


def _states(handed: Mapping[str, Any]) -> PromptStates:
    """The arguments of a decoder as `PromptStates`. Raises Unshareable for one that is not known."""
    unknown = [name for name, value in handed.items() if name not in READ | SILENT and not _says_nothing(value)]
    if unknown:
        raise attention.Unshareable(f"the wrapper hands its decoder {unknown[0]!r}, which packs do not know")
    embeds_1PH = handed["inputs_embeds"]
    P, positions = embeds_1PH.shape[1], handed.get("position_ids")
    if positions is not None:
        positions = positions.reshape(-1, P)
    masks = handed.get("attention_mask")
    seen, deep = handed.get("visual_pos_masks"), handed.get("deepstack_visual_embeds")
    return PromptStates(
        embeds_1PH[0],
        positions,
        _two_way(masks, P),
        None if seen is None else seen.reshape(P),
        () if deep is None else tuple(deep),
    )


def _says_nothing(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | str)


def _two_way(masks: Any, P: int) -> dict[bool, Tensor]:
    """Where a mask lets a token see later ones: windowed → [P, P] bool. A mask that is causal says nothing new."""
    kinds = {"full_attention": False, "sliding_attention": True}
    if isinstance(masks, Tensor):
        masks = {"full_attention": masks, "sliding_attention": masks}
    found: dict[bool, Tensor] = {}
    for name, mask in (masks or {}).items():
        if mask is None or mask.dim() == 2:
            continue
        if name not in kinds or mask.shape[-2:] != (P, P):
            raise attention.Unshareable(f"a mask {name} of shape {tuple(mask.shape)} is not known here")
        allowed = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] > -1
        if bool(allowed.triu(1).any()):
            found[kinds[name]] = allowed
    return found


def _positions(pack: packing.Pack, prompts: Sequence[PromptStates], begins: Sequence[int]) -> Tensor:
    """[1, T], or [A, 1, T]: a prompt's own, and its answers' from the largest of them on, the same on every axis."""
    axes = {1 if p.positions is None else len(p.positions) for p in prompts}
    if len(axes) > 1:
        raise attention.Unshareable("prompts of one pack have positions of different kinds")
    positions = torch.from_numpy(pack.positions).repeat(axes.pop(), 1)
    for prompt, begin, end in zip(prompts, begins[:-1], begins[1:], strict=True):
        if prompt.positions is None:
            continue
        P, own = len(prompt.embeds), prompt.positions.cpu()
        positions[:, begin + P : end] += int(own.max()) + 1 - P
        positions[:, begin : begin + P] = own
    return positions if len(positions) == 1 else positions[:, None]


def _deep(
    pack: packing.Pack, prompts: Sequence[PromptStates], spans: Sequence[slice], device: torch.device
) -> dict[str, Any]:
    """What a decoder adds to the hidden states of pictures after its first layers (Qwen3-VL)."""
    layers = {len(prompt.deep) for prompt in prompts}
    if layers == {0}:
        return {}
    if len(layers) > 1:
        raise attention.Unshareable("prompts of one pack have deep states of different numbers of layers")
    seen = torch.zeros(1, len(pack.ids), dtype=torch.bool, device=device)
    for span, prompt in zip(spans, prompts, strict=True):
        assert prompt.seen is not None
        seen[0, span] = prompt.seen
    deep = [torch.cat([prompt.deep[layer] for prompt in prompts]) for layer in range(layers.pop())]
    return {"visual_pos_masks": seen, "deepstack_visual_embeds": deep}


@dataclass(frozen=True, slots=True, eq=False)
class TwoWayPack:
    """A pack whose prompts are not causal throughout: inside a picture every token sees every other (Gemma 3).

    `two_way`: where a prompt begins → its masks (`PromptStates.two_way`). One explicit mask a segment serves all layers
    of a kind.
    """

    pack: packing.Pack
    two_way: Mapping[int, Mapping[bool, Tensor]]
    device: torch.device
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return len(self.pack.ids)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
    ) -> Tensor:
        """query [1, Hq, T, D], key [1, Hk, T, D], value [1, Hk, T, E] → [1, T, Hq, E]."""
        if softcap or sinks is not None:
            raise attention.Unshareable("pictures seen both ways with soft caps or sinks are not known here")
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
        for segment in self.pack.segments:
            own = slice(segment.start, segment.start + segment.length)
            before = slice(segment.prefix, segment.prefix + segment.prefix_length)
            keys, values = (torch.cat((s[:, :, before], s[:, :, own]), 2) for s in (key, value))
            found = scaled_dot_product_attention(
                query[:, :, own],
                keys,
                values,
                attn_mask=self._mask(segment, window),
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            out[:, own] = found.transpose(1, 2)
        return out

    def _mask(self, segment: packing.Segment, window: int) -> Tensor:
        """[length, prefix_length + length] bool; the first segment of a prompt holds the prompt itself."""
        known = self._masks.get((segment.start, window))
        if known is not None:
            return known
        place = torch.arange(segment.length, device=self.device)[:, None] + segment.prefix_length
        age = place - torch.arange(segment.prefix_length + segment.length, device=self.device)[None]
        mask = (age >= 0) & (age < window) if window else age >= 0
        own = self.two_way.get(segment.start, {}).get(window > 0) if not segment.prefix_length else None
        if own is not None:
            mask[: len(own), : len(own)] = own
        self._masks[segment.start, window] = mask
        return mask
