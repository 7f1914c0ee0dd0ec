"""Pairs in groups by the values of a column. Pure.

    numbers           each value where there are at most DISTINCT, else bins between the quartiles
    everything else   each value; beyond MOST of them the rarer ones are pooled
    length            built in: scored tokens of the longer answer, in doubling bins
    turns             built in: messages of prompt and answer (who reads the pairs counts them)
    data              built in: the data set that a pair is from

Pairs without a value are a group of their own, so groups always add up to all pairs. Groups of texts are named by
those texts; `numbered` gives them names without.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo_score.losses.ops import Floats

LENGTH, TURNS = "length", "turns"
DATA, DATASET = "data", "dataset"
"""What the option that names data sets is called, and the column that holds them."""
BUILT_IN = {
    DATA: "the data set that a pair is from",
    LENGTH: "scored tokens of the longer answer",
    TURNS: "messages of prompt and answer, system texts not counted",
}
LENGTH_EDGES = (32, 64, 128, 256, 512, 1024, 2048)
DISTINCT, BINS, MOST = 8, 4, 30
LONGEST_NAME = 80
MEANS = b"dpo_score.means"
"""Metadata of an Arrow field whose values need a word of explanation."""
NO_VALUE, EMPTY, OTHERS = OWN_NAMES = ("(no value)", "(empty)", "(other values)")


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """`codes`: for every row an index into `names`, in the order to show them in. `how`: in words.

    `quotes`: whether the names are texts of the data.
    """

    codes: NDArray[np.int32]
    names: tuple[str, ...]
    how: str
    quotes: bool = False


def means(sentence: str) -> dict[bytes, bytes]:
    """The metadata that explains a column."""
    return {MEANS: sentence.encode()}


def group_field(column: pa.ChunkedArray, field: pa.Field) -> Grouping:
    """`cut`, with what the field says of itself."""
    found, said = cut(column), (field.metadata or {}).get(MEANS)
    return found if said is None else replace(found, how=f"{said.decode()}; {found.how}")


def cut(column: pa.ChunkedArray) -> Grouping:
    """Groups of a column of any type."""
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return group_numbers(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
    return replace(group_texts(_texts(column)), quotes=not pa.types.is_boolean(kind))


def by_length(longer: Floats) -> Grouping:
    """Doubling bins of the longer answer's scored tokens; NaN has no value."""
    names = [f"up to {LENGTH_EDGES[0]}", *(f"{edge // 2 + 1} to {edge}" for edge in LENGTH_EDGES[1:])]
    codes = np.searchsorted(np.array(LENGTH_EDGES), longer).astype(np.int32)
    codes[~np.isfinite(longer)] = len(LENGTH_EDGES) + 1
    return Grouping(codes, (*names, f"over {LENGTH_EDGES[-1]}", NO_VALUE), BUILT_IN[LENGTH])


def group_numbers(values: Floats) -> Grouping:
    """Few different numbers are groups of their own; many are cut at their quartiles. NaN and inf have no value."""
    there = np.isfinite(values)
    different = np.unique(values[there])
    if len(different) <= DISTINCT:
        names, how = _distinct(different), _each(len(different))
        edges = different
    else:
        shares = np.arange(1, BINS) / BINS
        edges = np.unique(np.quantile(values[there], shares, method="inverted_cdf"))
        names, how = _ranges(different, edges), "bins between its quartiles"
    codes = np.searchsorted(edges, values).astype(np.int32)
    codes[~there] = len(names)
    return Grouping(codes, (*names, NO_VALUE), how)


def _ranges(different: Floats, edges: Floats) -> list[str]:
    """A name for each bin (edge before, edge]: the least and the largest number that lie in it."""
    bins = np.split(different, np.searchsorted(different, edges, side="right"))
    ends = [(found[0], found[-1]) for found in bins if len(found)]
    short = [f"{_number(low)} to {_number(high)}" if low < high else _number(low) for low, high in ends]
    return short if len(set(short)) == len(short) else [f"{_full(low)} to {_full(high)}" for low, high in ends]


def _distinct(different: Floats) -> list[str]:
    """A name for each number; all digits where shorter names would be alike."""
    short = [_number(value) for value in different]
    return short if len(set(short)) == len(short) else [_full(value) for value in different]


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.4g}"


def _full(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def numbered(names: Sequence[str]) -> tuple[str, ...]:
    """Names that quote nothing: "group 1" and so on, in their order."""
    places = itertools.count(1)
    return tuple(name if name in OWN_NAMES else f"group {next(places)}" for name in names)


def _each(count: int) -> str:
    return "each of its values" if count != 1 else "its one value"


def group_texts(texts: Sequence[str | None]) -> Grouping:
    """Each text is a group, in order; of more than MOST the most frequent, and the rest as one."""
    shown = [NO_VALUE if text is None else _name(text) for text in texts]
    counts = Counter(name for name in shown if name not in (NO_VALUE, OTHERS))  # a text may be just that
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    names = (*sorted(ranked[:MOST]), OTHERS, NO_VALUE)
    places = {name: place for place, name in enumerate(names)}
    codes = np.fromiter((places.get(name, len(names) - 2) for name in shown), np.int32, len(shown))
    how = _each(len(ranked)) if len(ranked) <= MOST else f"the {MOST} most frequent of its {len(ranked):,} values"
    return Grouping(codes, names, how)


def _name(text: str) -> str:
    return (text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…") or EMPTY


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    if pa.types.is_boolean(column.type):
        column = pc.if_else(column, "true", "false")
    return [text_of(value) for value in column.to_pylist()]


def text_of(value: Any) -> str | None:
    """A cell as text: strings as they are, a list of strings with commas, else JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)
