"""One row of a file → its pairs, or a `Rejected`. The only place where a `Problem` becomes a `Rejected`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_score.data.column_types import Shapes
from dpo_score.data.formats.base import Reading
from dpo_score.data.formats.registry import Format
from dpo_score.data.formats.validate import Row, decoded_json, plain
from dpo_score.data.types import Pair, Problem, Rejected, Source, Text, TokenIds, Unusable
from dpo_score.escape import seen


@dataclass(frozen=True, slots=True)
class RowReader:
    """How the rows of one file are read. `columns` and `carried` map canonical names to columns of the file.

    `unpacked` holds the file's columns whose cells are not plain values yet, with the file's own shapes: a later shard
    may have more keys in its structs than the first.
    """

    format: Format
    how: Reading
    columns: Mapping[str, str]
    carried: Mapping[str, str]
    kept: tuple[str, ...]
    unpacked: Shapes
    keep_nulls: bool = False

    @property
    def needed(self) -> list[str]:
        """The columns to read from the file."""
        return list(dict.fromkeys([*self.columns.values(), *self.carried.values(), *self.kept]))

    def read(self, raw: Sequence[Mapping[str, Any]], source: Callable[[int | None], Source]) -> list[Pair | Rejected]:
        """`raw`: the rows of one unit (one, or two consecutive ones). `source(part)` names each result."""
        found = self._found(raw)
        parts: list[int | None] = [None] if len(found) == 1 else list(range(len(found)))
        return [self._placed(item, raw[0], source(part)) for item, part in zip(found, parts, strict=True)]

    def _found(self, raw: Sequence[Mapping[str, Any]]) -> list[Pair | Problem]:
        try:
            rows = [self._canonical(row, self.columns) for row in raw]
            row: Row = rows[0] if self.format.rows_per_unit == 1 else {"rows": rows}
            return list(self.format.read(row, self.how))
        except Unusable as unusable:
            return [unusable.problem]

    def _placed(self, item: Pair | Problem, raw: Mapping[str, Any], source: Source) -> Pair | Rejected:
        if isinstance(item, Problem):
            return rejected(source, item)
        try:
            return self._pair(item, raw, source)
        except Unusable as unusable:
            return rejected(source, unusable.problem)

    def _canonical(self, raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        return {name: self._plain(raw.get(column), column) for name, column in names.items()}

    def _plain(self, value: Any, column: str) -> Any:
        shape = self.unpacked.get(column)
        return value if shape is None else plain(value, shape, column, self.keep_nulls)

    def _pair(self, found: Pair, raw: Mapping[str, Any], source: Source) -> Pair:
        """`found` with its tools, template arguments, carried columns, source and id."""
        carried = self._canonical(raw, self.carried)
        tools = _tools(carried.get("tools") if found.tools is None else found.tools)
        kept = {name: raw.get(name) for name in self.kept}
        extra = {key: carried[key] for key in ("id", "subset", "group_id") if carried.get(key) is not None}
        return replace(
            found,
            source=source,
            tools=tools,
            chat_template_kwargs=_template_arguments(carried.get("chat_template_kwargs")),
            extra={**found.extra, **extra, **kept},
            pair_id=pair_id(found, tools),
        )


def rejected(source: Source, problem: Problem) -> Rejected:
    value = None if problem.value is None else seen(problem.value)
    return Rejected(source, problem.code, problem.reason, problem.column, value)


def _tools(value: Any) -> tuple[Mapping[str, Any], ...] | None:
    value = decoded_json(value, "tools") if value else None
    if not value:
        return None
    if not isinstance(value, list | tuple):
        raise Unusable("wrong_type", "tools is not a list", "tools", value)
    tools = tuple(decoded_json(tool, "tools") for tool in value)
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise Unusable("wrong_type", "a tool is not a struct", "tools", value)
    return tools


def _template_arguments(value: Any) -> Mapping[str, Any]:
    value = decoded_json(value, "chat_template_kwargs") if value else {}
    if not isinstance(value, Mapping):
        raise Unusable("wrong_type", "chat_template_kwargs is not a struct", "chat_template_kwargs", value)
    return {str(key): item for key, item in value.items()}


def pair_id(found: Pair, tools: Any) -> str:
    """blake2b-128 (hex) of the canonical JSON of what is compared.

    Conversations and texts count whole, so a row has one id whether its prompt is a column of its own or not.
    """
    if found.tokens is not None:
        return _ids_digest(found.tokens)
    sides = {"chosen": found.chosen, "rejected": found.rejected}
    content = {side: _whole(found.prompt, answer) for side, answer in sides.items()}
    text = json.dumps(
        {**content, "tools": tools}, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str
    )
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _whole(prompt: Text, answer: Text) -> Text:
    if isinstance(prompt, str):
        assert isinstance(answer, str)
        return prompt + answer
    assert not isinstance(answer, str)
    return (*prompt, *answer)


def _ids_digest(tokens: TokenIds) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (tokens.prompt, tokens.chosen, tokens.rejected):
        digest.update(len(part).to_bytes(8, "little") + part.astype("<i4").tobytes())
    for mask in (tokens.prompt_mask, tokens.chosen_mask, tokens.rejected_mask):
        digest.update(b"" if mask is None else bytes(mask))
    return digest.hexdigest()
