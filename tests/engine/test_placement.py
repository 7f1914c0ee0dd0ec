"""What is refused before a model that is larger than a device is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_score.engine import prepare as placement
from dpo_score.engine import run as local
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError
from tests.engine.executors.test_job_array import results
from tests.engine.test_run import refuse_loading
from tests.run_fixtures import preference_rows, write_rows
from tests.tiny import save_tiny


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel": 3}, "2 key-value heads.*; 1, 2 would do"),
        ({"tensor_parallel": 2, "device_map": "auto"}, "and --device-map do not go together"),
        ({"tensor_parallel": 2, "compile": "on"}, "and --compile on do not go together"),
    ],
)
def test_what_cannot_be_is_refused_before_loading(
    options: dict[str, Any], said: str, runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_loading(monkeypatch)
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(3))
    with pytest.raises(ConfigError, match=said):
        runner(data, tmp_path / "out", **options)
    assert not (tmp_path / "out/manifest.json").exists()


def test_an_architecture_that_nobody_can_deal_out_is_refused_with_the_alternative(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_loading(monkeypatch)
    folder = save_tiny(tmp_path / "gpt2", "gpt2", n_embd=32, n_head=4, n_layer=2)
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(3))
    with pytest.raises(ConfigError, match=r"no plan to shard the layers of 'gpt2' models.*--device-map auto"):
        runner(data, tmp_path / "out", tensor_parallel=2, reference=str(folder), policy=[f"same={folder}"])


def test_layers_spread_by_accelerate_give_the_same_numbers_and_one_line(runner: Any, tmp_path: Path) -> None:
    heard: list[str] = []

    class Heard(Progress):
        def say(self, line: str) -> None:
            heard.append(line)

    data = write_rows(tmp_path / "pairs.parquet", preference_rows(20))
    runner(data, tmp_path / "here", cache_dir=str(tmp_path / "other"))
    local.run(runner.config(data, tmp_path / "spread", device_map="auto"), Heard(quiet=True))
    assert sum("of which one computes at a time" in line for line in heard) == 1
    assert results(tmp_path / "spread") == results(tmp_path / "here")


def test_without_accelerate_the_message_says_what_to_install(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(3))
    with pytest.raises(ConfigError, match="pip install accelerate"):
        runner(data, tmp_path / "out", device_map="auto")
