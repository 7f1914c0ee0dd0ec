"""A following rank: one process that loads, checks and computes what its leader does, at the same time.

    python -m dpo_score.logprobs.rank_worker DESCRIPTOR      started by rank_zero.py, with a pipe to it

Promises: never decides anything; what goes wrong is answered, not raised; ends when its leader does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from typing import Any

from dpo_score.data.types import TokenSequence
from dpo_score.logprobs.scorer import Path, make_path
from dpo_score.logprobs.self_check import check_model
from dpo_score.logprobs.torch_settings import running
from dpo_score.logprobs.upcast import widened
from dpo_score.models import memory
from dpo_score.models.loader import ModelLoader
from dpo_score.models.numerics import Numerics
from dpo_score.models.parallel.process_group import Group
from dpo_score.models.parallel.rank_zero import LEAVE, Failure, leave_group
from dpo_score.models.resolve import ModelSource

PARENT_SECONDS = 0.5


class RankWorker:
    """What the steps of a leader do here. `paths`: ways to compute of the loaded model, by the leader's number."""

    def __init__(self, loader: ModelLoader) -> None:
        self._loader = loader
        self._model: Any = None
        self._paths: dict[int, tuple[Path, Numerics]] = {}

    def do(self, verb: str, arguments: Sequence[Any]) -> Failure | None:
        """Carry out one step; returns what went wrong, if anything."""
        try:
            verbs: Mapping[str, Callable[..., None]] = {
                "load": self.load,
                "verify": self.verify,
                "path": self.path,
                "compute": self.compute,
            }
            verbs[verb](*arguments)
        except Exception as error:  # noqa: BLE001 - carried to the leader
            failure = Failure.of(error)
            if failure.out_of_memory:
                memory.release(self._model.device.type)
            return failure
        return None

    def load(self, source: ModelSource, numerics: Numerics, attn_implementation: str | None) -> None:
        self._paths.clear()
        self._model = self._loader.load(source, numerics, attn_implementation).model

    def verify(self, numerics: Numerics) -> None:
        check_model(self._model, numerics)

    def path(self, number: int, numerics: Numerics, stats: Sequence[str], plain: bool, wide: bool) -> None:
        with running(numerics), widened(self._model) if wide else nullcontext():
            self._paths[number] = make_path(self._model, numerics, stats, plain), numerics

    def compute(self, number: int, sequences: Sequence[TokenSequence], wide: bool) -> None:
        path, numerics = self._paths[number]
        with running(numerics), widened(self._model) if wide else nullcontext():
            path.compute(sequences)


def follow(connection: Connection) -> None:
    """Join the group that the first message names, then carry out its steps until it is gone."""
    rank, size, device_kind, meeting, settings = connection.recv()
    connection.send(None)
    Group(rank, size, device_kind, meeting)
    worker = RankWorker(ModelLoader(**settings))
    while True:
        verb, *arguments = connection.recv()
        if verb == LEAVE:
            leave_group(whole=True)
            return
        connection.send(worker.do(verb, arguments))


def main() -> None:
    """The end of the leader is the end of this process, whether it waits for orders or in a collective."""
    warnings.simplefilter("ignore")  # the leader warns of the same
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the leader, who decides
    threading.Thread(target=_watch, args=(os.getppid(),), name="parent", daemon=True).start()
    with suppress(EOFError, OSError):
        follow(Connection(int(sys.argv[1])))
    os._exit(0)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    main()
