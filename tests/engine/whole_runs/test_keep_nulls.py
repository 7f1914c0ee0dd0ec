"""Keys that are null only because Arrow pads structs: left out, or kept as TRL keeps them, by every command alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_score import score
from dpo_score.cli.inspect import inspect
from dpo_score.results.run_folder import open_out
from dpo_score.results.source_text import stored_reader, text_source
from tests.exported import export, read
from tests.run_fixtures import Runner

CALLS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def calling(**arguments: str) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
    return [{"role": "assistant", "content": "", "tool_calls": [call]}]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two calls with different arguments: as structs, each is padded with the key of the other."""
    rows = [
        {"prompt": [{"role": "user", "content": "q"}], "chosen": calling(query="x"), "rejected": calling(other="y")},
        {"prompt": [{"role": "user", "content": "r"}], "chosen": calling(other="z"), "rejected": calling(query="x")},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "calls.parquet")
    return tmp_path / "calls.parquet"


def shown(capsys: pytest.CaptureFixture[str], data: Path, **settings: Any) -> str:
    inspect(str(data), 0, settings)
    return capsys.readouterr().out


@pytest.mark.parametrize("keep", [False, True])
def test_every_command_reads_the_same_pair(
    keep: bool, data: Path, runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how: dict[str, Any] = {"chat_template": CALLS, "keep_nulls": keep}
    runner(data, tmp_path / "out", path="plain", **how)
    digests = pq.read_table(tmp_path / "out/scores/better")["pair_digest"].to_pylist()

    store, manifest = open_out(str(tmp_path / "out"))
    source = text_source(store, manifest)
    assert not isinstance(source, str)
    reader = stored_reader(source, manifest)
    assert not isinstance(reader, str)
    again = [reader.encode(pair).pair_digest for pair in source.pairs(["0:0", "0:1"]).values()]  # type: ignore[union-attr]
    models = {"reference": runner.models["reference"], "policy": runner.models["better"]}
    in_memory = score(pq.read_table(data), **models, path="plain", cache_dir=runner.cache, **how)

    assert again == in_memory["pair_digest"].to_list() == digests
    text = shown(capsys, data, reference=str(runner.models["reference"]), **how)
    assert ("[n][u][l][l]" in text) is keep


def test_kept_nulls_are_what_trl_tokenises(data: Path, runner: Runner, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    from tests.parity.test_trl_ids import trl_rows
    from tests.tiny import byte_tokenizer

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_parquet(str(data), cache_dir=str(tmp_path / "hf")).to_list()
    theirs = trl_rows(rows, byte_tokenizer(CALLS))
    export(data, runner.models["reference"], tmp_path / "out", emit_ids=True, chat_template=CALLS, keep_nulls=True)
    ours = read(tmp_path / "out").to_pylist()
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert [row[name] for row in ours] == [row[name] for row in theirs]
