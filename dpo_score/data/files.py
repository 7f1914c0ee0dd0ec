"""Finding and opening the files of a data set, and telling what kind each one is. Nothing here decodes a row.

A set is a file, a folder, a glob, the same behind an fsspec URL (`s3://`, `http://`, …), or a data set of the hub. A
folder is searched to the bottom; names that begin with `.` or `_` are left out. layout.py decides which of the files
found make up the set. Every refusal is a `DataError` of one paragraph.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, Literal, TypeAlias

import fsspec

from dpo_score.config.schema import DataSpec
from dpo_score.data.hub import fetch
from dpo_score.data.layout import (
    Entry,
    Listing,
    Located,
    Place,
    card_head,
    is_hidden,
    kind_of_name,
    wanted,
    without_packing,
)
from dpo_score.errors import DataError, client_errors
from dpo_score.escape import seen

FileKind: TypeAlias = Literal["parquet", "arrow", "lines", "array", "csv"]
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[^:/]+)?$")
_BOM = b"\xef\xbb\xbf"
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a file can raise, packed ones too."""
_PACKED_HEADS = {
    b"\x1f\x8b": "give it a name that ends in .gz, or unpack it with `gunzip`",
    b"\x28\xb5\x2f\xfd": "unpack it with `unzstd`, or `pip install zstandard` and let its name end in .zst",
    b"BZh": "give it a name that ends in .bz2, or unpack it with `bunzip2`",
    b"\xfd7zXZ": "give it a name that ends in .xz, or unpack it with `unxz`",
    b"PK\x03\x04": "unpack the archive (a table of a spreadsheet program: save it as CSV)",
}
"""How packed files begin that their names do not tell, or that no library here unpacks → the way out."""


def locate(spec: DataSpec) -> list[Located]:
    """The files of a set, in reading order. Raises DataError where there are none."""
    return select(spec)[0]


def select(spec: DataSpec) -> tuple[list[Located], Mapping[str, str]]:
    """The files of a set, in reading order, and the names of the data files left out, each with the reason.

    Raises DataError where there are none, or where it is not clear which ones are meant.
    """
    if "***" in spec.path and "://" in spec.path:
        raise DataError(
            f"data set {spec.name!r}: {spec.path} was written down without its password or token (***): give the "
            f"whole URL again, --data {spec.name}=URL"
        )
    try:
        fs, root = fsspec.core.url_to_fs(spec.path)
    except client_errors(OSError, ValueError, ImportError) as error:
        raise DataError(f"data set {spec.name!r}: cannot open {spec.path}: {error}") from None
    try:
        place, found, base, config = _found(fs, str(root))
        if found is None and _HUB_ID.match(spec.path) and kind_of_name(spec.path) is None:
            return fetch(spec)
        if found is None:
            raise DataError(
                f"data set {spec.name!r}: {spec.path} does not exist; give a file, a folder, a glob or a URL"
            )
        paths, listing = _listing(fs, base, found, spec)
    except client_errors(OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"data set {spec.name!r}: cannot read {spec.path}: {why}") from None
    chosen = wanted(replace(listing, place=place), spec, config)
    if not chosen.entries:
        raise DataError(
            f"data set {spec.name!r}: no .parquet, .jsonl or .json file in {spec.path} (nor .arrow, .csv or .tsv)"
        )
    return [Located(paths[entry.name], entry.name, entry.size) for entry in chosen.entries], chosen.skipped


def _found(fs: Any, root: str) -> tuple[Place, Iterable[dict[str, Any]] | None, str, str | None]:
    """What the path is, the files there (None: nothing is), the folder above them, a configuration (`FOLDER:NAME`)."""
    if any(c in root for c in "*?[") and not fs.exists(root):
        return "glob", fs.glob(root, detail=True).values(), _fixed_part(root), None
    if fs.isfile(root):
        return "file", [fs.info(root)], root.rpartition("/")[0], None
    if fs.isdir(root):
        return "folder", fs.find(root, detail=True).values(), root, None
    folder, colon, config = root.rpartition(":")
    if colon and config and "/" not in config and fs.isdir(folder):
        return "folder", fs.find(folder, detail=True).values(), folder, config
    return "folder", None, root, None


def _fixed_part(pattern: str) -> str:
    """The folders of a glob before its first wildcard."""
    folders = pattern.split("/")[:-1]
    return "/".join(itertools.takewhile(lambda part: not any(c in part for c in "*?["), folders))


