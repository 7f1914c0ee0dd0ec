"""Names inside a store: POSIX-relative, never leaving it; and the names of files that are not finished.

A temporary file is `.work/<name>.tmp-<pid>-<host><random>`: the process that owns it can be told, so a later
run sweeps what a dead process left and never touches what a living one writes.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket

from dpo_score.errors import UsageError

WORK = ".work"
QUARANTINE = f"{WORK}/quarantine"
TEMP = re.compile(r"\.tmp-(?P<pid>\d+)-(?P<host>[0-9a-f]{8})(?P<rand>[0-9a-f]{8})$")


def checked(name: str) -> str:
    """`name` itself, or a UsageError when it is absolute, empty or steps out of the store."""
    parts = name.split("/")
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise UsageError(
            f"{name!r} is not a name inside the output folder: names are relative, with single slashes and "
            "without '..'; the file that mentions it was not written by dpo-score or was altered"
        )
    return name


def host_tag() -> str:
    """Eight hexadecimal digits that stand for this host."""
    return hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()


def temp_name(name: str) -> str:
    """A fresh unfinished name for `name`; long names are cut, since only the ending matters."""
    return f"{WORK}/{name.rsplit('/', 1)[-1][:60]}.tmp-{os.getpid()}-{host_tag()}{secrets.token_hex(4)}"


def quarantine_name(name: str) -> str:
    """Where a damaged file is kept for inspection; never the same place twice."""
    return f"{QUARANTINE}/{name.replace('/', '~')[-160:]}-{secrets.token_hex(4)}"


def alive(pid: int) -> bool:
    """Whether a process of this host runs under `pid`."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
