"""A glob of checkpoints → one policy a checkpoint, and the names of files that hold weights. Nothing is opened.

    runs/dpo/checkpoint-*       folders
    runs/dpo/step-*/policy.pt   files of weights, as the reference DPO implementation writes them
    runs/dpo/*.safetensors      files side by side

Promises: natural order (step-9 before step-10); the step is read from what the wildcards matched, the last part first.
Does not: look whether a checkpoint is whole. A policy that a glob found says so, and waits where it is not.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_score.errors import ConfigError

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
STATE_SUFFIXES = PICKLE_SUFFIXES | {".safetensors"}
_TRAINERS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|sampler|rng_state|random_states|custom_checkpoint)(_\d+)*\.\w+"
)
_PARTS = re.compile(r"adapter_model\.\w+|.+-\d{5}-of-\d{5}\.\w+")
_SHARED_NAMES = frozenset(
    {"policy", "model", "pytorch_model", "adapter_model", "consolidated", "weights", "state_dict", "checkpoint"}
    | {"pytorch_model_fsdp", "mp_rank_00_model_states"}
)
_OF_A_FOLDER = re.compile(r"(model|pytorch_model)\.\w+")


def is_trainers(name: str) -> bool:
    """Whether a file is what a trainer leaves beside the weights: a pickle, but no weights."""
    return _TRAINERS.fullmatch(name) is not None


def is_state_name(name: str) -> bool:
    """Whether a file may hold all the weights: not a shard, not an adapter, not what a trainer leaves beside them."""
    return Path(name).suffix in STATE_SUFFIXES and not is_trainers(name) and _PARTS.fullmatch(name) is None


def expanded(policy: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The policies that a glob in `model` or `adapter` matches; one without a glob as it is."""
    key = "adapter" if _is_open(str(policy.get("adapter") or "")) else "model"
    pattern = str(policy.get(key) or "")
    if not _is_open(pattern):
        return [dict(policy)]
    found = _found(pattern, files=key == "model")
    if not found:
        files = f", and no file of weights does ({', '.join(sorted(STATE_SUFFIXES))})" if key == "model" else ""
        raise ConfigError(f"policy {policy['name']!r}: no folder matches {pattern!r}{files}")
    named = zip(found, _labels(found, pattern), strict=True)
    return [{**policy, key: path, "name": f"{policy['name']}-{label}", "glob": pattern} for path, label in named]


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key: runs of digits count as numbers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def policy_stem(path: str) -> str:
    """A name for a checkpoint: the last part of its path, but for a file whose name many checkpoints share
    (step-10/policy.pt) that of its folder."""
    place = Path(path.rstrip("/"))
    shared = place.suffix in STATE_SUFFIXES and place.stem in _SHARED_NAMES
    folder = re.search(r"[A-Za-z0-9]", place.parent.name) is not None
    if not shared:
        return stem(path)
    return stem(place.parent.name) if folder else place.stem


def stem(path: str) -> str:
    """A name made of the last part of a path."""
    return _sayable(Path(path.rstrip("/")).name.split(".parquet")[0].split(".json")[0])


def _sayable(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-") or "data"


def _is_open(text: str) -> bool:
    return any(c in text for c in "*?[")


def _found(pattern: str, files: bool) -> list[str]:
    """Folders, and files of weights. Beside folders, a file that bears a model folder's own names is no checkpoint."""
    try:
        matches = glob.glob(pattern)  # noqa: PTH207  pathlib cannot glob an absolute pattern
    except ValueError:  # a null byte
        return []
    folders = [path for path in matches if Path(path).is_dir()]
    states = [path for path in matches if is_state_name(Path(path).name) and Path(path).is_file()]
    if folders:
        states = [path for path in states if _OF_A_FOLDER.fullmatch(Path(path).name) is None]
    return sorted([*folders, *(states if files else ())], key=natural)


def _labels(paths: Sequence[str], pattern: str) -> list[str]:
    """What tells checkpoints apart: the step or a name; where two are the same, all that the wildcards matched."""
    parts = [_open_parts(path, pattern) for path in paths]
    labels = [_label(names) for names in parts]
    if len(set(labels)) == len(labels):
        return labels
    return [_sayable("-".join(names)) for names in parts]


def _open_parts(path: str, pattern: str) -> list[str]:
    """The parts of `path` that `pattern` leaves open."""
    both = zip(Path(path).parts, Path(pattern).parts, strict=True)
    return [part for part, mask in both if _is_open(mask)]


def _label(names: Sequence[str]) -> str:
    """The number at the end of the last name, else the name. A file without a number has that of its folder."""
    last = Path(names[-1])
    if last.suffix not in STATE_SUFFIXES:
        return _number(last.name) or stem(last.name)
    return next((number for name in (last.stem, *names[-2:-1]) if (number := _number(name))), stem(last.stem))


def _number(name: str) -> str | None:
    """Digits at the end that are a whole number: 0.05 and 5e-7 have none."""
    found = re.search(r"(?<!\d)(?<!\d\.)(?<!\de-)(\d+)$", name)
    return found[1] if found else None
