"""A warmed process that forks one child per command line, so that a child costs no imports.

    stdin   {"argv": [...], "watch": [folder, ...], "record": file or null,
             "fault": {"kind": "kill" | errno name | signal, "call": i, "after": bool, "times": n},
             "kill_after": seconds from the first storage call to a SIGKILL from outside, or null}
    stdout  {"status": exit code, or -signal; "calls": [primitive, ...]; "errors": stderr text; "strays": [...]}

In the child the storage primitives are numbered; the fault strikes before or after call number `call`. `watch`
reports files that anything but the primitives (or a lock) opened for writing under the folders of the command.
`record`: where each call goes with its arguments and result, pickled, in the order in which they took effect.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from dpo_score.storage import io as storage
from tests.storage.shim import PRIMITIVES

BLOCK_ROWS = 20
BETWEEN_SIGNALS = 0.5
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def warm_up() -> None:
    """Import what a run imports, and start no thread."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    import pyarrow.parquet
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from dpo_score.cli import main as cli  # noqa: F401
    from dpo_score.cli import run as commands  # noqa: F401
    from dpo_score.engine import prepare
    from dpo_score.engine import run as local
    from dpo_score.logprobs import scorer  # noqa: F401
    from dpo_score.logprobs import self_check as verify  # noqa: F401
    from dpo_score.models import loader as model  # noqa: F401

    torch.set_num_threads(1)
    assert pyarrow.parquet is not None
    assert local.run is not None
    prepare.block_rows = lambda *_: BLOCK_ROWS  # type: ignore[assignment]


class Numbered:
    """Numbers the primitive calls of this process and lets the fault strike."""

    def __init__(self, fault: dict[str, Any], log: Path) -> None:
        self._fault, self._count = fault, 0
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for name in PRIMITIVES:
            setattr(storage, name, self._wrapped(name, getattr(storage, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self._count += 1
            number = self._count
            os.write(self._log, f"{name}\n".encode())
            strikes = number == self._fault.get("call")
            if strikes and not self._fault.get("after"):
                self._strike()
            result = real(*args)
            if strikes and self._fault.get("after"):
                self._strike()
            return result

        return call

    def _strike(self) -> None:
        kind = self._fault["kind"]
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind in ("SIGINT", "SIGTERM"):
            for _ in range(self._fault.get("times", 1)):
                os.kill(os.getpid(), getattr(signal, kind))
                time.sleep(BETWEEN_SIGNALS)
        elif kind is not None:
            number = getattr(errno, kind)
            raise OSError(number, os.strerror(number))


def record(path: Path) -> None:
    """Write every primitive call down. Threads call one at a time, so that the order is a true one."""
    file, one_at_a_time = path.open("wb"), threading.Lock()

    def recorded(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with one_at_a_time:
                result = real(*args)
                plain = [bytes(arg) if isinstance(arg, memoryview) else arg for arg in args]
                pickle.dump((name, plain, result), file)
                file.flush()
                return result

        return call

    for name in PRIMITIVES:
        setattr(storage, name, recorded(name, getattr(storage, name)))


def watch(folders: list[str], strays: Path) -> None:
    """Report every opening for writing below `folders` that did not come through storage or a lock."""
    report = os.open(strays, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(args[0], (str, bytes)):
            return
        path = os.fsdecode(args[0])
        if args[2] & WRITING and any(path.startswith(folder) for folder in folders):
            where = _callers()
            if not any(part in where for part in ("dpo_score/storage/io.py", "/filelock/")):
                os.write(report, f"{path} {where}\n".encode())

    sys.addaudithook(hook)


def _callers() -> str:
    frame: FrameType | None = sys._getframe(2)
    found = []
    while frame is not None:
        found.append(frame.f_code.co_filename)
        frame = frame.f_back
    return " ".join(found)


def child(job: dict[str, Any], folder: Path) -> None:
    """Run one command line; never returns."""
    status = 70
    try:
        err = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT)
        os.dup2(err, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if job.get("watch"):
            watch(job["watch"], folder / "strays")
        if job.get("record"):
            record(Path(job["record"]))
        Numbered(job.get("fault") or {}, folder / "calls")
        status = _main(job["argv"])
    finally:
        sys.stderr.flush()
        os._exit(status)


def _main(argv: list[str]) -> int:
    from dpo_score.cli import main as cli

    try:
        cli.main(argv)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:  # noqa: BLE001 - whatever it is, the test wants to see it
        traceback.print_exc()
        return 70
    return 0


def kill_after(pid: int, seconds: float, log: Path) -> None:
    """At whatever the child is doing then; a child that has ended is left alone."""
    while not _has_ended(pid) and not (log.exists() and log.stat().st_size):
        time.sleep(0.001)
    until = time.monotonic() + seconds
    while not _has_ended(pid) and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)  # of one that has ended and is not yet waited for, this changes nothing


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def serve() -> None:
    warm_up()
    gc.freeze()  # a child that collects garbage would look at all of this, and so copy it
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            pid = os.fork()
            if not pid:
                child(job, folder)
            if job.get("kill_after") is not None:
                kill_after(pid, job["kill_after"], folder / "calls")
            _, status = os.waitpid(pid, 0)
            text = {n: (folder / n).read_text() if (folder / n).exists() else "" for n in ("calls", "stderr", "strays")}
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            "calls": text["calls"].split(),
            "errors": text["stderr"],
            "strays": text["strays"].splitlines(),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
