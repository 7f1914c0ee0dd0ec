"""The pair as it was scored, as columns of a data set: prompt, chosen, rejected, tools, chat_template_kwargs.

A consumer that renders and tokenises these columns itself gets the ids that were scored. Two passes over the rows:
a `survey` finds what the columns have to hold, then blocks are written in one layout. Columns of the input that
already say what was scored are passed on untouched; others are written anew, the input's kept as `original_*`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dpo_score.config.schema import TextSpec
from dpo_score.data.types import Pair, Problem, Rejected
from dpo_score.export.exports import TEXTS
from dpo_score.tokenization.prompt import arranged

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
MESSAGES = pa.list_(MESSAGE)
JSON = pa.json_(pa.string())
JSON_MESSAGES = pa.list_(JSON)
"""Messages with more than role and content: a struct would pad each with the keys of all others."""
TOOLS, ARGUMENTS = "tools", "chat_template_kwargs"
KINDS = {"string": pa.string(), "messages": MESSAGES, "json": JSON_MESSAGES}


@dataclass(frozen=True, slots=True)
class Survey:
    """What the rows of a set need. `changed`: input columns whose value is not what was scored, in some row."""

    kind: str = "string"
    changed: frozenset[str] = frozenset()
    tools: bool = False
    arguments: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
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
    kind = next((name for name in ("json", "messages") if name in kinds), "string")
    given = kind != "string" and bool(text.chat_template_kwargs)
    return Survey(kind, frozenset(changed), tools, arguments or given)


def _kind(pair: Pair) -> str:
    if isinstance(pair.chosen, str):
        return "string"
    messages = [message for part in (pair.prompt, pair.chosen, pair.rejected) for message in part]
    plain = all(isinstance(m, Mapping) and m.keys() == {"role", "content"} for m in messages)
    return "messages" if plain else "json"


def _differs(name: str, pairs: Sequence[Pair | None], source: pa.Table) -> bool:
    """Whether a column of the input says something else than what was scored. Rows that were not do not count."""
    values = source[name].to_pylist()
    return any(p is not None and _value(p, name) != v for p, v in zip(pairs, values, strict=True))


def _value(pair: Pair, name: str) -> Any:
    part = getattr(pair, name)
    return part if isinstance(part, str) else [dict(message) for message in part]


def layout(found: Survey, source: pa.Schema) -> Layout:
    """Which columns are written anew. `source`: the input's columns."""
    type_ = KINDS[found.kind]
    built = {name: type_ for name in TEXTS if not _passes(name, found, source)}
    if found.tools:
        built[TOOLS] = pa.string()
    if found.arguments or ARGUMENTS in source.names:
        built[ARGUMENTS] = JSON
    return Layout(built)


def _passes(name: str, found: Survey, source: pa.Schema) -> bool:
    if name not in source.names or name in found.changed:
        return False
    type_ = source.field(name).type
    texts = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    return texts if found.kind == "string" else found.kind == "messages" and type_.equals(MESSAGES)


def built_columns(plan: Layout, pairs: Sequence[Pair | None], text: TextSpec) -> dict[str, pa.Array]:
    """The columns of `plan.built`, one value a pair; rows that were not scored are null."""
    return {name: _column(name, type_, pairs, text) for name, type_ in plan.built.items()}


def _column(name: str, type_: pa.DataType, pairs: Sequence[Pair | None], text: TextSpec) -> pa.Array:
    if name == ARGUMENTS:
        return _json([_arguments(pair, text) for pair in pairs])
    if name == TOOLS:
        return pa.array([_tools(pair) for pair in pairs], pa.string())
    values = [None if pair is None else _value(pair, name) for pair in pairs]
    return _json_lists(values) if type_ == JSON_MESSAGES else pa.array(values, type_)


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
