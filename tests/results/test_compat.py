"""Folders and caches of earlier releases are read, or refused with a hint; never misread (tests/data/compat)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_score.cli.main import main
from dpo_score.errors import DamageError, UsageError
from dpo_score.results.rescore import rescore
from dpo_score.results.run_folder import open_out, policy_names, read_scored
from dpo_score.results.status import status
from dpo_score.results.verify.verify import verify
from dpo_score.storage.cache.cache import open_cache
from dpo_score.storage.commits import sealed
from dpo_score.storage.manifest import read_manifest
from dpo_score.storage.open import open_store

COMPAT = Path(__file__).parents[1] / "data" / "compat"
VERSIONS = sorted(path.name for path in COMPAT.glob("v*"))
LAST_BITS = "does not follow"
"""What `verify` may say of derived columns where another processor computes exp and log."""


@pytest.fixture(params=VERSIONS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(COMPAT / request.param, tmp_path / request.param))


def test_there_is_a_golden_folder() -> None:
    assert "v1" in VERSIONS


def test_a_finished_run_is_read(golden: Path) -> None:
    out = str(golden / "out")
    assert status(out)["state"] == "complete"
    findings = verify(out)
    assert [what for _, what in findings.damage if LAST_BITS not in what] == []
    assert findings.rows == 10
    store, manifest = open_out(out)
    assert policy_names(store, manifest) == ["better"]
    assert read_scored(store, manifest, "better").row_ids == ["0:0", "0:1", "0:3", "0:4", "0:5"]
    assert pl.read_parquet(f"{out}/rejects/data/*.parquet")["code"].to_list() == ["null_field"]


def test_its_numbers_mean_what_they_meant(golden: Path) -> None:
    out = str(golden / "out")
    stored = pl.read_parquet(f"{out}/scores/better/*.parquet")
    rescore(out, "sigmoid", "0.2", None, [], None)
    again = pl.read_parquet(f"{out}/rescored/*/better/*.parquet")
    for column in ("loss", "margins", "chosen_rewards"):
        assert again[column].to_list() == pytest.approx(stored[column].to_list(), rel=1e-12)


def test_its_cache_is_read(golden: Path) -> None:
    cache = open_cache(golden / "cache")
    assert sum(row["entries"] for row in cache.ls()) == 20
    assert not cache.verify()


@pytest.mark.parametrize("command", ["status", "verify", "rescore", "report"])
def test_another_schema_version_is_refused_with_a_way_out(
    golden: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for name in ("manifest.json", "commits/manifest.json"):
        rewritten(golden / "out" / name, schema_version=99)
    with pytest.raises(SystemExit) as stop:
        main([command, str(golden / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert "schema version 99" in said
    assert "Use the release that wrote it" in said


def rewritten(path: Path, **changes: Any) -> None:
    """The file with other fields, and a checksum that fits them."""
    fields = {k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"}
    path.write_text(json.dumps(sealed({**fields, **changes})))


def test_a_manifest_with_fields_of_another_time_is_not_guessed_at(golden: Path) -> None:
    for name in ("manifest.json", "commits/manifest.json"):
        rewritten(golden / "out" / name, colour="blue")
    with pytest.raises((DamageError, UsageError), match="not a manifest of this version"):
        read_manifest(open_store(golden / "out"))


def test_a_record_with_fields_of_another_time_is_named(golden: Path) -> None:
    name = "commits/scores/better/00000-of-00001.json"
    rewritten(golden / "out" / name, colour="blue")
    assert (name, True) in [(file, "not a commit record" in what) for file, what in verify(str(golden / "out")).damage]
