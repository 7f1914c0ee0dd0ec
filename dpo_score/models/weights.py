"""What a model folder holds: its configuration, its weight files, and whether they may be read. No torch.

    folder ──▶ WeightFiles(files, pickle, as_state)      or one paragraph that says what the folder is and the way out

Nothing of a folder is executed or unpickled here, and no tensor is read: of a safetensors file only its header, and
where a folder holds two whole saves the first bytes of each tensor. What a writer has not finished is HalfWrittenError
(a policy found by a glob then waits for it); whatever else cannot be read is ModelError. Not here: reading tensors
(loader.py, state_dict.py), adapters (adapter_files.py), chat templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import huggingface_hub
from safetensors import SafetensorError, safe_open

from dpo_score.config.checkpoint_glob import PICKLE_SUFFIXES, STATE_SUFFIXES, is_state_name, is_trainers
from dpo_score.errors import HalfWrittenError, ModelError

ADAPTER_CONFIG = "adapter_config.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
DCP_METADATA = ".metadata"
FSDP_FOLDER = re.compile(r"pytorch_model_fsdp(_\d+)?")
FSDP_FILE = re.compile(r"pytorch_model_fsdp(_\d+)?\.bin")
ZERO_FOLDER = re.compile(r"global_step\d+")
ZERO_MODEL = "mp_rank_*_model_states.pt"
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
OTHER_FORMATS = {
    "consolidated*.pth": "the original Llama format: transformers' convert_llama_weights_to_hf.py converts it",
    "consolidated*.safetensors": "Mistral's own format: use the repository's files for transformers",
    "tf_model.h5": "TensorFlow: load it with from_tf=True under transformers 4 and save it again",
    "flax_model.msgpack": "Flax: load it with from_flax=True under transformers 4 and save it again",
    "*.onnx": "ONNX, which keeps no weights that transformers reads",
}
"""Names of weights that cannot be read here, with what to do about them."""
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
HEADER_LIMIT = 100 * 2**20
NESTING_LIMIT = 100
"""Levels of a model's JSON files. Real ones have at most about ten."""
COMPARED = 64
"""Bytes at the beginning of each tensor by which two saves in one folder are told apart."""
ZIP_START = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files that make up one set of weights; `pickle` when they are not safetensors.

    `as_state`: transformers would not find or read them in this folder by itself, so their tensors are read here and
    handed to it (state_dict.py).
    """

    files: tuple[Path, ...]
    pickle: bool
    as_state: bool = False


def brief(error: BaseException) -> str:
    """What a library says went wrong, as part of a sentence: one line, at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder; ModelError when it is not one, or nested so deeply that libraries fail."""
    try:
        text = path.read_text("utf-8")
        if text.startswith("version https://git-lfs"):
            raise ModelError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its repository")
        value = json.loads(text)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except RecursionError as error:
        raise _too_deep(path) from error
    except ValueError as error:
        text = f"{path} is not valid JSON ({error}): the folder is half written or damaged"
        raise HalfWrittenError(text, path) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}, not an object: it is no model configuration")
    if _deeper_than(value, NESTING_LIMIT):
        raise _too_deep(path)
    return value


def _deeper_than(value: Any, levels: int) -> bool:
    """Whether a JSON value is nested more than `levels` deep."""
    inside = [value]
    for _ in range(levels):
        inside = [item for outer in inside for item in (outer.values() if isinstance(outer, dict) else outer)]
        inside = [item for item in inside if isinstance(item, dict | list)]
        if not inside:
            return False
    return True


def _too_deep(path: Path) -> ModelError:
    return ModelError(f"{path} is nested more than {NESTING_LIMIT} levels deep, which no model's settings are")


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
        for key, _ in _items(read_json(path)):
            if key in CODE_KEYS or key.startswith("_attn_implementation"):
                raise ModelError(
                    f"{path} contains {key!r}, which can make the loader run code that is not part of transformers: "
                    "nothing was loaded. If you trust the author, pass --trust-remote-code; if transformers knows "
                    "the architecture itself, a copy of the folder without that key loads as it is"
                )


def code_files(folder: Path, config: Mapping[str, Any]) -> tuple[Path, ...]:
    """The Python files that a configuration may have transformers run, where that is allowed: those of the folder, and
    of other repositories that `auto_map` names and the hub cache holds."""
    named = [value for key, value in _items(config) if key == "auto_map"]
    if not named:
        return ()
    found = {path for path in folder.rglob("*.py") if path.is_file()}
    for text in _texts(named):
        repository, separator, _ = text.partition("--")
        if separator:
            found |= _cached_code(repository)
    return tuple(sorted(found))


def _cached_code(repository: str) -> set[Path]:
    try:
        return set(
            Path(huggingface_hub.snapshot_download(repository, local_files_only=True, allow_patterns="*.py")).rglob(
                "*.py"
            )
        )
    except (OSError, ValueError):
        return set()


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep."""
    if isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in value.items())
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _items(item)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


