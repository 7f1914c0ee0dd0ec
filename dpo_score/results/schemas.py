"""Blocks as Arrow tables: the text of a block (what is scored), its reference values, its scores, its rejects.

Every table of one kind has one schema whatever a block holds, so parts can be read together. Sums are made
here: float64, in token order, from the float32 values that a model returned. No model, no files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_score.data.types import EncodedPair, Ids, Media, Picture, Rejected, Side, TokenSequence
from dpo_score.escape import safe
from dpo_score.logprobs.types import SequenceLogps

SIDES: tuple[Side, Side] = ("chosen", "rejected")
IDS = pa.list_(pa.int32())
MASK = pa.list_(pa.bool_())
STATS = {"wpo": "log_sum_sq_probs", "entropy": "entropy", "top1": "top1"}
"""--stats NAME → the statistic of the scorer, summed over a sequence in column {role}_{side}_{statistic}."""

TEXT_FIELDS = (
    pa.field("row_id", pa.string()),
    pa.field("dataset", pa.string()),
    pa.field("source_file", pa.string()),
    pa.field("source_row", pa.int64()),
    pa.field("pair_id", pa.string()),
    pa.field("pair_digest", pa.string()),
    pa.field("prompt_digest", pa.string()),
)
COUNT_FIELDS = (
    pa.field("status", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("chosen_tokens", pa.int32()),
    pa.field("rejected_tokens", pa.int32()),
    pa.field("chosen_truncated", pa.bool_()),
    pa.field("rejected_truncated", pa.bool_()),
    pa.field("marks", pa.list_(pa.string())),
)
ID_FIELDS = (
    *(pa.field(f"{part}_ids", IDS) for part in ("prompt", "chosen", "rejected")),
    *(pa.field(f"{part}_mask", MASK) for part in ("prompt", "chosen", "rejected")),
)
REJECT_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("dataset", pa.string()),
        ("source_file", pa.string()),
        ("source_row", pa.int64()),
        ("column", pa.string()),
        ("value_seen", pa.string()),
        ("code", pa.string()),
        ("reason", pa.string()),
    ]
)
_sorted_json = json.JSONEncoder(sort_keys=True, default=str).encode
ID_NAMES = tuple(field.name for field in ID_FIELDS)


def text_schema(extra: Sequence[pa.Field]) -> pa.Schema:
    """Columns of a block's text: where from, what is carried along, counts, ids."""
    return pa.schema([*TEXT_FIELDS, *extra, *COUNT_FIELDS, *ID_FIELDS])


MEDIA = "media"
"""Beside the ids of a block whose prompts have pictures: what `Media` holds, null where a prompt has none."""
MEDIA_TYPE = pa.struct(
    [
        ("preparation", pa.string()),
        (
            "pictures",
            pa.list_(
                pa.struct(
                    [
                        ("sha256", pa.string()),
                        ("width", pa.int32()),
                        ("height", pa.int32()),
                        ("path", pa.string()),
                        ("row", pa.int64()),
                        ("column", pa.string()),
                        ("index", pa.int32()),
                    ]
                )
            ),
        ),
    ]
)


def text_table(encoded: Sequence[EncodedPair], extra: Sequence[pa.Field]) -> pa.Table:
    """One row a pair, in order; ids and masks included."""
    pairs, tokens = [item.pair for item in encoded], [item.tokens for item in encoded]
    sources = [pair.source for pair in pairs]
    columns: dict[str, Any] = {
        "row_id": [source.row_id for source in sources],
        "dataset": [source.dataset for source in sources],
        "source_file": [source.file for source in sources],
        "source_row": [source.row for source in sources],
        "pair_id": [pair.pair_id for pair in pairs],
        "pair_digest": [item.pair_digest for item in encoded],
        "prompt_digest": [prompt_digest(item) for item in encoded],
        **{field.name: [_carried(pair, field) for pair in pairs] for field in extra},
        "status": ["scored"] * len(encoded),
        "prompt_tokens": [len(ids.prompt) for ids in tokens],
        **{f"{side}_tokens": [item.sequence(side).scored_count for item in encoded] for side in SIDES},
        **{f"{side}_truncated": [getattr(ids, f"{side}_truncated") for ids in tokens] for side in SIDES},
        "marks": [item.marks for item in encoded],
    }
    for part in ("prompt", *SIDES):
        columns[f"{part}_ids"] = _list_column([getattr(ids, part) for ids in tokens], np.int32)
        columns[f"{part}_mask"] = _list_column([getattr(ids, f"{part}_mask") for ids in tokens], np.bool_)
    table = pa.table(columns, schema=text_schema(extra))
    media = [None if item.media is None else asdict(item.media) for item in encoded]
    return table.append_column(MEDIA, pa.array(media, MEDIA_TYPE)) if any(media) else table


