"""The sets of a run as one long list of rows: what they are, what identifies them, and how they are read.

Rows are numbered through all files of all sets, in order: [0, total). Reading is streamed and any range can be
asked for; consecutive ranges go on where the last one ended. Promises: every row number gives at least one `Pair`
or `Rejected`, in order; memory does not grow with files, row groups or ranges (one JSON array excepted).
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_score.config.schema import DataSpec, RunConfig
from dpo_score.data.column_types import (
    Shape,
    Shapes,
    agree,
    as_text,
    encoded_messages,
    is_plain,
    is_printed_by_numpy,
    refined,
    united,
)
from dpo_score.data.columns import ColumnAccount, account, unread_context
from dpo_score.data.files import content_sha256, select
from dpo_score.data.formats.base import Format, ReadOptions
from dpo_score.data.formats.detect import SAMPLE_ROWS, carried_columns, detect, replaced_names, structured_test
from dpo_score.data.formats.row import RowReader, rejected
from dpo_score.data.pictures import PictureColumn, holds_paths, located, paths_of, pillow
from dpo_score.data.row_reader import RawRow, RowFile, first_rows, open_rows
from dpo_score.data.types import Pair, Problem, Rejected, Source
from dpo_score.errors import DataError, nearest
from dpo_score.escape import seen, without_secrets

SAMPLED_FILES = 8
SHOWN_FILES = 10
SIZED_FILES, SIZED_ROWS = 8, 256
GROUPS_AT_ONCE = 4096
"""Prompts whose rows are looked for in one pass over the files, where they need not stand together."""


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """The units of a file whose format reads several rows at once: unit i is `rows[starts[i] : starts[i + 1]]`.

    rows: numbers of rows, counted over the files of the set ([n] int64), ascending in a unit; the first row of each
    unit lies in this file, and units ascend by it. starts: [units + 1] int64. before: rows of the set before this file.
    """

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    before: int

    def of(self, unit: int) -> list[int]:
        """The rows of a unit, counted over the files of the set."""
        found: list[int] = self.rows[self.starts[unit] : self.starts[unit + 1]].tolist()
        return found

    @property
    def first_rows(self) -> NDArray[np.int64]:
        """The row of this file that each unit begins with."""
        return self.rows[self.starts[:-1]] - self.before


@dataclass(frozen=True, slots=True)
class DataFile:
    """`index` counts over all sets of the run; `name` is the path below the set's root; `rows` counts units.

    A unit is what the format reads at once: one row, or all rows of one prompt (`groups`), which count for the file
    that holds the first of them.
    """

    path: str
    name: str
    index: int
    rows: int
    size: int
    sha256: str
    content: RowFile
    commit: str | None = None
    groups: Groups | None = field(default=None, compare=False)

    def first_row(self, unit: int) -> int:
        """The row of the file that a unit is named after."""
        return unit if self.groups is None else int(self.groups.first_rows[unit])

    def unit_of(self, row: int) -> int:
        """The unit that is named after a row of the file."""
        return row if self.groups is None else int(np.searchsorted(self.groups.first_rows, row))


@dataclass(frozen=True, slots=True)
class Dataset:
    """A set with its format decided.

    schema: column → shape, over all files. columns: what becomes of each of them. skipped: name of a data file that is
    left out → why.
    """

    spec: DataSpec
    files: tuple[DataFile, ...]
    schema: Shapes
    format: Format
    reader: RowReader
    columns: ColumnAccount
    skipped: Mapping[str, str] = field(default_factory=dict)
    pictures: str | None = None
    """Digest of the pictures that the data name by path."""

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def commit(self) -> str | None:
        """The commit of a hub data set; `spec.revision` names it, too."""
        return self.files[0].commit

    @property
    def is_conversational(self) -> bool:
        """Whether the rows are conversations, which a chat template renders; so is a text with a system text."""
        return self.format.is_conversational(self.reader.columns)

    @property
    def carried(self) -> list[str]:
        """The columns that go along with each pair (id, subset, tools, kept ones), beside those of the format."""
        own = self.reader.columns.values()
        return [seen(name, 60) for name in self.columns.read if name not in own]

    @property
    def needed(self) -> list[str]:
        """The columns to read from a file: those of the reader, and those that are compared with them."""
        return [*self.reader.needed, *self.columns.repeated]

    def reader_of(self, file: DataFile) -> RowReader:
        """The set's reader, made for one of its files."""
        media = None
        if self.reader.media is not None:
            media = PictureColumn(self.reader.media.column, self.spec.media_root, file.path)
        return replace(self.reader, unpacked=_unpacked(file.content, self.schema), media=media)

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for two runs to read the same pairs: JSON values only."""
        spec, options = self.spec, self.reader.options
        return {
            "name": spec.name,
            "files": [{"name": f.name, "size": f.size, "sha256": f.sha256} for f in self.files],
            "split": list(spec.split),
            **({"commit": self.commit} if self.commit else {}),
            "format": {
                "name": self.format.full_name,
                "version": self.format.version,
                "polarity": self.format.polarity,
                "columns": dict(self.reader.columns),
            },
            "map": dict(spec.map),
            **({"pictures": self.pictures} if self.pictures else {}),
            **({"ignore_columns": sorted(self.columns.ignored)} if self.columns.ignored else {}),
            "pairing": options.pairing,
            "preference": options.preference,
            "keep_ties": options.keep_ties,
            "keep_nulls": self.reader.keep_nulls,
            "seed": options.seed if options.pairing == "random" else None,
        }

    def summary(self) -> str:
        """The decision in one line: format, columns read and not read, which side is better, rows and files."""
        columns = ", ".join(
            f"{name} = {column}" if name != column else name for name, column in self.reader.columns.items()
        )
        commit = f"commit {self.commit}; " if self.commit else ""
        names = ", ".join(seen(file.name, 80) for file in self.files[:SHOWN_FILES])
        more = f" and {len(self.files) - SHOWN_FILES:,} more" if len(self.files) > SHOWN_FILES else ""
        counted = "in " if len(self.files) == 1 else f"in {len(self.files):,} files: "
        left_out = [f"{seen(name, 80)} ({why})" for name, why in list(self.skipped.items())[:SHOWN_FILES]]
        if len(self.skipped) > SHOWN_FILES:
            left_out.append(f"and {len(self.skipped) - SHOWN_FILES:,} more")
        alike = [" = ".join(seen(name, 80) for name in names) for names in self._files_alike()]
        parts = (
            f"{self.format.polarity}; {self.rows:,} rows {counted}{names}{more}",
            f"files of the same content, each of which is read: {', '.join(alike)}" if alike else "",
            f"carried along: {', '.join(self.carried)}" if self.carried else "",
            self.columns.sentence(),
            f"files not read: {', '.join(left_out)}" if left_out else "",
        )
        decided = f"format {self.format.full_name} ({self.format.code}), columns {seen(columns, 400)}"
        return f"{self.spec.name}: {commit}{decided}; " + "; ".join(part for part in parts if part)

    def _files_alike(self) -> list[list[str]]:
        """The names of files that are equal byte for byte: most often copies, whose rows then count twice."""
        by_content: dict[str, list[str]] = {}
        for file in self.files:
            if file.content.rows:
                by_content.setdefault(file.sha256, []).append(file.name)
        return [names for names in by_content.values() if len(names) > 1]

    def value_kind(self, column: str) -> str:
        """The kind of the values of a column that is carried to the output; "other" where rows or files differ."""
        kinds = {file.content.shapes[column].kind for file in self.files if column in file.content.shapes} - {"null"}
        mixed = any(column in file.content.mixed for file in self.files)
        if kinds == {"int", "float"}:
            kinds = {"float"}
        return "other" if mixed or len(kinds) > 1 else next(iter(kinds), "null")


def has_pictures(datasets: Sequence[Dataset]) -> bool:
    """Whether the pairs of a set may be about pictures."""
    return any(dataset.reader.media is not None for dataset in datasets)


def only_ids(datasets: Sequence[Dataset]) -> bool:
    """Whether no set holds text."""
    return all(dataset.format.holds_ids for dataset in datasets)


def open_data(
    config: RunConfig, *, sha256: Callable[[str], str] | None = None, keep_columns: Sequence[str] | None = None
) -> tuple[Dataset, ...]:
    """The sets of a configuration, opened in the same way by every command.

    keep_columns: instead of those that the configuration names. Raises DataError.
    """
    return open_datasets(
        config.data,
        seed=config.seed,
        sha256=sha256,
        keep_columns=config.keep_columns if keep_columns is None else keep_columns,
        keep_nulls=config.text.keep_nulls,
    )


def open_datasets(
    specs: Sequence[DataSpec],
    *,
    seed: int = 0,
    sha256: Callable[[str], str] | None = None,
    keep_columns: Sequence[str] = (),
    keep_nulls: bool = False,
) -> tuple[Dataset, ...]:
    """List, check and digest the files of every set, and decide its format.

    sha256: path → digest of its content (default: read the file). Raises DataError.
    """
    datasets: list[Dataset] = []
    first_index = 0
    for spec in specs:
        located, skipped = select(spec)
        files = []
        for index, found in enumerate(located, first_index):
            content, digest = open_rows(found), found.sha256 or (sha256 or content_sha256)(found.path)
            file = DataFile(
                found.path, without_secrets(found.name), index, content.rows, found.size, digest, content, found.commit
            )
            files.append(file)
        if not sum(file.rows for file in files):
            raise DataError(f"data set {spec.name!r}: {spec.path} holds no rows")
        first_index += len(files)
        pinned = spec.model_copy(update={"revision": files[0].commit or spec.revision})
        decided = _decided(pinned, files, seed, tuple(keep_columns), keep_nulls)
        pictures = _pictures_digest(decided, sha256 or content_sha256)
        datasets.append(replace(decided, skipped=skipped, pictures=pictures))
    _refuse_unknown(datasets, keep_columns, "to keep")
    _refuse_unknown(datasets, list(dict.fromkeys(chain.from_iterable(s.ignore_columns for s in specs))), "to ignore")
    return tuple(datasets)


def _decided(spec: DataSpec, files: list[DataFile], seed: int, kept: tuple[str, ...], keep_nulls: bool) -> Dataset:
    """The format of a set, from the columns of all its files and rows spread over them."""
    filled = [file for file in files if file.rows]
    sampled = filled[:: max(1, len(filled) // SAMPLED_FILES)]
    sample = [row for file in sampled for row in file.content.sample(list(file.content.shapes))]
    every = dict.fromkeys(name for file in filled for name in file.content.shapes)
    schema = {
        name: refined(
            united(file.content.shapes[name] for file in filled if name in file.content.shapes),
            [row.get(name) for row in sample],
            structured_test([name, *(key for key, column in spec.map.items() if column == name)]),
        )
        for name in every
    }
    shapes = {name: shape for name, shape in schema.items() if name not in spec.ignore_columns}

    def rows_of(names: Sequence[str]) -> list[Mapping[str, Any]]:
        each = SAMPLE_ROWS // len(sampled)
        found = [row for file in sampled for row in first_rows(file.content.stream(0, names), each)]
        spread = sample if sum(file.rows for file in sampled) > len(found) else ()
        return [*found, *({name: row.get(name) for name in names} for row in spread)]

    format_, columns = detect(shapes, spec, rows_of)
    carried = carried_columns(shapes, spec)
    here = tuple(name for name in kept if name in schema)
    options = ReadOptions(spec.pairing, spec.preference, spec.keep_ties, seed)
    _refuse_drift(filled, schema, format_, columns)
    if format_.grouped_by:
        files = _in_groups(files, columns[format_.grouped_by])
    media = columns.get("images")
    if media is not None:
        _refuse_unreachable(spec, media, schema[media], [row.get(media) for row in sample])
    column = None if media is None else PictureColumn(media, spec.media_root)
    reader = RowReader(format_, options, columns, carried, here, {}, keep_nulls, column)
    replaced = [name for name in schema if name.replace("-", "_") in replaced_names(spec)]
    how: dict[str, Any] = {"beside": format_.beside, "replaced": replaced, "complete": format_.holds_ids}
    how["pictures"] = media is not None
    accounted = account(spec, schema, reader.needed, sample, **how)
    return Dataset(spec, tuple(files), schema, format_, reader, accounted)


def _refuse_unreachable(spec: DataSpec, column: str, shape: Shape, cells: Sequence[Any]) -> None:
    """DataError where a column names pictures that cannot be found: URLs, or paths without a folder they begin in."""
    pillow()
    if spec.media_root is not None and not Path(spec.media_root).is_dir():
        raise DataError(f"data set {spec.name!r}: --media-root {spec.media_root} is no folder")
    if not holds_paths(shape):
        return
    name = next(paths_of(cells), "")
    head = f"data set {spec.name!r} ({spec.path}): column {column!r} names pictures "
    way_out = f"or leave the column out with --ignore-columns {column}"
    if "://" in name[:32] or name.startswith("data:"):
        raise DataError(
            f"{head}by URL ({seen(name, 80)!r}), which is not fetched: save them and give their paths, {way_out}"
        )
    if spec.media_root is None:
        raise DataError(
            f"{head}by path ({seen(name, 80)!r}): say --media-root FOLDER that the paths are relative to, {way_out}"
        )


def _pictures_digest(dataset: Dataset, sha256: Callable[[str], str]) -> str | None:
    """Of every picture that the set names by path: its name and its bytes. None where it names none."""
    media, root = dataset.reader.media, dataset.spec.media_root
    if media is None or root is None:
        return None
    names: set[str] = set()
    for file in dataset.files:
        rows = (row for row in file.content.stream(0, [media.column]) if not isinstance(row, Problem))
        names.update(paths_of(row.get(media.column) for row in rows))
    found = hashlib.sha256()
    for name in sorted(names):
        path = located(root, name)
        found.update(f"{name}\0{sha256(str(path)) if path else ''}\n".encode("utf-8", "surrogatepass"))
    return found.hexdigest() if names else None


def _in_groups(files: Sequence[DataFile], column: str) -> list[DataFile]:
    """The files with all rows that are equal in `column` as one unit; rows that cannot be read stand alone."""
    units: dict[bytes, int] = {}
    unit_of_row, row = array("q"), 0
    for file in files:
        for raw in file.content.stream(0, [column]):
            value = None if isinstance(raw, Problem) else raw.get(column)
            content = repr(value) if value is not None else f"row {row}"
            digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            unit_of_row.append(units.setdefault(digest, len(units)))
            row += 1
    numbers = np.frombuffer(unit_of_row, dtype=np.int64)
    rows = np.argsort(numbers, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=len(units)))])
    grouped, before = [], 0
    first_rows = rows[starts[:-1]]
    for file in files:
        here = np.searchsorted(first_rows, [before, before + file.content.rows])
        ends = starts[here[0] : here[1] + 1]
        groups = Groups(rows[ends[0] : ends[-1]], ends - ends[0], before)
        grouped.append(replace(file, rows=int(here[1] - here[0]), groups=groups))
        before += file.content.rows
    return grouped


def _unpacked(content: RowFile, decided: Shapes) -> dict[str, Shape]:
    """The columns of a file to be made plain: strings found to hold messages, and what Arrow pads or encodes."""
    shapes = {}
    for name, own in content.shapes.items():
        known = decided.get(name, own)
        if own.kind == "text" and known.encoded:
            shapes[name] = replace(known, binary=own.binary)
        elif content.padded and not is_plain(own):
            shapes[name] = own
    return shapes


def _refuse_unknown(datasets: Sequence[Dataset], names: Sequence[str], purpose: str) -> None:
    """A column that is named may be missing from some sets, not from all of them."""
    columns = {column for dataset in datasets for column in dataset.schema}
    for name in names:
        if name not in columns:
            sets = ", ".join(repr(dataset.spec.name) for dataset in datasets)
            raise DataError(f"data set {sets} has no column {name!r} {purpose}; {nearest(name, columns)}")


def _refuse_drift(files: Sequence[DataFile], schema: Shapes, format_: Format, columns: Mapping[str, str]) -> None:
    """Every file must have the columns that the format needs, of the same kinds; optional ones may be absent."""
    optional = {column.name for column in format_.needs if column.optional} | {"system", "images"}
    for name, column in columns.items():
        expected = next(file for file in files if column in file.content.shapes)
        for file in files:
            found = file.content.shapes.get(column)
            if found is None and name in optional:
                continue
            known = expected.content.shapes[column]
            if found is None or not agree(known if known.kind != "null" else schema[column], found):
                raise DataError(
                    f"{file.path}: column {column!r} is {found or 'missing'}, but {known} in {expected.path}. "
                    "The files of one set must have the same columns: name those to read (a glob), or give the others "
                    "as a set of their own."
                )


class PairReader:
    """Reads ranges of rows; consecutive ranges continue one stream instead of decoding a row group again."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._places = [(dataset, file) for dataset in datasets for file in dataset.files]
        self._next = -1
        self._stream: Iterator[list[Pair | Rejected]] = iter(())

    def read(self, start: int, stop: int) -> list[Pair | Rejected]:
        """The pairs and rejects of the rows [start, stop), in order."""
        return [item for unit in self.units(start, stop) for item in unit]

    def units(self, start: int, stop: int) -> Iterator[list[Pair | Rejected]]:
        """What each row of [start, stop) gives: at least one item a row."""
        if start != self._next:
            self._stream = self._from(start)
        for self._next in range(start + 1, stop + 1):
            unit = next(self._stream, None)
            if unit is None:
                return
            yield unit

    def _from(self, start: int) -> Iterator[list[Pair | Rejected]]:
        for dataset, file in self._places:
            if start < file.rows:
                yield from _read(dataset, file, range(start, file.rows))
            start = max(start - file.rows, 0)


