"""`inspect` shows a pair as the model sees it, and what a run stored of it; data text stays text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dpo_score.cli.inspect import inspect, row_id_at
from dpo_score.errors import UsageError
from dpo_score.results.run_folder import open_out
from dpo_score.results.source_text import pieces, text_source
from tests.engine.whole_runs.small_run import small_run
from tests.tiny import byte_tokenizer


def shown(capsys: pytest.CaptureFixture[str], target: Path, row: int, **settings: object) -> str:
    inspect(str(target), row, dict(settings))
    return capsys.readouterr().out


def test_a_pair_of_a_data_file_with_scored_tokens_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run()
    text = shown(capsys, run.data, 7, reference=str(run.folder / "model0"))
    assert "row 0:7" in text
    assert "identical_pair" in text
    assert "[<|im_end|>]" in text
    assert "chosen (begins at token" in text


def test_no_weights_are_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run()
    for path in (run.folder / "model0").iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    assert "tokens, not scored" in shown(capsys, run.data, 0, reference=str(tmp_path))


def test_a_row_that_cannot_be_scored_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run()
    assert "rejected, null_field" in shown(capsys, run.data, 5, reference=str(run.folder / "model0"))
    assert "not scored (rejects/data), null_field" in shown(capsys, run.out, 5)


def test_stored_values_and_token_shares_of_one_policy(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, small_run().out, 3, policy=["step-20"])
    assert "step-20 (β 0.1)" in text
    assert "step-10" not in text
    assert "policy_chosen_logps -" in text
    assert "most by" in text


@pytest.mark.parametrize(("how", "header"), [("exact", True), ("corrected", False), (None, False)])
def test_a_pair_as_rewardbench_sees_it(how: str | None, header: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Theirs scores the header of the assistant's turn, too."""
    run = small_run()
    options = {} if how is None else {"rewardbench": how}
    text = shown(capsys, run.data, 0, reference=str(run.folder / "model0"), render="chat", **options)
    chosen = text.split("chosen (begins at token")[1].split("rejected (begins")[0]
    assert ("[<|im_start|>][a][s][s]" in chosen) is header


def test_hostile_text_reaches_the_terminal_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run()
    for text in (shown(capsys, run.out, 9), shown(capsys, run.data, 9, reference=str(run.folder / "model0"))):
        assert "\x1b" not in text
        assert "\u202e" not in text


def test_without_token_values_the_way_to_get_them_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--per-token" in shown(capsys, small_run(per_token=False).out, 3)


def test_rows_are_numbered_through_scored_and_rejected() -> None:
    store, manifest = open_out(str(small_run().out))
    assert [row_id_at(store, manifest, n) for n in (0, 5, 39)] == ["0:0", "0:5", "0:39"]


@pytest.mark.parametrize("row", [-1, 40])
def test_a_row_that_is_not_there(row: int) -> None:
    with pytest.raises(UsageError, match="--row"):
        inspect(str(small_run().out), row, {})


def test_an_unknown_policy_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="step-20"):
        inspect(str(small_run().out), 0, {"policy": ["step-21"]})


def test_changed_data_gives_no_texts(tmp_path: Path) -> None:
    run = small_run()
    store, manifest = open_out(str(run.out))
    before = run.data.read_bytes()
    try:
        run.data.write_bytes(before + b" ")
        assert isinstance(text_source(store, manifest), str)
    finally:
        run.data.write_bytes(before)
    assert not isinstance(text_source(store, manifest), str)


@pytest.mark.parametrize("text", ["plain", "héllo 東京 🙂<|im_end|>", "\n\n x", ""])
def test_pieces_join_to_the_decoded_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text