def without_ids(text: pa.Table) -> pa.Table:
    """A text table as it goes into outputs: without ids, masks, and the places of pictures."""
    return text.drop_columns([name for name in (*ID_NAMES, MEDIA) if name in text.column_names])


def _list_column(rows: Sequence[np.ndarray[Any, Any] | None], dtype: type[np.generic]) -> pa.Array:
    """A list column from one array a row, null where there is none."""
    absent = [row is None for row in rows]
    if all(absent):
        return pa.nulls(len(rows), pa.list_(pa.from_numpy_dtype(dtype)))
    arrays = [np.zeros(0, dtype) if row is None else row for row in rows]
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    values = pa.array(np.concatenate(arrays).astype(dtype, copy=False))
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(absent) if any(absent) else None)


def prompt_digest(encoded: EncodedPair) -> str:
    """blake2b-128 (hex) of the prompt's text and tools without regard to case and spaces; of its ids if without text.

    Pairs of one digest are one cluster for every interval, so prompts that are nearly the same get the same digest.
    """
    pair = encoded.pair
    if not pair.prompt or pair.tokens is not None:
        return TokenSequence(encoded.tokens.prompt, encoded.tokens.prompt[:0]).key.hex()
    content = _sorted_json(_folded([pair.prompt, pair.tools]))
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _folded(value: Any) -> Any:
    """The same value with every text in it in one case and with single spaces."""
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, Mapping):
        return {str(key): _folded(item) for key, item in value.items()}
    return [_folded(item) for item in value] if isinstance(value, list | tuple) else value


def _carried(pair: Any, field: pa.Field) -> Any:
    value = pair.tied if field.name == "tied" else pair.extra.get(field.name)
    if value is None or not pa.types.is_string(field.type):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")  # lone surrogates


def sequences(text: pa.Table) -> list[TokenSequence]:
    """chosen, rejected, chosen, rejected … of a text table: 2 × rows."""
    parts: dict[str, list[Any]] = {name: list(_arrays(text[name])) for name in ID_NAMES}
    media = text[MEDIA].to_pylist() if MEDIA in text.column_names else [None] * text.num_rows
    parts[MEDIA] = [None if one is None else _media(one) for one in media]
    return [_sequence(parts, row, side) for row in range(text.num_rows) for side in SIDES]


def _media(cell: Mapping[str, Any]) -> Media:
    return Media(tuple(Picture(**picture) for picture in cell["pictures"]), cell["preparation"])


def _sequence(parts: Mapping[str, list[Any]], row: int, side: Side) -> TokenSequence:
    prompt, response = parts["prompt_ids"][row], parts[f"{side}_ids"][row]
    prompt_mask, mask = parts["prompt_mask"][row], parts[f"{side}_mask"][row]
    if prompt_mask is None and mask is None:
        return TokenSequence(prompt, response, media=parts[MEDIA][row])
    prompt_mask = np.zeros(len(prompt), bool) if prompt_mask is None else prompt_mask.astype(bool)
    mask = np.ones(len(response), bool) if mask is None else mask.astype(bool)
    return TokenSequence(prompt, response, np.concatenate([prompt_mask, mask]), parts[MEDIA][row])


