"""A .gguf file as a model folder: converted once, checked, kept in the cache.

    CACHE/converted/<sha256 of the file>-v<VERSION>/   config.json, model.safetensors, tokenizer files, gguf.json

Promises: the folder appears whole or not at all (temporary folder, fsync, rename, under a lock); its logits on a probe
text equal those of the model that transformers read from the GGUF file, bit for bit; once it is there, the GGUF file
and the `gguf` package are no longer needed. Weights are stored dequantised in float32: a quantised block is scale x
integer + offset, which 16 bits cannot hold.
Does not: read formats or architectures that transformers' GGUF support does not know.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import uuid4

from dpo_score.errors import ModelError
from dpo_score.models.locate import ProgressLine, no_progress
from dpo_score.models.weights import brief

VERSION = 1
RECORD = "gguf.json"
PROBE = "The quick brown fox jumps over 13 lazy dogs.\nWhy? Because it can: naïve, déjà vu, 東京 — 3.14!"


def converted(path: Path, sha256: str, cache_dir: Path, say: ProgressLine = no_progress) -> Path:
    """The model folder made from `path`, whose digest is `sha256`; converts it on first use.

    Raises ModelError when the gguf package is absent, the architecture is unknown, or the check fails.
    """
    from filelock import FileLock

    folder = cache_dir / "converted" / f"{sha256}-v{VERSION}"
    if _whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not _whole(folder):
            say(f"converting {path.name} ({path.stat().st_size / 2**20:.0f} MB) once, in {folder.parent}")
            _convert_into(folder, path, sha256)
    return folder


def _whole(folder: Path) -> bool:
    """Whether every file that the record lists is there with its size."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        return all((folder / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _convert_into(folder: Path, path: Path, sha256: str) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        _write_model(temporary, path)
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        record = {"gguf_sha256": sha256, "converter": VERSION, "files": sizes}
        (temporary / RECORD).write_text(json.dumps(record, indent=1), "utf-8")
        for written in (*temporary.iterdir(), temporary):
            _fsync(written)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_model(folder: Path, path: Path) -> None:
    """Read the GGUF file through transformers, write it as safetensors, and compare both on the probe text."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{path} is a GGUF file, and reading one for the first time needs the gguf package: "
            '`pip install "dpo-score[gguf]"`'
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
    ids = torch.tensor([tokenizer(PROBE).input_ids])
    with torch.inference_mode():
        same = torch.equal(read.eval()(ids).logits, again.eval()(ids).logits)
    if not same or tokens != ids[0].tolist():
        raise ModelError(
            f"{path}: the converted model and the GGUF model differ on a probe text, so the conversion was "
            "thrown away. Convert the model with another tool and name its folder"
        )


def _plain_copy(read: Any) -> Any:
    """The same weights in a model that was never quantised: transformers does not save one that was."""
    from transformers import AutoModelForCausalLM

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
    from transformers.utils import logging

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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
