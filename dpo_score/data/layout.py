"""Which files of a folder or repository make up a data set: its configurations, its splits, its shards. Pure.

One rule for a local folder, a glob, an fsspec URL and a data set of the hub. In: a `Listing` of names. Out: a
`Selection`: the files to read, in reading order, and the files left out, each with the reason.

A card (the YAML head of README.md) that lists configurations decides. Without one, folders and file names say what is
a configuration and what is a split. Nothing is guessed: several configurations or splits without a choice, and a
series of shards with one missing, are a `DataError` that lists them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, TypeAlias

import yaml
from fsspec.utils import glob_translate

from dpo_score.config.schema import DataSpec
from dpo_score.errors import DataError
from dpo_score.escape import seen

CONVERTED = "refs/convert/parquet"
"""The branch where the hub keeps its own Parquet copy of a data set, as CONFIG/SPLIT/0000.parquet."""
SHARD = re.compile(r"^(?P<split>.+)[-_]\d+[-_]of[-_]\d+(-[0-9a-f]+)?$")
KNOWN_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
KINDS: Mapping[str, tuple[str, ...]] = {
    "Parquet": (".parquet", ".pq"),
    "JSON": (".jsonl", ".ndjson", ".json"),
    "Arrow": (".arrow",),
    "CSV": (".csv", ".tsv"),
}
"""Kinds of data files, by the endings of their names. Where a folder holds several kinds, the first one is read."""
HUB_KINDS = ("Parquet", "JSON")
"""Kinds read from the hub; for a set of any other kind its own Parquet copy is read."""
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_METADATA = frozenset(
    {
        *("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json", "manifest.json"),
        *("croissant.json", "package.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    }
)
Place: TypeAlias = Literal["hub", "folder", "glob", "file"]
"""What a path is: a data set of the hub, a folder, a pattern that chose the folders already, or one file."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_SHARDS = 100_000
"""More files than that in a series are not looked for: the number in the name is something else."""


@dataclass(frozen=True, slots=True)
class Located:
    """A file of a set: `path` opens it, `name` is the path below the set's root.

    `sha256` and `commit` are known of files from the hub.
    """

    path: str
    name: str
    size: int
    sha256: str | None = None
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a listing; `sha256` is known for those in the hub's large-file storage."""

    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """What a folder or repository holds.

    commit: of a repository, else "". card: the YAML head of README.md. whole: False for what a half-filled hub cache
    holds. place: one file is read whatever its name says; only a hub data set is limited to HUB_KINDS.
    saved: split → file names, for a folder that `save_to_disk` of the datasets library wrote.
    """

    commit: str
    entries: tuple[Entry, ...]
    card: Mapping[str, Any]
    whole: bool = True
    place: Place = "hub"
    saved: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Selection:
    """`entries` are read, in this order; `skipped`: name of a data file that is not → why."""

    entries: tuple[Entry, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


def hub_name(path: str) -> tuple[str, str | None]:
    """`org/name:config` → repository, configuration."""
    repository, _, config = path.partition(":")
    return repository, config or None


def wanted(listing: Listing, spec: DataSpec, config: str | None) -> Selection:
    """The files to read; no entries where the listing holds no data for them.

    Raises DataError: an unknown configuration or split, a choice between several that was not made, a missing shard.
    """
    skipped: dict[str, str] = {}
    by_split = _as_saved(listing, skipped) or _by_card(listing, config, spec, skipped)
    by_split = by_split or _by_names(listing, config, spec, skipped)
    named = [name for name in by_split if name]
    if named and not spec.split and not listing.whole:
        raise DataError(
            f"data set {spec.name!r}: {spec.path} has the split {', '.join(named)} in the hub's cache, and may have "
            "others, but the hub cannot be reached: say --split NAME"
        )
    chosen = _of_splits(by_split, spec)
    if listing.place != "file":
        _refuse_partial(chosen, spec)
    return Selection(tuple(chosen), skipped)


# --- names --------------------------------------------------------------------------------------------------------


def kind_of_name(name: str) -> str | None:
    """The kind of data file that a name's ending says, a key of KINDS."""
    plain = without_packing(name)
    return next((kind for kind, endings in KINDS.items() if plain.endswith(endings)), None)


def without_packing(name: str) -> str:
    """The name in lower case, without .gz and the like."""
    lower = name.lower()
    return next((lower.removesuffix(ending) for ending in _PACKED if lower.endswith(ending)), lower)


def is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)


