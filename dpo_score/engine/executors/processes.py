"""Workers as processes of this machine, each with the devices of one replica. Nothing to install, nothing to join."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from pathlib import Path

from dpo_score.config.schema import RunConfig
from dpo_score.engine.executors.pool import LostError, WorkerHandle
from dpo_score.engine.executors.worker import Assignment, Report, WorkerReady

KILLED_SECONDS = 10.0


class ProcessHand:
    """One process, started anew as often as it must be. `environment`: which devices it sees."""

    def __init__(self, config: RunConfig, environment: Mapping[str, str]) -> None:
        self._config, self._environment = config, environment
        self._start()

    def _start(self) -> None:
        self.pipe, there = connection.Pipe()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dpo_score.engine.executors.worker_process", str(there.fileno())],
                env={**os.environ, **self._environment},
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a library prints is no result of the command
            )
        self.pipe.send((self._config, str(Path.cwd())))

    def decide(self) -> None:
        self._send(None)

    def work(self, assignment: Assignment) -> None:
        self._send(assignment)

    def _send(self, request: Assignment | None) -> None:
        try:
            self.pipe.send(request)
        except OSError:
            return  # its answer will be that it is lost

    def answer(self) -> WorkerReady | Report | None:
        try:
            found: WorkerReady | Report | Exception | None = self.pipe.recv()
        except (EOFError, OSError):
            raise LostError(f"process {self._process.pid} died (exit status {self._wait()})") from None
        if isinstance(found, Exception):
            raise found
        return found

    def restart(self) -> None:
        self.kill()
        self.see_dead()
        self._start()

    def kill(self) -> None:
        self.pipe.close()
        self._process.kill()

    def see_dead(self) -> None:
        self._wait()

    def _wait(self) -> int | None:
        try:
            return self._process.wait(KILLED_SECONDS)
        except subprocess.TimeoutExpired:
            return None


class ProcessPlace:
    """This machine. `devices`: for each replica the GPUs that it sees, as CUDA_VISIBLE_DEVICES names them."""

    def __init__(self, devices: Sequence[str | None]) -> None:
        self._devices, self._hired = devices, 0

    @property
    def room(self) -> int:
        return len(self._devices)

    @property
    def needs(self) -> str:
        return "a process of its own"

    @property
    def has(self) -> str:
        return f"{os.cpu_count()} CPU cores on {platform.node()}"

    def start_worker(self, config: RunConfig) -> WorkerHandle:
        visible = self._devices[self._hired % len(self._devices)]
        self._hired += 1
        return ProcessHand(config, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})

    def answering(self, hands: Sequence[WorkerHandle], seconds: float) -> list[WorkerHandle]:
        owing = {hand.pipe: hand for hand in hands if isinstance(hand, ProcessHand)}
        return [owing[pipe] for pipe in connection.wait(list(owing), seconds)]  # type: ignore[index]