def _arrays(column: pa.ChunkedArray) -> list[Ids | None]:
    """Rows of a list column as numpy views, None where null."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    values = array.values.to_numpy(zero_copy_only=False)
    offsets, valid = array.offsets.to_numpy(), array.is_valid().to_numpy(zero_copy_only=False)
    return [values[a:b] if ok else None for a, b, ok in zip(offsets[:-1], offsets[1:], valid, strict=True)]


def value_columns(role: str, entries: Sequence[SequenceLogps], stats: Sequence[str], per_token: bool) -> dict[str, Any]:
    """`{role}_{side}_logps`, `…_logps_shared`, statistics, and with per_token the lists, from 2 × rows entries.

    The shared sum runs over the first min(nc, nr) tokens of each side (LD-DPO).
    """
    columns: dict[str, Any] = {}
    pairs = list(zip(entries[0::2], entries[1::2], strict=True))
    shared = [min(len(c.token_logps), len(r.token_logps)) for c, r in pairs]
    for index, side in enumerate(SIDES):
        side_entries = [pair[index] for pair in pairs]
        columns[f"{role}_{side}_logps"] = [_sum(e.token_logps) for e in side_entries]
        columns[f"{role}_{side}_logps_shared"] = [
            _sum(e.token_logps[:m]) for e, m in zip(side_entries, shared, strict=True)
        ]
        for stat in stats:
            columns[f"{role}_{side}_{STATS[stat]}"] = [_sum(e.stats[STATS[stat]]) for e in side_entries]
        if per_token:
            columns[f"{role}_{side}_token_logps"] = pa.array(
                [e.token_logps for e in side_entries], pa.list_(pa.float32())
            )
    return columns


def turn_columns(
    role: str, entries: Sequence[SequenceLogps], sequences: Sequence[TokenSequence]
) -> dict[str, pa.Array]:
    """`{role}_{side}_turn_logps`: for each pair a list with the sum of every assistant turn, in order; with the same
    tokens, they add up to the row's own sum. A turn is a stretch of scored tokens; between two of them lie the tokens
    that open the next turn.
    """
    sums = [_turn_sums(entry, sequence) for entry, sequence in zip(entries, sequences, strict=True)]
    type_ = pa.list_(pa.float64())
    return {f"{role}_{side}_turn_logps": pa.array(sums[index::2], type_) for index, side in enumerate(SIDES)}


def _turn_sums(entry: SequenceLogps, sequence: TokenSequence) -> list[float]:
    ends = np.flatnonzero(np.diff(sequence.scored_positions) > 1) + 1
    return [_sum(turn) for turn in np.split(entry.token_logps, ends)]


def _sum(values: np.ndarray[Any, np.dtype[Any]]) -> float:
    """Sequential float64 sum in token order: the same bits on every machine, whatever NumPy's blocking."""
    return float(np.cumsum(values, dtype=np.float64)[-1]) if len(values) else 0.0


def with_columns(table: pa.Table, columns: Mapping[str, Any]) -> pa.Table:
    """Append columns (lists are float64, arrays keep their type)."""
    for name, values in columns.items():
        table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values, pa.float64()))
    return table


def reject_table(rejected: Sequence[Rejected]) -> pa.Table:
    """One row a rejected pair; the value seen is escaped and cut to 200 characters."""
    return pa.Table.from_pylist([_reject_row(item) for item in rejected], schema=REJECT_SCHEMA)


def _reject_row(item: Rejected) -> dict[str, Any]:
    return {
        "row_id": item.source.row_id,
        "dataset": item.source.dataset,
        "source_file": item.source.file,
        "source_row": item.source.row,
        "column": item.column,
        "value_seen": None if item.value_seen is None else safe(item.value_seen, 200),
        "code": item.code,
        "reason": safe(item.reason),
    }


def reject_rows(text: pa.Table, reasons: Mapping[int, tuple[str, str]]) -> pa.Table:
    """Rows of a text or reference table that a model could not score: `reasons` maps row → (code, reason)."""
    rows = sorted(reasons)
    kept = text.take(pa.array(rows, pa.int64())).select(["row_id", "dataset", "source_file", "source_row"])
    empty = pa.nulls(len(rows), pa.string())
    codes = pa.array([reasons[row][0] for row in rows], pa.string())
    texts = pa.array([safe(reasons[row][1]) for row in rows], pa.string())
    arrays = [*kept.columns, empty, empty, codes, texts]
    return pa.table(arrays, schema=REJECT_SCHEMA)
