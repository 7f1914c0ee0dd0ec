"""Which files make up a set, and what each one is: names, splits, kinds. Nothing here decodes a row.

A set is a file, a folder, a glob, the same behind an fsspec URL, or a data set of the hub (hub.py). Folders are
searched to the bottom, in the order of their paths; names that begin with `.` or `_` are left out. Every refusal is
a `DataError` of one paragraph.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, TypeAlias

from dpo_score.config.schema import DataSpec
from dpo_score.errors import DataError, client_errors
from dpo_score.escape import seen

FileKind: TypeAlias = Literal["parquet", "lines", "array"]
_PARQUET = (".parquet", ".pq")
_JSON = (".jsonl", ".ndjson", ".json")
SHARD = re.compile(r"^(?P<split>.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[^:/]+)?$")
KNOWN_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


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


def locate(spec: DataSpec) -> list[Located]:
    """The files of a set, in reading order. Raises DataError where there are none."""
    fs, root = _filesystem(spec)
    found = _matching(fs, root, spec)
    if found is None:
        from dpo_score.data.hub import fetch

        return fetch(spec)
    kept = _of_kind(found)
    if not kept:
        raise DataError(f"data set {spec.name!r}: no .parquet, .jsonl or .json file in {spec.path}")
    return _of_split(kept, spec)


def _filesystem(spec: DataSpec) -> tuple[Any, str]:
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(spec.path)
    except (ValueError, ImportError) as error:
        raise DataError(f"data set {spec.name!r}: cannot open {spec.path}: {error}") from None
    return fs, str(root)


def _matching(fs: Any, root: str, spec: DataSpec) -> list[Located] | None:
    """The files that are here; None where nothing is, and the name is that of a hub data set."""
    try:
        if any(c in root for c in "*?["):
            base = _fixed_part(root)
            return _located(fs, spec, base, fs.glob(root, detail=True).values())
        if fs.isfile(root):
            return _located(fs, spec, str(PurePosixPath(root).parent), [fs.info(root)])
        if fs.isdir(root):
            return _located(fs, spec, root, fs.find(root, detail=True).values())
    except client_errors(OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"data set {spec.name!r}: cannot read {spec.path}: {why}") from None
    if _HUB_ID.match(spec.path) and not (is_parquet(spec.path) or is_json(spec.path)):
        return None
    raise DataError(f"data set {spec.name!r}: {spec.path} does not exist; give a file, a folder, a glob or a URL")


def _fixed_part(pattern: str) -> str:
    """The folders of a glob before its first wildcard."""
    fixed = []
    for part in PurePosixPath(pattern).parts[:-1]:
        if any(c in part for c in "*?["):
            break
        fixed.append(part)
    return str(PurePosixPath(*fixed)) if fixed else "."


def _located(fs: Any, spec: DataSpec, base: str, infos: Iterable[dict[str, Any]]) -> list[Located]:
    protocol = spec.path.split("://", 1)[0] + "://" if "://" in spec.path else ""
    prefix = base.rstrip("/") + "/"
    files = []
    for info in infos:
        path = str(info["name"])
        name = path.removeprefix(prefix)
        hidden = any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)
        if info.get("type") == "file" and not hidden:
            files.append(Located(protocol + path if protocol != "file://" else path, name, int(info.get("size") or 0)))
    return sorted(files, key=lambda file: file.name)


def _of_kind(files: Sequence[Located]) -> list[Located]:
    """A single file is taken whatever its name; of several, Parquet goes before JSON."""
    if len(files) == 1:
        return list(files)
    return [file for file in files if is_parquet(file.name)] or [file for file in files if is_json(file.name)]


def is_parquet(name: str) -> bool:
    return name.lower().endswith(_PARQUET)


def is_json(name: str) -> bool:
    return _without_packing(name).endswith(_JSON)


def _without_packing(name: str) -> str:
    return name.lower().removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz").removesuffix(".zst")


# --- splits -----------------------------------------------------------------------------------------------------


def split_names(name: str) -> list[str]:
    """The splits a file belongs to by its path, the most telling first.

    `train-00000-of-00002.parquet`, `split=train/…` and a folder or file called `train` all say train;
    `mine-test.parquet` says test.
    """
    path = PurePosixPath(name)
    stem = PurePosixPath(_without_packing(path.name)).stem
    shard = SHARD.match(stem)
    if shard:
        return [shard["split"]]
    keyed = [part.removeprefix("split=") for part in path.parts[:-1] if part.startswith("split=")]
    folders = [part for part in path.parts[:-1] if "=" not in part]
    words = [word for word in re.split(r"[-._ ]", stem) if word in KNOWN_SPLITS]
    return [*keyed, stem, *words, *(folder for folder in reversed(folders))]


def _of_split(files: list[Located], spec: DataSpec) -> list[Located]:
    """The files of the wanted splits, in the order asked; without a wish there must be one split only."""
    sharded = {name for file in files for name in split_names(file.name)[:1] if SHARD.match(_stem(file.name))}
    if not spec.split:
        if len(sharded) > 1:
            raise DataError(
                f"data set {spec.name!r}: {spec.path} holds the splits {', '.join(sorted(sharded))}; say --split NAME"
            )
        return files
    chosen = []
    for split in spec.split:
        found = [file for file in files if split in split_names(file.name) and file not in chosen]
        if not found:
            known = sorted({name for file in files for name in split_names(file.name)})
            raise DataError(f"data set {spec.name!r}: no split {split!r} in {spec.path}; found: {', '.join(known)}")
        chosen += found
    return chosen


def _stem(name: str) -> str:
    return PurePosixPath(_without_packing(PurePosixPath(name).name)).stem


# --- what a file is ---------------------------------------------------------------------------------------------


def open_binary(path: str) -> Any:
    """A readable binary file, local or behind fsspec; packed JSON is unpacked."""
    import fsspec

    compression = "infer" if _without_packing(path).endswith(_JSON) else None
    try:
        return fsspec.open(path, "rb", compression=compression).open()
    except client_errors(OSError, ValueError, ImportError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def kind_of(file: Located) -> FileKind:
    """Parquet, JSON lines or one JSON array, from the first and last bytes. Raises DataError for anything else."""
    with open_binary(file.path) as handle:
        try:
            head = handle.read(512)
        except client_errors(OSError, EOFError) as error:
            raise DataError(f"{file.path} cannot be read: {error}") from None
        if head[:4] == b"PAR1":
            _refuse_cut_parquet(handle, file)
            return "parquet"
    _refuse_other(head, file)
    return "array" if head.lstrip()[:1] == b"[" else "lines"


def _refuse_cut_parquet(handle: Any, file: Located) -> None:
    handle.seek(-min(8, file.size), 2)
    if handle.read()[-4:] != b"PAR1" or file.size < 12:
        raise DataError(f"{file.path} is cut off: it begins as Parquet, but has no footer. Copy or download it again.")


def _refuse_other(head: bytes, file: Located) -> None:
    if not head.strip(b"\0 \t\r\n"):
        raise DataError(f"{file.path} is empty ({file.size} bytes). Copy or download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{file.path} is a Git LFS pointer, not the data. Fetch the file itself (`git lfs pull`).")
    if head[:4] == b"PARE":
        raise DataError(f"{file.path} is an encrypted Parquet file, which cannot be read. Decrypt it first.")
    begins = seen(head[:60].decode("utf-8", "replace"), 60)
    if file.name.lower().endswith(_PARQUET):
        raise DataError(f"{file.path} is not Parquet: it begins with {begins!r}. Convert it, or rename it.")
    if head.lstrip()[:1] not in (b"{", b"["):
        raise DataError(f"{file.path} is neither Parquet nor JSON lines: it begins with {begins!r}.")


def content_sha256(path: str) -> str:
    """SHA-256 of the file as it lies in storage, hexadecimal."""
    import fsspec

    digest = hashlib.sha256()
    try:
        with fsspec.open(path, "rb").open() as handle:
            while piece := handle.read(1 << 20):
                digest.update(piece)
    except client_errors(OSError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return digest.hexdigest()
