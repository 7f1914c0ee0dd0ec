"""The table of preference formats.

Every `Format` that a family's file defines is in it, in the order of the files. What a new format needs is its
function in one of these files and its fixture in tests/data/formats/golden.py, whose tests fail without it.
"""

from __future__ import annotations

import copyreg
from typing import Any

from dpo_score.data.formats import chosen_rejected, labelled, pictured, ranked, token_ids
from dpo_score.data.formats.base import Format

FAMILIES = (token_ids, chosen_rejected, labelled, ranked, pictured)
FORMATS: tuple[Format, ...] = tuple(
    value for family in FAMILIES for value in vars(family).values() if isinstance(value, Format)
)


def describe_formats() -> list[dict[str, Any]]:
    """The table as plain values, for `dpo-score formats`."""
    keys = ("name", "code", "variant", "columns", "polarity", "version")
    return [{key: getattr(format_, key) for key in keys} for format_ in FORMATS]


def named(name: str) -> tuple[Format, ...]:
    """The formats that a `--format` value means: a name (with all its variants), a code, or name/variant."""
    return tuple(format_ for format_ in FORMATS if name in (format_.name, format_.code, format_.full_name))


def map_keys() -> str:
    """The keys of --map that each format reads, one line a format: what `--map help` prints."""
    width = max(len(format_.full_name) for format_ in FORMATS)
    lines = []
    for format_ in FORMATS:
        needed = ", ".join(column.name for column in format_.needs if not column.optional)
        optional = ", ".join(column.name for column in format_.needs if column.optional)
        lines.append(f"{format_.full_name:{width}}  {needed}" + (f"; optional: {optional}" if optional else ""))
    lines.append("")
    lines.append(
        "every format: system, images, tools, chat_template_kwargs, id, subset, group_id (KEY= leaves a column out)"
    )
    return "\n".join(lines)


def _from_the_table(full_name: str, version: int) -> Format:
    """The format that another process sent."""
    return next(one for one in FORMATS if (one.full_name, one.version) == (full_name, version))


# Another process finds a format in its own table: the functions that a format is made of have no names to be sent by.
copyreg.pickle(Format, lambda one: (_from_the_table, (one.full_name, one.version)))
