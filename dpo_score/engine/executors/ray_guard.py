"""Watches over a run on a Ray cluster from a process of its own, and says how to go on when it ends without its end.

    python -m dpo_score.engine.executors.ray_guard SESSION      standard input: a pipe that the run holds

A run whose head process (GCS) or node (raylet) is killed is ended by Ray itself, at once or after a minute, without a
word that helps. This process notices such a death, tells the run to end (a byte on standard output), and writes one
sentence to standard error. Processes of SESSION, a cluster that the run made for itself, are ended too; SESSION is
empty for a cluster that the run has only joined. The word `done` on the pipe is the run's own end: nothing is said.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 1.0
HEAD = ("gcs_server", "raylet")
LOST = (
    "error: the run ended before its end: a process of its Ray cluster, or its own, was killed or ran out of memory. "
    "Committed blocks are kept: the same command resumes"
)


@dataclass(frozen=True, slots=True)
class Process:
    """`program`: the name of its file; `parent`: the process that started it."""

    number: int
    parent: int
    program: str
    words: tuple[str, ...]


def processes() -> list[Process]:
    """Every process of this machine but this one; none where /proc is absent."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended meanwhile
        if int(folder.name) != os.getpid():
            found.append(Process(int(folder.name), parent, Path(words[0]).name, tuple(words)))
    return found


def head_of(session: str) -> list[int]:
    """The processes that a session cannot do without."""
    of_session = (p for p in processes() if session and any(session in word for word in p.words))
    return [process.number for process in of_session if process.program in HEAD]


def below(known: set[int]) -> set[int]:
    """`known`, and every process that one of them has started, directly or not."""
    there, before = processes(), -1
    while len(known) != before:
        before = len(known)
        known = known | {process.number for process in there if process.parent in known}
    return known


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def main() -> None:
    """Ctrl-C is for the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    session = sys.argv[1]
    head = head_of(session)
    known, said = set(head), b""
    while all(map(is_alive, head)):
        known = below(known)  # Ray renames its processes, so a dead parent's are no longer found
        ready, _, _ = select.select([0], [], [], POLL_SECONDS)
        if ready:
            said = os.read(0, 16)
            break
    if said == b"done":
        return
    with suppress(BrokenPipeError):  # the run itself was killed
        os.write(1, b"!")
    for process in below(known):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    print(LOST, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