def _read(dataset: Dataset, file: DataFile, units: Sequence[int]) -> Iterator[list[Pair | Rejected]]:
    """What these units of a file give; `units` ascend."""
    reader = dataset.reader_of(file)
    shapes = {name: dataset.schema[name] for name in reader.columns.values()}
    prose = [name for name, shape in shapes.items() if shape.kind == "text" and not shape.encoded]
    for unit, raw in zip(units, _raw_units(dataset, file, units), strict=True):
        source = partial(Source, dataset.spec.name, file.name, file.index, file.first_row(unit))
        problems = (row if isinstance(row, Problem) else _problem_of(row, dataset, prose) for row in raw)
        problem = next((problem for problem in problems if problem is not None), None)
        yield [rejected(source(None), problem)] if problem is not None else reader.read(raw, source)  # type: ignore[arg-type]


def _raw_units(dataset: Dataset, file: DataFile, units: Sequence[int]) -> Iterator[list[RawRow]]:
    """The rows of each unit, as the files hold them. Raises DataError where a file has become shorter."""
    if file.groups is None:
        stream = isinstance(units, range) and len(units) > 0
        rows = file.content.stream(units[0], dataset.needed) if stream else file.content.picked(units, dataset.needed)
        for unit in units:
            row = next(rows, None)
            if row is None:
                raise DataError(f"{file.path} ended before row {unit}: it changed while it was read")
            yield [row]
        return
    for at in range(0, len(units), GROUPS_AT_ONCE):
        members = [file.groups.of(unit) for unit in units[at : at + GROUPS_AT_ONCE]]
        wanted = sorted(chain.from_iterable(members))
        found = dict(zip(wanted, _rows_of_set(dataset, wanted), strict=False))
        if len(found) < len(wanted):
            raise DataError(
                f"{file.path}, or a file after it, has fewer rows than it had: it changed while it was read"
            )
        yield from ([found[row] for row in rows] for rows in members)


