"""Lengths at which a configuration changes what a model computes, and which rows may share a forward because of them.

Some position encodings look at the longest row of a forward and then treat every row of it alike: LongRoPE takes its
long factors above the length the model was first trained with, dynamic NTK scaling stretches with the longest row.
What a row gets would depend on its neighbours. So rows on both sides of such a length never share a forward, and above
the length of a dynamic scaling only rows of equal length do. In: a configuration as a dictionary. No torch.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_score.data.types import TokenSequence
from dpo_score.models.limits import text_config

LONG_ROPE = ("longrope", "su")
WINDOWS = re.compile(r"(\w+_)?window(_size)?")
FORWARD_WIDE = re.compile(r".*(chunk|block)_?size|.*top_?k|.*_budget|.*floor(_scale)?|dense_len")
"""Settings at whose length a forward may turn to another way to compute for all of its rows: sparse attention that
keeps so many tokens, chunks, scales of attention by position."""
OTHER_PARTS = re.compile(r".*(vision|audio|quantization).*")
FIXED_ROPE = ("default", "linear", "yarn", "llama3", "proportional", "mrope")
"""Rotary positions whose frequencies depend on no length of a forward."""
LONGEST_PROBE = 8192
"""Lengths above are not tried on a model, as the forward would cost more than many jobs: rows above the first of them
are computed by the model itself, each alone."""


@dataclass(frozen=True, slots=True)
class LengthRules:
    """`switches`: a row of n tokens is computed in another way if n is above one of these (ascending). Above
    `own_way_above` every length has a way of its own. Above `alone_above` nothing was tried: every row has a forward of
    its own, of the model as it was loaded."""

    switches: tuple[int, ...] = ()
    own_way_above: int | None = None
    alone_above: int | None = None

    def __bool__(self) -> bool:
        """Whether a forward must know how long its longest row is."""
        return bool(self.switches) or self.own_way_above is not None

    def way(self, length: int) -> tuple[int, int]:
        """Equal for rows that may share a forward. `length` counts all tokens of a row, also the last one."""
        own = length if self.own_way_above is not None and length > self.own_way_above else 0
        return bisect_left(self.switches, length), own

    def is_alone(self, sequence: TokenSequence) -> bool:
        return self.alone_above is not None and row_length(sequence) > self.alone_above

    def apart(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Indices of the sequences, one list for each way to compute them, the shortest first; a list for each row
        that must be alone."""
        alone = [index for index, sequence in enumerate(sequences) if self.is_alone(sequence)]
        ways: dict[tuple[int, int], list[int]] = {}
        for index in sorted(set(range(len(sequences))) - set(alone)):
            way = self.way(row_length(sequences[index])) if self else (0, 0)
            ways.setdefault(way, []).append(index)
        return [*(ways[way] for way in sorted(ways)), *([index] for index in alone)]


def row_length(sequence: TokenSequence) -> int:
    """All tokens of a row."""
    return len(sequence.prompt) + len(sequence.response)


def length_rules(config: Mapping[str, Any]) -> LengthRules:
    """The rules that a model's position encoding asks for, and what was not tried."""
    text = text_config(config)
    switches, own = set(), []
    for rope in _rope_settings(text):
        kind = rope.get("rope_type") or rope.get("type")
        first = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
        if kind in LONG_ROPE and isinstance(first, int):
            switches.add(first)
        if kind == "dynamic" and isinstance(text.get("max_position_embeddings"), int):
            own.append(text["max_position_embeddings"])
    above = min(own, default=None)
    untried = [n for n in (*_named_lengths(text), *_windows(text), *switches, *own) if n > LONGEST_PROBE]
    return LengthRules(tuple(sorted(switches)), above, min(untried, default=None))


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
    return min(_probed(text, _windows(text)), default=None)


def changing_lengths(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Lengths on both sides of which a forward may be computed in another way as a whole, ascending.

    Candidates, named by the configuration: whether a model really does so is asked of the model. None is above
    LONGEST_PROBE, nor beyond the positions that the model has.
    """
    text = text_config(config)
    rules = length_rules(config)
    ruled = [n for n in (*rules.switches, rules.own_way_above) if n is not None and n <= LONGEST_PROBE]
    return tuple(sorted({*_probed(text, _named_lengths(text)), *ruled}))


def _windows(text: Mapping[str, Any]) -> list[int]:
    return [] if text.get("use_sliding_window", True) is False else _lengths(text, WINDOWS)


def _named_lengths(text: Mapping[str, Any]) -> list[int]:
    """Lengths that the names of settings tell of, and the first context where positions are scaled in a way that is
    not known to be the same for every length."""
    found = _lengths(text, FORWARD_WIDE)
    for rope in _rope_settings(text):
        kind, first = rope.get("rope_type") or rope.get("type"), rope.get("original_max_position_embeddings")
        plain = kind is None or kind in (*FIXED_ROPE, *LONG_ROPE, "dynamic")
        if isinstance(first, int) and (not plain or any("scaling" in name for name in rope)):
            found.append(first)
    return found


def _probed(text: Mapping[str, Any], lengths: Iterable[int]) -> list[int]:
    longest = text.get("max_position_embeddings")
    most = min(LONGEST_PROBE, longest - PROBE_TAIL if isinstance(longest, int) else LONGEST_PROBE)
    return [n for n in lengths if n <= most]


def _lengths(settings: Mapping[str, Any], names: re.Pattern[str]) -> list[int]:
    """Positive whole numbers of settings with such names, also of those inside others."""
    found = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += [] if OTHER_PARTS.fullmatch(str(name)) else _lengths(value, names)
        elif names.fullmatch(str(name)):  # id2label has numbers for names
            found += [v for v in _as_list(value) if isinstance(v, int) and not isinstance(v, bool) and v > 0]
    return found


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
