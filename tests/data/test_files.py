"""Files are found, told apart by their splits and their bytes, and refused in one paragraph."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_score.config.schema import DataSpec
from dpo_score.data.dataset import open_datasets, read_pairs
from dpo_score.data.files import locate
from dpo_score.data.layout import split_names
from dpo_score.errors import DataError

PAIRS = pa.table({"prompt": ["q"] * 50, "chosen": ["a"] * 50, "rejected": ["b"] * 50})


def spec(path: Path | str, *split: str) -> DataSpec:
    return DataSpec(name="set", path=str(path), split=split)


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(PAIRS, folder / name)


def names(path: Path | str, *split: str) -> list[str]:
    return [file.name for file in locate(spec(path, *split))]


def test_folders_are_read_in_the_order_of_paths_without_hidden_files(tmp_path: Path) -> None:
    make(tmp_path, "b/1.parquet", "a/2.parquet", "a/1.parquet", ".hidden.parquet", "_private/1.parquet", "x/.tmp-1")
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "more.jsonl").write_text("{}")
    assert names(tmp_path) == ["a/1.parquet", "a/2.parquet", "b/1.parquet"]


def test_names_of_a_glob_start_below_its_fixed_part(tmp_path: Path) -> None:
    make(tmp_path, "v1/train/1.parquet", "v1/test/1.parquet", "v2/train/1.parquet")
    assert names(tmp_path / "v*/train/*.parquet") == ["v1/train/1.parquet", "v2/train/1.parquet"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/train_prefs-00001-of-00002-0123abcd.parquet", "train_prefs"),
        ("split=test/part.parquet", "test"),
        ("test.parquet", "test"),
        ("quickstart-test.parquet", "test"),
        ("validation/1.jsonl.gz", "validation"),
    ],
)
def test_a_path_says_its_split(name: str, split: str) -> None:
    assert split in split_names(name)


def test_a_split_selects_and_keeps_the_asked_order(tmp_path: Path) -> None:
    make(tmp_path, "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "train_prefs-00000-of-00001.parquet",
         "test-00000-of-00001.parquet")  # fmt: skip
    assert names(tmp_path, "train") == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert names(tmp_path, "test", "train_prefs") == [
        "test-00000-of-00001.parquet",
        "train_prefs-00000-of-00001.parquet",
    ]


def test_an_unknown_split_lists_those_found(tmp_path: Path) -> None:
    make(tmp_path, "train-00000-of-00001.parquet", "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"no split 'dev' in .*; found: test, train"):
        locate(spec(tmp_path, "dev"))


def test_several_splits_are_not_mixed_unasked(tmp_path: Path) -> None:
    make(tmp_path, "train-00000-of-00001.parquet", "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match="holds the splits test, train; say --split NAME"):
        locate(spec(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\0" * 100, "is empty"),
        (b"prompt,chosen,rejected\nq,a,b\n", "is not Parquet: it begins with 'prompt,chosen"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"PAR1", "is cut off"),
        (b"PAR1" + b"\0" * 100, "is cut off"),
        (b"PAR1" + b"\0" * 100 + b"PAR1", "cannot be read as Parquet"),
        (b"PARE" + b"\0" * 100 + b"PARE", "encrypted"),
        (b"\x1f\x8b\x08", "is packed: give it a name that ends in .gz"),
        (b"PK\x03\x04", "is packed: unpack the archive"),
        (b"\x1b]8;;evil\x07", r"begins with '\\\\x1b\]8"),
    ],
)
def test_what_is_not_parquet_is_said_in_one_paragraph(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        open_datasets([spec(path)])
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_cut_file_is_refused(share: float, tmp_path: Path) -> None:
    make(tmp_path, "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match="is cut off"):
        open_datasets([spec(tmp_path)])


def test_a_flipped_byte_in_the_data_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(PAIRS, path, compression="zstd", write_page_checksum=True)
    damaged = bytearray(path.read_bytes())
    damaged[4:60] = bytes(56)
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        list(read_pairs(open_datasets([spec(path)]), 0, 50))


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_datasets([spec(tmp_path / "nothing.parquet")])
    with pytest.raises(DataError, match=r"no \.parquet, \.jsonl or \.json file"):
        open_datasets([spec(tmp_path / "*.parquet")])


def test_an_unknown_scheme_is_one_sentence() -> None:
    with pytest.raises(DataError, match="cannot open nowhere://x"):
        open_datasets([spec("nowhere://x")])


def test_a_url_whose_secret_was_left_out_says_what_to_give() -> None:
    with pytest.raises(DataError, match=r"without its password or token \(\*\*\*\): give the whole URL again, --data"):
        open_datasets([spec("https://***@example.invalid/pairs.parquet?token=***")])


def test_a_json_file_without_objects_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{broken\n{broken\n")
    with pytest.raises(DataError, match="none of the first 2 rows is a JSON object"):
        open_datasets([spec(tmp_path / "a.jsonl")])
    (tmp_path / "a.json").write_text("[1, 2")
    with pytest.raises(DataError, match="is not one JSON array"):
        open_datasets([spec(tmp_path / "a.json")])


@pytest.mark.parametrize("kind", ["folder", "glob"])
@pytest.mark.parametrize("words", [("test", "train"), ("testing", "training"), ("evaluation", "train2")])
def test_a_local_path_keeps_its_splits_apart(words: tuple[str, str], kind: str, tmp_path: Path) -> None:
    make(tmp_path, *(f"{word}.parquet" for word in words))
    path = tmp_path if kind == "folder" else tmp_path / "*.parquet"
    with pytest.raises(DataError, match=f"holds the splits {words[0]}, train(ing)?; say --split NAME"):
        locate(spec(path))
    assert names(path, words[0]) == [f"{words[0]}.parquet"]


def test_configurations_of_a_local_folder_are_chosen_by_name(tmp_path: Path) -> None:
    make(tmp_path, "easy/train.parquet", "easy/test.parquet", "hard/train.parquet")
    with pytest.raises(DataError, match=r"several configurations: easy, hard\. Say which, as in .*:easy"):
        locate(spec(tmp_path))
    assert names(f"{tmp_path}:easy", "test") == ["easy/test.parquet"]
    assert names(f"{tmp_path}:hard") == ["hard/train.parquet"]


def test_a_card_of_a_local_folder_decides(tmp_path: Path) -> None:
    make(tmp_path, "one/x-0.parquet", "two/x-0.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# pairs\n")
    with pytest.raises(DataError, match="several configurations: one, two"):
        locate(spec(tmp_path))
    assert names(f"{tmp_path}:two") == ["two/x-0.parquet"]
    [dataset] = open_datasets([spec(f"{tmp_path}:two")])
    assert dataset.skipped == {"one/x-0.parquet": "the card does not name it for this configuration"}


def test_a_card_that_names_files_which_are_not_there_is_not_passed_over(tmp_path: Path) -> None:
    make(tmp_path, "one/x-0.parquet")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: one\n  data_files: parts/*\n---\n")
    with pytest.raises(DataError, match=r"names the files parts/\*, and none of them is there"):
        locate(spec(tmp_path))


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ("train-00000-of-00002", "train-00001-of-00002"),
        ("train-1-of-2", "train-2-of-2"),
        ("p_000_of_003", "p_001_of_003"),
    ],
)
def test_a_missing_shard_is_refused_but_for_a_file_named_alone(first: str, other: str, tmp_path: Path) -> None:
    make(tmp_path, f"{first}.parquet")
    with pytest.raises(DataError, match=f"lacks {other}|lacks train-0-of-2"):
        locate(spec(tmp_path))
    assert names(tmp_path / f"{first}.parquet") == [f"{first}.parquet"]
    make(tmp_path, f"{other}.parquet", "p_002_of_003.parquet")
    assert names(tmp_path / f"{first[0]}*.parquet")[:2] == [f"{first}.parquet", f"{other}.parquet"]


def test_one_name_with_two_endings_is_one_file_and_files_of_the_same_content_are_named(tmp_path: Path) -> None:
    row = '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
    for name, text in (("a.jsonl", row), ("a.json", f"[{row}]"), ("b.jsonl", row + row), ("c.jsonl", row)):
        (tmp_path / name).write_text(text)
    [dataset] = open_datasets([spec(tmp_path)])
    assert dataset.skipped == {"a.json": "it has the name of a.jsonl"}
    assert "4 rows in 3 files" in dataset.summary()
    assert "files of the same content, each of which is read: a.jsonl = c.jsonl" in dataset.summary()


def test_files_that_are_left_out_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "more.csv").write_text("x\n1\n")
    [dataset] = open_datasets([spec(tmp_path)])
    assert [file.name for file in dataset.files] == ["a.jsonl"]
    assert dataset.skipped == {
        "dataset_infos.json": "it describes the data set",
        "more.csv": "CSV, where JSON files are read",
        "a.jsonl.gz": "a packed copy of a.jsonl",
    }
    assert all(name in dataset.summary() for name in dataset.skipped)
