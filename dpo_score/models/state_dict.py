"""Checkpoints of other tools: state dicts without a model folder, read over a base's configuration.

    policy.pt         {"step_idx", "state", "metrics"} of the reference DPO implementation
    mp_rank_00_model_states.pt   {"module": …} of DeepSpeed, where it holds the whole model (ZeRO 1 and 2)
    *.pt *.pth *.bin  a torch or accelerate state dict, bare or nested ("state_dict", "model", "module", …)
    a DCP folder      .metadata and *.distcp, as torch.distributed.checkpoint and FSDP write them
    a folder          model.safetensors without config.json, as accelerate's save_state writes it

Promises: tensors only. A pickle is read with weights_only, the metadata of a DCP folder through an unpickler that knows
the classes of that format and no other, and neither unless pickles are allowed. Wrappers' additions to names (module.,
_orig_mod., …) and the place inside a nesting are found by the names that the model expects; transformers then reports
key by key what is missing or left over.
Does not: take weights from the base. It lends its configuration and tokenizer.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dpo_score.errors import ModelError
from dpo_score.models.weights import DCP_METADATA, ZERO_MODEL, brief, zero_in_parts, zero_way_out

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
DCP_CLASSES = frozenset(
    {("torch.distributed.checkpoint.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta")}
    | {("torch.distributed.checkpoint.metadata", name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")}
    | {
        ("torch.distributed.checkpoint.metadata", f"{kind}Metadata")
        for kind in ("TensorStorage", "BytesStorage", "ChunkStorage")
    }
    | {("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")}
    | {("torch.serialization", "_get_layout"), ("torch", "Size"), ("collections", "OrderedDict")}
    | {("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")}
)


def read_state(files: tuple[Path, ...], expected: Collection[str]) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint under the names that the model uses; `expected` are those names.

    What lies outside the part that holds the model (an optimizer, a step counter) is left unread where the format
    allows. Raises ModelError when no tensor bears a name that the model expects.
    """
    if files[0].name == DCP_METADATA:
        return _read_dcp(files[0].parent, expected)
    stored = {name: tensor for path in files for name, tensor in _open(path).items()}
    found = {name: stored[key] for name, key in own_names(stored, expected, files[0]).items()}
    if any(tensor.numel() == 0 for tensor in found.values()):
        raise zero_in_parts(files[0].parent)
    return found


def _open(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        way_out = zero_way_out(path.parent.parent, ". Convert it") if path.match(ZERO_MODEL) else ""
        raise ModelError(f"{path} is not a pickle of tensors alone: {brief(error)}{way_out}") from error
    return dict(_flat(content))


def _flat(content: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Nested mappings of tensors as one mapping with dotted names; everything else is passed over."""
    if isinstance(content, Tensor):
        yield place, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(value, f"{place}.{key}" if place else str(key))


def own_names(stored: Iterable[str], expected: Collection[str], path: Path) -> dict[str, str]:
    """Model name → stored name, for the part of a checkpoint that holds the model.

    The part is the prefix under which most of the expected names occur; behind it, wrappers' segments are left out.
    Raises ModelError where two parts hold as many, such as a policy and its reference, or a moving average.
    """
    names = list(stored)
    votes = Counter(prefix for name in names for prefix in _prefixes(name, expected))
    if not votes:
        raise ModelError(
            f"{path} holds no tensor that its base's architecture knows (first names: {', '.join(sorted(names)[:5])}): "
            "name the base that it was trained from"
        )
    best = max(votes, key=lambda prefix: (votes[prefix], -len(prefix)))
    equals = sorted(p for p, n in votes.items() if n == votes[best] and "optim" not in p)
    if len(equals) > 1:
        raise ModelError(
            f"{path} holds {len(equals)} models, under {', '.join(p.rstrip('.') or '(no name)' for p in equals[:5])}: "
            "nothing says which is meant. Save the one to score in a file of its own"
        )
    best = next(iter(equals), best)
    return {_unwrapped(name.removeprefix(best)): name for name in names if name.startswith(best)}


def _prefixes(name: str, expected: Collection[str]) -> Iterator[str]:
    """Every way to read `name` as something the model expects behind a prefix."""
    parts = name.split(".")
    for start, part in enumerate(parts):
        if part not in WRAPPERS and _unwrapped(".".join(parts[start:])) in expected:
            yield "".join(f"{outer}." for outer in parts[:start])


def are_renamed(missing: Collection[str], unexpected: Iterable[str]) -> bool:
    """Whether tensors that a model misses are there by longer names: behind the segments of a wrapper (DDP,
    torch.compile, FSDP), or all of them behind a prefix of a trainer (`policy.`, `pretrained_model.`)."""
    unexpected = list(unexpected)
    if any(not WRAPPERS.isdisjoint(name.split(".")) for name in unexpected):
        return True
    tails = {name.split(".", n)[-1] for name in unexpected for n in range(1, name.count(".") + 1)}
    return len(missing) > 0 and tails >= set(missing)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class _DcpUnpickler(pickle.Unpickler):
    """Knows the classes that a DCP metadata file is made of, and dtypes; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in DCP_CLASSES
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of the format")


def _read_dcp(folder: Path, expected: Collection[str]) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp

    entries = _dcp_metadata(folder).state_dict_metadata
    tensors = {name: entry for name, entry in entries.items() if hasattr(entry, "properties")}
    names = own_names(tensors, expected, folder)
    state = {key: torch.empty(tensors[key].size, dtype=tensors[key].properties.dtype) for key in names.values()}
    try:
        dcp.state_dict_loader._load_state_dict(state, storage_reader=_reader(folder), no_dist=True)
    except dcp.api.CheckpointException as error:
        cause = next((cause for cause, _ in error.failures.values()), error)
        raise ModelError(f"{folder} could not be read as a distributed checkpoint: {brief(cause)}") from error
    return {name: state[key] for name, key in names.items()}


def _dcp_metadata(folder: Path) -> Any:
    try:
        with (folder / DCP_METADATA).open("rb") as file:
            return _DcpUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / DCP_METADATA} is not the metadata of a distributed checkpoint: {error}") from error


def _reader(folder: Path) -> Any:
    """torch's own reader, with the metadata read by the unpickler above instead of the general one."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            metadata = _dcp_metadata(folder)
            if metadata.storage_meta is not None:
                metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)
