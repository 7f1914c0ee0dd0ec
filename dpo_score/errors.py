"""Every error that a user can see, and the exit code of each.

    DpoScoreError                     1   something failed that is not the user's mistake
    ├── UsageError                    2   the request cannot be carried out as it is
    │   ├── ConfigError               2   an option or a key of the pipeline file
    │   ├── DataError                 2   a data file: names file, row, column and the value seen; a value in Python
    │   ├── ModelError                2   a model folder, a tokenizer, an adapter
    │   │   └── HalfWrittenError      2   weights that a writer has not finished: the reference's. Of a policy: 6, or
    │   │       │                 0 where a glob found it and another policy was scored
    │   │       └── WeightsChangedError   weights that changed while they were scored: nothing of them is kept
    │   └── IdentityError             2   OUT belongs to another request: prints the fields that differ
    ├── StorageError                  1   disk full, read-only, permission: resumable once mended
    ├── GroupLostError                1   a process that holds part of a model died or fell silent: resumable
    ├── TextProcessError              1   a process that reads and tokenises rows died: resumable
    ├── BadRowsError                  3   more rejected rows than --max-bad-rows allows; outputs are kept
    ├── DamageError                   4   verify found damaged files
    ├── FailIfError                   5   a --fail-if condition holds
    └── PolicyFailedError             6   the run finished, but a policy could not be scored
    Interrupted              130 or 143   stopped by a signal: the same command resumes

A message is one paragraph: what is wrong, where, the value seen, and the way out. ConfigError and DataError are
ValueErrors too, for callers in Python. Row problems
are not exceptions: they are `dpo_score.data.types.Rejected` values with a code.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path

from dpo_score.escape import without_secrets


class DpoScoreError(Exception):
    """Root of all errors raised on purpose. No message holds a password or a token, whoever prints it."""

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_secrets(arg) if isinstance(arg, str) else arg for arg in args))


class UsageError(DpoScoreError):
    exit_code = 2


class ConfigError(UsageError, ValueError):
    pass


class DataError(UsageError, ValueError):
    pass


class ModelError(UsageError):
    pass


class HalfWrittenError(ModelError):
    """`place`: the file that is not whole, or the folder that lacks one."""

    def __init__(self, message: str, place: Path = Path()) -> None:
        super().__init__(message)
        self.place = place


class WeightsChangedError(HalfWrittenError):
    pass


class IdentityError(UsageError):
    pass


class StorageError(DpoScoreError):
    pass


class TextProcessError(DpoScoreError):
    pass


class GroupLostError(DpoScoreError):
    """Raised with the reason alone; whoever prints it says how to go on."""

    def __str__(self) -> str:
        return f"{self.reason}: the same command resumes"

    @property
    def reason(self) -> str:
        return super().__str__()


class BadRowsError(DpoScoreError):
    exit_code = 3


class DamageError(DpoScoreError):
    exit_code = 4


class FailIfError(DpoScoreError):
    exit_code = 5


class PolicyFailedError(DpoScoreError):
    exit_code = 6


class Interrupted(DpoScoreError):
    """Stopped by a signal between two packs; nothing half-committed."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted: the same command resumes where this one stopped")
        self.exit_code = 128 + signal_number


def nearest(name: str, known: Iterable[str]) -> str:
    """A `did you mean` clause for an unknown name, or the list of known ones."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}"


_CLIENT_ERRORS = (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError"), ("gcsfs.retry", "HttpError"))


def client_errors(*also: type[Exception]) -> tuple[type[Exception], ...]:
    """`also`, and what the object-store libraries in use raise beside OSError: no route, no credentials."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _CLIENT_ERRORS)  # maybe half imported
    return (*also, *(kind for kind in found if kind is not None))
