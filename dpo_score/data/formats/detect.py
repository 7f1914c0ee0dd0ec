"""Which format a set has: exactly one must match its schema, or the set is refused.

In come the shapes of the columns, the person's --format and --map, and a way to look at the first rows; out come the
format and the column of the file behind each name that its reader uses. Nothing is guessed: no match, or more than
one, is a `DataError` that shows the schema, the candidates, and the option that settles it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from dpo_score.config.schema import DataSpec
from dpo_score.data.column_types import Shape, Shapes, ShapeTest, either, is_message, is_messages, is_number, is_text
from dpo_score.data.formats.base import Column, ColumnMap, Format
from dpo_score.data.formats.cells import Row, plain
from dpo_score.data.formats.chosen_rejected import (
    HISTORY,
    PROMPT_LIKE,
    PROMPT_NAMES,
    SIDE_NAMES,
    is_unpaired,
    names_its_sides,
    text_prompts,
)
from dpo_score.data.formats.registry import FORMATS, named
from dpo_score.data.pictures import NAMES, PATH_NAMES, holds_pictures
from dpo_score.data.types import Unusable
from dpo_score.errors import DataError, nearest
from dpo_score.escape import seen

SAMPLE_ROWS = 1000


SYSTEM = Column("system", either(is_text, is_messages, is_message), also=("system_prompt", "system_message"))
"""Read with every format but token ids, and put before the conversation in one place: row.py."""
PICTURES = Column("images", holds_pictures, also=(*NAMES[1:], *PATH_NAMES))
"""Read with every format but token ids; where its pictures stand in the conversation is settled in data/pictures.py."""
CARRIED = ("id", "subset", "group_id", "tools", "chat_template_kwargs")
_CARRIED_ALSO: Mapping[str, tuple[str, ...]] = {"id": ("id", "prompt_id")}

KEYS = frozenset(
    (SYSTEM.name, PICTURES.name, *CARRIED, *(column.name for format_ in FORMATS for column in format_.needs))
)
"""What --map can name a column as; a column that it names so has no other name."""

READ_IN_ANY_SPELLING = frozenset((*PROMPT_LIKE, *SYSTEM.also, "system", "chosen", "rejected", "tools"))
"""Names that mean the same with capitals, blanks or hyphens."""

Sample = Callable[[Sequence[str]], Sequence[Mapping[str, Any]]]
"""The given columns of the first rows of the set, at most SAMPLE_ROWS: called where the schema cannot decide."""


def detect(shapes: Shapes, spec: DataSpec, sample: Sample) -> tuple[Format, dict[str, str]]:
    """The format of a set, and the column of the file behind each name its reader uses.

    shapes: column of the file → shape. Raises DataError.
    """
    names = reader_names(shapes, spec)
    view = {name: shapes[column] for name, column in names.items()}
    format_, found = _decided(view, names, spec, sample)
    _refuse_two_prompts(format_, found, view, spec)
    _refuse_labels_as_answers(found, view, names, spec, sample)
    system = SYSTEM.find(view, spec.map)
    if system is not None and not format_.holds_ids:
        found[SYSTEM.name] = system
    pictures = PICTURES.find(view, spec.map)
    if pictures is not None and not format_.holds_ids and pictures not in found.values():
        found[PICTURES.name] = pictures
    columns = {name: names[column] for name, column in found.items()}
    _refuse_unread_keys(format_, columns, spec)
    _refuse_undecided_preference(spec, columns)
    return format_, columns


def structured_test(names: Sequence[str]) -> ShapeTest | None:
    """Which lists or structs a column of one of these names is to hold, that may then be written as JSON text.

    None where a text is meant: a format reads a text of that name. An earlier history is the exception, as lists of
    two texts are no text that people write.
    """
    columns = [column for format_ in FORMATS for column in format_.needs if {column.name, *column.also} & set(names)]
    if HISTORY in columns:
        return HISTORY.fits
    texts = any(column.fits(Shape("text")) for column in columns) or any(set(two) & set(names) for two in SIDE_NAMES)
    return either(*(column.fits for column in columns)) if columns and not texts else None


def carried_columns(shapes: Shapes, spec: DataSpec) -> dict[str, str]:
    """The columns that go along with a pair: id, subset, group_id, tools, chat_template_kwargs."""
    names = reader_names(shapes, spec)
    found = {key: next((n for n in _CARRIED_ALSO.get(key, (key,)) if n in names), None) for key in CARRIED}
    return {key: names[name] for key, name in found.items() if name is not None}


def replaced_names(spec: DataSpec) -> set[str]:
    """Names of columns that a key of --map puts another column (or none) in the place of."""
    also = {column.name: column.also for column in (SYSTEM, PICTURES)}
    return {*spec.map, *chain.from_iterable(names for key, names in also.items() if key in spec.map)}


def reader_names(shapes: Shapes, spec: DataSpec) -> dict[str, str]:
    """Name that a reader may ask for → column of the file.

    Hyphens read as underscores, capitals and blanks as others spell the name, the two sides are called chosen and
    rejected whatever SIDE_NAMES calls them, and a key of --map hides the other names of what it replaces.
    """
    given = {key: column for key, column in spec.map.items() if column}
    if "chosen" in given and given["chosen"] == given.get("rejected"):
        raise DataError(f"data set {spec.name!r}: --map says that {given['chosen']} is both chosen and rejected")
    names: dict[str, str] = {}
    for column in shapes:
        names.setdefault(column.replace("-", "_"), column)
    for column in shapes:
        plain_name = column.strip().replace("-", "_").replace(" ", "_").lower()
        if plain_name in READ_IN_ANY_SPELLING and plain_name not in names and column not in given.values():
            names[plain_name] = names.pop(column.replace("-", "_"))
    for key, column in spec.map.items():
        if column and column not in shapes:
            raise DataError(
                f"data set {spec.name!r}: --map {key}={column} names a column that is not there; "
                f"{nearest(column, shapes)}"
            )
        others = {column.name: (column.name, *column.also) for column in (SYSTEM, PICTURES)}
        hidden = {"prompt": PROMPT_NAMES, **others, **_CARRIED_ALSO}.get(key, (key,))
        for name in hidden:
            names.pop(name, None)
    taken = {column for key, column in given.items() if key in KEYS}
    names = {name: column for name, column in names.items() if column not in taken} | given
    sides = next((two for two in SIDE_NAMES if all(name in names for name in two)), None)
    if sides is not None and not {"chosen", "rejected"} & spec.map.keys():
        for name, side in zip(("chosen", "rejected"), sides, strict=True):
            names[name] = names.pop(side)
    return names


def _decided(view: Shapes, names: ColumnMap, spec: DataSpec, sample: Sample) -> tuple[Format, dict[str, str]]:
    candidates = FORMATS if spec.format == "auto" else named(spec.format)
    if not candidates:
        known = sorted({name for format_ in FORMATS for name in (format_.name, format_.full_name)})
        raise DataError(f"data set {spec.name!r}: unknown format {spec.format!r}; {nearest(spec.format, known)}")
    fixed = [key for key, column in spec.map.items() if column]
    matches = [(format_, found) for format_ in candidates if (found := format_.match(view, fixed)) is not None]
    exact = [match for match in matches if match[0].full_name == spec.format]
    if exact or (spec.format != "auto" and len(matches) == 1):
        return (exact or matches)[0]
    by_rows = [(format_, found) for format_, found in matches if format_.sample_fits is not None]
    others = [(format_, found) for format_, found in matches if format_.sample_fits is None]
    fitting = [match for match in by_rows if _rows_fit(*match, view, names, sample)]
    matches = fitting or others
    if len(matches) == 1:
        return matches[0]
    fits, fits_by_columns = [format_ for format_, _ in matches], [format_ for format_, _ in by_rows]
    raise DataError(_refusal(view, names, spec, candidates, fits, fits_by_columns))


def _rows_fit(format_: Format, found: ColumnMap, view: Shapes, names: ColumnMap, sample: Sample) -> bool:
    """Whether the sampled rows have the form that the schema cannot tell."""
    assert format_.sample_fits is not None
    rows = sample([names[name] for name in found.values()])
    return format_.sample_fits([_readable(row, found, view, names) for row in rows])


def _readable(raw: Mapping[str, Any], found: ColumnMap, view: Shapes, names: ColumnMap) -> Row:
    """A row by the names of the reader; what cannot be decoded is left out, as the row checks will find it."""
    row = {}
    for key, name in found.items():
        try:
            row[key] = plain(raw.get(names[name]), view[name], name)
        except Unusable:
            row[key] = None
    return row


ANSWER_NAMES = (
    *((f"response_{a}", f"response_{b}") for a, b in ("ab", "AB", "01", "12")),
    *((f"{name}_a", f"{name}_b") for name in ("answer", "completion", "output", "option")),
    *(("response1", "response2"), ("answer_0", "answer_1"), ("output_1", "output_2")),
)
"""Neutral names of two answers: a set that has them needs a label."""
LABEL_NAMES = ("winner", "label", "labels", "preference", "preferred", "choice", "better", "best", "score", "vote")


ONE_ANSWER = ("response", "completion", "answer", "output", "generation")
SCORE_NAMES = ("score", "rating", "reward", "helpfulness", "overall_score", "quality")


# --- refusals -------------------------------------------------------------------------------------------------------


def _refusal(
    view: Shapes,
    names: ColumnMap,
    spec: DataSpec,
    candidates: Sequence[Format],
    matches: Sequence[Format],
    by_columns: Sequence[Format],
) -> str:
    """Why no format was decided on: `matches` fit, of `by_columns` the columns fit and the rows do not."""
    schema = ", ".join(f"{names[name]}: {str(shape)[:120]}" for name, shape in list(view.items())[:60]) or "no column"
    head = f"data set {spec.name!r} ({spec.path}) has the columns {schema}. "
    if matches:
        options = " or ".join(f"--format {format_.full_name}" for format_ in matches)
        return f"{head}More than one format fits: say {options}."
    if by_columns:
        turns = [name for name in view if name not in ("chosen", "rejected") and is_messages(view[name])]
        if turns:
            return f"{head}Column {names[turns[0]]!r} looks like the prompt: say --map prompt={names[turns[0]]}."
        options = " or ".join(f"--format {format_.full_name}" for format_ in by_columns)
        needed = "; or ".join(format_.columns for format_ in by_columns)
        return (
            f"{head}The columns would fit {needed}; but the rows do not have that form, so that there would be no "
            f"prompt. Say {options} to read them so, or name the prompt with --map prompt=COLUMN."
        )
    if is_unpaired(view):
        return f"{head}These are single completions with a label (the KTO form); DPO needs pairs."
    if spec.format != "auto":
        needed = "; or ".join(format_.columns for format_ in candidates)
        return f"{head}That is not {spec.format}, which needs {needed}. Rename columns with --map NAME=COLUMN,…"
    return f"{head}No known format fits (`dpo-score formats` lists them). {_way_out(view, names)}"


def _way_out(view: Shapes, names: ColumnMap) -> str:
    """The --map that would read these columns, as far as their names tell."""
    prompts = [name for name in PROMPT_LIKE if name in view]
    if names_its_sides(view) and prompts:
        name, shape = names[prompts[0]], view[prompts[0]]
        if name == "prompt" and (is_text(shape) or is_messages(shape)):
            sides = " and ".join(f"{names[side]} ({str(view[side])[:120]})" for side in ("chosen", "rejected"))
            return (
                f"Beside such a prompt, {sides} should be strings or messages (role and content), both of one type. "
                "Change the columns, or name others with --map chosen=COLUMN,rejected=COLUMN."
            )
        if is_text(shape) or is_messages(shape):
            return (
                f"Column {name!r} looks like the prompt: say --map prompt={name}, or --map prompt=COLUMN for another."
            )
        return (
            f"Column {name!r} looks like the prompt, but it is {str(shape)[:120]}: a prompt is a string or a list of "
            "messages (role and content). Change the column, or name another with --map prompt=COLUMN."
        )
    two = next((two for two in ANSWER_NAMES if all(name in view for name in two)), None)
    if two is not None:
        first, second = (names[name] for name in two)
        prompt = next((names[name] for name in PROMPT_NAMES if name in view), "COLUMN")
        label = next((names[name] for name in LABEL_NAMES if name in view), "COLUMN")
        sides = f"response_0={first},response_1={second}"
        return (
            f"What says which answer is better? If {label} holds words (model_a, B, tie, A>B): --map prompt={prompt},"
            f"response_a={first},response_b={second},winner={label}. If it numbers the better answer, 0 being {first}: "
            f"--map prompt={prompt},{sides},better_response_id={label}. If it is 1 where {first} is better: --map "
            f"history={prompt},human_ref_A={first},human_ref_B={second},labels={label}. "
            "--map help names the keys of every format."
        )
    score = next((names[name] for name in SCORE_NAMES if name in view and is_number(view[name])), None)
    response = next((names[name] for name in ONE_ANSWER if is_text(view.get(name))), None)
    if score is not None and response is not None and prompts:
        return (
            f"If the rows of one prompt are its answers, and a higher {score} is better: "
            f"--map prompt={names[prompts[0]]},response={response},helpfulness={score}. "
            "--map help names the keys of every format."
        )
    return (
        "Say which columns to read, for instance --map prompt=COLUMN,chosen=COLUMN,rejected=COLUMN; "
        "--map help names the keys of every format."
    )


def _refuse_two_prompts(format_: Format, found: ColumnMap, view: Shapes, spec: DataSpec) -> None:
    """Two columns that could each be the prompt: picking one silently would score other tokens."""
    prompts = text_prompts(view)
    if (
        len(prompts) > 1
        and found.get("prompt") in prompts
        and format_.name != "messages-full"
        and "prompt" not in spec.map
    ):
        options = " or ".join(f"--map prompt={name}" for name in prompts)
        join = f", or --map instruction={prompts[0]},input={prompts[1]} to join them" if len(prompts) == 2 else ""
        raise DataError(f"data set {spec.name!r} ({spec.path}) has {len(prompts)} prompt columns: say {options}{join}.")


def _refuse_labels_as_answers(found: ColumnMap, view: Shapes, names: ColumnMap, spec: DataSpec, sample: Sample) -> None:
    """Beside two answers, a text column called chosen may hold the name of the better one instead of its text."""
    two = next((two for two in ANSWER_NAMES if all(is_text(view.get(name)) for name in two)), None)
    if two is None or not is_text(view.get("chosen")) or "chosen" not in found or set(two) & set(found.values()):
        return
    first, second, chosen = (names[name] for name in (*two, "chosen"))
    rows = sample([first, second, chosen])
    if rows and not any(row.get(chosen) in (row.get(first), row.get(second)) for row in rows):
        raise DataError(
            f"data set {spec.name!r} ({spec.path}) has two answers, {first} and {second}, and {chosen!r} holds neither "
            f"of them in the first {len(rows)} rows (for example {seen(rows[0].get(chosen), 40)!r}). If it names the "
            f"better one, say --map prompt=COLUMN,response_a={first},response_b={second},winner={chosen}; if it is an "
            f"answer of its own, leave the others out with --ignore-columns {first},{second}"
        )


def _refuse_unread_keys(format_: Format, columns: ColumnMap, spec: DataSpec) -> None:
    """A key of --map that nothing reads would be ignored without a word."""
    unread = next((key for key in spec.map if spec.map[key] and key not in columns and key not in CARRIED), None)
    if unread is None:
        return
    common = () if format_.holds_ids else (SYSTEM.name, PICTURES.name)
    keys = dict.fromkeys([*(column.name for column in format_.needs), *common, *CARRIED])
    close = nearest(unread, keys) if unread not in keys else f"it reads {', '.join(keys)}"
    wrong = f"; its column {spec.map[unread]!r} is of another type" if unread in keys else ""
    raise DataError(
        f"data set {spec.name!r}: --map {unread}=… is not read by {format_.full_name}{wrong}; {close} "
        "(--map help names the keys of every format)"
    )


def _refuse_undecided_preference(spec: DataSpec, columns: ColumnMap) -> None:
    """DataError where two labels are side by side and none was chosen."""
    labels = [name for name in ("better", "safer") if f"{name}_response_id" in columns]
    if len(labels) == 2 and spec.preference is None:
        raise DataError(
            f"data set {spec.name!r} has two labels, better_response_id and safer_response_id: "
            "say --preference better or --preference safer"
        )
    if labels and spec.preference is not None and spec.preference not in labels:
        raise DataError(f"data set {spec.name!r} has no label for --preference {spec.preference}")
