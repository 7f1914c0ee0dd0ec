"""Lengths at which a configuration changes what a model computes, and which rows may share a forward because of them.

Some position encodings look at the longest row of a forward and then treat every row of it alike: LongRoPE takes its
long factors above the length the model was first trained with, dynamic NTK scaling stretches with the longest row.
What a row gets would depend on its neighbours. So rows on both sides of such a length never share a forward, and above
the length of a dynamic scaling only rows of equal length do. In: a configuration as a dictionary. No torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_score.data.types import TokenSequence
from dpo_score.models.limits import text_config

LONG_ROPE = ("longrope", "su")
WINDOWS = ("sliding_window", "window_size", "attention_window", "local_attention_window")
FORWARD_WIDE = (
    "index_topk",
    "attention_chunk_size",
    "chunk_size",
    "mamba_chunk_size",
    "block_size",
    "attention_block_size",
)
"""Settings at whose length a forward may turn to another way to compute for all of its rows."""
LONGEST_PROBE = 8192
"""Lengths above are not tried on a model: the forward would cost more than many jobs."""


@dataclass(frozen=True, slots=True)
class LengthRules:
    """`switches`: a row of n tokens is computed in another way if n is above one of these (ascending). Above
    `own_way_above` every length has a way of its own."""

    switches: tuple[int, ...] = ()
    own_way_above: int | None = None

    def __bool__(self) -> bool:
        return bool(self.switches) or self.own_way_above is not None

    def way(self, length: int) -> tuple[int, int]:
        """Equal for rows that may share a forward. `length` counts all tokens of a row, also the last one."""
        own = length if self.own_way_above is not None and length > self.own_way_above else 0
        return bisect_left(self.switches, length), own

    def apart(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Indices of the sequences, one list for each way to compute them, the shortest first."""
        if not self:
            return [list(range(len(sequences)))] if sequences else []
        ways: dict[tuple[int, int], list[int]] = {}
        for index, sequence in enumerate(sequences):
            ways.setdefault(self.way(row_length(sequence)), []).append(index)
        return [ways[way] for way in sorted(ways)]


def row_length(sequence: TokenSequence) -> int:
    """All tokens of a row."""
    return len(sequence.prompt) + len(sequence.response)


def length_rules(config: Mapping[str, Any]) -> LengthRules:
    """The rules that a model's position encoding asks for."""
    text = text_config(config)
    switches, own = set(), []
    for rope in _rope_settings(text):
        kind = rope.get("rope_type") or rope.get("type")
        first = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
        if kind in LONG_ROPE and isinstance(first, int):
            switches.add(first)
        if kind == "dynamic" and isinstance(text.get("max_position_embeddings"), int):
            own.append(text["max_position_embeddings"])
    return LengthRules(tuple(sorted(switches)), min(own, default=None))


def _rope_settings(text: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Settings of rotary positions: one for the model, or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        found = text.get(name)
        if isinstance(found, Mapping):
            yield found
            yield from (inner for inner in found.values() if isinstance(inner, Mapping))


def smallest_window(config: Mapping[str, Any]) -> int | None:
    """The smallest sliding window that a row which the model can read may exceed, or None."""
    text = text_config(config)
    if text.get("use_sliding_window", True) is False:
        return None
    return min(_lengths(text, WINDOWS), default=None)


def changing_lengths(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Lengths on both sides of which a forward may be computed in another way as a whole, ascending.

    Candidates, named by the configuration: whether a model really does so is asked of the model. None is above
    LONGEST_PROBE, nor beyond the positions that the model has.
    """
    text = text_config(config)
    rules = length_rules(config)
    found = {*_lengths(text, FORWARD_WIDE), *(n for n in rules.switches if n <= LONGEST_PROBE)}
    if rules.own_way_above is not None and rules.own_way_above <= LONGEST_PROBE:
        found.add(rules.own_way_above)
    return tuple(sorted(found))


def _lengths(text: Mapping[str, Any], names: Sequence[str]) -> list[int]:
    longest = text.get("max_position_embeddings")
    most = min(LONGEST_PROBE, longest - PROBE_TAIL if isinstance(longest, int) else LONGEST_PROBE)
    values = [value for name in names for value in _as_list(text.get(name))]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 < v <= most]


PROBE_TAIL = 64
"""Most tokens that a row of a probe has beyond the length in question."""


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def fresh_rope(model: Any) -> None:
    """Forget the longest row that earlier forwards had: dynamic scaling keeps its frequencies until a shorter one
    comes, and would give a row those of another."""
    for module in model.modules():
        if not hasattr(module, "max_seq_len_cached") or not hasattr(module, "original_max_seq_len"):
            continue
        for name in [n for n in vars(module) if n.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            kept = getattr(module, f"{prefix}original_inv_freq", None)
            current = getattr(module, f"{prefix}inv_freq", None)
            if kept is None or current is None or getattr(module, name) == module.original_max_seq_len:
                continue
            setattr(module, f"{prefix}inv_freq", kept.to(current.device))
            setattr(module, name, module.original_max_seq_len)
