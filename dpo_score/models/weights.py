"""What a model folder holds: its configuration, its weight files, and whether they may be read. No torch.

Promises: nothing of a folder is executed or unpickled; a folder that is half written (HalfWrittenError), pickled or
asks for code of its own is refused here, in one paragraph, before any library opens it. The files listed are the ones
that transformers reads, in the order of its own search. wholeness.py says of a single file whether it is whole.
Does not: read tensor data (a safetensors header is read, its tensors are not), or judge a chat template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import is_zipfile

from dpo_score.config.checkpoint_glob import PICKLE_SUFFIXES, STATE_SUFFIXES, is_state_name, is_trainers
from dpo_score.errors import HalfWrittenError, ModelError

ADAPTER_CONFIG = "adapter_config.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_PICKLE = "adapter_model.bin"
SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
DCP_METADATA = ".metadata"
CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_pipelines"})
CONFIG_FILES = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    ADAPTER_CONFIG,
)
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings", "embeddings")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files that make up one set of weights; `pickle` when they are not safetensors."""

    files: tuple[Path, ...]
    pickle: bool


def brief(error: BaseException) -> str:
    """What a library says went wrong, as part of a sentence: one line, at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder; ModelError when it is not one."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        text = f"{path} is not valid JSON ({error}): the folder is half written or damaged"
        raise HalfWrittenError(text, path) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}, not an object: it is no model configuration")
    return value


def is_adapter(folder: Path) -> bool:
    """Whether a folder is a PEFT adapter: adapter_config.json without full weights beside it."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    if any((folder / name).is_file() for name in (*SAFE_WEIGHTS, *PICKLES)):
        raise ModelError(
            f"{folder} holds both full weights and {ADAPTER_CONFIG}, so it could mean either: move the adapter's "
            "files to a folder of their own, or remove them if the weights are already merged"
        )
    return True


def refuse_code(folder: Path) -> None:
    """Refuse a folder whose JSON files ask for code of its own or choose an attention implementation.

    Such keys have been used to run code without consent, so they count wherever they are nested.
    """
    for name in CONFIG_FILES:
        path = folder / name
        if not path.is_file():
            continue
        for key in _keys(read_json(path)):
            if key in CODE_KEYS or key.startswith("_attn_implementation"):
                raise ModelError(
                    f"{path} contains {key!r}, which can make the loader run code that is not part of transformers: "
                    "nothing was loaded. If you trust the author, pass --trust-remote-code; if transformers knows "
                    "the architecture itself, a copy of the folder without that key loads as it is"
                )


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from (str(key) for key in value)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _keys(item)


def model_weights(folder: Path, config: Mapping[str, Any], allow_pickle: bool) -> WeightFiles:
    """The weight files of a model folder, each checked to be whole. Pickles only where they are all there is."""
    return _safe(folder, _named_by_config(folder, config) or SAFE_WEIGHTS) or _pickles(folder, allow_pickle)


def _safe(folder: Path, names: tuple[str, ...]) -> WeightFiles | None:
    """The first of `names` that is there, a safetensors file or an index of them, every file checked."""
    for name in names:
        if (folder / name).is_file():
            files = _shards(folder, name) if name.endswith(".json") else {folder / name: None}
            for path, tensors in files.items():
                check_safetensors(path, tensors)
            return WeightFiles(tuple(sorted(files)), pickle=False)
    return None


def _named_by_config(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """`transformers_weights` in config.json names the file to read: accepted for safetensors of this folder only."""
    name = config.get("transformers_weights")
    if name is None:
        return ()
    if not isinstance(name, str) or Path(name).name != name or ".safetensors" not in name:
        raise ModelError(
            f"{folder / 'config.json'} names {name!r} as its weights: only a safetensors file of that folder is read"
        )
    return (name,)


def _shards(folder: Path, index: str) -> dict[Path, set[str] | None]:
    """Shard → the tensors that the index expects in it. Every shard must be there, inside the folder."""
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / index} has no weight_map: the folder is damaged or half written")
    expected: dict[Path, set[str] | None] = {}
    for tensor, name in weight_map.items():
        if Path(str(name)).name != name:
            raise ModelError(f"{folder / index} names the shard {name!r}, which is not a file of the same folder")
        expected.setdefault(folder / name, set()).add(tensor)  # type: ignore[union-attr]
    absent = sorted(path.name for path in expected if not path.is_file())
    if absent:
        raise HalfWrittenError(
            f"{folder} is half written: {index} names {len(expected)} shards, {len(absent)} of them absent "
            f"(first: {absent[0]}). Wait for the writer to finish, or copy or download the folder again",
            folder,
        )
    return expected


