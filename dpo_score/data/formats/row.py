"""One row of a file → its pairs, or a `Rejected`: what belongs to every format is done here, once.

In come raw cells by the file's column names; out come pairs with their source, system text, tools, template
arguments, carried columns and id. This is the only place where a `Problem` becomes a `Rejected`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_score.data.column_types import Shapes
from dpo_score.data.formats.base import ColumnMap, Format, ReadOptions, assistant_answer, user_prompt
from dpo_score.data.formats.cells import Row, checked_text, conversation, decoded_json, plain
from dpo_score.data.formats.transcripts import hh_messages
from dpo_score.data.pictures import PictureColumn, refuse_image_parts, with_pictures
from dpo_score.data.types import (
    SYSTEM_ROLES,
    Message,
    Pair,
    Picture,
    Problem,
    Rejected,
    Source,
    Text,
    TokenIds,
    Unusable,
)
from dpo_score.escape import seen

_canonical_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str).encode


@dataclass(frozen=True, slots=True)
class RowReader:
    """How the rows of one file are read. `columns` and `carried` map names that readers use to columns of the file.

    `unpacked` holds the file's columns whose cells are not plain values yet, with the file's own shapes: a later shard
    may have more keys in its structs than the first.
    """

    format: Format
    options: ReadOptions
    columns: ColumnMap
    carried: ColumnMap
    kept: tuple[str, ...]
    unpacked: Shapes
    keep_nulls: bool = False
    media: PictureColumn | None = None

    @property
    def needed(self) -> list[str]:
        """The columns to read from the file."""
        return list(dict.fromkeys([*self.columns.values(), *self.carried.values(), *self.kept]))

    def read(self, raw: Sequence[Mapping[str, Any]], source: Callable[[int | None], Source]) -> list[Pair | Rejected]:
        """`raw`: the rows of one unit (one, or all of a prompt). `source(part)` names each result."""
        try:
            rows = [self._cells(row, self.columns) for row in raw]
            row: Row = {"rows": rows} if self.format.grouped_by else rows[0]
            found = list(self.format.read(row, self.options))
            systems = [_system_text(cells) for cells in rows]
            if any(system != systems[0] for system in systems):
                raise Unusable("context_mismatch", "the rows of one prompt have different system texts", "system")
            system = systems[0]
            pictures = self._pictures(raw, source(None).row)
        except Unusable as unusable:
            return [rejected(source(None), unusable.problem)]
        parts: list[int | None] = [None] if len(found) == 1 else list(range(len(found)))
        settled = (system, pictures, raw[0])
        return [self._finished(item, *settled, source(part)) for item, part in zip(found, parts, strict=True)]

    def _pictures(self, raw: Sequence[Mapping[str, Any]], row: int) -> tuple[Picture, ...] | None:
        """The pictures of a unit; None where the set has no column of pictures."""
        if self.media is None:
            return None
        cells = [row.get(self.media.column) for row in raw]
        if any(cell != cells[0] for cell in cells):
            raise Unusable("context_mismatch", "the rows of one prompt have different pictures", self.media.column)
        return self.media.pictures(cells[0], row)

    def _cells(self, raw: Mapping[str, Any], names: ColumnMap) -> dict[str, Any]:
        """A row by the names of the reader, each cell as plain Python."""
        media = None if self.media is None else self.media.column
        return {name: self._plain(raw.get(column), column) for name, column in names.items() if column != media}

    def _plain(self, value: Any, column: str) -> Any:
        shape = self.unpacked.get(column)
        return value if shape is None else plain(value, shape, column, self.keep_nulls)

    def _finished(
        self,
        found: Pair | Problem,
        system: str | None,
        pictures: tuple[Picture, ...] | None,
        raw: Mapping[str, Any],
        source: Source,
    ) -> Pair | Rejected:
        """The pair that the format read, with all that does not depend on the format."""
        if isinstance(found, Problem):
            return rejected(source, found)
        try:
            whole = found if system is None else with_system(found, system)
            whole = _without_places(whole) if pictures is None else _with_pictures(whole, pictures)
            carried = self._cells(raw, self.carried)
            tools = _tools(carried.get("tools") if whole.tools is None else whole.tools)
            kept = {name: raw.get(name) for name in self.kept}
            extra = {key: carried[key] for key in ("id", "subset", "group_id") if carried.get(key) is not None}
            return replace(
                whole,
                source=source,
                tools=tools,
                chat_template_kwargs=_template_arguments(carried.get("chat_template_kwargs")),
                extra={**whole.extra, **extra, **kept},
                pair_id=pair_id(whole, tools),
            )
        except Unusable as unusable:
            return rejected(source, unusable.problem)


def rejected(source: Source, problem: Problem) -> Rejected:
    value = None if problem.value is None else seen(problem.value)
    return Rejected(source, problem.code, problem.reason, problem.column, value)


def _system_text(row: Row) -> str | None:
    """The text of the row's system column, "" where it is empty; None where the set has no such column.

    Some sets hold it as a list of messages, whatever role they give it: its content counts.
    """
    if "system" not in row:
        return None
    value = row["system"]
    if value is None or value == []:
        return ""
    if isinstance(value, list | tuple | Mapping):
        return "\n\n".join(str(turn.get("content") or "") for turn in conversation(row, "system"))
    return checked_text(value, "system")


def with_system(found: Pair, system: str) -> Pair:
    """The pair with a system text before its conversation; a pair of strings becomes a conversation.

    So every row of a set with a system column is a conversation, also where the text is empty. A system message that
    the conversation has already must say the same.
    """
    whole = _as_conversation(found)
    sides = (whole.chosen, whole.rejected) if whole.implicit else (whole.prompt,)
    if not system:
        return whole
    first = [_with_system_turn(turns, system) for turns in sides if not isinstance(turns, str)]
    return replace(whole, chosen=first[0], rejected=first[1]) if whole.implicit else replace(whole, prompt=first[0])


def _with_system_turn(turns: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    if not turns or turns[0]["role"] not in SYSTEM_ROLES:
        return ({"role": "system", "content": system}, *turns)
    if str(turns[0].get("content", "")).strip() != system.strip():
        reason = "the system column and the conversation's system message differ; --map system= leaves the column out"
        raise Unusable("context_mismatch", reason, "system", system)
    return turns


def _as_conversation(found: Pair) -> Pair:
    if not isinstance(found.prompt, str) or not isinstance(found.chosen, str) or not isinstance(found.rejected, str):
        return found
    if not found.implicit:
        chosen, rejected_ = assistant_answer(found.chosen), assistant_answer(found.rejected)
        return replace(found, prompt=user_prompt(found.prompt), chosen=chosen, rejected=rejected_)
    sides = [hh_messages(side) for side in (found.chosen, found.rejected)]
    if sides[0] is None or sides[1] is None:
        reason = "a system text needs a conversation, and the two texts show no turns; --map system= leaves it out"
        raise Unusable("wrong_type", reason, "system")
    return replace(found, prompt=(), chosen=sides[0], rejected=sides[1])


def _with_pictures(found: Pair, pictures: tuple[Picture, ...]) -> Pair:
    """The pair as a conversation whose image parts stand for the row's pictures: so is every row of such a set."""
    whole = _as_conversation(found)
    sides, placed = with_pictures(whole, pictures)
    extra = dict(whole.extra)
    if "group_id" in extra:  # the same question about another picture is another one
        seen_with = "\n".join((extra["group_id"], *(picture.sha256 for picture in placed)))
        extra["group_id"] = hashlib.blake2b(seen_with.encode(), digest_size=8).hexdigest()
    return replace(whole, **sides, pictures=placed, extra=extra)


def _without_places(found: Pair) -> Pair:
    """The pair of a set without pictures, whose messages must have no place for one."""
    for name in ("prompt", "chosen", "rejected"):
        side = getattr(found, name)
        if not isinstance(side, str):
            refuse_image_parts(side, name)
    return found


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
    text = _canonical_json({**content, "tools": tools})
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
