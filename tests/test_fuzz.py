"""No file of a folder and no option, however odd, ends a command in a traceback.

    python -m pytest tests/test_fuzz.py                          a few seconds, as in CI
    DPO_SCORE_FUZZ_SECONDS=3600 python -m pytest tests/test_fuzz.py

A folder of the first release is spoiled in one place (bits, lengths, types, depths, aliases) and read by one command;
options are drawn from odd values. Each try is told by its seed, which a failure prints.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from dpo_score.cli.main import main

OUT = Path(__file__).parent / "data" / "compat" / "v1" / "out"
SECONDS = float(os.environ.get("DPO_SCORE_FUZZ_SECONDS", "8"))
READING = (
    "verify",
    "status",
    "compare",
    "report --no-text",
    "audit --no-text",
    "rescore",
    "inspect",
    "export --to trl",
)
ODD_VALUES = (
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    "",
    "x" * 10_000,
    "\x1b[31m",
    [],
    {},
    [[]],
    {"a": {}},
    "../../etc",
    "NaN",
)
DEEP = "[" * 5_000 + "]" * 5_000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
NUMBERS = ("1e300", "-1", "0", "nan", "inf", "1e-300", "", "x", "0.1,1e300", "9" * 400)


def spoiled(draw: random.Random, data: bytes) -> bytes:
    """One change of a file."""
    kind = draw.randrange(6)
    if kind == 0 and data:
        place = draw.randrange(len(data))
        return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]
    if kind == 1:
        return data[: draw.randrange(len(data) + 1)]
    if kind == 2:
        return draw.choice([b"", b"null", b"[]", b"{}", b"\xff\xfe", b"PAR1", DEEP.encode(), BOMB.encode()])
    try:
        fields = json.loads(data)
    except ValueError:
        return data + bytes(draw.randrange(256) for _ in range(20))
    return json.dumps(changed(draw, fields)).encode()


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


def ends_well(command: list[str], seed: int) -> None:
    try:
        main(command)
    except SystemExit as stopped:
        if stopped.code not in (None, 0, 1, 2, 3, 4, 5, 6):
            raise AssertionError(f"seed {seed}: {command} ended with {stopped.code!r}") from stopped
    except Exception as error:
        raise AssertionError(f"seed {seed}: {command} ended in {error!r}") from error


def test_no_spoiled_file_ends_a_command_in_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = sorted(str(path.relative_to(OUT)) for path in OUT.rglob("*") if path.is_file())
    until, seed = time.monotonic() + SECONDS, 0 if SECONDS < 60 else random.randrange(10**9)
    while time.monotonic() < until:
        draw, out = random.Random(seed), tmp_path / "out"
        shutil.copytree(OUT, out)
        for _ in range(draw.randint(1, 2)):
            path = out / draw.choice(names)
            path.write_bytes(spoiled(draw, path.read_bytes()))
        command, *options = draw.choice(READING).split()
        ends_well([command, str(out), *options], seed)
        assert "Traceback" not in "".join(capsys.readouterr()), seed
        shutil.rmtree(out)
        seed += 1
    assert seed


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("option", ["--beta", "--label-smoothing"])
def test_no_number_ends_rescore_in_a_traceback(tmp_path: Path, option: str, number: str) -> None:
    shutil.copytree(OUT, tmp_path / "out")
    ends_well(["rescore", str(tmp_path / "out"), f"{option}={number}"], 0)


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pipeline.yaml").write_text(BOMB)
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(tmp_path / "pipeline.yaml"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "its aliases stand for more than" in " ".join(capsys.readouterr().err.split())
