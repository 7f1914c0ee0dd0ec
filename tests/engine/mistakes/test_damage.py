"""One flipped bit in each kind of file that a run leaves: `verify` names it, the same command mends it.

Mending means: set aside with one warning, only that block computed again, and the bytes that stood there before.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpo_score.config.schema import ModelSpec, PolicySpec
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.errors import DamageError
from dpo_score.results import cache_admin as cachework
from dpo_score.results.verify.verify import verify
from tests.run_fixtures import Runner, preference_rows, write_rows

RESULTS = ("reference", "scores", "rejects", "summary.json", "README.md", "pipeline.yaml")


@dataclass
class Sound:
    """A finished run and the cache it filled. `copies` of both are damaged, never the run itself."""

    folder: Path
    models: Mapping[str, Path]

    def run(self, out: Path, cache: Path | None = None) -> Progress:
        runner = Runner(cache or self.folder / "cache", self.models)
        config = runner.config(self.folder / "pairs.parquet", out, path="plain")
        better, worse = (str(self.models[name]) for name in ("better", "worse"))
        own = PolicySpec(name="own", model=better, reference=ModelSpec(model=worse))
        policies = (PolicySpec(name="better", model=better), own)
        progress = Progress(quiet=True)
        run(config.model_copy(update={"policies": policies}), progress)
        return progress


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, models: Mapping[str, Path]) -> Sound:
    folder = tmp_path_factory.mktemp("sound")
    rows = preference_rows(70)
    rows[3]["chosen"] = None
    write_rows(folder / "pairs.parquet", rows)
    made = Sound(folder, models)
    made.run(folder / "out")
    return made


@pytest.fixture
def out(sound: Sound, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound.folder / "out", tmp_path / "out"))


def flip(path: Path, share: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 4
    path.write_bytes(content)


def contents(out: Path) -> dict[str, bytes]:
    files = [p for name in RESULTS for p in ([out / name] if (out / name).is_file() else (out / name).rglob("*"))]
    found = {str(path.relative_to(out)): path.read_bytes() for path in files if path.is_file()}
    return {name: data.replace(str(out).encode(), b"OUT") for name, data in found.items()}


DATA = (
    "reference/part-00000-of-00002.parquet",
    "reference/own/part-00001-of-00002.parquet",
    "scores/better/part-00001-of-00002.parquet",
    "rejects/data/part-00000-of-00002.parquet",
)
RECORDS = (
    "commits/reference/00000-of-00002.json",
    "commits/reference/own/00001-of-00002.json",
    "commits/scores/better/00000-of-00002.json",
)
ENDINGS = ("summary.json", "README.md", "pipeline.yaml")
MANIFESTS = ("manifest.json", "commits/manifest.json")


def test_the_kinds_are_all_there_are(out: Path) -> None:
    """Each file of OUT is of a kind that is damaged below."""
    known = {Path(name).parent.as_posix() if "/" in name else name for name in (*DATA, *RECORDS, *ENDINGS, *MANIFESTS)}
    found = [path.relative_to(out) for path in out.rglob("*") if path.is_file() and ".work" not in path.parts]
    kinds = {path.parent.as_posix() if path.parent.name else path.name for path in found}
    kinds -= {"report.html"}  # made from the others by `dpo-score report`, vouched for by none
    kinds -= {"scores/own", "commits/scores/own"}  # as those of `better`
    assert kinds == known


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("name", [*DATA, *RECORDS, *ENDINGS, *MANIFESTS])
def test_verify_names_the_file(out: Path, name: str, share: float) -> None:
    flip(out / name, share)
    before = (out / name).read_bytes()
    findings = verify(str(out))
    assert {file for file, _ in findings.damage} == {name}
    with pytest.raises(DamageError, match=name.rsplit("/", 1)[-1]) as error:
        findings.raise_damage()
    assert error.value.exit_code == 4
    assert (out / name).read_bytes() == before, "verify looks, and does not touch"


@pytest.mark.parametrize("name", [*DATA, *RECORDS])
def test_the_same_command_mends_it_with_one_warning(sound: Sound, out: Path, name: str) -> None:
    block = re.findall(r"\d{5}", name)[0]
    others = [path for path in out.glob("scores/*/*.parquet") if f"part-{block}" not in path.name]
    before = [path.stat().st_ino for path in others]
    flip(out / name)
    progress = sound.run(out)
    assert len(progress.warnings) == 1, progress.warnings
    assert name.rsplit("/", 1)[-1] in progress.warnings[0]
    assert contents(out) == contents(sound.folder / "out")
    assert verify(str(out)).damage == []
    assert [path for path in out.rglob(f"*{Path(name).name}*") if "quarantine" in str(path)]
    assert [path.stat().st_ino for path in others] == before


@pytest.mark.parametrize("name", [*ENDINGS, *MANIFESTS])
def test_what_is_written_at_the_end_is_written_again(sound: Sound, out: Path, name: str) -> None:
    flip(out / name)
    sound.run(out)
    assert contents(out) == contents(sound.folder / "out")
    assert verify(str(out)).damage == []


def test_a_block_that_is_gone_with_its_record_is_missed(out: Path) -> None:
    for name in ("commits/scores/better/00001-of-00002.json", DATA[2]):
        (out / name).unlink()
    assert [name for name, _ in verify(str(out)).damage] == ["scores/better"]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_damaged_cache_entry_is_computed_again_with_one_warning(
    sound: Sound, tmp_path: Path, forwards: list[int], share: float
) -> None:
    cache = Path(shutil.copytree(sound.folder / "cache", tmp_path / "cache"))
    value = max(cache.glob("logps/v1/*/*.parquet"), key=lambda path: path.stat().st_size)
    flip(value, share)
    with pytest.raises(DamageError, match=value.name):
        cachework.verify(str(cache))
    progress = sound.run(tmp_path / "out", cache)
    assert len(progress.warnings) == 1, progress.warnings
    assert value.name in progress.warnings[0]
    assert len(forwards) == 1, "one file holds the values of one block of one model"
    again, first = contents(tmp_path / "out"), contents(sound.folder / "out")
    tables = [name for name in first if name.endswith(".parquet")]
    assert {name: again[name] for name in tables} == {name: first[name] for name in tables}
    cachework.verify(str(cache))


def test_a_damaged_index_of_the_cache_is_made_again(sound: Sound, tmp_path: Path, forwards: list[int]) -> None:
    from dpo_score.storage.cache.cache import open_cache

    cache = Path(shutil.copytree(sound.folder / "cache", tmp_path / "cache"))
    for space in open_cache(cache).spaces():
        space.compact()
    indexes = sorted(cache.rglob("*.sqlite"))
    assert indexes
    flip(indexes[0])
    progress = sound.run(tmp_path / "out", cache)
    assert len(progress.warnings) == 1, progress.warnings
    assert forwards == []


@pytest.mark.parametrize("kind", ["file-digests/*.json", "noise/*.json", "logps/v1/*/namespace.json"])
def test_other_files_of_the_cache_cost_nothing_but_themselves(sound: Sound, tmp_path: Path, kind: str) -> None:
    cache = Path(shutil.copytree(sound.folder / "cache", tmp_path / "cache"))
    found = sorted(cache.glob(kind))
    for path in found:
        flip(path, 0.3)
    sound.run(tmp_path / "out", cache)
    again, first = contents(tmp_path / "out"), contents(sound.folder / "out")
    tables = [name for name in first if name.endswith(".parquet")]
    assert {name: again[name] for name in tables} == {name: first[name] for name in tables}
