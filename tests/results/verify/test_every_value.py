"""Every column and every JSON value of OUT, changed together with its checksum and record: found, or free.

Free, and listed here, is what nothing else in OUT repeats; pipelines/GUARANTEES.md says the same in words.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.errors import UsageError
from dpo_score.results.rescore import rescore
from dpo_score.results.verify.recompute import _differences
from dpo_score.results.verify.verify import verify
from dpo_score.storage.base import FileRecord
from dpo_score.storage.commits import sealed, unsealed
from dpo_score.storage.manifest import read_manifest, save_manifest
from dpo_score.storage.open import open_store
from tests.exported import export
from tests.run_fixtures import Runner, preference_rows, write_rows

FREE = re.compile(
    r"""
      (commits/|manifest).*\ (versions\.|notes\.noise\.(keys|deltas))     # of where and with what it was computed
    | manifest.json\ (host|started|finished|warnings|notes|cache_snapshots|numerics\.run\.(batch|compile|kernel|path))
    | manifest.json\ block_rows                                          # one block: its last row is not full
    | pipeline.yaml\ (data|reference\.model|policies|compute\.(path|threads)|out|cache_dir)   # places and speed
    | reference.*\ ref_.*(entropy|log_sum_sq_probs)$ | scores.*\ policy_.*(entropy|log_sum_sq_probs)$
    | rejects/.*\ (column|value_seen|reason)$                             # words
    | (data/train.*)\ (prompt|chosen|rejected|subset|score|topic|metadata\ dpo_score.schema)$  # the input's
    | dpo_score.json\ (reference\.(name|fingerprint|has_adapter)|noise_floor|version|rows\.datasets)
    | dpo_score.json\ text\.(chat|max_length|pad_token|tokenizer)
    """,
    re.VERBOSE,
)


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + (1 if isinstance(value, int) else 0.125)
    if isinstance(value, str):
        return ("x" if value[:1] != "x" else "y") + value[1:]
    if isinstance(value, list):
        return [other(value[0]), *value[1:]] if value else ["x"]
    return {"x": 1} if isinstance(value, dict) else 1


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to the values that hold no others; of a list to its first item."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in inner:
        yield from leaves(item, (*path, key))
    if not inner or not value:
        yield path


def changed(fields: Any, path: tuple[Any, ...]) -> Any:
    fields = copy.deepcopy(fields)
    at = fields
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = other(at[path[-1]])
    return fields


class Forger:
    """Changes one value of OUT and everything that vouches for its file, and puts all back."""

    def __init__(self, out: Path) -> None:
        self.out, self.store = out, open_store(out)
        self.sound = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def put_back(self) -> None:
        for path, content in self.sound.items():
            if path.read_bytes() != content:
                path.write_bytes(content)

    def vouched(self, file: FileRecord) -> None:
        for name in self.store.list():
            if name.endswith(".json") and name.startswith(("commits/", "rescored/")) and "manifest" not in name:
                fields = dict(unsealed(self.store.read_json(name), name))
                fields["files"] = [file.to_json() if f["name"] == file.name else f for f in fields["files"]]
                self.store.write_json(name, sealed(fields))
        manifest = read_manifest(self.store)
        assert manifest is not None
        outputs = tuple(file if known.name == file.name else known for known in manifest.outputs)
        save_manifest(self.store, replace(manifest, outputs=outputs))

    def forgeries(self, name: str) -> Iterator[str]:
        """One forgery of a file after the other; says what was changed."""
        if name.endswith(".parquet"):
            yield from self._columns(name)
        elif name.endswith((".json", ".yaml")):
            yield from self._values(name)

    def _columns(self, name: str) -> Iterator[str]:
        table = self.store.read_table(name)
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        for place, field in enumerate(table.schema):
            values = table[field.name].to_pylist()
            row = next((row for row, value in enumerate(values) if value not in (None, [])), 0)
            values[row] = other(values[row] if values[row] is not None else [] if pa.types.is_list(field.type) else "x")
            forged = table.set_column(place, field, pa.array(values, field.type))
            self.vouched(self.store.write_table(name, forged, metadata))
            yield f"{name} {field.name}"
        for key in metadata:
            self.vouched(self.store.write_table(name, table, {**metadata, key: other(metadata[key])}))
            yield f"{name} metadata {key}"

    def _values(self, name: str) -> Iterator[str]:
        raw = self.store.read_bytes(name)
        fields = yaml.safe_load(raw)
        is_sealed = "checksum" in fields
        fields = dict(unsealed(fields, name)) if is_sealed else fields
        for path in leaves(fields):
            forged = sealed(changed(fields, path)) if is_sealed else changed(fields, path)
            if name.endswith(".yaml"):
                self.store.write_bytes(name, yaml.safe_dump(forged).encode())
            else:
                self.store.write_json(name, forged)
            if name == "manifest.json":
                self.store.write_json("commits/manifest.json", forged)
            elif not is_sealed:
                self.vouched(FileRecord(name, len(self.store.read_bytes(name)), 0, self.store.sha256(name)))
            yield f"{name} {'.'.join(map(str, path))}"


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory, models: Mapping[str, Path]) -> Mapping[str, Forger]:
    """A run with everything that OUT can hold, and a data set for training."""
    folder = tmp_path_factory.mktemp("forged")
    rows = [{**row, "score": i / 3, "topic": "xyz"[i % 3]} for i, row in enumerate(preference_rows(12))]
    rows[3]["chosen"], rows[5]["chosen"] = None, rows[5]["rejected"]
    data = write_rows(folder / "pairs.parquet", rows)
    options = {"per_token": True, "stats": "entropy", "score": "all-assistant", "max_length": 90}
    config = Runner(folder / "cache", models).config(
        data, folder / "run", path="plain", keep_columns="score", slice="length,topic", **options
    )
    run(config, Progress(quiet=True))
    rescore(str(folder / "run"), "ipo", "0.5", None, [], None)
    export(data, models["reference"], folder / "data", path="plain", threads=1, emit_ids=True)
    return {name: Forger(folder / name) for name in ("run", "data")}


RUN = (
    "reference/part-00000-of-00001.parquet",
    "scores/better/part-00000-of-00001.parquet",
    "rejects/data/part-00000-of-00001.parquet",
    "commits/scores/better/00000-of-00001.json",
    "manifest.json",
    "pipeline.yaml",
)
DATA = ("data/train-00000-of-00001.parquet", "commits/data/train/00000-of-00001.json", "dpo_score.json")


@pytest.mark.parametrize(("which", "name"), [*(("run", name) for name in RUN), *(("data", name) for name in DATA)])
def test_what_is_changed_is_found_or_free(outs: Mapping[str, Forger], which: str, name: str) -> None:
    forger = outs[which]
    missed = []
    for what in forger.forgeries(name):
        if not FREE.match(what) and not found(forger.out):
            missed.append(what)
        forger.put_back()
    assert missed == []
    assert not found(forger.out), "nothing is found where nothing was changed"


def found(out: Path) -> bool:
    try:
        return bool(verify(str(out)).damage)
    except UsageError as error:
        return "schema version" in str(error)  # another release's: refused


def test_a_grid_is_held_against_the_scores_value_by_value(outs: Mapping[str, Forger]) -> None:
    forger = outs["run"]
    for name in (name for name in forger.store.list("rescored")):
        missed = []
        for what in forger.forgeries(name):
            missed += [] if found(forger.out) else [what]
            forger.put_back()
        assert missed == []


def test_every_value_of_the_summary_is_made_again(outs: Mapping[str, Forger]) -> None:
    """The comparison goes through all of them; a few are tried with the command."""
    forger = outs["run"]
    fields = forger.store.read_json("summary.json")
    paths = [path for path in leaves(fields) if path[0] not in ("skipped", "failed") and path[:2] != ("text", "render")]
    for path in paths:
        assert list(_differences(changed(fields, path), fields, "", plain=False)), path
    for path in paths[:: len(paths) // 12]:
        forger.store.write_json("summary.json", changed(fields, path))
        content = forger.store.read_bytes("summary.json")
        forger.vouched(FileRecord("summary.json", len(content), 0, forger.store.sha256("summary.json")))
        assert found(forger.out), path
        forger.put_back()


def test_the_card_is_made_again(outs: Mapping[str, Forger]) -> None:
    for forger in outs.values():
        text = forger.store.read_bytes("README.md").decode().replace("11", "10").replace("13", "12")
        forger.store.write_bytes("README.md", text.encode())
        forger.vouched(FileRecord("README.md", len(text.encode()), 0, forger.store.sha256("README.md")))
        assert found(forger.out)
        forger.put_back()