# --- the weights of a model folder ------------------------------------------------------------------------------


def model_weights(folder: Path, config: Mapping[str, Any], allow_pickle: bool) -> WeightFiles:
    """The weight files of a model folder, each checked to be whole: safetensors, else pickles under transformers'
    names, else a trainer's own layout beside config.json."""
    named = _named_by_config(folder, config)
    found = _safetensors(folder, named) if named else _safetensors(folder, SAFE_WEIGHTS)
    if found is not None:
        return found
    if (shards := _shards_without_index(folder)) is not None:
        return shards
    if _has_any(folder, PICKLES):
        return _pickles(folder, allow_pickle)
    layout = trainer_layout(folder)
    return _pickles(folder, allow_pickle) if layout is None else _as_state(layout, allow_pickle)


LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
ANY_LAYERS = 1000
"""More layers than any model has: beyond it they are counted against the weights that are there."""


def refuse_impossible_size(path: Path, config: Mapping[str, Any], found: WeightFiles) -> None:
    """Refuse a configuration with more layers than its weights have tensors, before transformers builds them all."""
    asked = [(key, value) for key, value in _items(config) if key in LAYER_KEYS and isinstance(value, int)]
    for key, layers in asked:
        if layers <= ANY_LAYERS:
            continue
        held = sum(
            len(tensor_shapes(file)) if file.suffix == ".safetensors" else file.stat().st_size // 1024
            for file in found.files
        )
        if layers > held:
            raise ModelError(
                f"{path} says {key} {layers:,}, but the weights beside it hold {held:,} tensors: it is damaged, or "
                "belongs to another model"
            )


def _has_any(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).is_file() for name in names)


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


def _safetensors(folder: Path, names: Iterable[str]) -> WeightFiles | None:
    """The first of `names` that is there, a safetensors file or an index of them, every file checked.

    Some trainers leave a `model.safetensors` that lacks most tensors beside whole shards with an index: where the
    index names more tensors than the single file holds, its shards are read. Two whole saves must be the same weights.
    """
    present = [name for name in names if (folder / name).is_file()]
    if not present:
        return None
    if len(present) > 1:
        single, index = (folder / name for name in present)
        if tensor_shapes(single).keys() < _weight_map(index).keys():
            return WeightFiles(_shards(index)[0], pickle=False, as_state=True)
        _refuse_two_saves(single, index)
    if present[0].endswith(".json"):
        files, index_is_whole = _shards(folder / present[0])
        return _refuse_unwritten(WeightFiles(files, pickle=False, as_state=not index_is_whole))
    return _refuse_unwritten(WeightFiles((folder / present[0],), pickle=False))


def _refuse_two_saves(single: Path, index: Path) -> None:
    """Raise ModelError where shards that are all there hold other values than the one file beside them."""
    files = {single.parent / name for name in _weight_map(index).values()}
    if not all(path.is_file() for path in files):
        return  # an index that was left behind
    one = _beginnings(single)
    for path in sorted(files):
        for name, beginning in _beginnings(path).items():
            if one.get(name, beginning) != beginning:
                raise ModelError(
                    f"{single.parent} holds two sets of weights that differ (first tensor: {name}): {single.name}, and "
                    f"the {len(files)} shards of {index.name}. Move the one that is not wanted out of the folder"
                )


