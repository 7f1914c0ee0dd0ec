"""From cells to checked values: texts, messages, numbers, labels. Every format reads its row through these checks.

In comes a row as plain Python values by the names that the reader uses; out come values of the type that was asked
for. A cell that cannot be used raises `Unusable` with a code and a reason; row.py makes a `Rejected` of it. No other
exception leaves this file, whatever the cell holds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, TypeAlias

from dpo_score.data.column_types import Shape, decoded_or_text
from dpo_score.data.types import Message, Unusable
from dpo_score.escape import seen

Row: TypeAlias = Mapping[str, Any]
"""Canonical column name → plain Python value."""

MAX_CHARACTERS = 10_000_000
MAX_MESSAGES = 10_000
_LARGEST = sys.float_info.max
ROLES = {
    "human": "user",
    "prompter": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "system": "system",
}
"""Speakers as sets spell them, in any case, and the role that chat templates know. Other roles stay as they are."""
_PLAIN_ROLES = ("user", "assistant", "system", "tool")
_CALLS = ("tool_calls", "function_calls", "function_call")
"""Keys with which an assistant's message calls a tool: its content may then be null."""


def text_cell(row: Row, column: str) -> str:
    """The string in `column`; it may be empty."""
    return checked_text(row.get(column), column)


def checked_text(value: Any, column: str) -> str:
    if value is None:
        raise Unusable("null_field", f"{column} is null", column)
    if not isinstance(value, str):
        raise Unusable("wrong_type", f"{column} is a {type(value).__name__}, not a string", column, value)
    if len(value) > MAX_CHARACTERS:
        raise Unusable("too_large", f"{column} has {len(value):,} characters (limit {MAX_CHARACTERS:,})", column, value)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            reason = f"{column} holds a lone surrogate at character {error.start}: not Unicode text"
            raise Unusable("invalid_utf8", reason, column, value[: error.start]) from None
    return value


def optional_text(row: Row, column: str) -> str:
    """The string in `column`, or "" where the column is absent or null."""
    return "" if row.get(column) is None else text_cell(row, column)


def text_inside(row: Row, column: str, key: str) -> str:
    """The string in `column`, or under `key` where the column holds structs."""
    value = row.get(column)
    if isinstance(value, Mapping):
        return checked_text(value.get(key), f"{column}.{key}")
    return checked_text(value, column)


def number_cell(row: Row, column: str, what: str = "label") -> float:
    return checked_number(row.get(column), column, what)


def checked_number(value: Any, column: str, what: str = "label") -> float:
    """A finite number. Sets write them as text, booleans and decimals, too ("N/A" among the texts)."""
    if value is None:
        raise Unusable("null_field", f"{what} {column} is null", column)
    number: Any = value
    if isinstance(value, str):
        try:
            number = float({"true": "1", "false": "0"}.get(value.strip().lower(), value))
        except ValueError:
            number = None
    elif isinstance(value, Decimal):
        number = float(value)
    if not isinstance(number, int | float) or not -_LARGEST <= number <= _LARGEST:
        raise Unusable("invalid_label", f"{what} {column} is not a finite number", column, value)
    return float(number)


def label_cell(row: Row, column: str, allowed: tuple[int, ...]) -> int:
    """An integer label among `allowed`."""
    value = number_cell(row, column)
    if value not in allowed:
        expected = ", ".join(map(str, allowed))
        raise Unusable("invalid_label", f"label {column} must be one of {expected}", column, row.get(column))
    return int(value)


def list_cell(row: Row, column: str) -> list[Any]:
    """A list; a struct of lists (what `datasets.Sequence` makes of a list of structs) is turned into that list."""
    value = row.get(column)
    if value is None:
        raise Unusable("null_field", f"{column} is null", column)
    if isinstance(value, Mapping) and value and all(isinstance(part, list | tuple) for part in value.values()):
        if len({len(part) for part in value.values()}) != 1:
            raise Unusable("wrong_type", f"the lists in {column} have different lengths", column, value)
        rows = (zip(value, items, strict=True) for items in zip(*value.values(), strict=True))
        value = [{key: part for key, part in row if part is not None} for row in rows]
    if not isinstance(value, list | tuple):
        raise Unusable("wrong_type", f"{column} is a {type(value).__name__}, not a list", column, value)
    if len(value) > MAX_CHARACTERS:
        raise Unusable("too_large", f"{column} has {len(value):,} items", column)
    return list(value)


def struct_item(value: Any, column: str) -> Mapping[str, Any]:
    if value is None:
        raise Unusable("null_field", f"{column} is null", column)
    if not isinstance(value, Mapping):
        raise Unusable("wrong_type", f"{column} is a {type(value).__name__}, not a struct", column, value)
    return value


def conversation(row: Row, column: str) -> tuple[Message, ...]:
    """A list of messages, at least one; a single message is a list of one."""
    value = row.get(column)
    if isinstance(value, Mapping) and not isinstance(value.get("role", value.get("from")), list | tuple):
        return (message(value, column),)
    items = list_cell(row, column)
    if not items:
        raise Unusable("null_field", f"{column} holds no message", column, items)
    if len(items) > MAX_MESSAGES:
        raise Unusable("too_large", f"{column} has {len(items):,} messages (limit {MAX_MESSAGES:,})", column)
    return tuple(message(item, column) for item in items)


