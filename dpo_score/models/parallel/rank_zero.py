"""Rank 0 of a group: starts the others as its children and has them do, step by step, what it does itself.

    rank 0 ──(verb, arguments)──▶ every worker      all run the step, meeting in torch.distributed's collectives
    rank 0 ◀──None, or what went wrong── every worker

Promises: a worker that dies, fails alone or stays silent is a `GroupLostError` here; rank 0 caught in a collective
that its workers left is ended; workers end with rank 0. Steps and answers go through private pipes, so
nothing that others can reach is unpickled. Does not: know what a verb means (logprobs/rank_worker.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpo_score.errors import GroupLostError, ModelError
from dpo_score.models.memory import is_out_of_memory
from dpo_score.models.parallel.process_group import BACKENDS, COLLECTIVE_SECONDS, Group, group_of, joined
from dpo_score.models.weights import brief

FOLLOW = (sys.executable, "-m", "dpo_score.logprobs.rank_worker")
LOAD_SECONDS = 7200.0
"""How long ranks may be apart in starting and in reading weights."""
DESERTED_SECONDS = 60.0
"""How long rank 0 that failed waits for workers, which may be caught in a collective that it left."""
CLOSE_SECONDS = 10.0
"""How long ranks may take to leave their group together."""
LEAVE = "leave"
"""The verb that ends a worker."""
CAUGHT_SECONDS = 15.0
"""From a worker's death to the end of rank 0 that has not noticed: it hangs in a collective."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong in one rank. `collectives`: how many it had entered, so that ranks that failed alike are told
    from ranks that left others waiting."""

    kind: str
    text: str
    out_of_memory: bool
    collectives: int

    @classmethod
    def of(cls, error: Exception) -> Failure:
        memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
        return cls(type(error).__name__, brief(error), memory, _collectives())


@dataclass(frozen=True, slots=True, eq=False)
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.process.pid})"


class RankZero(Group):
    """Rank 0, with its workers as child processes."""

    def __init__(
        self, size: int, device_kind: str, settings: Mapping[str, Any], command: Sequence[str] = FOLLOW
    ) -> None:
        """`settings`: what a worker makes its `ModelLoader` of. `command` is given the descriptor of a pipe."""
        if device_kind not in BACKENDS:
            raise ModelError(f"--tensor-parallel needs CUDA devices or the CPU, not {device_kind}")
        if dist.is_initialized():
            raise ModelError("--tensor-parallel: this process is in a torch.distributed group of its own already")
        if device_kind == "cuda" and torch.cuda.device_count() < size:
            raise ModelError(f"--tensor-parallel {size}: only {torch.cuda.device_count()} CUDA devices are visible")
        self._folder = Path(tempfile.mkdtemp(prefix="dpo-score-ranks-"))
        self._workers = [_started(command, rank) for rank in range(1, size)]
        self._closing, self._numbers = False, count()
        self._entered: float | None = None
        try:
            meeting = self._folder / "meeting"
            for worker in self._workers:
                self._tell(worker, (worker.rank, size, device_kind, meeting, dict(settings)))
            self._answers(LOAD_SECONDS)  # every worker has started, so joining takes moments
            super().__init__(0, size, device_kind, meeting)
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def number(self) -> int:
        """One that this rank has not given out before."""
        return next(self._numbers)

    @contextmanager
    def step(self, verb: str, *arguments: Any, seconds: float = COLLECTIVE_SECONDS) -> Iterator[None]:
        """Have all workers do `verb` while the body does the same here.

        Raises the body's own error where all ranks failed alike, else GroupLostError.
        """
        for worker in self._workers:
            self._tell(worker, (verb, *arguments))
        mine: Exception | None = None
        self._entered = time.monotonic()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised below, once it is known whether all failed alike
            mine = error
        finally:
            self._entered = None
        self._settle(mine, self._others(mine, seconds))

    def _others(self, mine: Exception | None, seconds: float) -> list[Failure | None]:
        """The answers of the workers, which may be waiting for this rank in vain where it failed."""
        try:
            return self._answers(seconds if mine is None else min(seconds, DESERTED_SECONDS))
        except GroupLostError as lost:
            if mine is None:
                raise
            # the loss first: where a worker died, what rank 0 says (a connection reset) only is_worker from it
            raise GroupLostError(f"{lost.reason}; rank 0: {type(mine).__name__}: {brief(mine)}") from mine

    def _settle(self, mine: Exception | None, answers: Sequence[Failure | None]) -> None:
        own = None if mine is None else Failure.of(mine)
        failures = [own, *answers]
        if not any(failures):
            return
        if mine is not None and own is not None and _alike(failures) and _usable_after(mine, own):
            raise mine
        said = [f"rank {rank}: {found.kind}: {found.text}" for rank, found in enumerate(failures) if found is not None]
        raise GroupLostError(f"a tensor-parallel group failed ({'; '.join(said)})") from mine

    @staticmethod
    def _tell(worker: _Worker, message: Any) -> None:
        try:
            worker.connection.send(message)
        except OSError:
            raise _lost(worker) from None

    def _answers(self, seconds: float) -> list[Failure | None]:
        until = time.monotonic() + seconds
        return [_answer(worker, until, seconds) for worker in self._workers]

    def _watch(self) -> None:
        """End this process when a worker is dead and that goes unnoticed: it is caught in a collective."""
        died: float | None = None
        while not self._closing:
            time.sleep(0.5)
            entered = self._entered
            if died is None and any(worker.process.poll() is not None for worker in self._workers):
                died = time.monotonic()
            if died and entered and time.monotonic() - max(died, entered) > CAUGHT_SECONDS:
                print("a process of a tensor-parallel group died: the same command resumes", file=sys.stderr)
                os._exit(70)

    def close(self) -> None:
        """End the workers, and this process's membership.

        All ranks leave their group together: with NCCL a rank that leaves it alone may wait for the others for ever.
        Whoever has not left within CLOSE_SECONDS is ended.
        """
        self._closing = True
        joined(None)
        for worker in self._workers:
            with suppress(GroupLostError):
                self._tell(worker, (LEAVE,))
        leave_group(whole=all(worker.process.poll() is None for worker in self._workers))
        until = time.monotonic() + CLOSE_SECONDS
        for worker in self._workers:
            worker.connection.close()
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(until - time.monotonic(), 0.0))
            worker.process.kill()
            worker.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def leave_group(whole: bool) -> None:
    """End this process's membership, within CLOSE_SECONDS: what hangs is left behind in a thread that ends with the
    process. `whole`: all ranks are there, and leave with this one; else its connections are cut."""
    if not dist.is_initialized():
        return
    cut: Any = getattr(dist.distributed_c10d, "_abort_process_group", None)
    alone = not whole and cut is not None and dist.get_backend() == "nccl"
    leaving = threading.Thread(target=cut if alone else dist.destroy_process_group, name="leave", daemon=True)
    leaving.start()
    leaving.join(CLOSE_SECONDS)


def _alike(failures: Sequence[Failure | None]) -> bool:
    """All ranks failed at the same place, so none waits for another."""
    return len({None if f is None else (f.kind, f.out_of_memory, f.collectives) for f in failures}) == 1


def _usable_after(error: Exception, failure: Failure) -> bool:
    """Whether ranks that failed alike can go on together: not after an error of the collectives themselves."""
    return failure.out_of_memory or not isinstance(error, RuntimeError)


def _started(command: Sequence[str], rank: int) -> _Worker:
    here, there = Pipe()
    with there:
        fd = there.fileno()
        process = subprocess.Popen([*command, str(fd)], pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=2)
    return _Worker(rank, process, here)


def _answer(worker: _Worker, until: float, seconds: float) -> Failure | None:
    try:
        if not worker.connection.poll(max(until - time.monotonic(), 0.0)):
            raise GroupLostError(f"{worker.name} of a tensor-parallel group gave no answer within {seconds:g} s")
        answer: Failure | None = worker.connection.recv()
    except (EOFError, OSError):
        raise _lost(worker) from None
    return answer


def _lost(worker: _Worker) -> GroupLostError:
    with suppress(subprocess.TimeoutExpired):
        worker.process.wait(5)
    status = worker.process.returncode
    return GroupLostError(f"{worker.name} of a tensor-parallel group died (exit status {status})")


def _collectives() -> int:
    """Collectives that this process has entered."""
    if not dist.is_initialized():
        return 0
    default: Any = dist.distributed_c10d._get_default_group()
    return int(default._get_sequence_number_for_group())


def group_step(model: Any, verb: str, *arguments: Any) -> AbstractContextManager[None]:
    """A step of the group that holds `model`, where this process leads it; else nothing."""
    group = group_of(model)
    return group.step(verb, *arguments) if isinstance(group, RankZero) else nullcontext()
