"""Any rows, any damage to known rows, any configuration: the books balance, or one clear error; never a traceback.

Small and the same on every machine; `DPO_SCORE_FUZZ=500 pytest tests/engine/whole_runs/test_fuzz.py` looks further.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_score.config.load import load_config
from dpo_score.config.schema import OPTIONS
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.errors import DpoScoreError, UsageError
from dpo_score.results.verify.verify import verify
from tests.data.formats.golden import GOLDEN
from tests.data.test_fuzz import COLUMNS, TYPES, values

EXAMPLES = int(os.environ.get("DPO_SCORE_FUZZ", "6"))
relaxed = settings(
    max_examples=EXAMPLES,
    derandomize="DPO_SCORE_FUZZ" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
SOUND = {"prompt": "q", "chosen": " yes", "rejected": " no"}
strings = st.text(max_size=8) | st.sampled_from(["\x1b[31m", "\u202e", "<|im_end|>", "", "\0", "x" * 300])
cells = strings | st.none() | values


@pytest.fixture(scope="module")
def cache_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as found:
        yield Path(found)


def balances(data: Path, models: Mapping[str, Path], cache: Path, **options: Any) -> None:
    """Run it. input = scored + rejected, each row once, and `verify` agrees; or a DpoScoreError of one paragraph."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        given = {"reference": str(models["reference"]), "policy": [f"better={models['better']}"], "max_length": 128}
        given |= {"data": [f"set={data}"], "out": str(out), "cache_dir": str(cache), "path": "plain", "threads": 1}
        try:
            outcome = run(load_config(None, {**given, **options}, environment={}), Progress(quiet=True))
        except DpoScoreError:
            return
        counts = outcome.summary["policies"]["better"]["overall"]
        scored = read(out, "scores/better/*.parquet")
        lost = read(out, "rejects/*/*.parquet")
        assert counts["n"] == len(scored) + len(lost)
        assert len(set(scored)) == len(scored)
        assert len({tuple(row.split(":")[:2]) for row in (*scored, *lost)}) == outcome.summary["data"]["rows"]
        assert scored == sorted(scored, key=lambda row: [int(part) for part in row.split(":")])
        assert verify(str(out)).damage == []


def read(out: Path, pattern: str) -> list[str]:
    return [row for path in sorted(out.glob(pattern)) for row in pl.read_parquet(path)["row_id"]]


def lines(folder: Path, rows: list[Mapping[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@given(rows=st.lists(st.fixed_dictionaries(dict.fromkeys(SOUND, cells)), min_size=1, max_size=5))
@relaxed
def test_any_cells(rows: list[dict[str, Any]], folder: Path, models: Mapping[str, Path], cache_of_all: Path) -> None:
    balances(lines(folder, [SOUND, *rows, SOUND]), models, cache_of_all)


@given(golden=st.sampled_from(GOLDEN), data=st.data())
@relaxed
def test_any_damage_to_a_known_set(
    golden: Any, data: st.DataObject, folder: Path, models: Mapping[str, Path], cache_of_all: Path
) -> None:
    rows = [dict(row) for row in golden.rows]
    row = data.draw(st.sampled_from(rows))
    row[data.draw(st.sampled_from(sorted(row)))] = data.draw(cells)
    options = {k: v for k, v in golden.options.items() if k in ("preference", "pairing", "keep_ties")}
    balances(lines(folder, [*golden.rows, *rows]), models, cache_of_all, format=golden.format, **options)


@given(schema=st.dictionaries(st.sampled_from(COLUMNS), TYPES, min_size=1, max_size=4), count=st.integers(0, 3))
@relaxed
def test_any_schema(
    schema: dict[str, pa.DataType], count: int, folder: Path, models: Mapping[str, Path], cache_of_all: Path
) -> None:
    sound = {name: pa.array([text] * count, pa.string()) for name, text in SOUND.items()}
    table = pa.table({**sound, **{name: pa.nulls(count, type_) for name, type_ in schema.items()}})
    try:
        pq.write_table(table, folder / "rows.parquet")
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return
    balances(folder / "rows.parquet", models, cache_of_all)


plain = st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=6)
trees = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner))


@given(name=st.sampled_from(OPTIONS), value=trees)
@settings(relaxed, max_examples=max(EXAMPLES, 150))
def test_any_value_of_any_option(name: Any, value: Any, folder: Path) -> None:
    """Through a file: each ends in a configuration, or in an error that names the file."""
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps({"data": "x.parquet", "reference": "m", name.path[0]: nested(name.path[1:], value)}))
    with suppress(UsageError):
        load_config(str(path), {}, environment={})


def nested(path: tuple[str, ...], value: Any) -> Any:
    return {path[0]: nested(path[1:], value)} if path else value


@given(content=st.text(max_size=60) | trees.map(json.dumps))
@settings(relaxed, max_examples=max(EXAMPLES, 100))
def test_any_pipeline_file(content: str, folder: Path) -> None:
    path = folder / "pipeline.yaml"
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    with suppress(UsageError):
        load_config(str(path), {}, environment={})
