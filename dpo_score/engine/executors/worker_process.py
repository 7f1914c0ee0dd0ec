"""One worker as a process of its own, which does what it is asked through a pipe and ends when the asker does.

python -m dpo_score.engine.executors.worker_process DESCRIPTOR      started by process_crew.py
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection

from dpo_score.engine.executors.worker import Assignment, Report, Worker, WorkerReady
from dpo_score.errors import DpoScoreError


def serve(pipe: Connection) -> None:
    """Stand, then answer one request after the other: None is to decide, an assignment to work."""
    worker = Worker(*pipe.recv())
    _send(pipe, worker.ready())
    requests: queue.Queue[Assignment | None] = queue.Queue()
    threading.Thread(target=_listen, args=(pipe, requests), name="listener", daemon=True).start()
    while True:
        _do(worker, requests.get(), pipe)


def _listen(pipe: Connection, requests: queue.Queue[Assignment | None]) -> None:
    """Requests as they come. The end of the pipe ends the process, whatever it is at: what it had not committed is
    computed again by another."""
    while True:
        try:
            requests.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(70)


def _do(worker: Worker, request: Assignment | None, pipe: Connection) -> None:
    try:
        if request is None:
            _send(pipe, worker.decide())
            return
        for report in worker.work(request):
            _send(pipe, report)
        _send(pipe, None)
    except Exception as error:  # noqa: BLE001 - raised by the process that asked
        _send(pipe, _portable(error))


def _send(pipe: Connection, answer: WorkerReady | Report | Exception | None) -> None:
    try:
        pipe.send(answer)
    except OSError:
        os._exit(70)


def _portable(error: Exception) -> Exception:
    """The error itself where it can travel, else its text."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - made a line above
    except Exception:  # noqa: BLE001 - whatever its class does when it is copied
        return DpoScoreError(f"{type(error).__name__}: {error}")
    return error


def main() -> None:
    """Ctrl-C is for the process that asked, which ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
