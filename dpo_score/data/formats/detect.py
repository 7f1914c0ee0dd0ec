"""Which format a set has: exactly one row of the table must match its schema, or the set is refused.

Nothing is guessed: no match, or more than one, is a `DataError` that shows the schema, the candidates, and the
option that settles it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_score.config.schema import DataSpec
from dpo_score.data.column_types import Shapes
from dpo_score.data.formats.base import ASSISTANT
from dpo_score.data.formats.chosen_rejected import PROMPT_NAMES, SYSTEM_NAMES, Binding, text_prompts, unpaired
from dpo_score.data.formats.registry import TABLE, Format, named
from dpo_score.errors import DataError, nearest

HH_SHARE = 0.95
HH_SAMPLE = 1000
CARRIED = ("id", "subset", "group_id", "tools", "chat_template_kwargs")
_ALIASES = {
    "prompt": PROMPT_NAMES,
    "system": SYSTEM_NAMES,
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "id": ("id", "prompt_id"),
}

Sample = Callable[[], Sequence[Mapping[str, Any]]]
"""The first rows of the set, at most HH_SAMPLE: called only where the schema cannot decide."""


def detect(shapes: Shapes, spec: DataSpec, sample: Sample) -> tuple[Format, Binding]:
    """The format of a set, and the column of the file behind each name its reader uses.

    shapes: column of the file → shape. Raises DataError.
    """
    names = _names(shapes, spec)
    view = {name: shapes[column] for name, column in names.items()}
    format_, found = _decide(view, spec, lambda: _is_transcript(sample(), names))
    _refuse_two_prompts(format_, found, view, spec)
    unread = [key for key in spec.map if spec.map[key] and key not in found and key not in CARRIED]
    if unread:
        known = nearest(unread[0], [*found, *CARRIED, "system"])
        raise DataError(f"data set {spec.name!r}: --map {unread[0]}=… is not read by {format_.full_name}; {known}")
    return format_, {name: names[column] for name, column in found.items()}


def carried_columns(shapes: Shapes, spec: DataSpec) -> Binding:
    """The columns that go along with a pair: id, subset, group_id, tools, chat_template_kwargs."""
    names = _names(shapes, spec)
    found = {key: next((n for n in _ALIASES.get(key, (key,)) if n in names), None) for key in CARRIED}
    return {key: names[name] for key, name in found.items() if name is not None}


def _names(shapes: Shapes, spec: DataSpec) -> Binding:
    """Name a reader may ask for → column. Hyphens read as underscores; `--map` hides what it replaces."""
    names: Binding = {}
    for column in shapes:
        names.setdefault(column.replace("-", "_"), column)
    for key, column in spec.map.items():
        if column and column not in shapes:
            raise DataError(
                f"data set {spec.name!r}: --map {key}={column} names a column that is not there; "
                f"{nearest(column, shapes)}"
            )
        for alias in _ALIASES.get(key, (key,)):
            names.pop(alias, None)
    return {**names, **{key: column for key, column in spec.map.items() if column}}


def _decide(view: Shapes, spec: DataSpec, is_transcript: Callable[[], bool]) -> tuple[Format, Binding]:
    rows = TABLE if spec.format == "auto" else named(spec.format)
    if not rows:
        known = sorted({name for row in TABLE for name in (row.name, row.full_name)})
        raise DataError(f"data set {spec.name!r}: unknown format {spec.format!r}; {nearest(spec.format, known)}")
    matches = [(row, found) for row in rows if (found := row.bind(view)) is not None]
    if {row.name for row, _ in matches} == {"hh-transcript", "pair-text-implicit"}:
        wanted = "hh-transcript" if is_transcript() else "pair-text-implicit"
        matches = [match for match in matches if match[0].name == wanted]
    if len(matches) == 1:
        return matches[0]
    raise DataError(_refusal(view, spec, rows, [row for row, _ in matches]))


def _refusal(view: Shapes, spec: DataSpec, rows: Sequence[Format], matches: Sequence[Format]) -> str:
    schema = ", ".join(f"{name}: {str(shape)[:120]}" for name, shape in list(view.items())[:60]) or "no column"
    head = f"data set {spec.name!r} ({spec.path}) has the columns {schema}. "
    if matches:
        names = " or ".join(f"--format {row.full_name}" for row in matches)
        return f"{head}More than one format fits: say {names}."
    if unpaired(view):
        return f"{head}These are single completions with a label (the KTO form); DPO needs pairs."
    if spec.format != "auto":
        needed = "; or ".join(row.columns for row in rows)
        return f"{head}That is not {spec.format}, which needs {needed}. Rename columns with --map NAME=COLUMN,…"
    return (
        f"{head}No known format fits (`dpo-score formats` lists them). "
        "Say which columns to read, for instance --map prompt=COLUMN,chosen=COLUMN,rejected=COLUMN."
    )


def _refuse_two_prompts(format_: Format, found: Binding, view: Shapes, spec: DataSpec) -> None:
    """Two columns that could each be the prompt: picking one silently would score other tokens."""
    prompts = text_prompts(view)
    if (
        len(prompts) > 1
        and found.get("prompt") in prompts
        and format_.name != "messages-full"
        and "prompt" not in spec.map
    ):
        options = " or ".join(f"--map prompt={name}" for name in prompts)
        raise DataError(f"data set {spec.name!r} ({spec.path}) has {len(prompts)} prompt columns: say {options}.")


def _is_transcript(rows: Sequence[Mapping[str, Any]], names: Binding) -> bool:
    """Whether at least HH_SHARE of the rows hold the assistant's marker on both sides."""
    columns = [names[n] for n in ("chosen", "rejected", "chosen_response", "rejected_response") if n in names]
    hits = sum(all(ASSISTANT in str(row.get(column)) for column in columns[:2]) for row in rows)
    return bool(rows) and hits >= HH_SHARE * len(rows)


def refuse_undecided_preference(spec: DataSpec, columns: Mapping[str, str]) -> None:
    """DataError where two labels stand side by side and none was chosen."""
    labels = [name for name in ("better", "safer") if f"{name}_response_id" in columns]
    if len(labels) == 2 and spec.preference is None:
        raise DataError(
            f"data set {spec.name!r} has two labels, better_response_id and safer_response_id: "
            "say --preference better or --preference safer"
        )
    if labels and spec.preference is not None and spec.preference not in labels:
        raise DataError(f"data set {spec.name!r} has no label for --preference {spec.preference}")