def _pickles(folder: Path, allow_pickle: bool) -> WeightFiles:
    found = sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES and path.is_file())
    found = [path for path in found if not is_trainers(path.name)]
    stray = sorted(path.name for path in folder.glob("*.safetensors"))
    if not found:
        clue = f" ({', '.join(stray[:3])} but no index)" if stray else ""
        raise HalfWrittenError(
            f"{folder} has no weights: neither {' nor '.join(SAFE_WEIGHTS)} is there{clue}. The folder is half "
            "written, or its weights are in another format (pickles of a hub repository are fetched only with "
            "--allow-pickle)",
            folder,
        )
    if not allow_pickle:
        raise ModelError(
            f"{folder} holds its weights only as pickle ({found[0].name}), a format that can run code when it is read: "
            "nothing was opened. Save the model with safetensors, or pass --allow-pickle if you trust its author"
        )
    names = [name for name in PICKLES if (folder / name).is_file()]
    if not names:
        raise ModelError(f"{folder}: {found[0].name} is not a name that transformers reads ({PICKLES[0]} is)")
    files = [folder / names[0]] if names[0].endswith(".bin") else list(_shards(folder, names[0]))
    for path in files:
        check_pickle(path)
    return WeightFiles(tuple(sorted(files)), pickle=True)


def adapter_weights(folder: Path, allow_pickle: bool) -> WeightFiles:
    """The weights of an adapter folder: adapter_model.safetensors, or a pickle where that is allowed."""
    if (folder / ADAPTER_WEIGHTS).is_file():
        check_safetensors(folder / ADAPTER_WEIGHTS)
        return WeightFiles((folder / ADAPTER_WEIGHTS,), pickle=False)
    if not (folder / ADAPTER_PICKLE).is_file():
        raise HalfWrittenError(
            f"{folder} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}: the adapter is half written", folder
        )
    if not allow_pickle:
        raise ModelError(
            f"{folder} holds its adapter only as pickle ({ADAPTER_PICKLE}), a format that can run code when it is "
            "read: nothing was opened. Save it with safetensors, or pass --allow-pickle if you trust its author"
        )
    check_pickle(folder / ADAPTER_PICKLE)
    return WeightFiles((folder / ADAPTER_PICKLE,), pickle=True)


def is_state(path: Path) -> bool:
    """Whether a path is a checkpoint without config.json: a state-dict file, a DCP folder, accelerate's folder, or a
    folder with one file of weights, such as the reference implementation's policy.pt."""
    if path.is_file():
        return path.suffix in STATE_SUFFIXES
    if (path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file():
        return False
    return _has_library_names(path) or len(lone_states(path)) == 1


def _has_library_names(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (DCP_METADATA, *SAFE_WEIGHTS, *PICKLES))


def lone_states(folder: Path) -> list[Path]:
    """The files of a folder that may each be a whole checkpoint, by their names; none where libraries name them."""
    if not folder.is_dir() or _has_library_names(folder):
        return []
    return sorted(path for path in folder.iterdir() if is_state_name(path.name) and path.is_file())


def state_weights(path: Path, allow_pickle: bool) -> WeightFiles:
    """The files of a checkpoint without config.json. Only safetensors are read unless pickles are allowed."""
    path = next(iter(lone_states(path)), path)
    distributed = (path / DCP_METADATA).is_file()
    if path.is_dir() and not distributed:
        return _safe(path, SAFE_WEIGHTS) or _pickles(path, allow_pickle)
    if path.suffix == ".safetensors":
        check_safetensors(path)
        return WeightFiles((path,), pickle=False)
    if not allow_pickle:
        raise ModelError(
            f"{path} is a checkpoint in pickle, a format that can run code when it is read: nothing was opened. Pass "
            "--allow-pickle to read its tensors (and nothing else in it), or save the model with safetensors"
        )
    if distributed:
        return WeightFiles((path / DCP_METADATA, *sorted(path.glob("*.distcp"))), pickle=True)
    check_pickle(path)
    return WeightFiles((path,), pickle=True)


def embedding_rows(files: tuple[Path, ...]) -> int | None:
    """Rows of the token embedding by the safetensors headers, or None where no tensor bears a known name."""
    rows = []
    for path in files:
        if path.suffix != ".safetensors":
            continue
        for name, entry in safetensors_header(path).items():
            module = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if name.endswith(".weight") and module in EMBEDDINGS and len(entry["shape"]) == 2:
                rows.append(int(entry["shape"][0]))
    return max(rows, default=None)


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