def split_names(name: str) -> list[str]:
    """The splits a file belongs to by its path, the most telling first.

    `train-00000-of-00002.parquet`, `split=train/…` and a folder or file called `train` all say train;
    `mine-test.parquet` says test.
    """
    path = PurePosixPath(name)
    stem = PurePosixPath(without_packing(path.name)).stem
    shard = SHARD.match(stem)
    if shard and shard["split"] != "data":
        return [shard["split"]]
    keyed = [part.removeprefix("split=") for part in path.parts[:-1] if part.startswith("split=")]
    folders = [part for part in path.parts[:-1] if "=" not in part]
    words = [word for word in re.split(r"[-._ \d]", stem) if word in KNOWN_SPLITS]
    return [*keyed, stem, *words, *(folder for folder in reversed(folders))]


def _split(name: str) -> str | None:
    """The split that a name tells: of a shard, of a word like train, or of the hub's own copies."""
    stem = PurePosixPath(name).name.split(".")[0]
    shard = SHARD.match(stem)
    if shard and shard["split"] != "data":
        return shard["split"]
    folders = PurePosixPath(name).parts[:-1]
    if re.fullmatch(r"\d{4}", stem) and len(folders) == 2:
        return folders[1]
    return next((found for found in split_names(name) if found in KNOWN_SPLITS), None)


def missing_shards(names: Collection[str]) -> dict[str, list[str]]:
    """A file of a series such as `NAME-00000-of-00003.parquet` → the names that `names` lacks of that series.

    Series count from 0 or from 1. Names with a digest behind the number cannot be made up, and are passed over.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.*[-_])(\d+)([-_]of[-_](\d+)(?!-[0-9a-f]+\.)\b.*)", name)
        if match is None or not 0 < int(match[4]) <= MAX_SHARDS:
            continue
        count, width = int(match[4]), len(match[2])
        first = int(f"{match[1]}{count:0{width}d}{match[3]}" in names)
        series = [f"{match[1]}{index:0{width}d}{match[3]}" for index in range(first, first + count)]
        found[name] = [other for other in series if other not in names]
    return found


def is_commit(revision: str | None) -> bool:
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def card_head(text: str) -> Mapping[str, Any]:
    """The YAML head of a README.md, between two lines of `---`. A head that is no mapping says nothing."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", text.removeprefix("\ufeff"), flags=re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


# --- configurations -----------------------------------------------------------------------------------------------


def _as_saved(listing: Listing, skipped: dict[str, str]) -> dict[str, list[Entry]]:
    """Split → files of a `save_to_disk` folder, as its own metadata lists them."""
    by_name = {entry.name: entry for entry in listing.entries}
    found = {split: [by_name[name] for name in names if name in by_name] for split, names in listing.saved.items()}
    if found:
        read = {entry.name for entries in found.values() for entry in entries}
        data = (entry.name for entry in listing.entries if kind_of_name(entry.name) and not is_metadata(entry.name))
        skipped.update({name: "not a part of the saved data set" for name in data if name not in read})
    return found


def _by_card(listing: Listing, config: str | None, spec: DataSpec, skipped: dict[str, str]) -> dict[str, list[Entry]]:
    """Split → files, where the card says so."""
    declared = [item for item in _items(listing.card.get("configs")) if item.get("data_files") or item.get("data_dir")]
    if not declared:
        return {}
    names = [str(item.get("config_name", "default")) for item in declared]
    marked = [name for name, item in zip(names, declared, strict=True) if item.get("default") is True]
    chosen = declared[names.index(_one(config, names, marked, spec))]
    folder = str(chosen.get("data_dir") or "").strip("/")
    found: dict[str, list[Entry]] = {}
    for split, pattern in _patterns(chosen.get("data_files") or "**"):
        matching = _matching(listing.entries, f"{folder}/{pattern}" if folder else pattern)
        for entry in _rows_of_one_kind(matching, listing.place != "hub", skipped):
            found.setdefault(split or _split(entry.name) or "", []).append(entry)
    if not found and listing.place != "hub":
        asked = chosen.get("data_files") or f"{folder}/**"
        raise DataError(
            f"data set {spec.name!r}: the README.md of {spec.path} names the files {seen(asked, 120)}, and none of "
            "them is there. Copy or download them, or name the files to read yourself (a file, or a glob)"
        )
    read = {entry.name for entries in found.values() for entry in entries}
    for entry in listing.entries:
        if entry.name not in read and kind_of_name(entry.name) and not is_hidden(entry.name):
            skipped.setdefault(entry.name, "the card does not name it for this configuration")
    return found


