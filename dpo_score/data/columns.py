"""Every column of a data set is accounted for: read, said to be unread, or a reason to refuse the set.

In: the shapes of all columns, which ones are read, sampled rows. Out: a `ColumnAccount`. A column that is not read and
holds media, or looks like context of the question (messages, history, documents, tools, …), is a `DataError` with the
option that settles it, unless its content only repeats what is read; that is checked again in each row.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_score.config.schema import DataSpec
from dpo_score.data.column_types import Shape, Shapes, as_text, encoded_messages, is_messages
from dpo_score.data.types import Problem
from dpo_score.errors import DataError
from dpo_score.escape import seen

_MEDIA = "image images picture pictures photo photos screenshot video videos audio audios speech pixels"
_CONTEXT = f"""{_MEDIA} message messages conversation conversations conv dialog dialogs dialogue dialogues chat
    history context contexts trajectory turn turns step steps initial previous prior preceding system developer tool
    tools function functions document documents docs passage passages prompt question instruction instructions query
    input inputs problem attachment attachments demonstrations fewshot shot shots background knowledge evidence facts
    article articles paragraph paragraphs excerpt premise scenario situation persona personas profile character
    principle principles constitution guidelines rules schema"""
_DESCRIPTION = """id ids uuid hash key digest meta metadata count counts num number length len size tokens
    type kind source origin name names language lang url urls index idx score scores rating ratings label
    labels category categories tag tags domain topic date time timestamp created status model models judge
    judgement judgment critique rationale feedback raw generation generations generated labelling labeling
    annotation annotations annotator annotators difficulty level quality flag flags logps logprobs perplexity
    embedding order version split fingerprint stats success config configs configuration
    parameters params settings args kwargs"""
_MEDIA_WORDS, _CONTEXT_WORDS = frozenset(_MEDIA.split()), frozenset(_CONTEXT.split())
_NOT_CONTEXT_WORDS = frozenset(_DESCRIPTION.split())
"""A name with one of these words tells something about a row or about how its answers were made."""
_MAGIC = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
    b"RIFF",
    b"II*\0",
    b"MM\0*",
    b"ID3",
    b"\xff\xfb",
    b"fLaC",
    b"OggS",
    b"%PDF",
)
"""How files of pictures, sounds and films begin; MP4 and its like have "ftyp" at byte 4."""
_PLACE_WORDS = frozenset(("path", "paths", "file", "files", "filename", "filenames"))
_SHORT = 3
"""Texts of so few characters are part of anything: they repeat only a whole text that is the same."""


@dataclass(frozen=True, slots=True)
class ColumnAccount:
    """What becomes of every column. `repeated`: unread columns whose texts must occur in the columns that are read."""

    read: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()

    def to_json(self) -> dict[str, list[str]]:
        return {"read": list(self.read), "unread": [*self.unread, *self.repeated], "ignored": list(self.ignored)}

    def sentence(self) -> str:
        """The columns that are not read, in words; empty where all are read."""
        parts = []
        names = [*self.unread, *(f"{name} (it repeats what is read)" for name in self.repeated)]
        if names:
            parts.append(f"columns not read: {_listed(names)}")
        if self.ignored:
            parts.append(f"ignored as asked: {_listed(self.ignored)}")
        return "; ".join(parts)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(seen(name, 60) for name in names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def account(
    spec: DataSpec,
    shapes: Shapes,
    read: Collection[str],
    sample: Sequence[Mapping[str, Any]],
    *,
    beside: Collection[str] = (),
    replaced: Collection[str] = (),
    complete: bool = False,
    pictures: bool = False,
) -> ColumnAccount:
    """What becomes of each column of `shapes`. Raises DataError for an unread one that looks like context or media.

    read: columns that the format reads, that are carried along or kept. beside: unread columns that public sets of
    this format are known to have. replaced: columns that --map names another column for. complete: the columns read
    need no context: they are token ids. pictures: a column of pictures is read.
    """
    ignored = [name for name in shapes if name not in read and (name in spec.ignore_columns or name in replaced)]
    unread, repeated = [], []
    for name, shape in shapes.items():
        if name in read or name in ignored:
            continue
        media = _holds_media(name, shape, [row.get(name) for row in sample])
        if pictures and shape.kind == "text" and _words(name) & _PLACE_WORDS:  # where the pictures came from
            unread.append(name)
            continue
        context = media or (_looks_like_context(name, shape) and not complete)
        if shape.kind == "null" or not context:
            unread.append(name)
            continue
        filled = [row for row in sample if not _is_empty(row.get(name))]
        known = name.replace("-", "_") in beside
        new = [row for row in filled if not _is_repeated(row, name, read, short_counts=known)]
        if known and (media or len(new) < len(filled) or not filled):
            unread.append(name)
        elif new:
            raise DataError(_refusal(spec, name, shape, new[0].get(name), media))
        else:
            repeated.append(name)
    return ColumnAccount(tuple(read), tuple(ignored), tuple(unread), tuple(repeated))


def unread_context(row: Mapping[str, Any], accounted: ColumnAccount) -> Problem | None:
    """The problem of a row whose unread columns hold more than the columns that are read."""
    for name in accounted.repeated:
        if not _is_empty(row.get(name)) and not _is_repeated(row, name, accounted.read):
            reason = (
                f"{name} is not read, and in this row it holds text that no other column has: read it with --map, or "
                f"leave it out with --ignore-columns {name}"
            )
            return Problem("unread_context", reason, name, row.get(name))
    return None


def _refusal(spec: DataSpec, name: str, shape: Shape, example: Any, media: bool) -> str:
    head = f"data set {spec.name!r} ({spec.path}): column {name!r} ({str(shape)[:120]}) "
    if media:
        words = _words(name)
        if words & {"video", "videos", "audio", "audios", "speech"}:
            return f"{head}holds sound or film, which is not scored. Leave it out with --ignore-columns {name}"
        return (
            f"{head}holds media that is not read. Pictures are read from one column, images (--map images={name}, for "
            f"conversations and texts); sound and film are not scored. Leave it out with --ignore-columns {name}"
        )
    return (
        f"{head}looks like a part of the question (for example {seen(example, 80)!r}), but it is not read. Say what it "
        f"is with --map NAME={name} (--map help lists the names), or leave it out with --ignore-columns {name}"
    )


def _looks_like_context(name: str, shape: Shape) -> bool:
    if shape.kind in ("int", "float", "bool") or _words(name) & _NOT_CONTEXT_WORDS:
        return False
    return is_messages(shape) or bool(_words(name) & _CONTEXT_WORDS)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())) - {""}


def _holds_media(name: str, shape: Shape, values: Sequence[Any]) -> bool:
    """Bytes of a picture, sound or film; a struct of bytes and path, as the datasets library has it; or such a name."""
    item = shape.item if shape.kind == "list" and shape.item is not None else shape
    if "bytes" in item.fields:
        return True
    if item.binary:
        flat = (part for value in values for part in (value if isinstance(value, list) else [value]))
        if any(isinstance(part, bytes) and (part.startswith(_MAGIC) or part[4:8] == b"ftyp") for part in flat):
            return True
    words = _words(name)
    return bool(words & _MEDIA_WORDS) and not words & _NOT_CONTEXT_WORDS and item.kind not in ("int", "float", "bool")


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {}, "[]", "{}") or not any(text.strip() for text in _texts(value))


def _is_repeated(row: Mapping[str, Any], name: str, read: Collection[str], short_counts: bool = False) -> bool:
    """Whether the texts of an unread cell all occur in those of the cells that are read.

    short_counts: a text of few characters counts as repeated wherever it occurs.
    """
    known = [text.strip() for column in read for text in _texts(row.get(column))]
    texts = [text.strip() for text in _texts(row.get(name))]
    telling = [text for text in texts if len(text) > _SHORT]
    if not (telling or short_counts):
        return all(text in known for text in texts)
    everything = "\n".join(known)
    return all(text in everything for text in telling or texts)


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """The strings of a cell, but for roles and the like; a cell of encoded messages is decoded."""
    if isinstance(value, str):
        decoded = encoded_messages(value) if depth == 0 else None
        if decoded is not None:
            yield from _texts(decoded, 1)
        else:
            yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if key not in ("role", "from", "type", "name", "id"):
                yield from _texts(part, depth + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part, depth + 1)
    elif isinstance(value, bytes):
        text = as_text(value)
        yield text if isinstance(text, str) else repr(value[:40])
    elif value is not None:
        yield str(value)
