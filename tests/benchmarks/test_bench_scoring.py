"""The speed benchmark runs, says how far its systems are apart, and takes the options that its page gives it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.benchmarks import bench_scoring
from tests.tiny import save_tiny

NAME = "tests.benchmarks.bench_scoring"
PAGE = Path(__file__).with_name("README.md")


def words_of_the_page() -> list[str]:
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"python -m {NAME}"))
    return shlex.split(line)[3:]


def test_the_options_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [NAME, *words_of_the_page()])
    asked = bench_scoring.options()
    assert asked.rows == 64
    assert asked.systems.split(",")[0] == "fast"


@pytest.mark.slow
def test_two_systems_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"Say {i}.", "chosen": f" It is {i}.", "rejected": f" I say nothing of {i}."} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    given = {
        "--model": save_tiny(tmp_path / "model", "llama"),
        "--data": tmp_path / "d.parquet",
        "--json": tmp_path / "figures.json",
        "--systems": "fast,plain",
        "--rounds": 1,
        "--threads": 1,
    }
    monkeypatch.setattr(sys, "argv", [NAME, *(str(word) for option in given.items() for word in option)])
    bench_scoring.main()
    found = json.loads((tmp_path / "figures.json").read_text())
    tokens = sum(len(text) + (name != "prompt") for row in rows for name, text in row.items())
    assert found["tokens"] == tokens  # one a byte, and an end behind each answer
    assert [line["system"] for line in found["figures"]] == ["fast", "plain"]
    assert all(line["unique tokens/s"] > 0 and line["max |Δ| nats"] <= 1e-4 for line in found["figures"])