def _rows_of_set(dataset: Dataset, wanted: Sequence[int]) -> Iterator[RawRow]:
    """Rows by their numbers over the files of a set, which ascend: one pass over each file that holds any."""
    before = 0
    for file in dataset.files:
        inside = wanted[bisect_left(wanted, before) : bisect_left(wanted, before + file.content.rows)]
        if inside:
            yield from file.content.picked([row - before for row in inside], dataset.needed)
        before += file.content.rows


def _problem_of(row: Mapping[str, Any], dataset: Dataset, prose: Sequence[str]) -> Problem | None:
    """What the decisions about the whole set got wrong for this row."""
    for name in prose:
        value = as_text(row.get(name))
        if not isinstance(value, str) or value[:20].lstrip()[:1] not in ("[", "{", '"', "a"):
            continue
        if encoded_messages(value) is not None:
            reason = f"{name} holds messages written as text, unlike most rows of the set, where it is plain text"
            return Problem("encoded_text", reason, name, value)
        if is_printed_by_numpy(value):
            reason = f"{name} holds messages as numpy prints them, which cannot be read back: save JSON lines"
            return Problem("encoded_text", reason, name, value)
    return unread_context(row, dataset.columns) if dataset.columns.repeated else None


def read_pairs(datasets: Sequence[Dataset], start: int, stop: int) -> Iterator[Pair | Rejected]:
    """The pairs and rejects of the global rows [start, stop), streamed."""
    for unit in PairReader(datasets).units(start, stop):
        yield from unit


