"""Which files of a hub data set are wanted: its configurations and splits, from its card or its folders. Pure.

A card (the YAML head of README.md) that lists configurations decides; without one, folders are configurations and
names say splits. Never guesses: several configurations or splits without a choice are a `DataError` that lists them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from dpo_score.config.schema import DataSpec
from dpo_score.data.files import KNOWN_SPLITS, SHARD, is_json, is_parquet, split_names
from dpo_score.errors import DataError

CONVERTED = "refs/convert/parquet"
"""The branch where the hub keeps its own Parquet copy of a data set, as CONFIG/SPLIT/0000.parquet."""
_NOT_ROWS = frozenset({"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json"})
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a repository; `sha256` is known for those in large-file storage."""

    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit. `card`: the YAML head of its README.md. Not `whole`: what a cache holds."""

    commit: str
    entries: tuple[Entry, ...]
    card: Mapping[str, Any]
    whole: bool = True


def hub_name(path: str) -> tuple[str, str | None]:
    """`org/name:config` → repository, configuration."""
    repository, _, config = path.partition(":")
    return repository, config or None


def wanted(listing: Listing, spec: DataSpec) -> list[Entry]:
    """The files to read, in reading order; none when the repository holds neither Parquet nor JSON for them.

    Raises DataError: an unknown configuration or split, or a choice between several that was not made.
    """
    config = hub_name(spec.path)[1]
    by_split = _by_card(listing, config, spec) or _by_names(listing.entries, config, spec)
    named = [name for name in by_split if name]
    if named and not spec.split and not listing.whole:
        raise DataError(
            f"data set {spec.name!r}: {spec.path} has the split {', '.join(named)} in the hub's cache, and may have "
            "others, but the hub cannot be reached: say --split NAME"
        )
    return _of_splits(by_split, spec)


# --- configurations ---------------------------------------------------------------------------------------------


def _by_card(listing: Listing, config: str | None, spec: DataSpec) -> dict[str, list[Entry]]:
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
        for entry in _rows_of_one_kind(_matching(listing.entries, f"{folder}/{pattern}" if folder else pattern)):
            found.setdefault(split or _split(entry.name) or "", []).append(entry)
    return found


def _items(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _one(asked: str | None, known: Sequence[str], marked: Sequence[str], spec: DataSpec) -> str:
    """The configuration to read: the one asked for, the only one, or the one that is the default."""
    repository, listed = hub_name(spec.path)[0], ", ".join(dict.fromkeys(known))
    if asked is not None and asked not in known:
        raise DataError(f"data set {spec.name!r}: {repository} has no configuration {asked!r}; it has: {listed}")
    default = [*marked, *(name for name in known if name == "default")]
    if asked is None and len(set(known)) > 1 and not default:
        raise DataError(
            f"data set {spec.name!r}: {repository} has several configurations: {listed}. "
            f"Say which, as in {repository}:{known[0]}"
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
    from fsspec.utils import glob_translate

    pattern = pattern.removeprefix("./").rstrip("/")
    try:
        shape = re.compile(glob_translate(pattern))
    except ValueError:
        return []
    found = [entry for entry in entries if shape.match(entry.name) or entry.name.startswith(f"{pattern}/")]
    return sorted(found, key=lambda entry: entry.name)


def _by_names(entries: Sequence[Entry], config: str | None, spec: DataSpec) -> dict[str, list[Entry]]:
    """Split → files, from names alone."""
    rows = _rows_of_one_kind(entries)
    folders = {entry: _folder(entry.name) for entry in rows}
    known = sorted({folder for folder in folders.values() if folder is not None})
    loose = [entry for entry in rows if folders[entry] is None]
    if config == "default" and not known:
        config = None
    if rows and (config is not None or not loose):
        chosen = _one(config, known, (), spec)
        rows = [entry for entry in rows if folders[entry] == chosen]
    else:
        rows = loose
    found: dict[str, list[Entry]] = {}
    for entry in sorted(rows, key=lambda entry: entry.name):
        found.setdefault(_split(entry.name) or "", []).append(entry)
    return found


def _folder(name: str) -> str | None:
    """The folder that is a configuration: the first one that is neither `data` nor a split."""
    parts = PurePosixPath(name).parts[:-1]
    parts = parts[1:] if parts[:1] == ("data",) else parts
    return next((part for part in parts[:1] if part not in KNOWN_SPLITS and not part.startswith("split=")), None)


def _rows_of_one_kind(entries: Iterable[Entry]) -> list[Entry]:
    """Parquet before JSON; never what only describes a data set."""
    shown = [entry for entry in entries if not any(p.startswith((".", "_")) for p in PurePosixPath(entry.name).parts)]
    parquet = [entry for entry in shown if is_parquet(entry.name)]
    rows = [e for e in shown if is_json(e.name) and PurePosixPath(e.name).name not in _NOT_ROWS]
    return parquet or rows


# --- splits -----------------------------------------------------------------------------------------------------


def _split(name: str) -> str | None:
    """The split that a name tells: of a shard, of a word like train, or of the hub's own copies."""
    stem = PurePosixPath(name).name.split(".")[0]
    shard = SHARD.match(stem)
    if shard:
        return shard["split"]
    folders = PurePosixPath(name).parts[:-1]
    if re.fullmatch(r"\d{4}", stem) and len(folders) == 2:
        return folders[1]
    return next((found for found in split_names(name) if found in KNOWN_SPLITS), None)


def _of_splits(by_split: Mapping[str, list[Entry]], spec: DataSpec) -> list[Entry]:
    """The files of the splits asked for, in that order; without a wish there must be one split only."""
    listed = ", ".join(sorted(name for name in by_split if name)) or "none by name"
    if not spec.split and len(by_split) > 1:
        raise DataError(f"data set {spec.name!r}: {spec.path} holds the splits {listed}; say --split NAME")
    for split in spec.split:
        if by_split and split not in by_split:
            raise DataError(f"data set {spec.name!r}: no split {split!r} in {spec.path}; found: {listed}")
    chosen = [entry for split in spec.split or by_split for entry in by_split.get(split, [])]
    _refuse_partial(chosen, spec)
    return chosen


def _refuse_partial(entries: Sequence[Entry], spec: DataSpec) -> None:
    """The hub's Parquet copy of a very large set, or a half-filled cache, holds the first part only."""
    for entry in entries:
        if any(part.startswith("partial-") for part in PurePosixPath(entry.name).parts[:-1]):
            raise DataError(
                f"data set {spec.name!r}: the hub's own Parquet copy of {spec.path} holds only the first part of it "
                f"({entry.name}). Convert the whole set to Parquet yourself and give its folder"
            )
    names = {entry.name for entry in entries}
    for name in names:
        missing = [other for other in shards(name) if other not in names]
        if missing:
            raise DataError(f"data set {spec.name!r}: {spec.path} lacks {missing[0]}, of which {name} is a part")


def shards(name: str) -> list[str]:
    """All names of the series that `NAME-00000-of-00003.parquet` belongs to; itself where there is none."""
    match = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5}).*)", name)
    if match is None or re.search(r"-of-\d{5}-[0-9a-f]+\.", name):
        return [name]
    return [f"{match[1]}{index:05d}{match[2]}" for index in range(int(match[3]))]


def is_commit(revision: str | None) -> bool:
    return revision is not None and _COMMIT.fullmatch(revision) is not None
