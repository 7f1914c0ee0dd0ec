"""What a PEFT adapter's files say without being loaded: its settings, its tensors' names and shapes. No torch.

The one reader of adapter files: lora.py loads what is described here, limits.py asks for its embedding rows, memory.py
for the modules that it changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from dpo_score.errors import HalfWrittenError, ModelError
from dpo_score.models.weights import (
    ADAPTER_CONFIG,
    EMBEDDINGS,
    WeightFiles,
    check_pickle,
    tensor_shapes,
)

PREFIX = "base_model.model."
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
WHOLE_MODULE = (
    "modules_to_save",
    "token_adapter.base_layer",
    "base_layer",
    "original_module",
)
"""How peft calls a saved copy of a whole module between the module's name and `weight`; the copy that is used first."""


def adapter_weights(folder: Path, allow_pickle: bool) -> WeightFiles:
    """The weights of an adapter folder: adapter_model.safetensors, or a pickle where that is allowed."""
    if (folder / ADAPTER_WEIGHTS).is_file():
        tensor_shapes(folder / ADAPTER_WEIGHTS)
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


def named_adapters(folder: Path) -> list[str]:
    """The adapters in subfolders, as peft saves those that have names."""
    return sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))


def refuse_named(folder: Path) -> None:
    """Raise ModelError for a folder whose adapters lie in subfolders, with the names to choose from."""
    found = named_adapters(folder) if folder.is_dir() else []
    if found and not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{folder} holds {len(found)} named adapter{'s' if len(found) > 1 else ''} in subfolders "
            f"({', '.join(found[:5])}): name one of them, as {folder / found[0]}"
        )


def whole_rows(shapes: Mapping[str, tuple[int, ...]], module: str) -> int | None:
    """Rows of a whole embedding or head that the adapter saves for `module`, in any of peft's spellings."""
    for middle in ("", *(f".{name}" for name in WHOLE_MODULE)):
        shape = shapes.get(f"{PREFIX}{module}{middle}.weight")
        if shape is not None:
            return shape[0]
    return None


def embedding_rows(files: Iterable[Path]) -> int | None:
    """Rows of a token embedding that an adapter saves whole, by the headers of its files; None where it saves none."""
    for path in files:
        shapes = tensor_shapes(path) if path.suffix == ".safetensors" else {}
        modules = {module for key in shapes if (module := embedding_module(key)) is not None}
        rows = [found for module in modules if (found := whole_rows(shapes, module)) is not None]
        if rows:
            return max(rows)
    return None


def embedding_module(key: str) -> str | None:
    """The name of the token embedding that `key` is a saved weight of, or None."""
    name = key.removeprefix(PREFIX).removesuffix(".weight")
    for middle in WHOLE_MODULE:
        name = name.removesuffix(f".{middle}")
    known = key.endswith(".weight") and name.rsplit(".", 1)[-1] in EMBEDDINGS
    return name if known else None


def module_of(key: str, modules: Collection[str]) -> str:
    """The deepest module of the base in the name of an adapter's tensor, "" if there is none."""
    name = key.removeprefix(PREFIX)
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name
