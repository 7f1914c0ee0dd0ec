"""Formats of token ids: three id lists, or whole sequences with labels of which −100 means not scored.

No tokenizer and no template is needed. Any mask is kept: a labelled row's prompt is what both sides share
before the first scored token of either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_score.data.column_types import Shape, is_ids
from dpo_score.data.formats.base import Column, Content, Found, ReadOptions, pair, preference_format
from dpo_score.data.formats.cells import Row, list_cell
from dpo_score.data.types import Ids, Mask, Pair, TokenIds, Unusable

IGNORED = -100
_LARGEST_ID = 2**31 - 1


SIDES = ("prompt", "chosen", "rejected")


def _is_mask(shape: Shape | None) -> bool:
    return shape is not None and shape.kind == "list"


@preference_format(
    name="ids",
    code="F0",
    needs=(
        *(Column(side, is_ids, also=(f"{side}_ids", f"{side}_input_ids")) for side in SIDES),
        *(Column(f"{side}_mask", _is_mask, optional=True) for side in SIDES),
    ),
    unless=lambda shapes: "chosen_labels" in shapes,
    columns="prompt_ids, chosen_ids, rejected_ids: lists of integers (also *_input_ids)",
    polarity="chosen_ids are better than rejected_ids",
    content=Content.TOKEN_IDS,
)
def ids(row: Row, options: ReadOptions) -> Found:
    prompt, chosen, rejected = (ids_cell(row, side) for side in SIDES)
    sizes = {"prompt": len(prompt), "chosen": len(chosen), "rejected": len(rejected)}
    masks = {side: _mask_cell(row, f"{side}_mask", size) for side, size in sizes.items()}
    return [_pair(TokenIds(prompt, chosen, rejected, masks["prompt"], masks["chosen"], masks["rejected"]))]


@preference_format(
    name="ids",
    variant="labels",
    code="F0",
    needs=(
        *(Column(f"{side}_attention_mask", _is_mask, optional=True) for side in SIDES[1:]),
        *(Column(f"{side}_{part}", is_ids) for side in SIDES[1:] for part in ("input_ids", "labels")),
    ),
    columns="chosen_input_ids, chosen_labels, rejected_input_ids, rejected_labels (-100 = not scored)",
    polarity="chosen_input_ids are better than rejected_input_ids",
    content=Content.TOKEN_IDS,
)
def labelled_ids(row: Row, options: ReadOptions) -> Found:
    chosen, rejected = (_labelled(row, side) for side in ("chosen", "rejected"))
    k = min(_shared(chosen.ids, rejected.ids), chosen.first, rejected.first)
    tokens = TokenIds(
        chosen.ids[:k],
        chosen.ids[k:],
        rejected.ids[k:],
        None,
        _unless_all(chosen.scored[k:]),
        _unless_all(rejected.scored[k:]),
    )
    return [_pair(tokens)]


def _pair(tokens: TokenIds) -> Pair:
    for side, ids, mask in (
        ("chosen", tokens.chosen, tokens.chosen_mask),
        ("rejected", tokens.rejected, tokens.rejected_mask),
    ):
        if len(ids) == 0 or (mask is not None and not mask.any() and tokens.prompt_mask is None):
            raise Unusable("no_completion_tokens", f"{side} has no token to score", f"{side}_ids")
    return pair("", "", "", tokens=tokens)


@dataclass(frozen=True, slots=True, eq=False)
class _Labelled:
    ids: Ids
    scored: Mask

    @property
    def first(self) -> int:
        """Position of the first scored token; the length where there is none."""
        return int(np.argmax(self.scored)) if self.scored.any() else len(self.ids)


def _labelled(row: Row, side: str) -> _Labelled:
    ids = ids_cell(row, f"{side}_input_ids")
    labels = np.asarray(integers(row, f"{side}_labels"), dtype=np.int64)
    if len(labels) != len(ids):
        raise Unusable("invalid_ids", f"{side} has {len(ids)} ids, but {len(labels)} labels", f"{side}_labels")
    scored = labels != IGNORED
    if not np.array_equal(labels[scored], ids[scored]):
        raise Unusable("invalid_ids", f"a label of {side} is neither -100 nor its own token", f"{side}_labels")
    attended = _mask_cell(row, f"{side}_attention_mask", len(ids))
    return _Labelled(ids, scored) if attended is None else _Labelled(ids[attended], scored[attended])


def _unless_all(mask: Mask) -> Mask | None:
    return None if mask.all() else mask


def _shared(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def ids_cell(row: Row, column: str) -> Ids:
    """Token ids: whole numbers from 0 to 2³¹−1."""
    values = np.asarray(integers(row, column), dtype=np.int64)
    if len(values) and (values.min() < 0 or values.max() > _LARGEST_ID):
        raise Unusable("invalid_ids", f"{column} holds an id outside 0 … 2³¹−1", column, int(values.min()))
    return values.astype(np.int32)


def integers(row: Row, column: str) -> list[int]:
    values = list_cell(row, column)
    wrong: list[Any] = [v for v in values if type(v) is not int or not -(2**63) <= v < 2**63]
    if wrong:
        raise Unusable(
            "invalid_ids", f"{column} holds {type(wrong[0]).__name__} values, not token ids", column, wrong[0]
        )
    return values


def _mask_cell(row: Row, column: str, length: int) -> NDArray[np.bool_] | None:
    if row.get(column) is None:
        return None
    values = list_cell(row, column)
    if len(values) != length or any(v not in (0, 1, False, True) for v in values):
        raise Unusable("invalid_ids", f"{column} is not a mask over {length} tokens", column, values)
    return np.asarray(values, dtype=bool)
