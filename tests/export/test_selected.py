"""The kept pairs as a data set: the same bytes again, nothing computed, OUT's own values, a trainer takes it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import polars as pl
import pytest

from dpo_score.cli.main import main
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError, IdentityError, UsageError
from dpo_score.export.selected import write_selection
from dpo_score.results.select import Request, select
from tests.exported import export
from tests.run_fixtures import Runner, preference_rows, write_rows


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = preference_rows(30, seed=5)
    rows[4]["chosen"] = None
    return write_rows(tmp_path / "pairs.parquet", rows)


@pytest.fixture
def out(tmp_path: Path, data: Path, runner: Runner) -> str:
    runner(data, tmp_path / "out")
    return str(tmp_path / "out")


def write(out: str, folder: Path, rule: str = "margin:high", keep: int | None = 8) -> None:
    write_selection(out, select(out, Request(rule, keep)), str(folder), Progress(quiet=True))


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and ".work" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_kept_rows_with_the_values_of_the_run(out: str, tmp_path: Path, forwards: list[int]) -> None:
    before = len(forwards)
    write(out, tmp_path / "kept")
    assert len(forwards) == before
    written = pl.read_parquet(tmp_path / "kept/data/*.parquet")
    kept = select(out, Request("margin:high", 8)).frame.filter("kept")
    assert written["row_id"].to_list() == kept["row_id"].to_list()
    assert written["select_rank"].sort().to_list() == list(range(1, 9))
    scores = pl.read_parquet(f"{out}/scores/better/*.parquet")
    joined = written.join(scores, on="row_id", suffix="_run")
    for name in ("ref_chosen_logps", "ref_rejected_logps", "pair_id", "pair_digest"):
        assert joined[name].to_list() == joined[f"{name}_run"].to_list()
    source = pl.read_parquet(tmp_path / "pairs.parquet")
    rows = [int(row_id.split(":")[1]) for row_id in written["row_id"]]
    assert written.select("prompt", "chosen", "rejected", "subset").rows() == source[rows].rows()


def test_the_values_of_a_length_desensitised_loss_are_those_that_precompute_writes(
    tmp_path: Path, data: Path, runner: Runner
) -> None:
    """Their contract names ld_alpha, so a trainer takes them for sums in which later tokens count less."""
    runner(data, tmp_path / "ld", loss_param=["ld_alpha=0.25"])
    write(str(tmp_path / "ld"), tmp_path / "kept")
    export(data, runner.models["reference"], tmp_path / "whole", loss_param=["ld_alpha=0.25"])
    kept, whole = (pl.read_parquet(tmp_path / name / "data/*.parquet") for name in ("kept", "whole"))
    stored = pl.concat(pl.read_parquet(part) for part in (tmp_path / "ld/reference").glob("*.parquet"))
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        ours, precomputed, plain = (dict(frame.select("row_id", name).rows()) for frame in (kept, whole, stored))
        assert ours == pytest.approx({row_id: precomputed[row_id] for row_id in ours}, rel=1e-5)
        assert max(abs(value - plain[row_id]) for row_id, value in ours.items()) > 1.0


def test_every_row_of_the_run_is_in_the_list_of_reasons(out: str, tmp_path: Path) -> None:
    write(out, tmp_path / "kept")
    reasons = pl.read_parquet(tmp_path / "kept/selection.parquet")
    said = json.loads((tmp_path / "kept/selection.json").read_text())
    assert len(reasons) == 30 == said["rows"] == sum(said["counts"].values())
    assert dict(reasons["reason"].value_counts().rows()) == said["counts"]


def test_the_same_command_gives_the_same_bytes_and_another_is_refused(out: str, tmp_path: Path) -> None:
    write(out, tmp_path / "kept")
    first = digests(tmp_path / "kept")
    write(out, tmp_path / "kept")
    write(out, tmp_path / "again")
    assert digests(tmp_path / "kept") == first == digests(tmp_path / "again")
    for other in ({"keep": 9}, {"rule": "margin:low"}):
        with pytest.raises(IdentityError, match="holds another selection"):
            write(out, tmp_path / "kept", **other)
    assert digests(tmp_path / "kept") == first


def test_a_folder_of_something_else_is_refused(out: str, tmp_path: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="holds the scores of a run"):
        write(out, Path(out))
    (tmp_path / "other/data").mkdir(parents=True)
    (tmp_path / "other/data/train-00000-of-00001.parquet").write_bytes(data.read_bytes())
    with pytest.raises(ConfigError, match="not written here"):
        write(out, tmp_path / "other")


def test_changed_data_and_an_empty_selection(out: str, tmp_path: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="keeps no pair"):
        write(out, tmp_path / "none", "margins > 1000000000", None)
    write_rows(data, preference_rows(30, seed=6))
    with pytest.raises(UsageError, match="have changed since"):
        write(out, tmp_path / "kept")


def test_the_command_writes_and_the_loaders_read(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], runner: Runner
) -> None:
    pytest.importorskip("trl")
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig

    from dpo_score.integrations.trl import DPOTrainerWithRefLogps

    folder = tmp_path / "kept"
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["select", out, "--rule", "margin:high", "--keep", "50%", "--to", str(folder), "--quiet"])
    assert "select_rank" not in capsys.readouterr().err
    loaded = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "hf"))
    assert len(loaded) == 15
    reference = runner.models["reference"]
    trainer = DPOTrainerWithRefLogps(
        AutoModelForCausalLM.from_pretrained(reference),
        args=DPOConfig(
            str(tmp_path / "trained"),
            use_cpu=True,
            bf16=False,
            max_length=None,
            max_steps=1,
            per_device_train_batch_size=15,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            dataloader_pin_memory=False,
            gradient_checkpointing=False,
        ),
        train_dataset=loaded,
        processing_class=AutoTokenizer.from_pretrained(reference),
        contract=folder,
    )
    trainer.train()
    assert abs(trainer.state.log_history[0]["rewards/margins"]) <= 1e-5
