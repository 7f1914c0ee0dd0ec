"""Blocks read, rendered and tokenised in processes of their own, handed back in order.

Python renders and tokenises some thousand pairs a second and processor; a GPU scores a small model's pairs faster than
that. Each process is a fresh interpreter that gets the sets, the rows and the renderer once, over its standard input,
proves that it makes token ids by the same rules (`Renderer.identity`), and then encodes runs of consecutive blocks.
A block's bytes are those of `encoded_block` in this process.

What cannot be sent (code that a tokenizer brings along) is encoded in this process instead, and a line says so. A
process that ends before its work is done ends the run with one error; committed blocks are kept.

The pipes carry pickles, each behind its length: both ends are this program, started by itself.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from dpo_score.data.dataset import PairReader
from dpo_score.engine.block_inputs import BlockText, TextPlan, encoded_block
from dpo_score.engine.progress import Progress
from dpo_score.engine.threads import prefetch
from dpo_score.errors import DpoScoreError, TextProcessError
from dpo_score.heap import collect_garbage_rarely

RUN_ROWS = 2048
"""Rows of the consecutive blocks that a process is given at once: it reads a file on from where it is."""
WORTHWHILE_ROWS = 20_000
"""Fewer rows are encoded here, unless a number of processes is asked for: starting one takes a few seconds."""
MOST, CORES_EACH = 8, 2
_LENGTH = struct.Struct("<Q")


def process_count(asked: int | None, rows: int, device_kind: str) -> int:
    """How many processes encode `rows`: what is asked for, else some where a GPU would wait for this one."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, cores // CORES_EACH) if device_kind == "cuda" and rows >= WORTHWHILE_ROWS else 0


@contextmanager
def encoded_apart(
    plan: TextPlan, blocks: Sequence[int], count: int, progress: Progress
) -> Iterator[Iterable[BlockText]]:
    """`blocks` in order, made by `count` processes; nothing where there are to be none, or the plan cannot be sent."""
    with ExitStack() as stack:
        try:
            processes = [stack.enter_context(TextProcess()) for _ in range(min(count, len(blocks)))]
            _introduce(processes, plan)
        except CannotSend as reason:
            progress.warn(f"rows are read and tokenised by one process, since others cannot do what it does: {reason}")
            processes = []
        yield _in_turn(processes, blocks, max(1, RUN_ROWS // plan.rows.block_rows)) if processes else ()


def _introduce(processes: Sequence[TextProcess], plan: TextPlan) -> None:
    """Every process has the plan, and proves that it makes token ids as this one does. Raises CannotSend."""
    if not processes:
        return
    try:
        payload = pickle.dumps(plan)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CannotSend(str(error)) from None
    for process in processes:
        process.send(payload)
    expected = plan.renderer.identity()
    for process in processes:
        found = process.answer()
        if found != expected:
            raise CannotSend(found if isinstance(found, str) else "their token ids would be others")


def _in_turn(processes: Sequence[TextProcess], blocks: Sequence[int], size: int) -> Iterator[BlockText]:
    """Blocks in order, `size` of them from one process, then from the next. A process is at most a run ahead of the
    reader, which bounds memory."""
    runs, count = [blocks[at : at + size] for at in range(0, len(blocks), size)], len(processes)
    with ExitStack() as stack:
        encoded = [process.encoded(runs[number::count]) for number, process in enumerate(processes)]
        streams = [stack.enter_context(closing(prefetch(blocks, size))) for blocks in encoded]
        for number, run in enumerate(runs):
            yield from islice(streams[number % count], len(run))


class CannotSend(Exception):
    """What a plan holds exists in this process alone, such as code that a tokenizer brought along."""


class TextProcess:
    """One process, from its start to its end."""

    def __enter__(self) -> TextProcess:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dpo_score.engine.text_processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            write_frame(self._process.stdin, data)
        except OSError:
            raise self._ended() from None

    def answer(self) -> Any:
        """What the process sends next. Raises the error that it met, TextProcessError where it has ended."""
        assert self._process.stdout is not None
        data = read_frame(self._process.stdout)
        if data is None:
            raise self._ended()
        found = pickle.loads(data)  # noqa: S301 - written by this program, in a process that it started
        if isinstance(found, DpoScoreError):
            raise found
        return found

    def encoded(self, runs: Sequence[Sequence[int]]) -> Iterator[BlockText]:
        """The blocks of these runs. The process always has its next run at hand."""
        for number, run in enumerate(runs):
            for ahead in runs[:2] if number == 0 else runs[number + 1 : number + 2]:
                self.send(pickle.dumps(list(ahead)))
            for _ in run:
                yield _unpacked(*self.answer())

    def _ended(self) -> TextProcessError:
        code = self._process.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return TextProcessError(
            f"a process that reads and tokenises rows {how}, perhaps for want of memory. Committed blocks are kept: "
            "the same command resumes; with --text-processes 0 this process does the work itself"
        )


def write_frame(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> bytes | None:
    """The next frame; None at the end of the pipe, also where it ends within a frame."""
    header = pipe.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    data = pipe.read(length)
    return data if len(data) == length else None


def _packed(text: BlockText) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, text.table.schema) as writer:
        writer.write_table(text.table)
    return pickle.dumps((text.block, text.start, text.stop, sink.getvalue().to_pybytes(), text.rejected))


def _unpacked(block: int, start: int, stop: int, table: bytes, rejected: Any) -> BlockText:
    return BlockText(block, start, stop, pa.ipc.open_stream(table).read_all(), rejected)


# --- the other side of the pipes ---


def main() -> None:
    """Encode what standard input asks for until it ends; standard output carries frames and nothing else."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides when to stop
    collect_garbage_rarely()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    requests = sys.stdin.buffer
    payload = read_frame(requests)
    if payload is None:
        return
    try:
        plan: TextPlan = pickle.loads(payload)  # noqa: S301 - from the process that started this one
    except (ImportError, AttributeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        write_frame(answers, pickle.dumps(f"{type(error).__name__}: {error}"))
        return
    write_frame(answers, pickle.dumps(plan.renderer.identity()))
    reader = PairReader(plan.datasets)
    while (request := read_frame(requests)) is not None:
        try:
            for block in pickle.loads(request):  # noqa: S301
                write_frame(answers, _packed(encoded_block(plan, reader, block)))
        except DpoScoreError as error:
            write_frame(answers, pickle.dumps(error))
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