def answer(row: Row, column: str) -> tuple[Message, ...]:
    """The messages of one side: a list, a single message, or a string; the last one is the assistant's."""
    value = row.get(column)
    if isinstance(value, str):
        return ({"role": "assistant", "content": checked_text(value, column)},)
    return ended_by_assistant(conversation(row, column), column)


def ended_by_assistant(turns: tuple[Message, ...], column: str) -> tuple[Message, ...]:
    """`turns`. Raises Unusable where the last one is of another role."""
    if turns[-1]["role"] != "assistant":
        reason = f"the last message of {column} is from {seen(turns[-1]['role'], 40)!r}, not the assistant"
        raise Unusable("not_assistant_last", reason, column, turns[-1]["role"])
    return turns


def message(value: Any, column: str) -> Message:
    """One message with `role` and `content`, ShareGPT's `from` and `value` renamed, other keys kept."""
    if isinstance(value, dict) and len(value) == 2 and _is_simple(value.get("role"), value.get("content")):
        return value
    item = struct_item(value, f"a message of {column}")
    speaker = item.get("role") if item.get("role") is not None else item.get("from")
    role = checked_text(speaker, f"the role of a message of {column}").strip()
    if not role:
        raise Unusable("null_field", f"the role of a message of {column} is empty", column)
    role = ROLES.get(role.lower(), role)
    rest = {key: part for key, part in item.items() if key not in ("role", "from", "content", "value")}
    content = item.get("content", item.get("value"))
    if "tool_calls" in rest:
        rest["tool_calls"] = _tool_calls(rest["tool_calls"], column)
    if content is None and any(rest.get(key) for key in _CALLS):
        return {"role": role, **rest}
    return {"role": role, "content": _content(content, column), **rest}


def _is_simple(role: Any, content: Any) -> bool:
    """The common message, which no check below would change or refuse."""
    return role in _PLAIN_ROLES and type(content) is str and content.isascii() and len(content) <= MAX_CHARACTERS


def _content(value: Any, column: str) -> str | tuple[Mapping[str, Any], ...]:
    """Text, or typed parts that are all text (joined: nothing stands between them); the parts where some are places
    of pictures."""
    if not isinstance(value, list | tuple):
        return checked_text(value, f"the content of a message of {column}")
    if any(isinstance(part, Mapping) and part.get("type") == "image" for part in value):
        return tuple(_part(part, column) for part in value)
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(checked_text(part, column))
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text":
            raise Unusable("non_text_content", f"a message of {column} holds {seen(kind, 40)}, not text", column, kind)
        texts.append(checked_text(part.get("text"), f"a text part of {column}"))
    return "".join(texts)


def _part(part: Any, column: str) -> Mapping[str, Any]:
    """A text, or the place of a picture that a column of its own holds."""
    if isinstance(part, Mapping) and part.get("type") == "image":
        if any(part.get(key) is not None for key in ("image", "url", "path", "base64", "bytes")):
            reason = f"a message of {column} holds a picture itself: put it into a column images"
            raise Unusable("non_text_content", reason, column, "image")
        return {"type": "image"}
    return {"type": "text", "text": _content([part], column)}


def _tool_calls(value: Any, column: str) -> Any:
    """Tool calls as structs, with JSON strings (the list, or each call's arguments) decoded."""
    calls = decoded_json(value, f"tool_calls of {column}")
    if not isinstance(calls, list | tuple):
        return calls
    decoded = []
    for item in calls:
        call = decoded_json(item, f"tool_calls of {column}")
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
            call = {**call, "function": _with_decoded_arguments(call["function"])}
        elif isinstance(call, Mapping):
            call = _with_decoded_arguments(call)
        decoded.append(call)
    return decoded


def _with_decoded_arguments(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments that are not a JSON object stay the string they are: models do emit such calls."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            decoded = json.loads(arguments)
        except (ValueError, RecursionError):
            return function
        if isinstance(decoded, dict):
            return {**function, "arguments": decoded}
    return function


def decoded_json(value: Any, column: str) -> Any:
    """A JSON string, or a list or object as Python prints it, decoded; anything else as it is."""
    if not isinstance(value, str):
        return value
    decoded = decoded_or_text(value)
    if decoded != value:
        return decoded
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Unusable("invalid_json", f"{column} is not JSON: {seen(str(error), 80)}", column, value) from None


def plain(value: Any, shape: Shape, column: str, keep_nulls: bool = False) -> Any:
    """A cell as plain Python: JSON decoded, and struct keys that are null dropped.

    Arrow gives every struct of a column the same keys, so a null there is padding; a null inside decoded
    JSON was written on purpose and stays.
    """
    if isinstance(value, bytes) and shape.binary:
        value = _decoded_utf8(value, column)
    if value is None or shape.kind in ("text", "int", "float", "bool"):
        return decoded_json(value, column) if shape.encoded else value
    if shape.encoded or shape.kind == "json":
        return decoded_json(value, column)
    if shape.kind == "list" and shape.item is not None and isinstance(value, list | tuple):
        return [plain(item, shape.item, column, keep_nulls) for item in value]
    if shape.kind == "map":
        return dict(value)
    if shape.kind == "struct" and isinstance(value, Mapping):
        return {
            name: plain(value.get(name), inner, column, keep_nulls)
            for name, inner in shape.fields.items()
            if keep_nulls or value.get(name) is not None
        }
    return value


def _decoded_utf8(value: bytes, column: str) -> str:
    """Spark and Hive write text as binary columns."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unusable("invalid_utf8", f"{column} is not UTF-8: {error.reason}", column, repr(value[:200])) from None