def _items(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _one(asked: str | None, known: Sequence[str], marked: Sequence[str], spec: DataSpec) -> str:
    """The configuration to read: the one asked for, the only one, or the one that is the default."""
    place = spec.path.removesuffix(f":{asked}") if asked is not None else spec.path
    listed = ", ".join(dict.fromkeys(known))
    if asked is not None and asked not in known:
        raise DataError(f"data set {spec.name!r}: {place} has no configuration {asked!r}; it has: {listed}")
    default = [*marked, *(name for name in known if name == "default")]
    if asked is None and len(set(known)) > 1 and not default:
        raise DataError(
            f"data set {spec.name!r}: {place} has several configurations: {listed}. Say which, as in {place}:{known[0]}"
        )
    return asked if asked is not None else (*default, *known)[0]


def _patterns(files: Any) -> Iterable[tuple[str | None, str]]:
    """(split, pattern) of a card's `data_files`: a pattern, a list of them, or splits with patterns each."""
    if isinstance(files, Mapping):
        files = [{"split": split, "path": path} for split, path in files.items()]
    for item in files if isinstance(files, list) else [files]:
        split, paths = (item.get("split"), item.get("path")) if isinstance(item, Mapping) else (None, item)
        for path in paths if isinstance(paths, list) else [paths]:
            yield (None if split is None else str(split)), str(path)


def _matching(entries: Iterable[Entry], pattern: str) -> list[Entry]:
    pattern = pattern.removeprefix("./").rstrip("/")
    try:
        shape = re.compile(glob_translate(pattern))
    except ValueError:
        return []
    found = [entry for entry in entries if shape.match(entry.name) or entry.name.startswith(f"{pattern}/")]
    return sorted(found, key=lambda entry: entry.name)


def _by_names(listing: Listing, config: str | None, spec: DataSpec, skipped: dict[str, str]) -> dict[str, list[Entry]]:
    """Split → files, from names alone."""
    rows = _rows_of_one_kind(listing.entries, listing.place != "hub", skipped)
    folders = {entry: _folder(entry.name) for entry in rows}
    if listing.place == "glob" or (listing.place != "hub" and config is None and not _hold_splits(folders)):
        folders = dict.fromkeys(rows, None)  # plain parts of one set, as a cluster writes them
    known = sorted({folder for folder in folders.values() if folder is not None})
    loose = [entry for entry in rows if folders[entry] is None]
    if config == "default" and not known:
        config = None
    if rows and (config is not None or not loose):
        chosen = _one(config, known, (), spec)
        kept = [entry for entry in rows if folders[entry] == chosen]
    else:
        kept = loose
        skipped.update({e.name: f"in the folder {folders[e]}, a configuration" for e in rows if e not in loose})
    found: dict[str, list[Entry]] = {}
    for entry in sorted(kept, key=lambda entry: entry.name):
        found.setdefault(_split(entry.name) or "", []).append(entry)
    return found


def _folder(name: str) -> str | None:
    """The folder that is a configuration: the first one that is neither `data` nor a split nor a key=value part."""
    parts = PurePosixPath(name).parts[:-1]
    parts = parts[1:] if parts[:1] == ("data",) else parts
    return next((part for part in parts[:1] if part not in KNOWN_SPLITS and "=" not in part), None)


def _hold_splits(folders: Mapping[Entry, str | None]) -> bool:
    """Whether some folder, other than the splits themselves, holds files that name a split."""
    return any(folder is not None and _split(entry.name) for entry, folder in folders.items())


def is_metadata(name: str) -> bool:
    """Whether the name is that of a file that describes a data set and holds none of its rows."""
    return PurePosixPath(name).name in _METADATA


def _rows_of_one_kind(entries: Iterable[Entry], local: bool, skipped: dict[str, str]) -> list[Entry]:
    """The data files of the first kind that is there, each file once; the others go to `skipped`."""
    shown = [entry for entry in entries if not is_hidden(entry.name)]
    rows = [entry for entry in shown if not is_metadata(entry.name)]
    skipped.update(
        {e.name: "it describes the data set" for e in shown if is_metadata(e.name) and e.name != "README.md"}
    )
    if local and len(rows) == 1:
        return rows  # a single file is taken whatever its name
    by_kind: dict[str, list[Entry]] = {}
    for entry in rows:
        by_kind.setdefault(kind_of_name(entry.name) or "", []).append(entry)
    kind = next((kind for kind in KINDS if kind in by_kind and (local or kind in HUB_KINDS)), None)
    for other, left in by_kind.items():
        if other and kind and other != kind:
            skipped.update({entry.name: f"{other}, where {kind} files are read" for entry in left})
    return _without_copies(by_kind[kind], kind, skipped) if kind else []


def _without_copies(entries: Sequence[Entry], kind: str, skipped: dict[str, str]) -> list[Entry]:
    """`a.jsonl.gz` or `a.json` beside `a.jsonl` is the same rows twice: the first ending of its kind is read."""
    endings = [f"{ending}{packed}" for packed in ("", *_PACKED) for ending in KINDS[kind]]

    def stem_and_ending(entry: Entry) -> tuple[str, str]:
        ending = next(ending for ending in endings if entry.name.lower().endswith(ending))
        return entry.name[: -len(ending)], ending

    first: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda entry: endings.index(stem_and_ending(entry)[1])):
        known = first.setdefault(stem_and_ending(entry)[0], entry)
        if known is not entry:
            packed = without_packing(entry.name) != entry.name.lower()
            what = "a packed copy of" if packed else "it has the name of"
            skipped[entry.name] = f"{what} {known.name}"
    return [entry for entry in entries if entry.name not in skipped]


