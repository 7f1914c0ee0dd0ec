"""What an exported data set looks like before a file of it is written: its reader, files, columns and rows.

A reference value belongs to the tokens that were scored. A consumer that would split, mask or cut a row in another way
puts other tokens behind the same number, so an export for it is refused and the rule is named. Columns of the input
that already say what was scored are passed on untouched; others are written anew, the input's kept as `original_*`.
Boundaries of files depend on the data alone, so a --limit cuts the last file short and moves none. Nothing is written
here, and no model is needed.

To add an exporter, add its Consumer to CONSUMERS, and the rules that it breaks to `rule_unlike_trl` or one of its own:

    >>> consumers = {**CONSUMERS, "mine": Consumer("mine", texts=False)}  # token ids, so no rule can be broken
    >>> sorted(name for name, consumer in consumers.items() if not consumer.texts)
    ['ids', 'mine']
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_score.config.schema import RunConfig, TextSpec
from dpo_score.data.dataset import DataFile, Dataset, PairReader
from dpo_score.data.layout import split_names
from dpo_score.data.pictures import read_again
from dpo_score.data.types import Pair, Problem, Rejected
from dpo_score.engine.plan import SCHEMA_VERSION, RowBlocks, RunPlan
from dpo_score.engine.threads import prefetch
from dpo_score.errors import ConfigError, nearest
from dpo_score.export.input_rows import OriginalRows, source_schema
from dpo_score.results.schemas import IDS, MASK
from dpo_score.tokenization.prompt import arranged

# --- who reads the data set -------------------------------------------------------------------------------------------


VALUES = ("ref_chosen_logps", "ref_rejected_logps")
TEXTS = ("prompt", "chosen", "rejected")
TOKEN_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
MASKS = ("prompt_mask", "chosen_mask", "rejected_mask")
LABELS = ("row_id", "pair_id", "pair_digest")


@dataclass(frozen=True, slots=True)
class Consumer:
    """`texts`: it tokenises prompt, chosen and rejected itself; else it takes token ids as they are."""

    name: str
    texts: bool


CONSUMERS = {consumer.name: consumer for consumer in (Consumer("trl", texts=True), Consumer("ids", texts=False))}


def consumer_of(name: str, config: RunConfig, datasets: Sequence[Dataset], encoder_decoder: bool) -> Consumer:
    """The consumer called `name`; ConfigError when there is none, or when it would score other tokens."""
    if name not in CONSUMERS:
        raise ConfigError(f"--to {name}: {nearest(name, CONSUMERS)}")
    consumer = CONSUMERS[name]
    rule = rule_unlike_trl(config, datasets, encoder_decoder) if consumer.texts else None
    if rule is not None:
        raise ConfigError(
            f"--to {name}: {rule}, so its trainer would put other tokens behind these values. Use --to ids for a "
            "trainer of your own, which gets the very ids that were scored"
        )
    return consumer


def rule_unlike_trl(config: RunConfig, datasets: Sequence[Dataset], encoder_decoder: bool) -> str | None:
    """Which of TRL's rules a run breaks, as a clause: completion tokens alone, cut from the end, a causal model, text
    that it tokenises itself. None where TRL would score the same tokens."""
    text = config.text
    if text.score != "completion":
        return f"TRL scores every token of the answer, this run --score {text.score}"
    if text.truncation == "keep_end":
        return "TRL keeps the first max_length tokens of a row, this run the last ones (--truncation keep_end)"
    chats = (dataset for dataset in datasets if text.render == "chat" or dataset.is_conversational)
    if any(dataset.format.answer_start for dataset in chats):
        return "TRL scores the whole turn of the assistant, this run what follows the steps that it begins with"
    if any(dataset.format.holds_ids for dataset in datasets):
        return "TRL tokenises text, and this data is token ids"
    if encoder_decoder:
        return "TRL trains causal models only, and the reference is an encoder-decoder"
    return None


def renaming(given: str | None) -> dict[str, str]:
    """`a=b,c=d` → {a: b, c: d}."""
    pairs = [item.strip() for item in (given or "").split(",") if item.strip()]
    found = {}
    for pair in pairs:
        old, equals, new = (part.strip() for part in pair.partition("="))
        if not (old and equals and new):
            raise ConfigError(f"--rename takes OLD=NEW, a comma list; got {pair!r}")
        found[old] = new
    return found


def renamed(names: Sequence[str], changes: dict[str, str]) -> list[str]:
    """`names` after --rename; ConfigError for a column that is not written, or two of one name."""
    for old in changes:
        if old not in names:
            raise ConfigError(f"--rename {old}=…: no such column is written; {nearest(old, names)}")
    found = [changes.get(name, name) for name in names]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise ConfigError(f"--rename leaves two columns called {twice[0]!r}: choose another name")
    return found


# --- which rows each file holds ---------------------------------------------------------------------------------------


SHARD_BYTES = 500_000_000
GROWTH = 2.0
"""Bytes written for each byte read, at most: the input kept beside what was scored."""
_NOT_A_NAME = re.compile(r"\W+", re.ASCII)
_KNOWN = frozenset({"train", "test", "validation", "valid", "val", "dev", "eval"})


@dataclass(frozen=True, slots=True)
class Shard:
    """File `index` of `of` of a split: positions [start, stop) of the run."""

    split: str
    index: int
    of: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"data/{self.split}-{self.index:05d}-of-{self.of:05d}.parquet"

    @property
    def stage(self) -> str:
        return f"data/{self.split}"


@dataclass(frozen=True, slots=True)
class Split:
    """Rows [start, stop) of all sets (numbered through), with the bytes of their files."""

    name: str
    start: int
    stop: int
    bytes: int


def splits_of(datasets: Sequence[Dataset]) -> tuple[Split, ...]:
    """In reading order. One set: its splits' names. Several: the names of the sets, and of their splits if many."""
    found: list[Split] = []
    row = 0
    for dataset in datasets:
        labels = [_label(dataset, file) for file in dataset.files]
        several = len(set(labels)) > 1
        for file, label in zip(dataset.files, labels, strict=True):
            own = _NOT_A_NAME.sub("_", dataset.spec.name)
            name = label if len(datasets) == 1 else f"{own}_{label}" if several else own
            _append(found, Split(name, row, row + file.rows, file.size))
            row += file.rows
    return tuple(found)


