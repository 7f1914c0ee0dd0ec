"""From the name of a model to a folder or a file on this machine.

    MODEL = a folder | a .gguf file | package:NAME/FILE | a hub id `org/name` (or `org/name/FILE.gguf`)

Promises: a package is found without importing it; a hub repository is fetched through huggingface_hub (its cache,
HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT as everywhere), and whatever goes wrong there becomes one paragraph.
Does not: look inside what it finds (weights.py does), or fetch pickles unless they are allowed.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import huggingface_hub
from huggingface_hub import constants, errors

from dpo_score.config.checkpoint_glob import STATE_SUFFIXES
from dpo_score.data.hub_errors import explained, hub_failures
from dpo_score.errors import ModelError

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
HUB_GGUF = re.compile(r"(?P<repo>[A-Za-z0-9._-]+/[A-Za-z0-9._-]+)/(?P<file>.+\.gguf)")
HUB_ID_LENGTH = 96
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
UNWANTED = ("*/*.safetensors", "*/*.json", "*/*.txt", "*/*.bin", "consolidated*", "*.gguf")
HUB_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


ProgressLine: TypeAlias = Callable[[str], None]
"""Called with one line of text that says what is being done."""


def no_progress(line: str) -> None:
    """The default where no progress line is wanted."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where a model lies: a folder or a .gguf file, and the commit when it came from the hub."""

    path: Path
    commit: str | None = None


def locate(model: str, *, revision: str | None = None, allow_pickle: bool = False, local_only: bool = False) -> Located:
    """Find MODEL. `local_only`: a hub id counts only when it is in the hub cache already.

    Raises ModelError: no such folder, package, repository, revision, or no right to read it.
    """
    if model.startswith("package:"):
        return Located(in_package(model.removeprefix("package:")))
    path = _path(model)
    if path.is_dir() or (path.is_file() and path.suffix in {".gguf", *STATE_SUFFIXES}):
        return Located(path)
    if path.is_file() and path.suffix not in STATE_SUFFIXES:
        raise ModelError(f"model {model!r} is a file: name the folder that holds config.json, or a .gguf file")
    if gguf := HUB_GGUF.fullmatch(model):
        return _hub(lambda hub: hub.gguf(gguf["repo"], gguf["file"]), model, revision, local_only, allow_pickle)
    if HUB_ID.fullmatch(model) and len(model) <= HUB_ID_LENGTH:
        return _hub(lambda hub: hub.repository(model), model, revision, local_only, allow_pickle)
    raise ModelError(
        f"no such model: {model!r} is neither a folder here ({Path.cwd()}) nor the form of a hub id (org/name) "
        "or of package:NAME/FILE"
    )


def _path(model: str) -> Path:
    """The path that MODEL would be; one that cannot exist when it cannot be a path at all."""
    try:
        path = Path(model or "(no name)").expanduser()
        path.stat()
    except (OSError, RuntimeError, ValueError):
        return Path("(no such path)") if not model or len(model) > 255 or model.startswith("~") else Path(model)
    return path


def in_package(spec: str) -> Path:
    """`NAME/FILE` → the file or folder inside an installed Python package, found without running its code."""
    name, _, inside = spec.partition("/")
    if not name.isidentifier() or not inside:
        raise ModelError(f"package:{spec}: write package:NAME/FILE, with the name that Python imports (no dots)")
    roots = _package_folders(name)
    if not roots:
        raise ModelError(
            f"package:{spec}: Python package {name!r} is not installed here. Install it with "
            f"`pip install {name.replace('_', '-')}`, or name a folder or hub id instead"
        )
    for root in roots:
        path = (root / inside).resolve()
        if path.is_relative_to(root.resolve()) and path.exists():
            return path
    present = sorted(p.name for root in roots for p in root.glob("*.gguf"))
    clue = f"; it holds {', '.join(present[:3])}" if present else ""
    raise ModelError(f"package:{spec}: package {name!r} is installed at {roots[0]}, but has no {inside!r}{clue}")


def _package_folders(name: str) -> list[Path]:
    """The folders of a top-level package; asking the finders for a top-level name imports nothing."""
    if name in sys.modules and getattr(sys.modules[name], "__spec__", None) is None:
        return []
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


@dataclass(frozen=True, slots=True)
class _Hub:
    revision: str | None
    local_only: bool
    allow_pickle: bool

    def repository(self, repo: str) -> Located:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=self.revision,
            local_files_only=self.local_only,
            allow_patterns=[*WANTED, *(HUB_PICKLES if self.allow_pickle else ())],
            ignore_patterns=list(UNWANTED),
        )
        return _snapshot(Path(folder))

    def gguf(self, repo: str, file: str) -> Located:
        path = huggingface_hub.hf_hub_download(repo, file, revision=self.revision, local_files_only=self.local_only)
        return _snapshot(Path(path))


def _snapshot(path: Path) -> Located:
    commit = next((part for part in reversed(path.parts) if COMMIT.fullmatch(part)), None)
    return Located(path, commit)


def _hub(
    fetch: Callable[[_Hub], Located], model: str, revision: str | None, local_only: bool, allow_pickle: bool
) -> Located:
    """Run one hub request; every way it fails becomes a paragraph with the way out."""
    try:
        return fetch(_Hub(revision, local_only, allow_pickle))
    except hub_failures() as error:
        answered = isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__
        cause = answered if isinstance(answered, errors.HfHubHTTPError) else error
        raise ModelError(explained(cause, model, "model", revision)) from error


def stored_sha256(path: Path) -> str | None:
    """The sha256 under which the hub cache keeps a large file (the name of its blob), or None for any other file."""
    blob = path.resolve()
    cache = Path(constants.HF_HUB_CACHE).resolve()
    if blob.parent.name == "blobs" and blob.is_relative_to(cache) and SHA256.fullmatch(blob.name):
        return blob.name
    return None
