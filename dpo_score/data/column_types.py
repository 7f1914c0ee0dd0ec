"""The shape of a column, whatever the container: Arrow types and decoded JSON come to the same few kinds.

Promises: string, large_string, string_view and dictionaries of them are `text`; every list type is `list`;
`datasets.Json()` (Arrow's `arrow.json` extension) is `json` until `refined` by looking at values, because
such a column carries no type. Nothing here raises on an odd type: it becomes `other`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import pyarrow as pa

Kind: TypeAlias = Literal["text", "int", "float", "bool", "list", "struct", "map", "json", "null", "other"]

_BEGINS_CODE = re.compile(r"\s{0,20}(\[|\{|\"\s{0,20}(\[|\{))")
_PRINTED_MESSAGE = re.compile(r"(array\()?\s*\[\s*\{['\"](role|from|content|value)['\"]:\s*['\"]")
MAX_LITERAL = 1 << 20
"""Characters of a Python literal that is decoded; Python's own parser takes far more memory than JSON's."""


@dataclass(frozen=True, slots=True)
class Shape:
    """`item` is set for lists, `fields` for structs. `encoded`: the cell is a JSON string of this shape.

    `binary`: text that the file stores as bytes, as Spark and Hive do.
    """

    kind: Kind
    item: Shape | None = None
    fields: Mapping[str, Shape] = field(default_factory=dict)
    encoded: bool = False
    binary: bool = False

    def __str__(self) -> str:
        if self.kind == "list":
            return f"list<{self.item}>"
        if self.kind == "struct":
            return "struct<" + ", ".join(f"{name}: {shape}" for name, shape in self.fields.items()) + ">"
        return self.kind


Shapes: TypeAlias = Mapping[str, Shape]
ShapeTest: TypeAlias = Callable[[Shape | None], bool]
"""Whether a column of this shape fits; None: there is no such column."""


def is_text(shape: Shape | None) -> bool:
    return shape is not None and shape.kind == "text"


def is_number(shape: Shape | None) -> bool:
    return shape is not None and shape.kind in ("int", "float")


def is_label(shape: Shape | None) -> bool:
    """A number, a boolean, or text that may spell one."""
    return shape is not None and shape.kind in ("int", "float", "bool", "text")


def is_message(shape: Shape | None) -> bool:
    """A struct with role (or ShareGPT's from) and content (or value)."""
    return shape is not None and shape.kind == "struct" and _has_message_keys(shape.fields)


def _has_message_keys(fields: Shapes) -> bool:
    speaker = fields.get("role", fields.get("from"))
    if speaker is None or speaker.kind == "list":
        return False
    return ("role" in fields and ("content" in fields or "tool_calls" in fields)) or {"from", "value"} <= fields.keys()


def is_messages(shape: Shape | None) -> bool:
    """A list of messages, or a struct of lists: what `datasets.Sequence` makes of one."""
    return _has_message_keys(item_fields(shape))


def item_fields(shape: Shape | None) -> Shapes:
    """The fields of the structs in a list column, also where it is stored as a struct of lists; else none."""
    if shape is None:
        return {}
    if shape.kind == "list" and shape.item is not None:
        return shape.item.fields
    lists = {name: part.item for name, part in shape.fields.items() if part.kind == "list" and part.item is not None}
    return lists if len(lists) == len(shape.fields) else {}


def present(shape: Shape | None) -> bool:
    """A column of any type."""
    return shape is not None


def either(*tests: ShapeTest) -> ShapeTest:
    """A column that passes one of the tests."""
    return lambda shape: any(test(shape) for test in tests)


def struct_with(**fields: ShapeTest) -> ShapeTest:
    """A struct that has these fields, each passing its test."""
    return lambda shape: shape is not None and all(test(shape.fields.get(name)) for name, test in fields.items())


def items_with(**fields: ShapeTest) -> ShapeTest:
    """A list of structs that have these fields, each passing its test."""
    return lambda shape: all(test(item_fields(shape).get(name)) for name, test in fields.items())


def is_turn_pairs(shape: Shape | None) -> bool:
    """A list of [question, answer] lists, LLaMA-Factory's `history`; it may be empty in every row."""
    return shape is not None and shape.kind == "list" and (is_texts(shape.item) or is_empty(shape.item))


def is_empty(shape: Shape | None) -> bool:
    """A column, or the items of a list, in which no value says what it is."""
    return shape is None or shape.kind == "null" or (shape.kind == "list" and is_empty(shape.item))


def is_texts(shape: Shape | None) -> bool:
    return shape is not None and shape.kind == "list" and is_text(shape.item)


def is_numbers(shape: Shape | None) -> bool:
    return shape is not None and shape.kind == "list" and is_number(shape.item)


def is_ids(shape: Shape | None) -> bool:
    return shape is not None and shape.kind == "list" and shape.item is not None and shape.item.kind == "int"


def is_plain(shape: Shape) -> bool:
    """Whether the cells are used as Arrow gives them: nothing to decode, no padding of structs to take out.

    Messages of just role and content count: the checks of a message treat null and missing alike.
    """
    if shape.encoded or shape.binary or shape.kind in ("json", "map"):
        return False
    if shape.kind == "list":
        return shape.item is None or is_plain(shape.item)
    if shape.kind != "struct":
        return True
    texts = (is_text(field) and not field.binary for field in shape.fields.values())
    return shape.fields.keys() == {"role", "content"} and all(texts)


def from_arrow(type_: pa.DataType) -> Shape:
    """The shape of an Arrow type."""
    if isinstance(type_, pa.BaseExtensionType):
        return Shape("json") if type_.extension_name == "arrow.json" else from_arrow(type_.storage_type)
    if pa.types.is_dictionary(type_):
        return from_arrow(type_.value_type)
    if pa.types.is_map(type_):
        return Shape("map", item=from_arrow(type_.item_type))
    if pa.types.is_struct(type_):
        return Shape("struct", fields={f.name: from_arrow(f.type) for f in type_.fields})
    if _is_list(type_):
        return Shape("list", item=from_arrow(type_.value_type))
    if pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_):
        return Shape("text", binary=True)
    return Shape(_scalar_kind(type_))


