"""One rule says which rows of a policy are there; `run`, `status` and `verify` all follow it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_score.cli.main import main
from dpo_score.errors import DamageError, PolicyFailedError
from dpo_score.results.status import status
from dpo_score.results.verify.verify import verify
from dpo_score.storage.commits import CommitRecord, DamagedRecord
from dpo_score.storage.fingerprint import Identities, has_reference
from dpo_score.storage.manifest import Manifest
from dpo_score.storage.resume import BlockRange, FileState, missing_rows, row_ranges
from tests.run_fixtures import preference_rows, write_rows
from tests.tiny import save_tiny


def record(block: int, start: int, stop: int) -> CommitRecord:
    return CommitRecord("scores/a", block, 3, start, stop, "id", (), {}, "")


def test_rows_that_no_record_reaches_are_missing() -> None:
    rows = [BlockRange(i, 3, 10 * i, 10 * i + 10) for i in range(3)]
    sound = [record(i, 10 * i, 10 * i + 10) for i in range(3)]
    assert missing_rows((r, found, ()) for r, found in zip(rows, sound, strict=True)) == []
    assert missing_rows([(rows[0], sound[0], ()), (rows[1], record(1, 10, 14), ()), (rows[2], None, ())]) == [(14, 30)]
    assert missing_rows([(rows[0], DamagedRecord("x", "torn"), ()), (rows[1], sound[1], ())]) == [(0, 10)]
    assert missing_rows([(rows[0], sound[0], (FileState.SOUND, FileState.MISSING))]) == [(0, 10)]
    assert missing_rows([(BlockRange(0, 3, 0, 5), sound[0], ())]) == [], "more rows than are asked for are no fault"


def test_row_ranges_are_said_as_a_person_counts_them() -> None:
    assert row_ranges([(10, 20), (30, 31)]) == "rows 10 to 19, 30"
    assert row_ranges([(i * 2, i * 2 + 1) for i in range(9)]).endswith("and 1 more ranges")


def test_a_sample_decides_the_number_of_blocks() -> None:
    manifest = Manifest(Identities({"sample": 130}), {}, block_rows=64, total_rows=10_000)
    assert (manifest.rows, manifest.blocks) == (130, 3)
    assert [(r.start, r.stop) for r in manifest.block_ranges(100)] == [(0, 64), (64, 100)]
    assert Manifest(Identities({"sample": None}), {}, block_rows=64, total_rows=0).blocks == 1


def test_a_policy_s_own_reference_takes_the_place_of_the_run_s() -> None:
    found = Identities({}, {"weights": "w"}, {"a": {}, "b": {"reference": {"weights": None, "columns": ["c", "r"]}}})
    assert found.reference_of("a") == {"weights": "w"}
    assert has_reference(found.reference_of("b"))
    assert not has_reference({"weights": None, "columns": None})


def test_a_policy_of_which_rows_are_missing_is_named_by_every_command(
    runner: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(20))
    out, folder = tmp_path / "out", save_tiny(tmp_path / "policy", seed=1)
    other = save_tiny(tmp_path / "other", seed=2)
    policies = [f"a={folder}", f"b={other}"]
    runner(data, out, policy=policies, limit=10)
    assert verify(str(out)).damage == []
    folder.rename(tmp_path / "moved")
    found = runner(data, out, policy=policies, limit=20)
    with pytest.raises(PolicyFailedError, match=r"a: rows 10 to 19 of 20 are not scored"):
        found.raise_failures()
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["policies"]) == ["b"]
    assert "rows 10 to 19" in summary["failed"]["a"]
    stages = {stage["stage"]: stage["missing"] for stage in status(str(out))["stages"]}
    assert stages == {"reference": [], "scores/a": [[10, 20]], "scores/b": []}
    with pytest.raises(SystemExit):
        main(["status", str(out)])
    assert "scores/a: rows 10 to 19 are not scored yet" in capsys.readouterr().out
    with pytest.raises(DamageError, match="scores/a"):
        verify(str(out)).raise_damage()
    shutil.move(tmp_path / "moved", folder)
    runner(data, out, policy=policies, limit=20).raise_failures()
    assert verify(str(out)).damage == []


def test_a_scored_policy_whose_folder_and_part_are_gone_is_not_called_scored(runner: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(8))
    out, folder = tmp_path / "out", save_tiny(tmp_path / "policy", seed=1)
    runner(data, out, policy=[f"a={folder}"])
    shutil.rmtree(folder)
    runner(data, out, policy=[f"a={folder}"]).raise_failures()
    next((out / "scores/a").glob("*.parquet")).unlink()
    with pytest.raises(PolicyFailedError, match=r"a: rows 0 to 7 of 8 are not scored"):
        runner(data, out, policy=[f"a={folder}"]).raise_failures()


def test_a_policy_of_which_nothing_is_stored_is_named_and_no_damage(runner: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(8))
    out = tmp_path / "out"
    given = [f"a={runner.models['better']}", f"gone={tmp_path / 'nowhere'}"]
    with pytest.raises(PolicyFailedError, match="gone"):
        runner(data, out, policy=given).raise_failures()
    found = verify(str(out))
    assert found.damage == []
    assert "nothing is scored" in found.unproved["scores/gone"]