def _append(found: list[Split], new: Split) -> None:
    """Files of one split that follow each other are one range; a name that comes back later gets a number."""
    if found and found[-1].name == new.name:
        last = found.pop()
        found.append(Split(last.name, last.start, new.stop, last.bytes + new.bytes))
        return
    same = sum(split.name == new.name or split.name.startswith(f"{new.name}_part") for split in found)
    found.append(Split(f"{new.name}_part{same + 1}" if same else new.name, new.start, new.stop, new.bytes))


def _label(dataset: Dataset, file: DataFile) -> str:
    names = split_names(file.name)
    asked = next((split for split in dataset.spec.split if split in names), None)
    known = next((name for name in names if name in _KNOWN), "train")
    return _NOT_A_NAME.sub("_", asked or known)


def shards_of(splits: Sequence[Split], rows: RowBlocks) -> Iterator[Shard]:
    """The files to write, in order; those that a --limit leaves without rows are left out."""
    for split in splits:
        start, stop = _position(split.start, rows), _position(split.stop, rows)
        count = max(1, math.ceil(split.bytes * GROWTH / SHARD_BYTES)) if stop > start else 0
        for index in range(count):
            first = start + (stop - start) * index // count
            last = min(start + (stop - start) * (index + 1) // count, rows.wanted)
            if first < last:
                yield Shard(split.name, index, count, first, last)


def _position(row: int, rows: RowBlocks) -> int:
    return row if rows.sample is None else bisect_left(rows.sample, row)


# --- the pair as it was scored, as columns ----------------------------------------------------------------------------


MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
MESSAGES = pa.list_(MESSAGE)
JSON = pa.json_(pa.string())
JSON_MESSAGES = pa.list_(JSON)
"""Messages with more than role and content: a struct would pad each with the keys of all others."""
PART = pa.struct([("type", pa.string()), ("text", pa.string())])
PARTED = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(PART))]))
"""Messages whose content is in parts, as sets about pictures have them: the text of a picture's place is null."""
PICTURES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
"""Pictures as the datasets library stores them."""
TOOLS, ARGUMENTS, IMAGES = "tools", "chat_template_kwargs", "images"
KINDS = {"string": pa.string(), "messages": MESSAGES, "json": JSON_MESSAGES, "parts": PARTED}


@dataclass(frozen=True, slots=True)
class Survey:
    """What the rows of a set need. `changed`: input columns whose value is not what was scored, in some row."""

    kind: str = "string"
    changed: frozenset[str] = frozenset()
    tools: bool = False
    arguments: bool = False


