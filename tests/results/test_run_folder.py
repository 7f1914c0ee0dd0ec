"""What is done with finished results: rescore, verify, status, previews."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dpo_score.engine import progress
from dpo_score.engine.dry_run import dry_run, histogram, probe
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError, DamageError, UsageError
from dpo_score.results import cache_admin
from dpo_score.results.groups import read_policies
from dpo_score.results.rescore import rescore
from dpo_score.results.run_folder import STEP, chosen_names, open_out, read_scored, step_of
from dpo_score.results.status import status
from dpo_score.results.verify.verify import verify
from tests.run_fixtures import preference_rows, write_rows


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.parquet", preference_rows(100))


@pytest.fixture
def out(runner: Any, data: Path, tmp_path: Path) -> Path:
    runner(data, tmp_path / "out", policy=[f"{name}={runner.models[name]}" for name in ("better", "worse")])
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-10", 10),
        ("step.10", 10),
        ("checkpoint-500/", 500),
        ("global_step_100", 100),
        ("epoch-3", 3),
        ("ckpt10", 10),
        ("sigmoid-0.05-step-76", 76),
        ("lr-5e-7-20", 20),
        ("step_1000-merged", None),
        ("sigmoid-0.05", None),
        ("sigmoid-0.5", None),
        ("beta-.5", None),
        ("step-1.5", None),
        ("lr-5e-7", None),
        ("lr-5E-07", None),
        ("v1.2", None),
    ],
)
def test_a_step_is_a_whole_number_and_no_part_of_another(name: str, step: int | None) -> None:
    assert step_of(name) == step
    assert STEP.search(name.rstrip("/")) is None if step is None else step_of(name, "checkpoint-7") == step


def test_a_name_without_a_step_leaves_it_to_the_model() -> None:
    assert step_of("sigmoid-0.05", "data/quickstart-adapters/step-76") == 76


def test_policies_hold_what_is_equal_once(out: Path) -> None:
    store, manifest = open_out(str(out))
    first, second = read_policies(store, manifest, ["better", "worse"])
    alone = read_scored(store, manifest, "worse")
    assert second.row_ids is first.row_ids
    assert second.rows.clusters is first.rows.clusters
    shared = {name for name, values in second.rows.values.items() if values is first.rows.values[name]}
    assert shared == {"ref_chosen_logps", "ref_rejected_logps", "chosen_tokens", "rejected_tokens"}
    for name, values in alone.rows.values.items():
        assert np.array_equal(values, second.rows.values[name], equal_nan=True)


@pytest.mark.parametrize("asked", [" ", ",", " , "])
def test_a_list_of_policies_that_names_none_is_refused(out: Path, asked: str) -> None:
    with pytest.raises(UsageError, match="names no policy: name some of better, worse"):
        chosen_names(*open_out(str(out)), asked, str(out))
    assert chosen_names(*open_out(str(out)), "", str(out)) == ["better", "worse"]


def test_the_cache_is_verified_file_by_file(runner: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", -1.0)
    stream = io.StringIO()
    assert cache_admin.verify(str(runner.cache), Progress(stream=stream).reading) == "600 entries, nothing damaged"
    said = stream.getvalue().splitlines()
    assert said[0].startswith(f"reading the cache: 1/{len(said)} files, about ")
    assert said[-1].startswith(f"reading the cache: {len(said)}/{len(said)} files, ")


def test_rescore_reproduces_the_stored_loss_and_extends_it(out: Path) -> None:
    found = rescore(str(out), "sigmoid,ipo", "0.1,0.5", None, [], None)
    assert [(r["policy"], r["loss_name"], r["beta"]) for r in found["rows"]] == [
        (policy, loss, beta) for policy in ("better", "worse") for loss in ("sigmoid", "ipo") for beta in (0.1, 0.5)
    ]
    stored = pl.read_parquet(f"{out}/scores/better/*.parquet").select("row_id", "loss", "margins")
    grid = pl.read_parquet(f"{out}/rescored/*/better/*.parquet")
    same = grid.filter(loss_name="sigmoid", beta=0.1).select("row_id", "loss", "margins")
    assert same.sort("row_id").equals(stored.sort("row_id"))


def test_rescore_takes_a_scored_policy_as_reference(out: Path) -> None:
    found = rescore(str(out), "sigmoid", "1.0", None, [], "worse")
    assert [row["policy"] for row in found["rows"]] == ["better"]
    better, worse = (pl.read_parquet(f"{out}/scores/{name}/*.parquet") for name in ("better", "worse"))
    grid = pl.read_parquet(f"{out}/rescored/*/better/*.parquet")
    expected = better["policy_chosen_logps"] - worse["policy_chosen_logps"]
    assert (grid["chosen_rewards"] - expected).abs().max() < 1e-12


def test_rescore_names_the_flag_for_a_column_that_is_not_there(out: Path) -> None:
    with pytest.raises(ConfigError, match="--stats wpo"):
        rescore(str(out), "sigmoid", None, None, ["wpo=true"], None)
    with pytest.raises(UsageError, match=r"'nobody' is no scored policy of .* known: better, worse"):
        rescore(str(out), "sigmoid", None, None, [], "nobody")


def test_a_loss_of_ones_own_over_the_stored_columns(runner: Any, data: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def squared(columns, beta):\n"
        "    margin = columns['policy_chosen_logps'] - columns['policy_rejected_logps']\n"
        "    return beta * margin ** 2\n"
    )
    found = rescore(str(out), f"{tmp_path}/mine.py:squared", "0.5", None, [], None)
    scores = pl.read_parquet(f"{out}/scores/better/*.parquet")
    expected = 0.5 * (scores["policy_chosen_logps"] - scores["policy_rejected_logps"]) ** 2
    assert found["rows"][0]["loss"] == pytest.approx(float(expected.mean()), rel=1e-12)


def test_verify_finds_nothing_in_a_sound_folder(out: Path) -> None:
    findings = verify(str(out))
    assert findings.damage == []
    assert findings.rows == 300  # reference and two policies


KINDS = ("scores/better", "reference", "commits/reference", "commits/scores/worse", "summary.json", "README.md")


@pytest.mark.parametrize("kind", KINDS)
def test_verify_names_the_file_with_one_flipped_bit(out: Path, kind: str) -> None:
    path = out / kind if (out / kind).is_file() else sorted((out / kind).iterdir())[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    findings = verify(str(out))
    assert [name for name, _ in findings.damage] == [str(path.relative_to(out))]
    with pytest.raises(DamageError, match=path.name) as error:
        findings.raise_damage()
    assert error.value.exit_code == 4


def test_verify_notices_scores_that_do_not_follow_from_the_logps(out: Path) -> None:
    """A consistent forgery: part, record and checksum agree, but one margin was changed."""
    from dataclasses import replace

    from dpo_score.storage.commits import CommitRecord, commit, read_records
    from dpo_score.storage.open import open_store

    store = open_store(out)
    record = next(iter(read_records(store, "scores/better").values()))
    assert isinstance(record, CommitRecord)
    name = record.files[0].name
    table = store.read_table(name)
    values = table["margins"].to_pylist()
    forged = table.set_column(table.column_names.index("margins"), "margins", [[values[0] + 1e-12, *values[1:]]])
    metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    file = store.write_table(name, forged, metadata)
    store.remove(record.name)
    commit(store, replace(record, files=(file, *record.files[1:])))
    assert [(n, "margins" in what) for n, what in verify(str(out)).damage] == [(name, True)]


def test_damage_is_mended_by_the_same_command(runner: Any, data: Path, out: Path) -> None:
    path = sorted((out / "scores/better").iterdir())[0]
    sound = path.read_bytes()
    path.write_bytes(sound[:-20])
    runner(data, out, policy=[f"{name}={runner.models[name]}" for name in ("better", "worse")])
    assert path.read_bytes() == sound
    assert verify(str(out)).damage == []


def test_status_counts_blocks_and_rows(out: Path) -> None:
    found = status(str(out))
    assert found["state"] == "complete"
    stages = {s["stage"]: (s["done"], s["blocks"], s["scored"]) for s in found["stages"]}
    assert stages == {"reference": (2, 2, 100), "scores/better": (2, 2, 100), "scores/worse": (2, 2, 100)}


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(runner: Any, data: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    found = dry_run(runner.config(data, tmp_path / "never"), Progress(quiet=True))
    assert "chosen is better than rejected" in found["data"][0]
    assert found["rows"].startswith("100 in 2 blocks")
    assert found["cache"] == [f"{who}: 0 of 200 sampled sequences are known" for who in ("reference", "better")]
    assert not (tmp_path / "never").exists()
    assert set(before) <= set(tmp_path.iterdir())


def test_a_probe_measures_and_prices(runner: Any, data: Path, tmp_path: Path) -> None:
    found = probe(runner.config(data, tmp_path / "never"), Progress(quiet=True), price_per_hour=2.0)
    measured = [line.split()[0] for line in found["rows/s"]]
    assert all(float(speed.replace(",", "")) > 0 for speed in measured)
    assert measured
    assert "at 2 an hour" in found["cost"]


def test_a_histogram_counts_every_length() -> None:
    import numpy as np

    lines = histogram(np.array([3, 4, 5, 9, 100]))
    assert sum(int(line.split()[-2] if "█" in line else line.split()[-1]) for line in lines) == 5


def test_the_noise_floor_of_fp32_is_far_below_a_nat(runner: Any, data: Path, out: Path) -> None:
    import json

    noise = json.loads((out / "summary.json").read_text())["policies"]["better"]["noise"]
    assert noise["reference"]["sequences"] > 0
    assert 0.0 <= noise["margin_mean"] < 1e-3
    assert math.isfinite(noise["share_below"])
