"""A hub data set is one commit, its configuration and split are never guessed, and refusals say the way out."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_score.config.schema import DataSpec
from dpo_score.data.dataset import open_datasets
from dpo_score.data.files import locate
from dpo_score.data.layout import CONVERTED, Entry, Listing, hub_name, wanted
from dpo_score.errors import DataError
from tests.data.hub_data import TOKEN, Hub, serving

ROWS = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 3


def parquet(rows: list[dict[str, str]] = ROWS) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


TRAIN, TEST = parquet(ROWS), parquet(ROWS[:1])
SHARDED = {
    "README.md": b"# pairs",
    "data/train-00000-of-00001.parquet": TRAIN,
    "data/test-00000-of-00001.parquet": TEST,
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A public repository that this process' huggingface_hub talks to, with an empty cache."""
    with serving(Hub({"main": SHARDED})) as found:
        template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", found.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.chdir(tmp_path)
        yield found


def spec(path: str = "org/pairs", *split: str, revision: str | None = None) -> DataSpec:
    return DataSpec(name="set", path=path, split=split, revision=revision)


def names(spec_: DataSpec) -> list[str]:
    return [file.name for file in locate(spec_)]


def test_the_rows_are_read_and_the_commit_is_told_and_kept(hub: Hub) -> None:
    (dataset,) = open_datasets([spec("org/pairs", "train")])
    commit = hub.commit("main")
    assert dataset.rows == 3
    assert f"set: commit {commit}; format pair-text" in dataset.summary()
    assert dataset.fingerprint()["commit"] == dataset.spec.revision == commit


def test_the_digest_of_large_files_is_the_hubs_own(hub: Hub) -> None:
    hub.branches["main"] = {**SHARDED, "data/test.json": b""}

    def refuse(path: str) -> str:
        raise AssertionError(f"{path} was read to be digested")

    (dataset,) = open_datasets([spec("org/pairs", "train")], sha256=refuse)
    assert [file.sha256 for file in dataset.files] == [hashlib.sha256(TRAIN).hexdigest()]


def test_only_the_files_that_are_read_are_fetched(hub: Hub, tmp_path: Path) -> None:
    locate(spec("org/pairs", "test"))
    fetched = {path.name for path in (tmp_path / "hub").rglob("*.parquet")}
    assert fetched == {"test-00000-of-00001.parquet"}


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub) -> None:
    hub.branches["v2"] = {"train.jsonl": json.dumps(ROWS[0]).encode()}
    assert names(spec(revision="v2")) == names(spec(revision=hub.commit("v2"))) == ["train.jsonl"]
    with pytest.raises(DataError, match=r"org/pairs has no revision 'v3': see http://.*/datasets/org/pairs/tree/main"):
        locate(spec(revision="v3"))


def test_a_data_set_without_parquet_is_read_from_the_hubs_own_copy(hub: Hub) -> None:
    copy = {"default/train/0000.parquet": TRAIN, "default/train/0001.parquet": TRAIN, "default/test/0000.parquet": TEST}
    hub.branches = {"main": {"script.py": b"", "pairs.csv": b"a"}, CONVERTED: copy}
    assert names(spec("org/pairs", "train")) == ["default/train/0000.parquet", "default/train/0001.parquet"]
    (dataset,) = open_datasets([spec("org/pairs:default", "test")])
    assert (dataset.rows, dataset.commit) == (1, hub.commit(CONVERTED))
    again = open_datasets([spec("org/pairs:default", "test", revision=dataset.commit)])[0]
    assert again.fingerprint() == dataset.fingerprint()


def test_a_data_set_without_rows_says_so(hub: Hub) -> None:
    hub.branches = {"main": {"pairs.csv": b"a", "dataset_infos.json": b"{}"}}
    with pytest.raises(DataError, match="holds neither Parquet nor JSON, and the hub keeps no Parquet copy"):
        locate(spec())


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((403, "GatedRepo"), r"org/pairs is gated: ask for access on http://.*/datasets/org/pairs, then log in with"),
        ((401, "RepoNotFound"), r"no file or folder here .*if it is private, log in with `hf auth login` or set HF_T"),
        ((404, "RepoNotFound"), r"the hub has no repository of that name that you may read. Check the spelling"),
        ((403, ""), r"the hub answered 403 for http://.*: log in with `hf auth login`"),
        ((500, ""), r"the hub answered 500 for http://.*: try again later"),
    ],
)
def test_a_refusal_is_one_paragraph_with_the_page(refusal: tuple[int, str], message: str, hub: Hub) -> None:
    hub.refusal = refusal
    with pytest.raises(DataError, match=message) as error:
        locate(spec())
    assert "\n" not in str(error.value)


def test_without_the_hub_the_cache_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = open_datasets([spec("org/pairs", "train")])[0]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert open_datasets([spec("org/pairs", "train")])[0].fingerprint() == online.fingerprint()
    assert open_datasets([spec("org/pairs", "train", revision=online.commit)])[0].commit == online.commit
    assert len(hub.asked) == asked