@dataclass(frozen=True, slots=True)
class BuiltColumns:
    """`built`: columns written anew, with their types. Other input columns are passed on."""

    built: Mapping[str, pa.DataType]


def as_scored(item: Pair | Rejected, text: TextSpec) -> Pair | None:
    """The pair whose prompt and answers were rendered; None where there is none."""
    if isinstance(item, Rejected) or item.tokens is not None:
        return None
    found = arranged(item, text)
    return None if isinstance(found, Problem) else found


def survey(blocks: Iterable[tuple[Sequence[Pair | None], pa.Table]], text: TextSpec) -> Survey:
    """One pass over a set: pairs as scored, beside the input's columns (one row a pair)."""
    kinds: set[str] = set()
    changed: set[str] = set()
    tools = arguments = False
    for pairs, source in blocks:
        kinds |= {_kind(pair) for pair in pairs if pair is not None}
        changed |= {name for name in TEXTS if name in source.column_names and _differs(name, pairs, source)}
        tools = tools or any(pair is not None and pair.tools for pair in pairs)
        arguments = arguments or any(pair is not None and pair.chat_template_kwargs for pair in pairs)
    kind = next((name for name in ("parts", "json", "messages") if name in kinds), "string")
    given = kind != "string" and bool(text.chat_template_kwargs)
    return Survey(kind, frozenset(changed), tools, arguments or given)


def _kind(pair: Pair) -> str:
    if isinstance(pair.chosen, str):
        return "string"
    messages = [message for part in (pair.prompt, pair.chosen, pair.rejected) for message in part]
    if pair.pictures is not None:
        return _parted(pair, messages)
    plain = all(isinstance(m, Mapping) and m.keys() == {"role", "content"} for m in messages)
    return "messages" if plain else "json"


def _parted(pair: Pair, messages: Iterable[Any]) -> str:
    """The kind of a pair about pictures. ConfigError for what its columns have no room for."""
    if pair.tools or any(message.keys() != {"role", "content"} for message in messages):
        raise ConfigError(
            f"row {pair.source.row_id} of {pair.source.file} has pictures beside tools or other keys of a message, "
            "which are not written together yet: score such rows with `dpo-score run`, or leave the tools out"
        )
    return "parts"


def _differs(name: str, pairs: Sequence[Pair | None], source: pa.Table) -> bool:
    """Whether a column of the input says something else than what was scored. Rows that were not do not count."""
    values = source[name].to_pylist()
    return any(p is not None and _value(p, name) != v for p, v in zip(pairs, values, strict=True))


def _value(pair: Pair, name: str) -> Any:
    part = getattr(pair, name)
    return part if isinstance(part, str) else [dict(message) for message in part]


def columns_to_build(found: Survey, source: pa.Schema) -> BuiltColumns:
    """Which columns are written anew. `source`: the input's columns."""
    type_ = KINDS[found.kind]
    built = {name: type_ for name in TEXTS if not _passes(name, found, source)}
    if found.tools:
        built[TOOLS] = pa.string()
    if found.arguments or ARGUMENTS in source.names:
        built[ARGUMENTS] = JSON
    if found.kind == "parts":
        built[IMAGES] = PICTURES
    return BuiltColumns(built)


def _passes(name: str, found: Survey, source: pa.Schema) -> bool:
    if name not in source.names or name in found.changed:
        return False
    type_ = _without_large(source.field(name).type)
    return pa.types.is_string(type_) if found.kind == "string" else found.kind == "messages" and type_.equals(MESSAGES)


def _without_large(type_: pa.DataType) -> pa.DataType:
    """The type with 32-bit offsets throughout: polars writes large_string and large_list for the same values."""
    if pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        return pa.string()
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return pa.list_(_without_large(type_.value_type))
    if pa.types.is_struct(type_):
        return pa.struct([(field.name, _without_large(field.type)) for field in type_])
    return type_


def built_columns(found: BuiltColumns, pairs: Sequence[Pair | None], text: TextSpec) -> dict[str, pa.Array]:
    """The columns of `found.built`, one value a pair; rows that were not scored are null."""
    return {name: _column(name, type_, pairs, text) for name, type_ in found.built.items()}


def _column(name: str, type_: pa.DataType, pairs: Sequence[Pair | None], text: TextSpec) -> pa.Array:
    if name == ARGUMENTS:
        return _json([_arguments(pair, text) for pair in pairs])
    if name == IMAGES:
        return _images(pairs)
    if name == TOOLS:
        return pa.array([_tools(pair) for pair in pairs], pa.string())
    values = [None if pair is None else _value(pair, name) for pair in pairs]
    return _json_lists(values) if type_ == JSON_MESSAGES else pa.array(values, type_)


