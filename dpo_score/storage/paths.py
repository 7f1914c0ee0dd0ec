"""Names inside a store: POSIX-relative, never leaving it; and the names of files that are not finished.

A temporary file is `.work/<name>.tmp-<pid>-<machine><random>`: its name says which process writes it, so a later
run sweeps what a dead process left and never touches what a running one writes. A process number means something only
where it was given: on one host, since its last start, in one PID namespace (two containers may share a host's name).
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

from dpo_score.errors import UsageError

WORK = ".work"
QUARANTINE = f"{WORK}/quarantine"
TEMP = re.compile(r"\.tmp-(?P<pid>\d+)-(?P<machine>[0-9a-f]{8})(?P<rand>[0-9a-f]{8})$")


def checked(name: str) -> str:
    """`name` itself, or a UsageError when it is absolute, empty or steps out of the store."""
    parts = name.split("/")
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise UsageError(
            f"{name!r} is not a name inside the output folder: names are relative, with single slashes and "
            "without '..'; the file that mentions it was not written by dpo-score or was altered"
        )
    return name


@cache
def machine() -> str:
    """Eight hexadecimal digits that name where process numbers of this process are valid.

    Made of the host's name, the id of its last start and the PID namespace; where the system tells neither of the
    last two, of the name alone.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=4).hexdigest()


def temp_name(name: str) -> str:
    """A fresh unfinished name for `name`; long names are cut, since only the ending matters."""
    return f"{WORK}/{name.rsplit('/', 1)[-1][:60]}.tmp-{os.getpid()}-{machine()}{secrets.token_hex(4)}"


def quarantine_name(name: str) -> str:
    """Where a damaged file is kept for inspection; never the same place twice."""
    return f"{QUARANTINE}/{name.replace('/', '~')[-160:]}-{secrets.token_hex(4)}"


def alive(pid: int) -> bool:
    """Whether a process of this machine runs under `pid`; ask only of a process number that this machine gave."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