def _listing(fs: Any, base: str, infos: Iterable[dict[str, Any]], spec: DataSpec) -> tuple[dict[str, str], Listing]:
    """Name below `base` → what opens the file; and the listing that layout.py decides on."""
    prefix = base.rstrip("/") + "/"
    outer, chained, _ = spec.path.partition("::")
    paths, entries = {}, []
    for info in infos:
        path = str(info["name"])
        name = path.removeprefix(prefix)
        if info.get("type") != "file" or is_hidden(name):
            continue
        if chained:  # an archive behind a URL, as in zip://a.jsonl::https://host/set.zip
            url = f"{outer.partition('://')[0]}://{path}::{spec.path.partition('::')[2]}"
        else:
            url = path if "://" not in spec.path or spec.path.startswith("file://") else str(fs.unstrip_protocol(path))
        paths[name] = url
        entries.append(Entry(name, int(info.get("size") or 0)))
    entries.sort(key=lambda entry: entry.name)
    texts = {name: _text(fs, prefix + name) for name in paths if PurePosixPath(name).name in ("state.json",)}
    texts |= {name: _text(fs, prefix + name) for name in ("README.md", "dataset_dict.json") if name in paths}
    card = card_head(texts.get("README.md", "")) if len(entries) > 1 else {}
    return paths, Listing("", tuple(entries), card, place="folder", saved=_saved_splits(texts))


def _text(fs: Any, path: str) -> str:
    return bytes(fs.cat_file(path)).decode("utf-8", "replace")


def _saved_splits(texts: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Split → data files of a `save_to_disk` folder: of a whole Dataset (""), or of each one of a DatasetDict."""
    states = {name: _json_object(text) for name, text in texts.items() if PurePosixPath(name).name == "state.json"}
    known = _json_object(texts.get("dataset_dict.json", "")).get("splits")
    splits = [str(split) for split in known] if isinstance(known, list) else [""]
    found = {}
    for split in splits:
        folder = f"{split}/" if split else ""
        files = states.get(f"{folder}state.json", {}).get("_data_files")
        if isinstance(files, list) and all(isinstance(file, dict) and "filename" in file for file in files):
            found[split] = tuple(f"{folder}{file['filename']}" for file in files)
    return found


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# --- what a file is ---------------------------------------------------------------------------------------------


def open_binary(path: str) -> Any:
    """A readable binary file, local or behind fsspec; packed JSON and CSV is unpacked."""
    compression = "infer" if kind_of_name(PurePosixPath(path).name) in ("JSON", "CSV") else None
    try:
        return fsspec.open(path, "rb", compression=compression).open()
    except client_errors(OSError, ValueError, ImportError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def kind_of(file: Located) -> FileKind:
    """What a file holds, from its first and last bytes and, for CSV, its name. Raises DataError for anything else."""
    with open_binary(file.path) as handle:
        try:
            head = handle.read(512)
        except client_errors(*UNREADABLE) as error:
            raise DataError(f"{file.path} cannot be read: {error}") from None
        if head[:4] == b"PAR1":
            _refuse_cut_parquet(handle, file)
            return "parquet"
    if head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
        return "arrow"
    text = head.removeprefix(_BOM)
    _refuse_other(text, file)
    if kind_of_name(file.name) == "CSV":
        return "csv"
    begins = text.lstrip()
    if begins[:1] == b"[":
        return "array"
    if begins[:1] == b"{":
        return "lines"
    shown = seen(text[:60].decode("utf-8", "replace"), 60)
    raise DataError(f"{file.path} is neither Parquet nor JSON lines (nor Arrow, CSV or TSV): it begins with {shown!r}.")


def _refuse_cut_parquet(handle: Any, file: Located) -> None:
    handle.seek(-min(8, file.size), 2)
    if handle.read()[-4:] != b"PAR1" or file.size < 12:
        raise DataError(f"{file.path} is cut off: it begins as Parquet, but has no footer. Copy or download it again.")


def _refuse_other(head: bytes, file: Located) -> None:
    if not head.strip(b"\0 \t\r\n"):
        raise DataError(f"{file.path} is empty ({file.size} bytes). Copy or download it again, or take it away.")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{file.path} is a Git LFS pointer, not the data. Fetch the file itself (`git lfs pull`).")
    if head[:4] == b"PARE":
        raise DataError(f"{file.path} is an encrypted Parquet file, which cannot be read. Decrypt it first.")
    packed = next((way for magic, way in _PACKED_HEADS.items() if head.startswith(magic)), None)
    if packed is not None:
        raise DataError(f"{file.path} is packed: {packed}.")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{file.path} is UTF-16 text. Convert it: `iconv -f UTF-16 -t UTF-8 IN > OUT`.")
    if without_packing(file.name).endswith((".parquet", ".pq")):
        begins = seen(head[:60].decode("utf-8", "replace"), 60)
        raise DataError(f"{file.path} is not Parquet: it begins with {begins!r}. Convert it, or rename it.")


def content_sha256(path: str) -> str:
    """SHA-256 of the file as it lies in storage, hexadecimal."""
    digest = hashlib.sha256()
    try:
        with fsspec.open(path, "rb").open() as handle:
            while piece := handle.read(1 << 20):
                digest.update(piece)
    except client_errors(OSError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return digest.hexdigest()