# --- splits -------------------------------------------------------------------------------------------------------


def _of_splits(by_split: Mapping[str, list[Entry]], spec: DataSpec) -> list[Entry]:
    """The files of the splits asked for, in that order; where none is asked for, there must be one split only."""
    named = sorted(name for name in by_split if name)
    listed = ", ".join(named) or "none by name"
    if not spec.split and len(by_split) > 1:
        others = f" beside {by_split[''][0].name}, which names none" if "" in by_split else ""
        raise DataError(f"data set {spec.name!r}: {spec.path} holds the splits {listed}{others}; say --split NAME")
    chosen: list[Entry] = []
    for split in spec.split or by_split:
        found = by_split.get(split)
        if found is None:
            every = [entry for entries in by_split.values() for entry in entries]
            found = [entry for entry in every if split in split_names(entry.name)]
        if by_split and not found:
            names = sorted({name for entries in by_split.values() for e in entries for name in split_names(e.name)})
            listed = listed if named else ", ".join(names)
            raise DataError(f"data set {spec.name!r}: no split {split!r} in {spec.path}; found: {listed}")
        chosen += [entry for entry in found if entry not in chosen]
    return chosen


def _refuse_partial(entries: Sequence[Entry], spec: DataSpec) -> None:
    """The hub's Parquet copy of a very large set, or a half-copied folder, holds the first part only."""
    for entry in entries:
        if any(part.startswith("partial-") for part in PurePosixPath(entry.name).parts[:-1]):
            raise DataError(
                f"data set {spec.name!r}: the hub's own Parquet copy of {spec.path} holds only the first part of it "
                f"({entry.name}). Convert the whole set to Parquet yourself and give its folder"
            )
    for name, missing in missing_shards({entry.name for entry in entries}).items():
        if missing:
            raise DataError(
                f"data set {spec.name!r}: {spec.path} lacks {missing[0]}, of which {name} is a part. Copy or download "
                f"the missing file{'s' if len(missing) > 1 else ''}, or name {name} alone as the file to read"
            )