def _beginnings(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Tensor → dtype, shape, and its first bytes, of a safetensors file that `tensor_shapes` finds whole."""
    tensor_shapes(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                file.seek(8 + length + begin)
                found[name] = entry["dtype"], entry["shape"], file.read(min(COMPARED, end - begin))
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor → file, of an index; every file must be one of the same folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map: the folder is damaged or half written")
    for name in weight_map.values():
        if Path(str(name)).name != name:
            raise ModelError(f"{index} names the shard {name!r}, which is not a file of the same folder")
    return weight_map


def _shards(index: Path) -> tuple[tuple[Path, ...], bool]:
    """The shards of an index of safetensors, and whether transformers reads all of their tensors by it.

    A shard that the index leaves out belongs to it where its name says so (…-00002-of-00003 beside …-of-00003).
    Raises HalfWrittenError for shards that are absent, ModelError for tensors that are in none of them.
    """
    weight_map, folder = _weight_map(index), index.parent
    named = {folder / name for name in weight_map.values()}
    refuse_absent(index, named)
    kin = {(found["stem"], found["count"]) for path in named if (found := SHARD.fullmatch(path.name))}
    others = {
        path
        for path in folder.glob("*.safetensors")
        if (found := SHARD.fullmatch(path.name)) and (found["stem"], found["count"]) in kin
    }
    held = {path: tensor_shapes(path).keys() for path in sorted(named | others)}
    for path in sorted(named):
        expected = {tensor for tensor, name in weight_map.items() if name == path.name}
        if absent := sorted(expected - held[path]):
            raise ModelError(
                f"{path} lacks {len(absent)} tensors that {index.name} names (first: {absent[0]}): the shards belong "
                "to different saves. Save the model again, or copy the folder anew"
            )
    whole = {tensor for tensors in held.values() for tensor in tensors} <= weight_map.keys()
    return tuple(held), whole and "metadata" in read_json(index)  # without it transformers does not read an index


def _shards_without_index(folder: Path) -> WeightFiles | None:
    """Shards of one save whose names say that all of them are there, where no index does."""
    found = {path: match for path in sorted(folder.glob("*.safetensors")) if (match := SHARD.fullmatch(path.name))}
    saves = {(match["stem"], int(match["count"])) for match in found.values()}
    if len(saves) != 1 or len(found) != next(iter(saves))[1]:
        return None
    return _refuse_unwritten(WeightFiles(tuple(found), pickle=False, as_state=True))


def refuse_absent(index: Path, named: Iterable[Path]) -> None:
    """Raise HalfWrittenError where shards that an index names are not there."""
    named = sorted(named)
    absent = [path.name for path in named if not path.is_file()]
    if absent:
        raise HalfWrittenError(
            f"{index.parent} is half written: {index.name} names {len(named)} shards, {len(absent)} of them absent "
            f"(first: {absent[0]}). Wait for the writer to finish, or copy or download the folder again",
            index.parent,
        )


def _refuse_unwritten(found: WeightFiles) -> WeightFiles:
    """Refuse what sharded training writes when nothing gathers its parts: empty tensors, flattened parameters."""
    empty: list[str] = []
    flat: list[str] = []
    for path in found.files:
        for name, shape in tensor_shapes(path).items():
            if 0 in shape:
                empty.append(name)
            if name.endswith("flat_param") or "_flat_param_" in name:
                flat.append(name)
    place = found.files[0].parent
    if empty:
        raise ModelError(
            f"{place} holds {len(empty)} empty tensors (first: {empty[0]}): DeepSpeed ZeRO-3 saved the model without "
            f"gathering its parts. {zero_way_out(place)}, or set stage3_gather_16bit_weights_on_model_save"
        )
    if flat:
        raise ModelError(
            f"{place} holds flattened parameters of FSDP ({flat[0]}), whose shapes are lost: save with "
            "state_dict_type FULL_STATE_DICT or SHARDED_STATE_DICT, or with `accelerate merge-weights`"
        )
    return found


def _pickles(folder: Path, allow_pickle: bool) -> WeightFiles:
    found = sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES and path.is_file())
    found = [path for path in found if not is_trainers(path.name)]
    if not found:
        raise _no_weights(folder)
    if not allow_pickle:
        raise ModelError(
            f"{folder} holds its weights only as pickle ({found[0].name}), a format that can run code when it is read: "
            "nothing was opened. Save the model with safetensors, or pass --allow-pickle if you trust its author"
        )
    names = [name for name in PICKLES if (folder / name).is_file()]
    if not names:
        raise ModelError(
            f"{folder}: {found[0].name} is not a name that transformers reads ({PICKLES[0]} is). If it is the whole "
            f"model, name it over a base: `--policy NAME={found[0]} --policy-base reference`"
        )
    files = [folder / names[0]]
    if names[0].endswith(".json"):
        files = sorted({folder / name for name in _weight_map(folder / names[0]).values()})
        refuse_absent(folder / names[0], files)
    for path in files:
        check_pickle(path)
    return WeightFiles(tuple(sorted(files)), pickle=True)


def refuse_outer(folder: Path) -> None:
    """Raise ModelError for a folder without a model whose subfolders are models, with the names to choose from: what a
    trainer calls its output."""
    found = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if found:
        raise ModelError(
            f"{folder} is no model itself, but holds {len(found)} in subfolders ({', '.join(found[:5])}): name one of "
            f"them, as {folder / found[0]}, or all of them as a pattern"
        )


def _no_weights(folder: Path) -> ModelError:
    """Why a folder with a configuration has nothing to read: a format that is not read here, or no weights yet."""
    for pattern, what in OTHER_FORMATS.items():
        if found := sorted(folder.glob(pattern)):
            return ModelError(f"{folder} holds its weights as {found[0].name}, {what}")
    refuse_outer(folder)
    stray = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(stray) == 1 and not SHARD.fullmatch(stray[0]) and "tmp" not in stray[0]:
        return ModelError(
            f"{folder}: its only weights are {stray[0]}, a name that transformers does not read. If they are the whole "
            f"model, call them {SAFE_WEIGHTS[0]}"
        )
    clue = f" ({', '.join(stray[:3])} but no index)" if stray else ""
    return HalfWrittenError(
        f"{folder} has no weights: neither {' nor '.join(SAFE_WEIGHTS)} is there{clue}. Either they are still to be "
        "written, or they are in another format (pickles of a hub repository are fetched only with --allow-pickle)",
        folder,
    )


# --- checkpoints without a model folder --------------------------------------------------------------------------


def is_state(path: Path) -> bool:
    """Whether a path is a checkpoint without config.json: a state-dict file, a DCP folder, accelerate's or DeepSpeed's
    folder, or a folder with one file of weights, such as the reference implementation's policy.pt."""
    if path.is_file():
        return path.suffix in STATE_SUFFIXES
    if _has_any(path, ("config.json", ADAPTER_CONFIG)):
        return False
    return _has_any(path, (*SAFE_WEIGHTS, *PICKLES)) or trainer_layout(path) is not None or len(lone_states(path)) == 1


def trainer_layout(folder: Path) -> Path | None:
    """Where a trainer's folder keeps its model in a layout of its own: a DCP folder, accelerate's FSDP file, or a
    ZeRO folder of DeepSpeed. None where it is none of these."""
    if not folder.is_dir():
        return None
    if (folder / DCP_METADATA).is_file() or _is_zero(folder):
        return folder
    inside = sorted(path for path in folder.iterdir() if path.is_dir() or FSDP_FILE.fullmatch(path.name))
    for path in inside:
        distributed = FSDP_FOLDER.fullmatch(path.name) and (path / DCP_METADATA).is_file()
        if distributed or (path.is_file() and FSDP_FILE.fullmatch(path.name)):
            return path
    return _latest_zero(folder, inside)


def _is_zero(folder: Path) -> bool:
    return next(folder.glob(ZERO_MODEL), None) is not None or next(folder.glob("zero_pp_rank_*"), None) is not None


def _latest_zero(folder: Path, inside: Iterable[Path]) -> Path | None:
    """The ZeRO folder that the file `latest` names, else the last one."""
    found = [path for path in inside if path.is_dir() and _is_zero(path)]
    if not found:
        return None
    latest = folder / "latest"
    tag = latest.read_text("utf-8", errors="replace").strip() if latest.is_file() else ""
    steps = sorted(found, key=lambda path: (path.name == tag, len(path.name), path.name))
    return steps[-1]


def lone_states(folder: Path) -> list[Path]:
    """The files of a folder that may each be a whole checkpoint, by their names; none where libraries name them."""
    if not folder.is_dir() or _has_any(folder, (*SAFE_WEIGHTS, *PICKLES)) or trainer_layout(folder) is not None:
        return []
    return sorted(path for path in folder.iterdir() if is_state_name(path.name) and path.is_file())


def state_weights(path: Path, allow_pickle: bool) -> WeightFiles:
    """The files of a checkpoint without config.json. Only safetensors are read unless pickles are allowed."""
    layout = None if _has_any(path, (*SAFE_WEIGHTS, *PICKLES)) else trainer_layout(path)
    if layout is not None:
        return _as_state(layout, allow_pickle)
    path = next(iter(lone_states(path)), path)
    if path.is_dir():
        return _safetensors(path, SAFE_WEIGHTS) or _pickles(path, allow_pickle)
    return _as_state(path, allow_pickle)


def _as_state(path: Path, allow_pickle: bool) -> WeightFiles:
    """A file of weights, a DCP folder or a ZeRO folder, whose tensors are read by state_dict.py."""
    if path.suffix == ".safetensors":
        return _refuse_unwritten(WeightFiles((path,), pickle=False, as_state=True))
    zero = path.is_dir() and _is_zero(path)
    if not allow_pickle:
        kind, way_out = "a checkpoint", "save the model with safetensors"
        if zero:
            kind, way_out = "a DeepSpeed ZeRO checkpoint", zero_way_out(path.parent, "convert it")
        elif path.is_dir():
            kind, way_out = "a distributed checkpoint", f"convert it with `accelerate merge-weights {path} OUT`"
        raise ModelError(
            f"{path} is {kind} in pickle, a format that can run code when it is read: nothing was opened. Pass "
            f"--allow-pickle to read its tensors (and nothing else in it), or {way_out}"
        )
    if zero:
        return WeightFiles(_zero_files(path), pickle=True, as_state=True)
    if path.is_dir():
        parts = sorted(path.glob("*.distcp"))
        if not parts:
            raise HalfWrittenError(f"{path} is half written: it has {DCP_METADATA} but no *.distcp files", path)
        return WeightFiles((path / DCP_METADATA, *parts), pickle=True, as_state=True)
    check_pickle(path)
    return WeightFiles((path,), pickle=True, as_state=True)


def _zero_files(folder: Path) -> tuple[Path, ...]:
    """The file that holds the whole model under ZeRO 1 and 2; ModelError where it is in parts (ZeRO 3, or layers or
    tensors sharded over several ranks)."""
    whole = sorted(folder.glob(ZERO_MODEL))
    if len(whole) != 1:
        raise zero_in_parts(folder)
    check_pickle(whole[0])
    return (whole[0],)


def zero_in_parts(folder: Path) -> ModelError:
    """The refusal of a ZeRO checkpoint that no single file holds."""
    return ModelError(
        f"{folder} is a DeepSpeed ZeRO checkpoint whose parameters lie in parts in several files: "
        f"{zero_way_out(folder.parent, 'convert it')}"
    )


def zero_way_out(folder: Path, what: str = "Convert its ZeRO checkpoint") -> str:
    return (
        f"{what} with the script that DeepSpeed leaves beside it (`python zero_to_fp32.py {folder} OUT "
        "--safe_serialization`)"
    )


# --- single files -----------------------------------------------------------------------------------------------


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor → shape, from the header of a safetensors file; refuses a file that is cut, damaged or a placeholder."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if size == 0:
        raise HalfWrittenError(
            f"{path} is empty (0 bytes): the folder is half written. Copy or download it again", path
        )
    if start == b"version ":
        raise ModelError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    length = int.from_bytes(start, "little")
    if length > HEADER_LIMIT or not 0 < length <= size - 8:
        text = f"{path} is not a whole safetensors file ({size} bytes): copy or download it again"
        raise ModelError(text) if length > HEADER_LIMIT else HalfWrittenError(text, path)
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 not a dict
    except SafetensorError as error:
        if "not fully covered" in str(error):
            text = (
                f"{path} is truncated or damaged: its {size} bytes are not those that its header describes. The folder "
                "is half written, or the copy was interrupted: copy or download it again"
            )
            raise HalfWrittenError(text, path) from error
        raise ModelError(
            f"{path} has a damaged safetensors header ({brief(error)}): copy or download it again"
        ) from error


def check_pickle(path: Path) -> None:
    """Raise HalfWrittenError for an empty file, or a zip archive that is cut: torch.save writes its directory last.

    Whether a pickle in torch's old form, which is no archive, is whole shows only when it is read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(ZIP_START))
            whole = start != ZIP_START or is_zipfile(file)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if not start or not whole:
        seen = "truncated" if start else "empty (0 bytes)"
        raise HalfWrittenError(f"{path} is {seen}: it is half written. Copy or download it again", path)


def embedding_rows(files: Iterable[Path]) -> int | None:
    """Rows of the token embedding by the safetensors headers, or None where no tensor bears a known name."""
    rows = []
    for path in files:
        for name, shape in tensor_shapes(path).items() if path.suffix == ".safetensors" else ():
            module = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if name.endswith(".weight") and module in EMBEDDINGS and len(shape) == 2:
                rows.append(shape[0])
    return max(rows, default=None)
