"""`verify`: what it finds beside flipped bits (test_damage.py), what it leaves out and says so, what it never runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_score.cli.main import main
from dpo_score.config.schema import LossSpec, ModelSpec, PolicySpec
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.errors import ConfigError
from dpo_score.losses.columns import derive_table
from dpo_score.losses.parse import parse_loss
from dpo_score.results.rescore import rescore
from dpo_score.results.verify.verify import verify
from dpo_score.storage.base import FileRecord
from dpo_score.storage.commits import CommitRecord, read_record, sealed, unsealed
from dpo_score.storage.manifest import read_manifest, reopen_manifest, save_manifest
from dpo_score.storage.open import open_store
from tests.engine.mistakes.test_damage import flip
from tests.exported import export
from tests.run_fixtures import Runner, preference_rows, write_rows

PART = "part-00000-of-00003.parquet"


def damaged(out: Path) -> dict[str, str]:
    return dict(verify(str(out)).damage)


def record_of(out: Path, name: str) -> CommitRecord:
    record = read_record(open_store(out), name)
    assert isinstance(record, CommitRecord)
    return record


def resealed(out: Path, name: str, **changes: Any) -> None:
    """A record that says something else, with a checksum that fits."""
    open_store(out).write_json(name, replace(record_of(out, name), **changes).to_json())


def rewritten(out: Path, record: str, part: str, table: pa.Table, **said: str) -> None:
    """Another table in the place of a part, and a record that fits; `said`: changed metadata."""
    store = open_store(out)
    metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()} | said
    file = store.write_table(part, table, metadata)
    files = tuple(file if known.name == part else known for known in record_of(out, record).files)
    resealed(out, record, files=files)


def with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, models: Mapping[str, Path]) -> Path:
    """A run of 130 rows in 3 blocks: `better`, and `own` with a reference of its own; token values kept."""
    folder = tmp_path_factory.mktemp("finished")
    rows = preference_rows(130)
    rows[3]["chosen"] = None
    better, worse = (str(models[name]) for name in ("better", "worse"))
    own = PolicySpec(name="own", model=better, reference=ModelSpec(model=worse))
    config = Runner(folder / "cache", models).config(
        write_rows(folder / "pairs.parquet", rows), folder / "out", path="plain", per_token=True
    )
    policies = (PolicySpec(name="better", model=better), own)
    run(config.model_copy(update={"policies": policies}), Progress(quiet=True))
    return folder / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


# what is not there


@pytest.mark.parametrize("stage", ["reference", "reference/own", "scores/better", "scores/own"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_block_that_is_gone_with_its_record_is_missed_in_every_stage(out: Path, stage: str, block: int) -> None:
    name = f"commits/{stage}/{block:05d}-of-00003.json"
    for file in (*(file.name for file in record_of(out, name).files), name):
        (out / file).unlink()
    found = damaged(out)
    assert list(found) == [stage]
    assert f"1 of 3 blocks are missing, counted from 0: {block}" in found[stage]


def test_a_run_under_way_may_lack_blocks_and_hold_parts_without_a_record(out: Path) -> None:
    reopen_manifest(open_store(out))
    (out / "commits/scores/better/00002-of-00003.json").unlink()
    assert damaged(out) == {}


def test_a_run_of_the_first_rows_alone_is_whole(runner: Runner, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(130))
    runner(data, tmp_path / "out", path="plain", limit=10)
    assert damaged(tmp_path / "out") == {}
    runner(data, tmp_path / "out", path="plain", limit=70)
    assert damaged(tmp_path / "out") == {}


@pytest.mark.parametrize("folder", ["scores/better", "reference", "rejects/data"])
def test_a_part_that_no_record_names_is_named(out: Path, folder: str) -> None:
    foreign = f"{folder}/part-00003-of-00003.parquet"
    shutil.copy(next((out / folder).glob("*.parquet")), out / foreign)
    assert list(damaged(out)) == [foreign]


# what records say


@pytest.mark.parametrize("name", ["commits/reference/00001-of-00003.json", "commits/reference/own/00001-of-00003.json"])
def test_rows_are_those_that_a_record_covers(out: Path, name: str) -> None:
    record = record_of(out, name)
    for changes in (
        {"counts": {**record.counts, "rows": 9999}},
        {"stop": record.stop - 1},
        {"start": record.start + 1},
    ):
        resealed(out, name, **changes)
        assert name in damaged(out), changes
        resealed(out, name, counts=record.counts, start=record.start, stop=record.stop)
    assert damaged(out) == {}


def test_rejected_rows_that_are_left_out_are_missed(out: Path) -> None:
    """Row 3 is in no file any more, and no count tells of it."""
    name = "commits/reference/00000-of-00003.json"
    record = record_of(out, name)
    counts = {key: count for key, count in record.counts.items() if not key.startswith("rejected/")}
    resealed(out, name, files=tuple(f for f in record.files if not f.name.startswith("rejects/")), counts=counts)
    (out / "rejects/data" / PART).unlink()
    found = damaged(out)
    assert found[name] == "covers 64 rows, its files hold 63"


def test_a_policy_has_every_pair_that_its_reference_scored(out: Path) -> None:
    for policy in ("better", "own"):
        name, part = f"commits/scores/{policy}/00000-of-00003.json", f"scores/{policy}/{PART}"
        table = open_store(out).read_table(part)
        rewritten(out, name, part, table.slice(1))
        resealed(out, name, counts={**record_of(out, name).counts, "scored": table.num_rows - 1})
        assert "counts 62 pairs" in damaged(out)[name]


def test_rows_in_another_order_are_found(out: Path) -> None:
    name, part = "commits/reference/00001-of-00003.json", "reference/part-00001-of-00003.parquet"
    table = open_store(out).read_table(part)
    rewritten(out, name, part, table.take(list(reversed(range(table.num_rows)))))
    assert damaged(out) == {part: "its rows are not in order"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_in_lists_are_finite(out: Path, value: float) -> None:
    name, part = "commits/scores/better/00000-of-00003.json", f"scores/better/{PART}"
    table = open_store(out).read_table(part)
    values = table["policy_chosen_token_logps"].to_pylist()
    values[5][-1] = value
    rewritten(out, name, part, with_column(table, "policy_chosen_token_logps", values))
    assert damaged(out) == {part: "column policy_chosen_token_logps holds a number that is not finite"}


def test_a_reference_of_its_own_lost_the_same_rows_of_the_data(out: Path) -> None:
    name = "commits/reference/own/00000-of-00003.json"
    resealed(out, name, counts={**record_of(out, name).counts, "rejected/data/null_field": 2})
    assert damaged(out)[name] == "covers other pairs than commits/reference/00000-of-00003.json"


def test_rows_are_of_the_file_that_their_number_names(runner: Runner, tmp_path: Path) -> None:
    """Two files: what is said of a row is compared with what is said of the others of its file."""
    out = tmp_path / "out"
    (tmp_path / "d").mkdir()
    files = [
        write_rows(tmp_path / "d" / name, preference_rows(5)[:n]) for name, n in (("a.parquet", 5), ("b.parquet", 4))
    ]
    runner(files[0].parent, out, path="plain")
    assert damaged(out) == {}
    part, record = "reference/part-00000-of-00001.parquet", "commits/reference/00000-of-00001.json"
    table = open_store(out).read_table(part)
    named = table["source_file"].to_pylist()
    assert sorted(set(named)) == ["a.parquet", "b.parquet"]
    rewritten(out, record, part, with_column(table, "source_file", ["b.parquet", *named[1:]]))
    assert "file 0 is" in damaged(out)[part]


def test_what_the_data_hold_is_theirs(runner: Runner, tmp_path: Path) -> None:
    rows = [{**row, "q": float("nan") if i == 2 else 1.0} for i, row in enumerate(preference_rows(5))]
    runner(write_rows(tmp_path / "pairs.parquet", rows), tmp_path / "out", path="plain", keep_columns="q")
    assert damaged(tmp_path / "out") == {}


# a data set with reference values


def test_records_of_an_exported_data_set_are_looked_at(models: Mapping[str, Path], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(70))
    export(data, models["reference"], tmp_path / "out", path="plain", threads=1)
    assert damaged(tmp_path / "out") == {}
    (record,) = (tmp_path / "out/commits/data").rglob("*.json")
    name = str(record.relative_to(tmp_path / "out"))
    (file,) = record_of(tmp_path / "out", name).files
    sound = (tmp_path / "out" / file.name).read_bytes(), record.read_bytes()
    flip(tmp_path / "out" / file.name)
    assert file.name in damaged(tmp_path / "out")
    (tmp_path / "out" / file.name).write_bytes(sound[0])
    flip(record)
    assert list(damaged(tmp_path / "out")) == [name]
    record.write_bytes(sound[1])
    for path in ("commits/reference/00001-of-00002.json", "reference/part-00001-of-00002.parquet"):
        (tmp_path / "out" / path).unlink()
    assert list(damaged(tmp_path / "out")) == ["reference"]


# grids of rescore


@pytest.fixture
def grid(out: Path) -> Path:
    rescore(str(out), "ipo,sigmoid", "0.5", None, [], None)
    (folder,) = (out / "rescored").iterdir()
    return folder


def test_a_grid_is_as_it_was_written(out: Path, grid: Path) -> None:
    assert damaged(out) == {}
    for path in [path for path in grid.rglob("*") if path.is_file()]:
        sound = path.read_bytes()
        for share in (0.1, 0.5, 0.9):
            flip(path, share)
            assert list(damaged(out)) == [str(path.relative_to(out))], share
            path.write_bytes(sound)
    shutil.copy(grid / "better" / PART, grid / "better/more.parquet")
    assert list(damaged(out)) == [str((grid / "better/more.parquet").relative_to(out))]
    (grid / "better/more.parquet").unlink()
    (grid / "own" / PART).unlink()
    assert list(damaged(out)) == [str((grid / "own" / PART).relative_to(out))]


def test_a_grid_without_checksums_or_summary_is_said_and_no_failure(out: Path, grid: Path) -> None:
    fields = json.loads((grid / "summary.json").read_text())
    name = str(grid.relative_to(out))
    for old in ({k: v for k, v in fields.items() if k not in ("files", "checksum")}, None):
        (grid / "summary.json").unlink()
        if old is not None:
            (grid / "summary.json").write_text(json.dumps(old))
        findings = verify(str(out))
        findings.raise_damage()
        assert list(findings.unproved) == [name]
    rescore(str(out), "ipo,sigmoid", "0.5", None, [], None)
    assert verify(str(out)).unproved == {}


def test_a_grid_holds_what_records_vouch_for(out: Path) -> None:
    shutil.copy(out / "scores/better" / PART, out / "scores/better/part-00003-of-00003.parquet")
    rows = rescore(str(out), "ipo", "0.5", None, [], None)["rows"]
    assert [row["n"] for row in rows] == [129, 129]


# what contradicts itself, though every checksum and record fits


def shifted(out: Path, record: str, part: str, names: list[str], by: float = 5.0, again: bool = False) -> None:
    table = open_store(out).read_table(part)
    for name in names:
        table = with_column(table, name, [value + by for value in table[name].to_pylist()])
    if again:
        spec = LossSpec.model_validate_json(table.schema.metadata[b"dpo_score.loss_spec"])
        metadata = table.schema.metadata
        table = derive_table(table, parse_loss(spec), has_reference=True).replace_schema_metadata(metadata)
    rewritten(out, record, part, table)


REFERENCE = ("commits/reference/00000-of-00003.json", f"reference/{PART}")
BETTER = ("commits/scores/better/00000-of-00003.json", f"scores/better/{PART}")


def test_scores_hold_the_values_of_their_reference(out: Path) -> None:
    shifted(out, *REFERENCE, ["ref_chosen_logps", "ref_rejected_logps"])
    found = damaged(out)
    assert "column ref_rejected_logps is not the sum of ref_rejected_token_logps" in found[REFERENCE[1]]
    assert "is not that of the reference's part" in found[BETTER[1]]


def test_a_reference_changed_in_the_scores_alone_is_found(out: Path) -> None:
    shifted(out, *BETTER, ["ref_chosen_logps"], again=True)
    assert damaged(out) == {BETTER[1]: "column ref_chosen_logps is not that of the reference's part"}


def test_sums_are_those_of_their_lists(out: Path) -> None:
    shifted(out, *BETTER, ["policy_chosen_logps"], by=1e-7, again=True)
    assert damaged(out) == {BETTER[1]: "column policy_chosen_logps is not the sum of policy_chosen_token_logps"}


def test_token_counts_are_the_lengths_of_their_lists(out: Path) -> None:
    for place in (REFERENCE, BETTER):
        shifted(out, *place, ["chosen_tokens"], by=1, again=place is BETTER)
    assert "column chosen_tokens is not the length of ref_chosen_token_logps" in damaged(out)[REFERENCE[1]]


def test_reject_codes_are_counted_one_by_one(out: Path) -> None:
    part = f"rejects/data/{PART}"
    table = open_store(out).read_table(part)
    rewritten(out, REFERENCE[0], part, with_column(table, "code", ["too_long"]))
    assert "counts other reject codes" in damaged(out)[REFERENCE[0]]
    assert "too_long" in damaged(out)[REFERENCE[0]]


def remade(out: Path, name: str, change: Callable[[Any], None]) -> None:
    """An output changed together with what the manifest records of it."""
    store = open_store(out)
    fields = store.read_json(name)
    change(fields)
    store.write_json(name, fields)
    manifest = read_manifest(store)
    assert manifest is not None
    file = FileRecord(name, (out / name).stat().st_size, 0, store.sha256(name))
    outputs = tuple(file if known.name == name else known for known in manifest.outputs)
    save_manifest(store, replace(manifest, outputs=outputs))


SUMMARY_PATHS = (
    ("policies.better.overall.accuracy.value", 0.999),
    ("policies.better.overall.accuracy.ci95", [0.9, 1.0]),
    ("policies.better.subsets.pairs.a.margins.mean", 3.0),
    ("policies.own.overall.scored", 128),
    ("policies.better.noise.margin_mean", 0.5),
    ("policies.better.overall.rejected", {}),
    ("data.rows", 129),
    ("data.scored_by_reference", 131),
    ("data.rejected", {"rejected/data/null_field": 2}),
    ("text.marks", {"identical_pair": {"pairs": 1, "first": "0:0"}}),
)


@pytest.mark.parametrize(("path", "value"), SUMMARY_PATHS)
def test_every_number_of_the_summary_is_made_again(out: Path, path: str, value: Any) -> None:
    def change(fields: Any) -> None:
        *outer, last = path.split(".")
        for name in outer:
            fields = fields[name]
        fields[last] = value

    remade(out, "summary.json", change)
    found = damaged(out)
    assert found, path
    assert any(path.rpartition(".")[2] in what or "summary.json counts" in what for what in found.values()), found


def test_a_grid_follows_from_the_scores(out: Path, grid: Path) -> None:
    name = str(grid.relative_to(out))
    store = open_store(out)
    part = f"{name}/better/{PART}"
    table = store.read_table(part)
    table = with_column(table, "loss", [1.5, *table["loss"].to_pylist()[1:]])
    file = store.write_table(part, table, {})
    fields = dict(unsealed(store.read_json(f"{name}/summary.json"), name))
    sound = dict(fields)
    fields["files"] = [file.to_json() if known["name"] == part else known for known in fields["files"]]
    store.write_json(f"{name}/summary.json", sealed(fields))
    assert damaged(out) == {part: "does not follow from the scores"}
    sound["rows"][0]["accuracy"]["value"] = 0.999
    store.write_json(f"{name}/summary.json", sealed(sound))
    assert f"{name}/summary.json" in damaged(out) or part in damaged(out)


def test_rows_that_only_the_summary_counts_are_missed(out: Path) -> None:
    remade(out, "summary.json", lambda fields: fields["policies"]["own"]["overall"].update(scored=130))
    assert damaged(out)["scores/own"] == "holds 129 rows, summary.json counts 130"


def test_the_card_says_what_the_summary_says(out: Path) -> None:
    card = out / "README.md"
    text = card.read_text()
    assert "129" in text
    store = open_store(out)
    card.write_text(text.replace("129", "128"))
    manifest = read_manifest(store)
    assert manifest is not None
    file = FileRecord("README.md", card.stat().st_size, 0, store.sha256("README.md"))
    outputs = tuple(file if known.name == "README.md" else known for known in manifest.outputs)
    save_manifest(store, replace(manifest, outputs=outputs))
    assert list(damaged(out)) == ["README.md"]


def test_parts_and_policies_that_nothing_names(out: Path) -> None:
    shutil.copy(out / BETTER[1], out / "scores/better/extra.pq")
    shutil.copytree(out / "commits/scores/better", out / "commits/scores/ghost")
    found = damaged(out)
    assert found["scores/better/extra.pq"] == "no commit record names it"
    assert "commits/scores/ghost/00000-of-00003.json" in found


@pytest.mark.parametrize("kind", ["failed", "skipped"])
def test_a_reason_for_a_policy_that_nobody_asked_for_is_named(out: Path, kind: str) -> None:
    remade(out, "summary.json", lambda fields: fields.setdefault(kind, {}).update(ghost="it does not load"))
    assert "the policy 'ghost' was not scored, which pipeline.yaml does not ask for" in damaged(out)["summary.json"]


def test_a_policy_taken_out_of_everything_but_the_summary_is_missed(out: Path) -> None:
    store = open_store(out)
    for folder in ("scores/better", "commits/scores/better"):
        shutil.rmtree(out / folder)
    manifest = read_manifest(store)
    assert manifest is not None
    policies = {name: fields for name, fields in manifest.identities.policies.items() if name != "better"}
    save_manifest(store, replace(manifest, identities=replace(manifest.identities, policies=policies)))
    assert "'better', which the manifest does not name" in damaged(out)["summary.json"]


@pytest.mark.parametrize("left", ["everything", "two blocks", "nothing"])
def test_a_policy_that_the_summary_alone_forgot_is_named_with_what_is_stored_of_it(out: Path, left: str) -> None:
    remade(out, "summary.json", lambda fields: fields["policies"].pop("better"))
    if left == "two blocks":
        (out / "commits/scores/better/00002-of-00003.json").unlink()
        (out / "scores/better/part-00002-of-00003.parquet").unlink()
    if left == "nothing":
        for folder in ("scores/better", "commits/scores/better"):
            shutil.rmtree(out / folder)
    said = {
        "everything": "not summed up; summary.json has no such policy: summary.json does not say why",
        "two blocks": "rows 128 to 129 of 130 are missing, counted from 0; summary.json has no such policy: "
        "summary.json does not say why",
        "nothing": "pipeline.yaml asks for this policy, and summary.json names it neither as scored nor failed",
    }
    assert said[left] in damaged(out)["scores/better"]


def test_what_was_checked_is_counted_and_said_as_json(out: Path) -> None:
    store = open_store(out)
    files = [name for name in store.list() if name != "commits/manifest.json" and not name.startswith(".work")]
    sound = {"out": str(out), "files": len(files), "rows": 4 * 129, "damage": []}
    assert verify(str(out)).to_json() == sound
    (out / "README.md").write_text("altered")
    what = "missing or altered since the run wrote it"
    assert verify(str(out)).to_json() == {**sound, "damage": [{"file": "README.md", "what": what}]}


def test_a_part_that_is_no_parquet_any_more_is_said_with_what_reading_it_says(out: Path) -> None:
    store = open_store(out)
    data = b"PAR1 and nothing more PAR1"
    store.write_bytes(BETTER[1], data)
    file = FileRecord(BETTER[1], len(data), 64, hashlib.sha256(data).hexdigest())
    files = tuple(file if known.name == file.name else known for known in record_of(out, BETTER[0]).files)
    resealed(out, BETTER[0], files=files)
    assert "damaged Parquet file" in damaged(out)[BETTER[1]]


# whatever a file holds: one finding with its name, and the others are checked


DEEP = "[" * 20_000 + "]" * 20_000
ODD = (
    ("summary.json", DEEP),
    ("summary.json", '{"data": {"rows": 1e13}}'),
    ("summary.json", '{"data": {"rows": [1]}, "policies": {"better": 3, "own": {"overall": null}}}'),
    ("summary.json", "NaN"),
    ("summary.json", '{"data": {"rows": 130}, "skipped": null, "failed": [1]}'),
    ("commits/scores/better/00001-of-00003.json", DEEP),
    ("commits/scores/better/00001-of-00003.json", "[]"),
    ("commits/manifest.json", DEEP),
    ("manifest.json", DEEP),
    ("manifest.json", "null"),
    ("manifest.json", ""),
)


@pytest.mark.parametrize(("name", "text"), ODD)
def test_odd_json_is_one_finding_and_the_rest_is_checked(
    out: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / name).write_text(text)
    flip(out / "scores/own" / PART)
    assert exit_code(["verify", str(out)]) == 4
    said = capsys.readouterr()
    assert name in said.out
    assert f"scores/own/{PART}" in said.out
    assert "Traceback" not in said.out + said.err


SEALED = (
    {"counts": {"scored": None}},
    {"counts": None},
    {"block": -1},
    {"start": "0"},
    {"files": None},
    {"files": [{"name": 1, "size": 2, "rows": 3, "sha256": 4}]},
    {"files": [{"name": "../../etc/passwd", "size": 2, "rows": 3, "sha256": "x"}]},
    {"notes": []},
    {"row_ids_digest": 7},
)


@pytest.mark.parametrize("change", SEALED)
def test_a_sealed_record_of_wrong_types_is_one_finding(out: Path, change: dict[str, Any]) -> None:
    name = "commits/scores/better/00001-of-00003.json"
    store = open_store(out)
    store.write_json(name, sealed({**unsealed(store.read_json(name), name), **change}))
    assert name in damaged(out)


@pytest.mark.parametrize(
    "change", [{"block_rows": 0}, {"schema_version": "1"}, {"identities": []}, {"outputs": 3}, {"total_rows": -5}]
)
def test_a_sealed_manifest_of_wrong_types_is_one_finding(out: Path, change: dict[str, Any]) -> None:
    store = open_store(out)
    store.write_json("manifest.json", sealed({**unsealed(store.read_json("manifest.json"), "m"), **change}))
    assert list(damaged(out)) == ["manifest.json"]
    store.write_json("commits/manifest.json", store.read_json("manifest.json"))
    assert "manifest.json" in damaged(out)


def test_a_manifest_that_is_gone_is_one_finding(out: Path) -> None:
    (out / "manifest.json").unlink()
    flip(out / BETTER[1])
    assert {"manifest.json", BETTER[1]} <= damaged(out).keys()


def test_a_part_without_its_columns_is_one_finding(out: Path) -> None:
    for part, record in ((BETTER[1], BETTER[0]), (REFERENCE[1], REFERENCE[0])):
        rewritten(out, record, part, pa.table({"other": [1, 2]}))
    assert {BETTER[1], REFERENCE[1]} <= damaged(out).keys()


# code


CUSTOM = "def linear(columns, beta):\n    return -beta * columns['policy_chosen_logps']\n"


@pytest.fixture(scope="module")
def custom(tmp_path_factory: pytest.TempPathFactory, models: Mapping[str, Path]) -> Path:
    """A folder with mine.py and a run that was scored with its loss."""
    folder = tmp_path_factory.mktemp("custom")
    (folder / "mine.py").write_text(CUSTOM)
    data = write_rows(folder / "pairs.parquet", preference_rows(12))
    Runner(folder / "cache", models)(data, folder / "out", path="plain", loss=f"{folder / 'mine.py'}:linear")
    return folder


@pytest.fixture
def foreign(custom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That run as somebody else hands it on: it names a file that comes with it, and that touches `canary`."""
    folder = Path(shutil.copytree(custom / "out", tmp_path / "foreign"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\n{CUSTOM}")
    pipeline = folder / "pipeline.yaml"
    pipeline.write_text(pipeline.read_text().replace(str(custom / "mine.py"), "evil.py"))
    part = "scores/better/part-00000-of-00001.parquet"
    table = open_store(folder).read_table(part)
    said = table.schema.metadata[b"dpo_score.loss_spec"].decode().replace(str(custom / "mine.py"), "evil.py")
    rewritten(folder, "commits/scores/better/00000-of-00001.json", part, table, **{"dpo_score.loss_spec": said})
    monkeypatch.chdir(folder)
    return folder


def test_code_that_a_folder_names_and_brings_along_is_not_run(foreign: Path, tmp_path: Path) -> None:
    found = verify(".")
    assert not (tmp_path / "canary").exists()
    assert "not recomputed" in found.unproved["scores/better"]


READING = (
    "status .",
    "rescore . --loss ipo",
    "report .",
    "compare .",
    "audit .",
    "inspect .",
    "export . --to=trl --out x",
)


@pytest.mark.parametrize("command", READING)
def test_nor_does_another_command_on_results_run_it(foreign: Path, tmp_path: Path, command: str) -> None:
    with suppress(SystemExit):
        main(command.split())
    assert not (tmp_path / "canary").exists()


def test_a_custom_loss_is_said_to_be_left_out_and_the_rest_is_proved(
    custom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(["verify", str(custom / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "scores/better: loss and loss_code not recomputed: custom loss" in said
    assert "nothing damaged" in said
    out = Path(shutil.copytree(custom / "out", tmp_path / "out"))
    for column, where in (("margins", "scores"), ("dpo_weight", "scores"), ("loss", "summary.json")):
        spoil(out, column)
        ((name, what),) = damaged(out).items()
        assert name.startswith(where), "the value of a loss that is not run is still what summary.json was made of"
        assert column in what
        shutil.rmtree(out)
        shutil.copytree(custom / "out", out)


def spoil(out: Path, column: str) -> None:
    part = "scores/better/part-00000-of-00001.parquet"
    table = open_store(out).read_table(part)
    values = [1.25, *table[column].to_pylist()[1:]]
    rewritten(out, "commits/scores/better/00000-of-00001.json", part, with_column(table, column, values))


def test_a_custom_loss_is_proved_from_the_file_that_the_user_names(
    custom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = Path(shutil.copy(custom / "mine.py", tmp_path / "moved.py"))
    findings = verify(str(custom / "out"), [str(mine)])
    assert (findings.damage, findings.unproved) == ([], {})
    out = Path(shutil.copytree(custom / "out", tmp_path / "out"))
    spoil(out, "loss")
    assert "column loss does not follow" in str(verify(str(out), [str(mine)]).damage)
    assert exit_code(["verify", str(custom / "out"), "--loss-file", str(mine), "--json"]) == 0
    assert "unproved" not in json.loads(capsys.readouterr().out)


def test_a_file_that_is_not_the_stored_one_is_not_run(custom: Path, foreign: Path, tmp_path: Path) -> None:
    for out in (custom / "out", foreign):
        with pytest.raises(ConfigError, match=r"its sha256 is \w+; the scores were computed with .*mine\.py:linear"):
            verify(str(out), ["evil.py"])
    assert not (tmp_path / "canary").exists()


def test_a_file_for_a_run_without_a_custom_loss_is_refused(finished: Path, custom: Path) -> None:
    with pytest.raises(ConfigError, match="no custom loss"):
        verify(str(finished), [str(custom / "mine.py")])


@pytest.mark.parametrize("said", ["", '{"nome": "ipo"}', '{"name": "no-such-loss"}', '{"name": "a.py:f"}', "[1]"])
def test_a_part_that_does_not_say_its_loss_is_named(out: Path, said: str) -> None:
    part = f"scores/better/{PART}"
    table = open_store(out).read_table(part)
    rewritten(out, "commits/scores/better/00000-of-00003.json", part, table, **{"dpo_score.loss_spec": said})
    assert list(damaged(out)) == [part]


def exit_code(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code