def _images(pairs: Sequence[Pair | None]) -> pa.Array:
    """The files of the pictures of each pair, whether the data held them or named them."""
    held = read_again(picture for pair in pairs if pair is not None for picture in pair.pictures or ())
    cells = [
        None if pair is None else [{"bytes": held[p.sha256], "path": None} for p in pair.pictures or ()]
        for pair in pairs
    ]
    return pa.array(cells, PICTURES)


def _tools(pair: Pair | None) -> str | None:
    """Tools as JSON text, which TRL decodes: a struct would pad them with nulls."""
    return None if pair is None or not pair.tools else json.dumps(pair.tools, ensure_ascii=False, default=str)


def _arguments(pair: Pair | None, text: TextSpec) -> dict[str, Any]:
    """Never null: TRL unpacks the value of every row."""
    if pair is None or isinstance(pair.chosen, str):
        return {}
    return {**text.chat_template_kwargs, **pair.chat_template_kwargs}


def _json(values: Sequence[Any]) -> pa.Array:
    texts = [json.dumps(value, ensure_ascii=False, default=str) for value in values]
    return pa.ExtensionArray.from_storage(JSON, pa.array(texts, pa.string()))


def _json_lists(values: Sequence[Sequence[Any] | None]) -> pa.Array:
    """A list<arrow.json> array, null where a value is None."""
    offsets = [0]
    for value in values:
        offsets.append(offsets[-1] + len(value or ()))
    items = _json([item for value in values for item in value or ()])
    absent = pa.array([value is None for value in values], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items, mask=absent)


def kept_names(source: Sequence[str], taken: Iterable[str]) -> dict[str, str]:
    """Input column → its name in the output: `original_*` where the plain name is `taken`."""
    used, found = set(taken), {}
    for name in source:
        new = name
        while new in used:
            new = f"original_{new}"
        used.add(new)
        found[name] = new
    return found


# --- columns and rows of one set --------------------------------------------------------------------------------------


SLICE_ROWS = 512
TOKEN_VALUES = tuple(name.replace("_logps", "_token_logps") for name in VALUES)
Unit = Sequence[Pair | Rejected]
"""What one row gives: one item, or one for each pair that it expands to."""


@dataclass(frozen=True, slots=True)
class Export:
    """How the data set is written. `renames`: column → name in the files; `masks`: which ids were scored.

    `selection`: the request by which pairs were selected (selection.json); it adds select_score and select_rank.
    """

    consumer: Consumer
    emit_ids: bool
    per_token: bool
    masks: bool
    ld_alpha: float | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    selection: Mapping[str, Any] | None = None

    def fields(self) -> dict[str, Any]:
        """What the files depend on besides the reference values."""
        return {
            "consumer": self.consumer.name,
            "emit_ids": self.emit_ids,
            "per_token": self.per_token,
            "ld_alpha": self.ld_alpha,
            "renames": dict(self.renames),
            "version": SCHEMA_VERSION,
            **({} if self.selection is None else {"selection": dict(self.selection)}),
        }

    def added(self) -> pa.Schema:
        """The columns that follow those of the input."""
        ids = [(name, IDS) for name in TOKEN_IDS] if self.emit_ids else []
        masks = [(name, MASK) for name in MASKS] if self.emit_ids and self.masks else []
        lists = [(name, pa.list_(pa.float32())) for name in TOKEN_VALUES] if self.per_token else []
        labels = [(name, pa.string()) for name in LABELS]
        values = [(name, pa.float64()) for name in VALUES]
        ranks = [] if self.selection is None else [("select_score", pa.float64()), ("select_rank", pa.int64())]
        return pa.schema([*labels, *ids, *masks, *values, *lists, *ranks, ("status", pa.string())])


class RowSlice:
    """Some consecutive rows of one block: their numbers among all rows, and what each gives, read when it is needed."""

    def __init__(self, block: int, rows: Sequence[int], reader: _ForwardReader) -> None:
        self.block, self.rows, self._reader = block, rows, reader

    @cached_property
    def units(self) -> Sequence[Unit]:
        return self._reader.units(self.rows)

    @property
    def items(self) -> list[Pair | Rejected]:
        return [item for unit in self.units for item in unit]