def test_without_the_hub_its_own_copy_answers_from_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.branches = {"main": {"README.md": b"# x", "pairs.csv": b"a"}, CONVERTED: {"default/train/0000.parquet": TRAIN}}
    online = open_datasets([spec("org/pairs", "train")])[0]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert open_datasets([spec("org/pairs", "train")])[0].fingerprint() == online.fingerprint()


def test_a_half_filled_cache_does_not_pass_for_the_whole(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    locate(spec("org/pairs", "train"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="has the split train in the hub"):
        locate(spec())


def test_what_is_not_cached_is_said_with_the_command_that_fetches_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set.*`hf download --repo-type dataset org/pairs` where"):
        locate(spec())


def test_a_folder_here_goes_before_the_hub(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "org" / "pairs").mkdir(parents=True)
    (tmp_path / "org" / "pairs" / "mine.parquet").write_bytes(TRAIN)
    assert names(spec()) == ["mine.parquet"]
    assert hub.asked == []


PROGRAM = """
from dpo_score.config.schema import DataSpec
from dpo_score.data.files import locate
print(*(file.path for file in locate(DataSpec(name="set", path="org/pairs", split=("test",)))))
"""


def test_the_environment_is_honoured(hub: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN, then HF_HUB_OFFLINE, in a process of its own."""
    hub.refusal = (401, "RepoNotFound")
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def printed(**more: str) -> str:
        command = [sys.executable, "-c", PROGRAM]
        return subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, check=True).stdout

    first = printed()
    assert first.startswith(str(tmp_path / "home" / "hub"))
    asked = len(hub.asked)
    assert printed(HF_HUB_OFFLINE="1") == first
    assert len(hub.asked) == asked


# --- configurations and splits, from listings ---------------------------------------------------------------------


def chosen(
    files: list[str], path: str = "org/pairs", *split: str, card: Mapping[str, object] | None = None
) -> list[str]:
    listing = Listing("0" * 40, tuple(Entry(name, 1) for name in files), card or {})
    return [entry.name for entry in wanted(listing, spec(path, *split), hub_name(path)[1]).entries]


CARD = {
    "configs": [
        {"config_name": "en", "data_files": [{"split": "train", "path": "en/tr*.parquet"},
                                             {"split": "dev", "path": "en/d.parquet"}]},
        {"config_name": "de", "data_files": "de/*.parquet"},
        {"config_name": "fr", "data_dir": "fr"},
    ]
}  # fmt: skip
CARDED = ["en/tr1.parquet", "en/tr2.parquet", "en/d.parquet", "de/x.parquet", "fr/deep/y.parquet", "fr/y.json"]


def test_a_card_names_configurations_and_splits() -> None:
    assert chosen(CARDED, "org/pairs:en", "train", card=CARD) == ["en/tr1.parquet", "en/tr2.parquet"]
    assert chosen(CARDED, "org/pairs:en", "dev", "train", card=CARD)[0] == "en/d.parquet"
    assert chosen(CARDED, "org/pairs:de", card=CARD) == ["de/x.parquet"]
    assert chosen(CARDED, "org/pairs:fr", card=CARD) == ["fr/deep/y.parquet"]


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("org/pairs", (), "org/pairs has several configurations: en, de, fr. Say which, as in org/pairs:en"),
        ("org/pairs:nl", (), "org/pairs has no configuration 'nl'; it has: en, de, fr"),
        ("org/pairs:en", (), "holds the splits dev, train; say --split NAME"),
        ("org/pairs:en", ("test",), "no split 'test' in org/pairs:en; found: dev, train"),
    ],
)
def test_a_choice_that_was_not_made_is_listed(path: str, split: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        chosen(CARDED, path, *split, card=CARD)


def test_a_default_configuration_needs_no_choice() -> None:
    marked = {"configs": [{**CARD["configs"][0]}, {**CARD["configs"][1], "default": True}]}
    assert chosen(CARDED, card=marked) == ["de/x.parquet"]
    named = {
        "configs": [{"config_name": "a", "data_files": "a.json"}, {"config_name": "default", "data_files": "b.json"}]
    }
    assert chosen(["a.json", "b.json"], card=named) == ["b.json"]


def test_without_a_card_folders_are_configurations() -> None:
    files = ["harmless/train.jsonl.gz", "harmless/test.jsonl.gz", "helpful/train.jsonl.gz", "state.json"]
    assert chosen(files, "org/pairs:helpful") == ["helpful/train.jsonl.gz"]
    assert chosen(files, "org/pairs:harmless", "test") == ["harmless/test.jsonl.gz"]
    with pytest.raises(DataError, match="several configurations: harmless, helpful"):
        chosen(files)
    assert chosen(["data/train.parquet", "extra/old.parquet"]) == ["data/train.parquet"]


def test_splits_are_not_mixed_unasked() -> None:
    with pytest.raises(DataError, match="holds the splits test, train; say --split NAME"):
        chosen(["train.jsonl", "test.jsonl"])
    assert chosen(["train.jsonl", "test.jsonl"], "org/pairs", "test", "train") == ["test.jsonl", "train.jsonl"]


def test_half_a_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="holds only the first part of it"):
        chosen(["default/partial-train/0000.parquet"])
    with pytest.raises(DataError, match="lacks data/train-00001-of-00002"):
        chosen(["data/train-00000-of-00002.parquet"])
