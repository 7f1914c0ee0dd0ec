"""`verify --against trl`: stored reference values and the installed TRL's own, and when the two do not meet."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from dpo_score.cli.main import main
from dpo_score.config.load import load_config
from dpo_score.engine import run as local
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError, DamageError, UsageError
from dpo_score.integrations.trl_check import Agreement, StoredRow, compared, comparison, sampled
from dpo_score.integrations.trl_pass import TrlRow
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.storage.open import open_store
from tests.exported import chat_rows, export, hh_rows, text_rows, write_rows
from tests.tiny import save_tiny

ROWS = 6
DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "m0", seed=0)


def scored(rows: Sequence[dict[str, Any]], model: Path, folder: Path, **options: Any) -> str:
    """A run in which the reference is its own policy: stage one is what is looked at."""
    data = write_rows(folder / "d.parquet", list(rows))
    settings: dict[str, Any] = {"data": [str(data)], "reference": str(model), "policy": [f"p={model}"]}
    settings |= {"out": str(folder / "out"), "path": "plain", "threads": 1, "cache_dir": str(folder / "cache")}
    settings |= options
    local.run(load_config(None, {k: v for k, v in settings.items() if v is not None}, {}), Progress(quiet=True))
    return str(folder / "out")


def exit_code(command: list[str]) -> Any:
    with pytest.raises(SystemExit) as stopped:
        main(command)
    return stopped.value.code


def agreed(found: Agreement) -> bool:
    return not found.differences and 0.0 < found.largest <= found.bound


# --- they meet --------------------------------------------------------------------------------------------------------


def mixed_rows() -> list[dict[str, Any]]:
    """Conversations of several turns with a system text, and calls whose arguments differ from row to row."""
    rows = chat_rows(4)
    for number, row in enumerate(rows):
        call = {"type": "function", "function": {"name": "f", "arguments": {"ab"[number % 2]: number}}}
        row["prompt"] = [{"role": "system", "content": "Be kind."}, *row["prompt"]]
        row["prompt"].append({"role": "assistant", "content": "", "tool_calls": [call]})
        row["prompt"].append({"role": "user", "content": "Go on."})
    return rows


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (text_rows(ROWS), {}),
        (text_rows(ROWS), {"render": "chat", "max_length": 60}),
        (hh_rows(ROWS), {}),
        (mixed_rows(), {"chat_template_kwargs": '{"unused": 1}'}),
    ],
    ids=["strings", "cut", "transcripts", "conversations"],
)
def test_stored_values_are_trls(rows: Any, options: Any, model: Path, tmp_path: Path) -> None:
    found = comparison(scored(rows, model, tmp_path, **options), "trl", 100)
    assert agreed(found)
    assert found.rows == len(rows)
    assert found.bound == 1e-3


def test_both_kinds_of_rows_in_one_folder(model: Path, tmp_path: Path) -> None:
    files = [
        write_rows(tmp_path / f"{name}.parquet", rows) for name, rows in (("t", text_rows(3)), ("c", chat_rows(3)))
    ]
    out = scored([], model, tmp_path / "run", data=[f"{path.stem}={path}" for path in files])
    found = comparison(out, "trl", 100)
    assert agreed(found)
    assert found.rows == 6


def test_a_reference_that_is_an_adapter(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from tests.models.model_folders import save_adapter

    adapter = save_adapter(tmp_path / "adapter", model)
    assert agreed(comparison(scored(text_rows(ROWS), adapter, tmp_path), "trl", 3))


def test_sixteen_bits_are_held_to_the_noise_that_the_run_measured(model: Path, tmp_path: Path) -> None:
    found = comparison(scored(text_rows(ROWS), model, tmp_path, dtype="bfloat16"), "trl", ROWS)
    assert agreed(found)
    assert found.bound > 2e-3


def test_a_data_set_that_precompute_wrote(model: Path, tmp_path: Path) -> None:
    export(write_rows(tmp_path / "d.parquet", text_rows(ROWS)), model, tmp_path / "out")
    assert agreed(comparison(str(tmp_path / "out"), "trl", 2))


def test_the_command_says_what_it_found(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = scored(text_rows(ROWS), model, tmp_path)
    assert exit_code(["verify", out, "--against", "trl", "-n", "4"]) == 0
    assert "4 rows, 8 log-probs of the reference: largest |Δ| " in capsys.readouterr().out
    assert exit_code(["verify", out, "--against", "trl", "-n", "4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["against"]["rows"], printed["against"]["differences"], printed["damage"]) == (4, [], [])


def test_the_same_rows_are_drawn_again_and_all_where_more_are_asked_for(model: Path, tmp_path: Path) -> None:
    store = open_store(scored(text_rows(70), model, tmp_path))  # two blocks
    assert sampled(store, 9) == sampled(store, 9)
    assert [row.row_id for row in sampled(store, 1000)] == [f"0:{i}" for i in range(70)]
    files = {row.file for row in sampled(store, 40)}
    assert len(files) == 2


# --- they do not ------------------------------------------------------------------------------------------------------


def test_a_value_that_was_computed_wrongly_is_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true_score = PairScorer.score

    def off(self: Any, sequences: Any) -> Any:
        """The rejected answer of the third pair is 0.01 nats off."""
        results = true_score(self, sequences)
        shifted = results[5].token_logps + np.float32(0.01) * (np.arange(len(results[5].token_logps)) == 0)
        return [*results[:5], replace(results[5], token_logps=shifted.astype(np.float32)), *results[6:]]

    with monkeypatch.context() as patched:
        patched.setattr(PairScorer, "score", off)
        out = scored(text_rows(ROWS), model, tmp_path)
    assert exit_code(["verify", out, "--against", "trl", "-n", str(ROWS)]) == 4
    shown = capsys.readouterr()
    assert "row 0:2, rejected: stored -" in shown.out
    assert "1 of 12 reference log-probs are not TRL's" in shown.err
    assert "1 differ" in shown.out


def row(**changes: Any) -> StoredRow:
    from dpo_score.integrations.load_ref_logps import pair_digest

    known = {"row_id": "0:0", "file": "reference/part", "digest": pair_digest([[1], [2], [3]]), "tokens": (1, 1)}
    return StoredRow(**{**known, "values": (-5.0, -6.0), **changes})


def test_other_ids_and_dropped_rows_are_differences() -> None:
    other = compared("OUT", [row()], {"0:0": TrlRow([[1], [2], [4]], (-5.0, -6.0))}, 1e-3)
    assert other.differences == (("reference/part", "row 0:0: TRL makes other token ids of it"),)
    dropped = compared("OUT", [row()], {}, 1e-3)
    with pytest.raises(DamageError, match="row 0:0: TRL drops it"):
        dropped.raise_difference()


@pytest.mark.parametrize(("value", "differs"), [(-5.0009, False), (-5.0011, True), (float("nan"), True)])
def test_the_bound_is_that_of_the_sum(value: float, differs: bool) -> None:
    found = compared("OUT", [row()], {"0:0": TrlRow([[1], [2], [3]], (value, -6.0))}, 1e-3)
    assert bool(found.differences) is differs


def test_without_measured_noise_sixteen_bits_may_be_off_by_the_token() -> None:
    theirs = {"0:0": TrlRow([[1], [2], [3]], (-5.04, -6.0))}
    assert compared("OUT", [row()], theirs, math.inf).differences == ()
    assert compared("OUT", [row(values=(-5.1, -6.0))], theirs, math.inf).differences != ()


# --- they cannot be compared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"score": "all-assistant"}, "TRL scores every token of the answer"),
        ({"truncation": "keep_end"}, "TRL keeps the first max_length tokens"),
        ({"rewardbench": "exact"}, "adds and drops tokens that no trainer would"),
        ({"chat_template": DATED, "date": "2024-07-26"}, "which was 2024-07-26 and would be 20"),
        ({"reference": None, "loss": "simpo"}, "no reference model"),
    ],
)
def test_runs_that_trl_would_score_otherwise(options: Any, reason: str, model: Path, tmp_path: Path) -> None:
    out = scored(chat_rows(2), model, tmp_path, **options)
    with pytest.raises(UsageError, match=reason):
        comparison(out, "trl", 2)


def test_token_ids_are_not_tokenised_again(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}]
    with pytest.raises(UsageError, match="this data is token ids"):
        comparison(scored(rows, model, tmp_path), "trl", 2)


def test_what_is_no_longer_there(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    out = scored(text_rows(2), copy, tmp_path)
    save_tiny(copy, seed=9)
    with pytest.raises(UsageError, match="no longer holds the weights that were scored"):
        comparison(out, "trl", 2)
    shutil.rmtree(copy)
    with pytest.raises(UsageError, match="no such model"):
        comparison(out, "trl", 2)
    (tmp_path / "d.parquet").unlink()
    with pytest.raises(UsageError, match="the data cannot be read again"):
        comparison(out, "trl", 2)


def test_requests_that_make_no_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--against tlr: did you mean 'trl'"):
        comparison(str(tmp_path), "tlr", 2)
    with pytest.raises(ConfigError, match="-n 0: at least one row"):
        comparison(str(tmp_path), "trl", 0)
    with pytest.raises(UsageError, match="holds no run"):
        comparison(str(tmp_path), "trl", 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs trl, which is not installed"):
        comparison(str(tmp_path), "trl", 2)