def _is_list(type_: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(test(type_) for test in (*tests, *views))


def _scalar_kind(type_: pa.DataType) -> Kind:
    if pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        return "text"
    if pa.types.is_boolean(type_):
        return "bool"
    if pa.types.is_integer(type_):
        return "int"
    if pa.types.is_floating(type_) or pa.types.is_decimal(type_):
        return "float"
    return "null" if pa.types.is_null(type_) else "other"


def from_values(values: Iterable[Any]) -> Shape:
    """The shape that most of some decoded JSON values have; the others are for the row checks to find.

    Nulls have no say; a whole number among fractions is one of them.
    """
    by_kind: dict[Kind, list[Any]] = {}
    for value in values:
        if value is not None:
            by_kind.setdefault(_kind(value), []).append(value)
    if "float" in by_kind and "int" in by_kind:
        by_kind["float"] += by_kind.pop("int")
    if not by_kind:
        return Shape("null")
    kind = max(by_kind, key=lambda k: len(by_kind[k]))
    return _of_one_kind(kind, by_kind[kind])


def _kind(value: Any) -> Kind:
    if isinstance(value, Mapping):
        return "struct"
    if isinstance(value, list | tuple):
        return "list"
    return next((kind for python, kind in _PYTHON_KINDS if isinstance(value, python)), "other")


_PYTHON_KINDS: tuple[tuple[type, Kind], ...] = ((str, "text"), (bool, "bool"), (int, "int"), (float, "float"))


def _of_one_kind(kind: Kind, values: list[Any]) -> Shape:
    if kind == "list":
        return Shape("list", item=from_values(item for value in values for item in value))
    if kind == "struct":
        names = dict.fromkeys(str(name) for value in values for name in value)
        return Shape("struct", fields={name: from_values(value.get(name) for value in values) for name in names})
    return Shape(kind)


def refined(shape: Shape, values: Iterable[Any], structured: ShapeTest | None = None) -> Shape:
    """`shape` with its JSON parts replaced by what the sampled `values` hold.

    A text column counts as encoded messages if at least half of the sampled texts are messages in JSON or as Python
    prints them; the rows that differ are for the row checks. An answer that merely happens to be JSON stays text.
    structured: for a column whose name is that of lists or structs: which of their shapes are meant.
    """
    values = [as_text(value) if shape.binary else value for value in values if value is not None]
    if shape.kind == "json":
        found = from_values(decoded_or_text(value) for value in values)
        return Shape(found.kind, found.item, found.fields, encoded=True)
    if shape.kind == "list" and shape.item is not None and shape.item.kind == "json":
        return Shape("list", item=refined(shape.item, [item for value in values for item in value]))
    if shape.kind == "text":
        encoded = [decoded for value in values if (decoded := encoded_messages(value)) is not None]
        if encoded and 2 * len(encoded) >= len(values):
            found = from_values(encoded)
            return Shape(found.kind, found.item, found.fields, encoded=True, binary=shape.binary)
        decoded_ = [] if structured is None else [decoded_or_text(value) for value in values]
        parts = [value for value in decoded_ if isinstance(value, list | dict)]
        found = from_values(parts)
        if structured is not None and parts and 2 * len(parts) >= len(values) and structured(found):
            return Shape(found.kind, found.item, found.fields, encoded=True, binary=shape.binary)
    return shape


def encoded_messages(value: Any) -> Any:
    """The messages that a text holds in JSON or as Python prints them: a list, one message, or an object with
    `messages`. None for any other text, and for what is no text."""
    if not isinstance(value, str) or not _BEGINS_CODE.match(value) or ('"' not in value and "'" not in value):
        return None
    decoded = decoded_or_text(value)
    if isinstance(decoded, str):
        return None
    shape = from_values([decoded])
    holds = is_messages(shape) or is_message(shape) or is_messages(shape.fields.get("messages"))
    return decoded if holds else None


def as_text(value: Any) -> Any:
    """Bytes as the UTF-8 text that they are; what is no UTF-8, and any other value, as it is."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def is_printed_by_numpy(text: str) -> bool:
    """Whether a text is an array of messages as numpy prints it: no comma between them, and long ones cut.

    A table in memory with such a column becomes that when it is written as CSV.
    """
    return _PRINTED_MESSAGE.match(text) is not None


def decoded_or_text(value: Any) -> Any:
    """A JSON text decoded, or else a Python literal, as `str()` of a list prints it; any other value as it is.

    A list or object that was encoded twice is decoded twice.
    """
    if not isinstance(value, str | bytes):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        pass
    else:
        return decoded_or_text(decoded) if isinstance(decoded, str) and decoded[:1] in ("[", "{") else decoded
    if isinstance(value, str) and value[:20].lstrip()[:1] in ("[", "{") and len(value) <= MAX_LITERAL:
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            pass
    return value


def united(shapes: Iterable[Shape]) -> Shape:
    """One shape for a column of several files: the first that is not null, with the keys that any struct has."""
    known = [shape for shape in shapes if shape.kind != "null"] or [Shape("null")]
    first = next((shape for shape in known if shape.kind == "float"), known[0])
    alike = [shape for shape in known if shape.kind == first.kind and shape.encoded == first.encoded]
    if first.kind == "text":
        return Shape("text", binary=any(shape.binary for shape in alike), encoded=first.encoded)
    if first.kind == "list":
        items = [shape.item for shape in alike if shape.item is not None]
        return Shape("list", item=united(items) if items else None, encoded=first.encoded)
    if first.kind == "struct":
        names = dict.fromkeys(name for shape in alike for name in shape.fields)
        fields = {name: united(s.fields[name] for s in alike if name in s.fields) for name in names}
        return Shape("struct", fields=fields, encoded=first.encoded)
    return first


def agree(a: Shape, b: Shape) -> bool:
    """Whether two files' columns can be read as one: equal kinds, any number as any other, null as anything."""
    if "null" in (a.kind, b.kind) or {a.kind, b.kind} <= {"int", "float"}:
        return True
    if a.kind != b.kind:
        return False
    if a.kind == "list" and a.item and b.item:
        return agree(a.item, b.item)
    return all(agree(shape, b.fields[name]) for name, shape in a.fields.items() if name in b.fields)
