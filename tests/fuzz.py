"""No file that is read and no option, however odd, ends a command in a traceback, without a word, or never.

    python -m tests.fuzz [--seconds 3600] [--seed N]      every failure with its seed; the same seed makes the same try

Each try runs one real command in this process. Tried in turn: a folder of results that is spoiled in one or two places
(bits, lengths, types, depths, aliases); odd options; odd pipeline files; model folders whose configuration, tokenizer
or weights are spoiled; data files of every kind and format, packed or not, spoiled in a cell or a byte; results and the
cache of a real run, of which any file is spoiled, that are read, verified and gone on with.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_score.cli.main import main as dpo_score
from dpo_score.config.schema import OPTIONS
from tests.data.formats.golden import GOLDEN
from tests.run_fixtures import preference_rows, write_rows
from tests.tiny import save_tiny

OLD_OUT = Path(__file__).parent / "data" / "compat" / "v1" / "out"
LONGEST_TRY = 120
MEMORY = 2 << 20
"""Kilobytes that one try may add to the most that the process has held: torch and the tiny models take less."""
ENDINGS = (0, 2, 3, 4, 5, 6)
READING = (
    "verify OUT",
    "status OUT",
    "compare OUT",
    "report OUT --no-text",
    "audit OUT --no-text",
    "rescore OUT",
    "inspect OUT",
    "export OUT --to trl",
    "select OUT --rule margin:high --keep 50%",
    "finish OUT",
)
NUMBERS = (0, -1, 1, 3, 0.5, -0.0, 1e300, 1e-300, 1e308, 10**30, "nan", "inf", "9" * 400, "1e300,0.1")
TEXTS = (
    "",
    " ",
    "x",
    "x" * 10_000,
    "\x1b[31m",
    "\ud800",
    "a=b=c",
    "../../etc",
    "NaN",
    "-",
    "0/0",
    "{}",
    "[",
    "é",
    "a,,b",
)
ODD_VALUES = (None, True, [], {}, [[]], {"a": {}}, [None], *NUMBERS, *TEXTS)
DEEP = "[" * 5_000 + "]" * 5_000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
LOOP = "a: &a\n  b: *a\n"
WHOLE_FILES = (
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\xff\xfe",
    b"\0" * 99,
    b"PAR1",
    DEEP.encode(),
    BOMB.encode(),
    LOOP.encode(),
)


# --- spoiling ---------------------------------------------------------------------------------------------------------


def spoiled(draw: random.Random, data: bytes) -> bytes:
    """One change of a file: a bit, a stretch of zeros, its length, all of it, a JSON value in it, bytes behind it."""
    kind = draw.randrange(7)
    if kind == 6 and data:
        start = draw.randrange(len(data))
        return data[:start] + bytes(len(data[start : start + 512])) + data[start + 512 :]
    if kind == 0 and data:
        place = draw.randrange(len(data))
        return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]
    if kind == 1:
        return data[: draw.randrange(len(data) + 1)]
    if kind == 2:
        return draw.choice(WHOLE_FILES)
    try:
        return json.dumps(changed(draw, json.loads(data))).encode()
    except (ValueError, RecursionError):  # no JSON, or spoiled before
        return data + bytes(draw.randrange(256) for _ in range(20))


def changed(draw: random.Random, value: Any) -> Any:
    """A JSON value with another one somewhere inside."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice(sorted(value))
        if draw.random() < 0.1:
            return {key: inner for key, inner in value.items() if key != name}
        return {**value, name: changed(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [*value[:place], changed(draw, value[place]), *value[place + 1 :]]
    return draw.choice(ODD_VALUES)


def as_option(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("\0", "").encode("utf-8", "surrogateescape" if text.isascii() else "replace").decode("utf-8")


# --- what is tried ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fuzz:
    """`home`: sound models and data, made once. Each method spoils something in `place` and names the command."""

    home: Path

    @classmethod
    def at(cls, home: Path) -> Fuzz:
        for seed, name in enumerate(("reference", "better")):
            save_tiny(home / name, seed=seed)
        write_rows(home / "pairs.parquet", preference_rows(4))
        fuzz = cls(home)
        assert (wrong := failure_of(fuzz.run(home))) is None, wrong
        return fuzz

    def run(self, place: Path, **other: object) -> list[str]:
        given = {
            "data": self.home / "pairs.parquet",
            "reference": self.home / "reference",
            "policy": f"a={self.home / 'better'}",
            "out": place / "out",
            "cache-dir": place / "cache",
            "threads": 1,
            "path": "plain",
            **other,
        }
        return ["run", *(f"--{name}={as_option(str(value))}" for name, value in given.items()), "--quiet"]

    def results(self, draw: random.Random, place: Path) -> list[str]:
        out = Path(shutil.copytree(OLD_OUT, place / "out"))
        for _ in range(draw.randint(1, 2)):
            path = draw.choice(sorted(path for path in out.rglob("*") if path.is_file()))
            path.write_bytes(spoiled(draw, path.read_bytes()))
        return [str(out) if word == "OUT" else word for word in draw.choice(READING).split()]

    def stored(self, draw: random.Random, place: Path) -> list[str]:
        for name in ("out", "cache"):
            shutil.copytree(self.home / name, place / name)
        everything = sorted(path for name in ("out", "cache") for path in (place / name).rglob("*") if path.is_file())
        for _ in range(draw.randint(1, 2)):
            path = draw.choice(everything)
            path.write_bytes(spoiled(draw, path.read_bytes()))
        command = draw.choice(
            ("run", "run elsewhere", "verify OUT", "report OUT", "cache verify", "cache ls", "cache gc")
        )
        if command.startswith("run"):
            return self.run(place, out=place / ("other" if "elsewhere" in command else "out"))
        where = {"cache": [f"--cache-dir={place / 'cache'}"], "gc": ["--max-bytes=1"]}
        words = [str(place / "out") if word == "OUT" else word for word in command.split()]
        return [*words, *(option for word in words for option in where.get(word, []))]

    def options(self, draw: random.Random, place: Path) -> list[str]:
        out = Path(shutil.copytree(OLD_OUT, place / "out"))
        option, value = draw.choice(OPTIONS), draw.choice(ODD_VALUES)
        command = draw.choice(("run", "run", "rescore", "compare", "select", "inspect"))
        if command == "run":
            return [*self.run(place, **{option.name.replace("_", "-"): as_option(value)}), "--dry-run"]
        names = {
            "rescore": ("beta", "label-smoothing", "loss", "loss-param", "reference-policy"),
            "compare": ("fail-if", "slice", "baseline", "policies"),
            "select": ("keep", "policy", "folds", "seed", "score-columns"),
            "inspect": ("row", "max-length", "render", "chat-template"),
        }[command]
        more = (
            ["--rule", draw.choice(("random", "margin:low", "dual", as_option(value)))] if command == "select" else []
        )
        return [command, str(out), *more, f"--{draw.choice(names)}={as_option(value)}"]

    def pipelines(self, draw: random.Random, place: Path) -> list[str]:
        sound = {
            "data": [{"name": "set", "path": str(self.home / "pairs.parquet")}],
            "reference": str(self.home / "reference"),
            "policies": [{"name": "a", "model": str(self.home / "better")}],
            "loss": {"name": "sigmoid", "beta": 0.1},
            "text": {"max_length": 64, "render": "auto"},
            "compute": {"threads": 1, "path": "plain", "batch_tokens": 512},
        }
        path = place / "pipeline.yaml"
        path.write_bytes(spoiled(draw, json.dumps(sound).encode()))
        return ["run", str(path), "--out", str(place / "out"), "--cache-dir", str(place / "cache"), "--dry-run"]

    def models(self, draw: random.Random, place: Path) -> list[str]:
        folder = Path(shutil.copytree(self.home / "better", place / "model"))
        path = draw.choice(sorted(folder.iterdir()))
        data = path.read_bytes()
        if path.suffix == ".safetensors" and draw.random() < 0.5:  # the header is JSON of its own
            size = int.from_bytes(data[:8], "little")
            header = json.dumps(changed(draw, json.loads(data[8 : 8 + size]))).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
        else:
            path.write_bytes(spoiled(draw, data))
        return self.run(place, reference=folder) if draw.random() < 0.3 else self.run(place, policy=f"a={folder}")

    def data(self, draw: random.Random, place: Path) -> list[str]:
        golden = draw.choice(GOLDEN)
        rows = [dict(row) for row in golden.rows]
        if draw.random() < 0.6:
            place_of = draw.randrange(len(rows))
            rows[place_of] = changed(draw, rows[place_of])
        path = place / draw.choice(("a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv"))
        content = packed(path.name, rows)
        path.write_bytes(spoiled(draw, content) if draw.random() < 0.6 else content)
        return [*self.run(place, data=f"set={path}"), "--dry-run"]


def packed(name: str, rows: Sequence[Any]) -> bytes:
    """Rows as the file of that name; rows that it cannot hold, as JSON lines."""
    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    if name.startswith("a.json"):
        text = lines if "jsonl" in name else json.dumps(list(rows)).encode()
        return gzip.compress(text) if name.endswith(".gz") else text
    if name.endswith(".csv"):
        return "\n".join(";".join(map(str, row.values())) for row in rows if isinstance(row, dict)).encode(
            "utf-8", "replace"
        )
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    except (pa.ArrowException, TypeError, AttributeError, OverflowError, UnicodeEncodeError):
        return lines
    return bytes(sink.getvalue())


# --- one try ----------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """A try that does not end."""


def _on_alarm(_number: int, _frame: FrameType | None) -> None:
    raise Hang


def failure_of(command: list[str]) -> str | None:
    """What is wrong with how the command ended; None where all is well."""
    said, before = io.StringIO(), signal.signal(signal.SIGALRM, _on_alarm)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code: Any = 0
    signal.alarm(LONGEST_TRY)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            dpo_score(command)
    except SystemExit as stopped:
        code = stopped.code or 0
    except (Exception, Hang):  # noqa: BLE001 - whatever it is, it is what is looked for
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    text = said.getvalue()
    if code not in ENDINGS and not (code == 1 and "(ENAMETOOLONG)" in text):  # what the disk refuses ends with 1
        return f"exit code {code!r}: {text[-2000:]}"
    if code and "error: " not in text:
        return f"exit code {code} without a word: {text[-2000:]}"
    if any(word in text for word in ("Traceback", "Warning:", "\x1b[31m")):
        return f"it says: {text[-2000:]}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    if grown > MEMORY:
        return f"memory: {grown >> 10:,} MiB more than anything before"
    return None


KINDS: tuple[Callable[[Fuzz, random.Random, Path], list[str]], ...] = (
    Fuzz.results,
    Fuzz.options,
    Fuzz.data,
    Fuzz.pipelines,
    Fuzz.models,
    Fuzz.stored,
)


def failures(home: Path, seconds: float, seed: int = 0) -> Iterator[str]:
    """Tries until the time is over, one kind after the other; every failure with its seed and command."""
    fuzz, until = Fuzz.at(home), time.monotonic() + seconds
    while time.monotonic() < until:
        draw = random.Random(seed)
        offline = patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a name that is no folder may be a hub's
        with offline, tempfile.TemporaryDirectory(dir=home) as place, contextlib.chdir(place):
            command = KINDS[seed % len(KINDS)](fuzz, draw, Path(place))
            if (wrong := failure_of(command)) is not None:
                yield f"seed {seed}: {' '.join(command)[:500]}\n{wrong}"
        seed += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    asked, found = parser.parse_args(), 0
    print(f"from seed {asked.seed} on, for {asked.seconds:g} s", flush=True)
    with tempfile.TemporaryDirectory() as home:
        for wrong in failures(Path(home), asked.seconds, asked.seed):
            print(wrong, flush=True)
            found += 1
    print(f"{found} failures")
    raise SystemExit(found > 0)


if __name__ == "__main__":
    main()