class _ForwardReader:
    """Reads rows by number, ascending, skipping over small gaps instead of opening a file again."""

    def __init__(self, plan: RunPlan) -> None:
        self._reader, self._at = PairReader(plan.datasets), -1

    def units(self, rows: Sequence[int]) -> list[Unit]:
        if isinstance(rows, range):
            return list(self._reader.units(rows.start, rows.stop))
        return [self._unit(row) for row in rows]

    def _unit(self, row: int) -> Unit:
        if 0 <= self._at < row < self._at + SLICE_ROWS:
            list(self._reader.units(self._at, row))
        self._at = row + 1
        return next(self._reader.units(row, row + 1))


class RunRows:
    """The rows of a run by position: [0, wanted), of one set after the other."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan

    def first_row(self, index: int) -> int:
        """Number of a set's first row among the rows of all sets."""
        return sum(dataset.rows for dataset in self._plan.datasets[:index])

    def span(self, index: int) -> tuple[int, int]:
        """Positions [start, stop) of the wanted rows of a set."""
        start, wanted = self.first_row(index), self._plan.rows.wanted
        stop = start + self._plan.datasets[index].rows
        return min(self._position(start), wanted), min(self._position(stop), wanted)

    def set_of(self, position: int) -> int:
        """The set that the row at a position belongs to."""
        spans = map(self.span, range(len(self._plan.datasets)))
        return next(index for index, (start, stop) in enumerate(spans) if start <= position < stop)

    def slices(self, start: int, stop: int) -> Iterator[RowSlice]:
        """Positions [start, stop), at most SLICE_ROWS of one block at a time, read as one stream."""
        reader, size = _ForwardReader(self._plan), self._plan.rows.block_rows
        while start < stop:
            last = min(start + SLICE_ROWS, (start // size + 1) * size, stop)
            sample = self._plan.rows.sample
            rows = range(start, last) if sample is None else sample[start:last]
            yield RowSlice(start // size, rows, reader)
            start = last

    def _position(self, row: int) -> int:
        sample = self._plan.rows.sample
        return row if sample is None else bisect_left(sample, row)


@dataclass(frozen=True, slots=True)
class SetPlan:
    """One set: the input's columns, their names in the output, what is written anew, and what results."""

    source: pa.Schema
    columns: BuiltColumns
    kept: Mapping[str, str]
    schema: pa.Schema


def plan_set(plan: RunPlan, rows: RunRows, export: Export, index: int) -> SetPlan:
    """Reads the set once where texts are written; a consumer of ids needs no look at the rows."""
    source, added = source_schema(plan.datasets[index]), export.added()
    media = plan.datasets[index].reader.media
    if media is not None and not export.consumer.texts:
        raise ConfigError("the data have pictures, which token ids alone do not hold: precompute for TRL")
    if media is not None:  # written anew, with the bytes of pictures that the data name by path
        source = pa.schema([field for field in source if field.name != media.column])
    found, texts = BuiltColumns({}), export.consumer.texts
    if texts:
        with closing(prefetch(_surveyed(plan, rows, index, source))) as read:
            found = columns_to_build(survey(read, plan.renderer.text), source)
    kept = kept_names(source.names, {*found.built, *added.names, *(() if texts else TEXTS)})
    return SetPlan(source, found, kept, _output_schema(source, found, kept, added))


def _surveyed(
    plan: RunPlan, rows: RunRows, index: int, source: pa.Schema
) -> Iterator[tuple[list[Pair | None], pa.Table]]:
    originals = OriginalRows(plan.datasets[index], source, rows.first_row(index))
    wanted = [name for name in TEXTS if name in source.names]
    for piece in rows.slices(*rows.span(index)):
        pairs = [as_scored(item, plan.renderer.text) for item in piece.items]
        yield pairs, per_item(originals.take(piece.rows).select(wanted), piece.units)


def per_item(table: pa.Table, units: Sequence[Unit]) -> pa.Table:
    """One row a unit → one row an item."""
    counts = [len(unit) for unit in units]
    return table if all(count == 1 for count in counts) else table.take(np.repeat(np.arange(len(counts)), counts))


def _output_schema(source: pa.Schema, found: BuiltColumns, kept: Mapping[str, str], added: pa.Schema) -> pa.Schema:
    """prompt, chosen, rejected; the input's other columns; then what is added."""
    fields = {name: pa.field(name, type_) for name, type_ in found.built.items()}
    fields |= {kept[name]: source.field(name).with_name(kept[name]) for name in source.names}
    first = [fields.pop(name) for name in TEXTS if name in fields]
    return pa.schema([*first, *fields.values(), *added])
