"""Files of every kind give the same rows; what one row holds never stops the others."""

from __future__ import annotations

import csv
import gzip
import json
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_score.config.schema import DataSpec
from dpo_score.data import row_reader
from dpo_score.data.dataset import Dataset, open_datasets, read_pairs, read_rows_at
from dpo_score.data.types import Pair
from dpo_score.errors import DataError

ROWS = [{"prompt": f"ä{n}", "chosen": f'yes, "{n}"\nindeed', "rejected": f"no {n}", "score": n} for n in range(30)]
TABLE = pa.Table.from_pylist(ROWS)


def opened(path: Path | str, **spec: Any) -> Dataset:
    return open_datasets([DataSpec(name="set", path=str(path), **spec)])[0]


def codes(path: Path | str, **spec: Any) -> list[str]:
    dataset = opened(path, **spec)
    return [getattr(item, "code", "pair") for item in read_pairs([dataset], 0, dataset.rows)]


def as_csv(path: Path, delimiter: str, encoding: str) -> None:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def as_arrow(path: Path, new: Callable[..., Any]) -> None:
    with new(str(path), TABLE.schema) as writer:
        for batch in TABLE.to_batches(max_chunksize=7):
            writer.write_batch(batch)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FILES: dict[str, Callable[[Path], Any]] = {
    "a.csv": lambda path: as_csv(path, ",", "utf-8"),
    "semicolons.csv": lambda path: as_csv(path, ";", "utf-8-sig"),
    "a.tsv": lambda path: as_csv(path, "\t", "utf-8"),
    "stream.arrow": lambda path: as_arrow(path, pa.ipc.new_stream),
    "file.arrow": lambda path: as_arrow(path, pa.ipc.new_file),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES.encode()),
    "bom.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    "printed.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "objects.json": lambda path: path.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS)),
    "packed.csv.gz": lambda path: path.write_bytes(
        gzip.compress(
            b"prompt,chosen,rejected,score\n"
            + "".join(
                f'{r["prompt"]},"{str(r["chosen"]).replace(chr(34), chr(34) * 2)}",{r["rejected"]},{r["score"]}\n'
                for r in ROWS
            ).encode()
        )
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_rows_of_parquet(name: str, tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    FILES[name](tmp_path / name)
    one, other = opened(tmp_path / "a.parquet"), opened(tmp_path / name)
    pairs = [[item.pair_id for item in read_pairs([set_], 0, 30) if isinstance(item, Pair)] for set_ in (one, other)]
    assert pairs[0] == pairs[1]
    assert other.schema["score"].kind == "int"
    assert [item.source.row for item in read_rows_at([other], [3, 4, 29])] == [3, 4, 29]
    assert [item.source.row for item in read_pairs([other], 11, 13)] == [11, 12]


def test_a_cell_too_few_is_one_rejected_row_and_a_lone_quote_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\nq,a,b\nq,a\nq,,b\n")
    assert codes(tmp_path / "a.csv") == ["pair", "invalid_csv", "null_field"]


def test_a_lone_quote_is_said_with_the_lines_that_it_swallows_and_an_index_needs_no_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(',prompt,chosen,rejected\n0,q,a,b\n1,"q,a,b\n2,q,a,b\n')
    dataset = opened(tmp_path / "a.csv")
    assert "columns not read: column 1" in dataset.summary()
    _, lost = read_pairs([dataset], 0, 9)
    assert getattr(lost, "reason", "").startswith("lines 3 to 4 (a quote is never closed?) have 2 cells")


def test_messages_that_numpy_printed_are_no_prose(tmp_path: Path) -> None:
    turn = "{'role': 'user', 'content': 'q'}"
    cells = [f"[{turn}\n {turn}]", f"array([{turn}], dtype=object)", f"[{turn}]"]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": c, "chosen": "a", "rejected": "b"}) + "\n" for c in cells)
    )
    assert codes(tmp_path / "a.jsonl") == ["encoded_text"] * 3


def test_numbers_in_a_text_column_of_csv_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n007,12,13\n")
    dataset = opened(tmp_path / "a.csv")
    [pair] = read_pairs([dataset], 0, 1)
    assert isinstance(pair, Pair)
    assert (pair.prompt, pair.chosen) == ("007", "12")


def test_jsons_own_words_and_place_are_shown(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "q"},\n{"prompt": "q"},\n')
    with pytest.raises(DataError, match=r"none of the first 2 rows is a JSON object.*Extra data: line 1 column 16"):
        opened(tmp_path / "a.jsonl")
    (tmp_path / "b.json").write_text('[\n {"prompt": "q",}\n]')
    with pytest.raises(DataError, match=r"not one JSON array: .*line 2 column"):
        opened(tmp_path / "b.json")


def test_long_lines_deep_values_and_large_numbers_lose_their_own_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_reader, "MAX_LINE", 4 << 20)
    good = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"})
    deep = '{"prompt": "q", "chosen": "a", "rejected": "b", "more": ' + "[" * 900 + "]" * 900 + "}"
    deeper = '{"prompt": "q", "more": ' + "[" * 90_000 + "]" * 90_000 + "}"
    long = json.dumps({"prompt": "q" * (5 << 20), "chosen": "a", "rejected": "b"})
    number = good[:-1] + ', "more": ' + "9" * 5000 + "}"
    (tmp_path / "a.jsonl").write_text("\n".join([good, deep, long, deeper, number, good[:-1] + ', "n": 1e400}', good]))
    assert codes(tmp_path / "a.jsonl") == [
        "pair", "too_large", "too_large", "invalid_json", "invalid_json", "pair", "pair",
    ]  # fmt: skip


def test_a_dictionary_of_one_huge_value_is_decoded_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The footer says 16 MB for all 500 rows, which are 8 GB when they are decoded."""
    monkeypatch.setattr(row_reader, "WORST_BATCH_BYTES", 64 << 20)
    huge = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), pa.array(["x" * (16 << 20)]))
    small = pa.array(["b"] * 500)
    table = pa.table({"prompt": small, "chosen": huge, "rejected": small})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30)
    dataset = opened(tmp_path / "a.parquet")
    content = dataset.files[0].content
    assert isinstance(content, row_reader.ParquetRows)
    assert content._batch_rows <= 4
    assert [getattr(item, "code", "pair") for item in read_pairs([dataset], 0, 6)] == ["too_large"] * 6


def test_urls_are_read_as_files_are(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.jsonl").write_text(LINES)
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/set/a.jsonl"
        assert codes(url) == ["pair"] * 30
        with pytest.raises(DataError, match="does not exist"):
            opened(url + "x")
        server.shutdown()


def test_a_saved_data_set_is_read_by_its_own_list_of_files(tmp_path: Path) -> None:
    for split in ("train", "extra"):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        FILES["stream.arrow"](folder / "data-00000-of-00001.arrow")
        FILES["stream.arrow"](folder / "cache-0123.arrow")
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["train", "extra"]}))
    with pytest.raises(DataError, match="holds the splits extra, train"):
        opened(tmp_path / "saved")
    dataset = opened(tmp_path / "saved", split=("extra",))
    assert [file.name for file in dataset.files] == ["extra/data-00000-of-00001.arrow"]
    assert "cache-0123.arrow (not a part of the saved data set)" in dataset.summary()
    assert opened(tmp_path / "saved/train").rows == 30
