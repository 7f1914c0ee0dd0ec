"""A .gguf file as a model folder: converted once, checked, kept in the cache.

    CACHE/converted/<sha256 of the file>-v<VERSION>/   config.json, model.safetensors, tokenizer files, then gguf.json

gguf.json lists every other file with its sha256 and is written last. A folder is used only while all of them have that
content; else the file is converted again. Every tensor that is written equals, bit for bit, the one that transformers
read from the GGUF file, and the logits of a probe text agree within the bound of fp32. Weights are stored dequantised
in float32: a quantised block is scale x integer + offset, which 16 bits cannot hold.
Does not: read formats or architectures that transformers' GGUF support does not know.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from dpo_score.errors import ModelError, StorageError
from dpo_score.models.locate import ProgressLine, no_progress
from dpo_score.models.weights import brief
from dpo_score.storage.open import open_store

VERSION = 1
RECORD = "gguf.json"
PROBE = "The quick brown fox jumps over 13 lazy dogs.\nWhy? Because it can: naïve, déjà vu, 東京 — 3.14!"
LOGITS_BOUND = 1e-4
"""Largest difference of two fp32 passes over the largest logit."""
CHUNK_BYTES = 8 * 2**20


def converted(
    path: Path, digest: str, cache_dir: Path, sha256: Callable[[Path], str], say: ProgressLine = no_progress
) -> Path:
    """The model folder made from `path`, whose sha256 is `digest`; converts it on first use, and again where the
    folder's content is not what was written. `sha256` hashes a file.

    Raises ModelError when the gguf package is absent, the architecture is unknown, or the check fails.
    """
    folder = cache_dir / "converted" / f"{digest}-v{VERSION}"
    if _whole(folder, sha256):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not _whole(folder, sha256):
            again = " again, since the copy there was damaged," if (folder / RECORD).is_file() else " once,"
            say(f"converting {path.name} ({path.stat().st_size / 2**20:.0f} MB){again} in {folder.parent}")
            _convert_into(folder, path, digest)
    return folder


def _whole(folder: Path, sha256: Callable[[Path], str]) -> bool:
    """Whether every file that the record lists is there with its content."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        listed = dict(record["files"])
        return bool(listed) and all(sha256(folder / name) == expected for name, expected in listed.items())
    except (OSError, ValueError, KeyError, TypeError, StorageError):
        return False


def _convert_into(folder: Path, path: Path, digest: str) -> None:
    """Write the model beside its place in the cache, then file by file into it, the record last."""
    store = open_store(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as temporary:
        _write_model(Path(temporary), path)
        if store.exists(RECORD):
            store.remove(RECORD)
        files = {}
        for written in sorted(Path(temporary).iterdir()):
            files[written.name] = store.write_chunks(written.name, _chunks(written)).sha256
        store.write_json(RECORD, {"gguf_sha256": digest, "converter": VERSION, "files": files})


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _write_model(folder: Path, path: Path) -> None:
    """Read the GGUF file through transformers, write it as safetensors, and compare what is read back."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{path} is a GGUF file, and reading one for the first time needs the gguf package: "
            '`pip install "dpo-score[gguf]"`'
        )
    with _quiet(), _names_made_once():
        try:
            place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
            with redirect_stderr(StringIO()):  # a bar that transformers cannot be told to leave out
                read, info = AutoModelForCausalLM.from_pretrained(
                    **place, dtype=torch.float32, local_files_only=True, output_loading_info=True
                )
            tokenizer = AutoTokenizer.from_pretrained(**place, local_files_only=True)
        except (ValueError, KeyError, RuntimeError, OSError, NotImplementedError) as error:
            raise ModelError(f"{path} could not be read as a GGUF model: {brief(error)}") from error
        if absent := sorted(info["missing_keys"]):
            raise ModelError(
                f"{path} lacks {len(absent)} tensors of its architecture (first: {absent[0]}): it may be one part of "
                "several, which is not supported; merge the parts into one file"
            )
        _plain_copy(read).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        tokens = AutoTokenizer.from_pretrained(folder)(PROBE).input_ids
    if difference := _difference(read.eval(), again.eval(), tokenizer(PROBE).input_ids, tokens):
        raise ModelError(
            f"{path}: the converted model is not the GGUF model ({difference}), so the conversion was thrown away. "
            "Convert the model with another tool and name its folder"
        )


def _difference(read: Any, again: Any, ids: list[int], tokens: list[int]) -> str | None:
    """What distinguishes the model read back from the one that the GGUF file holds, None where nothing does.

    Tensors are compared bit for bit. Logits are not: two passes over the same weights may differ in their last bits.
    """
    if tokens != ids:
        return "its tokenizer gives other ids for a probe text"
    stored = again.state_dict()
    for name, tensor in read.state_dict().items():
        if name not in stored or not torch.equal(tensor, stored[name]):
            return f"the tensor {name} has other values"
    with torch.inference_mode():
        own, other = (model(torch.tensor([ids])).logits for model in (read, again))
    apart = float((own - other).abs().max() / own.abs().max().clamp_min(1e-6))
    return None if apart <= LOGITS_BOUND else f"its logits for a probe text are off by {apart:.1e} of the largest"


def _plain_copy(read: Any) -> Any:
    """The same weights in a model that was never quantised: transformers does not save one that was."""
    config = type(read.config).from_dict(
        {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_model_name_or_path")}
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=read.dtype)
    plain.load_state_dict(read.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    return plain


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers: the conversion says one line of its own."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


@contextmanager
def _names_made_once() -> Iterator[None]:
    """transformers asks for the table of tensor names once a module, and each one takes a quarter of a second to make:
    a minute and a half for a model of 30 layers."""
    import gguf

    make = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = cache(make)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = make