def read_rows_at(datasets: Sequence[Dataset], rows: Iterable[int]) -> list[Pair | Rejected]:
    """The pairs and rejects of these global rows, given in ascending order: one pass over each file that holds any."""
    wanted, before = list(rows), 0
    found: list[Pair | Rejected] = []
    for dataset in datasets:
        for file in dataset.files:
            inside = slice(bisect_left(wanted, before), bisect_left(wanted, before + file.rows))
            for unit in _read(dataset, file, [row - before for row in wanted[inside]]):
                found += unit
            before += file.rows
    return found


def mean_text_bytes(dataset: Dataset) -> float:
    """Mean bytes of the columns read in a unit: an estimate from the first rows of the first files."""
    files = [file for file in dataset.files if file.rows][:SIZED_FILES]
    needed = dataset.reader.needed
    rows = [row for file in files for row in first_rows(file.content.stream(0, needed), SIZED_ROWS)]
    media = None if dataset.reader.media is None else dataset.reader.media.column
    cells = (value for row in rows for name, value in row.items() if name in needed and name != media)
    size = sum(len(value if isinstance(value, str) else repr(value)) for value in cells)
    rows_per_unit = sum(file.content.rows for file in files) / max(sum(file.rows for file in files), 1)
    return size / max(len(rows), 1) * rows_per_unit
