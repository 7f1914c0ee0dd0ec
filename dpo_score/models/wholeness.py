"""Whether a file of weights is whole: by its size, its first bytes and its directory. No tensor is read. No torch.

Promises: nothing is unpickled. What a writer has not finished is HalfWrittenError, other damage ModelError.
Does not: tell whether a pickle in torch's old form, which is no archive, is whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import is_zipfile

from dpo_score.errors import HalfWrittenError, ModelError

HEADER_LIMIT = 100 * 2**20
ZIP_START = b"PK\x03\x04"


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file (tensor name → dtype, shape, data_offsets), checked against the file's size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _header(path, size, file)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error


def _header(path: Path, size: int, file: BinaryIO) -> dict[str, Any]:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if size == 0:
        raise HalfWrittenError(
            f"{path} is empty (0 bytes): the folder is half written. Copy or download it again", path
        )
    if start == b"version ":
        raise ModelError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    if not 0 < length <= min(HEADER_LIMIT, size - 8):
        text = f"{path} is not a whole safetensors file ({size} bytes): copy or download it again"
        raise ModelError(text) if length > HEADER_LIMIT else HalfWrittenError(text, path)
    try:
        header = json.loads(file.read(length))
        end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} has a damaged safetensors header ({error}): copy or download it again") from error
    if size != 8 + length + end:
        text = (
            f"{path} is truncated or damaged: {size} bytes, its header says {8 + length + end}. The folder is half "
            "written, or the copy was interrupted: copy or download it again"
        )
        raise HalfWrittenError(text, path) if size < 8 + length + end else ModelError(text)
    header.pop("__metadata__", None)
    return dict(header)


def check_safetensors(path: Path, expected: set[str] | None = None) -> None:
    """Raise ModelError unless the file is whole and holds the tensors that an index expects in it."""
    header = safetensors_header(path)
    absent = sorted((expected or set()) - header.keys())
    if absent:
        raise ModelError(
            f"{path} lacks {len(absent)} tensors that the index names (first: {absent[0]}): the shards belong to "
            "different saves, or the folder is half written"
        )


def check_pickle(path: Path) -> None:
    """Raise HalfWrittenError for an empty file, or a zip archive that is cut: torch.save writes its directory last."""
    try:
        with path.open("rb") as file:
            start = file.read(len(ZIP_START))
            whole = start != ZIP_START or is_zipfile(file)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if not start or not whole:
        seen = "truncated" if start else "empty (0 bytes)"
        raise HalfWrittenError(f"{path} is {seen}: it is half written. Copy or download it again", path)
