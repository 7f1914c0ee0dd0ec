"""`--loss path.py:function`: a loss from the user's own file.

    def my_loss(columns: dict[str, numpy.ndarray], beta: float) -> numpy.ndarray: ...

`columns` are the numeric columns of a score table as float64, NaN where null; the result has one value a row. To name
the file on the command line or in the pipeline file is consent to run it: code is never imported from data. The loss is
identified by the SHA-256 of the file, and exactly these bytes are compiled and run; files that it imports are not part
of its identity. Its derivative is unknown, hence `dpo_weight` is null.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_score.errors import ConfigError

_CUSTOM = re.compile(r"(?P<path>.+\.py):(?P<function>[A-Za-z_]\w*)")


@dataclass(frozen=True, slots=True)
class CustomLoss:
    path: str
    function: str
    sha256: str
    call: Callable[[dict[str, NDArray[np.float64]], float], Any]


def is_custom(name: str) -> bool:
    return _CUSTOM.fullmatch(name) is not None


def not_run(columns: Mapping[str, NDArray[np.float64]], _beta: float) -> Any:
    """In place of a function whose file was not named to be run: its values are unknown."""
    return np.full(len(next(iter(columns.values()))), np.nan)


def load_custom(name: str, runs: bool = True) -> CustomLoss:
    """Import the file and find the function; ConfigError when either is not there.

    Without `runs` the file is read and not imported: its identity is known, and `call` is `not_run`.
    """
    match = _CUSTOM.fullmatch(name)
    if match is None:
        raise ConfigError(f"loss {name!r}: write path/to/file.py:function")
    path = Path(match["path"]).expanduser()
    if not path.is_file():
        raise ConfigError(f"loss {name!r}: there is no file {str(path)!r}")
    content = path.read_bytes()
    function = getattr(_imported(content, path, name), match["function"], None) if runs else not_run
    if not callable(function):
        raise ConfigError(f"loss {name!r}: {path.name} defines no function {match['function']!r}")
    return CustomLoss(str(path), match["function"], hashlib.sha256(content).hexdigest(), function)


def _imported(content: bytes, path: Path, name: str) -> ModuleType:
    module = ModuleType(f"dpo_score_custom_{path.stem}")
    module.__file__ = str(path)
    try:
        code = compile(content, str(path), "exec", dont_inherit=True)
        exec(code, module.__dict__)  # noqa: S102 - the user named this file to be run
    except Exception as error:  # whatever the user's file raises, the message is theirs
        raise ConfigError(f"loss {name!r}: importing the file failed: {type(error).__name__}: {error}") from error
    return module


def evaluate_custom(
    loss: CustomLoss, columns: Mapping[str, NDArray[np.float64]], beta: float, rows: int
) -> NDArray[np.float64]:
    """One float64 per row; ConfigError when the function fails or returns another shape."""
    try:
        result = np.asarray(loss.call({key: value.copy() for key, value in columns.items()}, beta), dtype=np.float64)
    except Exception as error:  # as above
        raise ConfigError(
            f"loss {loss.path}:{loss.function} failed: {type(error).__name__}: {error}; columns: {', '.join(columns)}"
        ) from error
    if result.shape != (rows,):
        raise ConfigError(
            f"loss {loss.path}:{loss.function} returned shape {result.shape}, not one value for each of {rows} rows"
        )
    return result
