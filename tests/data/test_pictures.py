"""Pictures of pairs: every schema, the places in a conversation, and pictures that cannot be scored."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpo_score.config.schema import DataSpec
from dpo_score.data import pictures
from dpo_score.data.dataset import open_datasets, read_pairs
from dpo_score.data.pictures import read_again
from dpo_score.data.types import Pair, Rejected, text_of
from dpo_score.errors import DataError
from tests.vision import CELL, cell, encoded, picture, write_pairs

RED, BLUE = encoded(picture(1)), encoded(picture(2, 40, 16))
PART = pa.struct([("type", pa.string()), ("text", pa.string())])
TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(PART))]))


def read(path: Path, **options: Any) -> list[Pair | Rejected]:
    datasets = open_datasets([DataSpec(name="set", path=str(path), **options)])
    return list(read_pairs(datasets, 0, datasets[0].rows))


def one(path: Path, **options: Any) -> Pair:
    found = read(path, **options)[0]
    assert isinstance(found, Pair), found
    return found


def parts(pair: Pair) -> list[str]:
    """The prompt: texts, and `#` for a picture."""
    assert not isinstance(pair.prompt, str)
    return [p.get("text", "#") for turn in pair.prompt for p in turn["content"]]


def turn(role: str, *texts: str | None) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text" if t else "image", "text": t} for t in texts]}


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path.parent / "root").mkdir(exist_ok=True)
    (path.parent / "root" / "red.png").write_bytes(RED)
    (path.parent / "root" / "blue.png").write_bytes(BLUE)
    return path


def rlaif_v(folder: Path, better: str, worse: str) -> Pair:
    columns = {"idx": [0], "image_path": ["a/b.jpg"], "origin_dataset": ["c"], "origin_split": ["d"]}
    image = pa.array([{"bytes": RED, "path": "b.jpg"}], CELL)
    texts = {"question": ["What?"], "chosen": [better], "rejected": [worse]}
    return one(parquet(folder / "set.parquet", image=image, **texts, **columns))


def h4(folder: Path, better: str, worse: str) -> Pair:
    images = pa.array([[cell(RED)]], pa.list_(CELL))
    sides = {s: pa.array([[turn("assistant", t)]], TURNS) for s, t in (("chosen", better), ("rejected", worse))}
    prompt = pa.array([[turn("user", None, "What?")]], TURNS)
    return one(parquet(folder / "set.parquet", images=images, prompt=prompt, **sides))


def tr_vlm(folder: Path, better: str, worse: str) -> Pair:
    image = pa.array([cell(RED)], CELL)
    return one(parquet(folder / "s.parquet", prompt=["What?"], image=image, chosen=[better], rejected=[worse]))


def mmpr(folder: Path, better: str, worse: str) -> Pair:
    row = {"image": "red.png", "question": "<image>\nWhat?", "chosen": better, "rejected": worse}
    return one(lines(folder / "set.jsonl", row), media_root=str(folder / "root"))


def sharegpt(folder: Path, better: str, worse: str) -> Pair:
    sides = {s: {"from": "gpt", "value": t} for s, t in (("chosen", better), ("rejected", worse))}
    row = {"conversations": [{"from": "human", "value": "<image>What?"}], **sides, "images": ["red.png"]}
    return one(lines(folder / "set.jsonl", row), media_root=str(folder / "root"))


def vl_reward_bench(folder: Path, better: str, worse: str) -> Pair:
    ranks = {"response": [[worse, better]], "human_ranking": [[1, 0]], "id": ["mmmu-1"], "rationale": ["r"]}
    return one(parquet(folder / "set.parquet", query=["What?"], image=pa.array([cell(RED)], CELL), **ranks))


def multimodal(folder: Path, better: str, worse: str) -> Pair:
    row = {"ID": "PAIRS_1", "Text": "What?", "Image": "red.png", "Output1": worse, "Output2": better}
    row |= {"Better": "Output2", "Meta": {"Category": "safety"}}
    return one(lines(folder / "set.jsonl", row), media_root=str(folder / "root"))


def vl_feedback(folder: Path, better: str, worse: str) -> Pair:
    rated = [
        {"response": text, "model": "m", "annotations": {"Helpfulness": {"Rating": rating, "Rationale": ""}}}
        for text, rating in ((worse, "2"), (better, "5"))
    ]
    image = pa.array([cell(RED)], CELL)
    return one(parquet(folder / "set.parquet", prompt=["What?"], image=image, completions=[rated], models=[["m"]]))


SCHEMAS: Sequence[Callable[[Path, str, str], Pair]] = (
    rlaif_v,
    h4,
    tr_vlm,
    mmpr,
    sharegpt,
    vl_reward_bench,
    multimodal,
    vl_feedback,
)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_has_its_picture_before_the_question_and_the_better_side(
    schema: Callable[[Path, str, str], Pair], tmp_path: Path
) -> None:
    for better, worse in (("A cat.", "A dog."), ("A dog.", "A cat.")):
        found = schema(tmp_path, better, worse)
        assert parts(found) == ["#", "What?"]
        assert [text_of(side[-1]["content"]) for side in (found.chosen, found.rejected)] == [better, worse]  # type: ignore[index]
        assert found.pictures is not None
        assert [(p.width, p.height) for p in found.pictures] == [(32, 24)]
        assert list(read_again(found.pictures).values()) == [RED]


def test_benchmarks_give_their_categories(tmp_path: Path) -> None:
    assert vl_reward_bench(tmp_path, "a", "b").extra["subset"] == "reasoning"
    assert multimodal(tmp_path, "a", "b").extra["subset"] == "safety/bias"


def test_several_pictures_stand_where_their_markers_are_and_rows_may_have_none(tmp_path: Path) -> None:
    conversation = [{"from": "human", "value": "Is <image>like <image>\n?"}, {"from": "gpt", "value": "Yes."}]
    more = [*conversation, {"from": "human", "value": "Sure?"}]
    sides = {s: {"from": "gpt", "value": s} for s in ("chosen", "rejected")}
    row = {"conversations": more, **sides, "images": ["red.png", "blue.png"]}
    bare = {"conversations": conversation[:1], **sides, "images": []}
    bare["conversations"] = [{"from": "human", "value": "No picture?"}]
    few = {**row, "images": ["red.png"]}
    found = read(lines(tmp_path / "set.jsonl", row, bare, few), media_root=str(tmp_path / "root"))
    assert isinstance(found[0], Pair)
    assert isinstance(found[1], Pair)
    assert parts(found[0]) == ["Is ", "#", "like ", "#", "?", "Yes.", "Sure?"]
    assert [p.width for p in found[0].pictures or ()] == [32, 40]
    assert (parts(found[1]), found[1].pictures) == (["No picture?"], ())
    assert isinstance(found[2], Rejected)
    assert found[2].code == "image_count"


def test_a_changed_picture_is_another_pair_of_another_prompt(tmp_path: Path) -> None:
    a, b = (one(write_pairs(tmp_path / f"{i}.parquet", [[data]])) for i, data in enumerate((RED, BLUE)))
    assert a.pair_id != b.pair_id
    assert a.prompt != b.prompt


def _png(mode: str, **options: Any) -> bytes:
    return encoded(picture(0, mode=mode), "JPEG" if mode == "CMYK" else "PNG", **options)


def _bomb() -> bytes:
    """A PNG whose header promises more pixels than its data hold."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def _sixteen_bit() -> bytes:
    import numpy as np

    return encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16)))


BROKEN = {
    "0 bytes": (b"", "image_broken"),
    "no picture": (b"hello, this is text", "image_broken"),
    "cut short": (RED[: len(RED) // 2], "image_broken"),
    "a film": (b"\0\0\0\x18ftypmp42" + bytes(64), "image_broken"),
    "a bomb": (_bomb(), "image_too_large"),
    "animated": (encoded(picture(0), "GIF", save_all=True, append_images=[picture(1)]), "image_animated"),
    "CMYK": (_png("CMYK"), "image_mode"),
    "16 bit": (_sixteen_bit(), "image_mode"),
    "null": (None, "image_missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_picture_that_cannot_be_scored_is_a_rejected_row(name: str, tmp_path: Path) -> None:
    data, code = BROKEN[name]
    images = [[RED], [RED]] if data is None else [[RED], [data]]
    path = write_pairs(tmp_path / "set.parquet", images)
    if data is None:
        table = pq.read_table(path)
        column = pa.array([[cell(RED)], [{"bytes": None, "path": None}]], pa.list_(CELL))
        pq.write_table(table.set_column(0, "images", column), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good, bad = read(path)
    assert isinstance(good, Pair)
    assert isinstance(bad, Rejected)
    assert bad.code == code, bad.reason


def test_a_picture_has_the_size_that_its_exif_data_turn_it_to(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture(0, 32, 16), "JPEG", exif=exif)
    found = one(write_pairs(tmp_path / "set.parquet", [[turned]]))
    assert [(p.width, p.height) for p in found.pictures or ()] == [(16, 32)]
    assert pictures.decoded(turned).size == (16, 32)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_other_modes_of_eight_bits_are_scored(mode: str, tmp_path: Path) -> None:
    assert one(write_pairs(tmp_path / "set.parquet", [[_png(mode)]])).pictures


def test_paths_need_a_root_and_do_not_leave_it(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(RED)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
    texts = {"question": "What?", "chosen": "a", "rejected": "b"}
    names = ("red.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", "none.png", "a\0b")
    path = lines(tmp_path / "set.jsonl", *({"image": name, **texts} for name in names))
    with pytest.raises(DataError, match=r"names pictures by path .*--media-root FOLDER"):
        read(path)
    found = read(path, media_root=str(tmp_path / "root"))
    assert isinstance(found[0], Pair)
    assert [item.code for item in found[1:] if isinstance(item, Rejected)] == ["image_missing"] * 5
    lines(tmp_path / "set.jsonl", {"image": "https://x.org/a.png", **texts})
    with pytest.raises(DataError, match="by URL"):
        read(path, media_root=str(tmp_path / "root"))


def test_films_and_sounds_are_refused_by_name_and_a_second_column_of_pictures(tmp_path: Path) -> None:
    film = pa.array([cell(b"\0\0\0\x18ftypmp42")], CELL)
    texts = {"prompt": ["q"], "chosen": ["a"], "rejected": ["b"]}
    for name in ("video", "audio"):
        with pytest.raises(DataError, match=f"column '{name}' .*sound or film, which is not scored"):
            read(parquet(tmp_path / "set.parquet", **texts, **{name: film}))
    two = {"image": pa.array([cell(RED)], CELL), "image_2": pa.array([cell(BLUE)], CELL)}
    with pytest.raises(DataError, match=r"column 'image_2' .*Pictures are read from one column"):
        read(parquet(tmp_path / "set.parquet", **texts, **two))


def test_pictures_by_path_are_part_of_what_identifies_a_set(tmp_path: Path) -> None:
    row = {"image": "red.png", "question": "q", "chosen": "a", "rejected": "b"}
    path, root = lines(tmp_path / "set.jsonl", row), str(tmp_path / "root")

    def fingerprint() -> Any:
        return open_datasets([DataSpec(name="s", path=str(path), media_root=root)])[0].fingerprint()

    before = fingerprint()
    assert before == fingerprint()
    (tmp_path / "root" / "red.png").write_bytes(BLUE)
    assert fingerprint() != before


def test_a_picture_that_changes_while_it_is_scored_ends_the_run(tmp_path: Path) -> None:
    row = {"image": "red.png", "question": "q", "chosen": "a", "rejected": "b"}
    found = one(lines(tmp_path / "set.jsonl", row), media_root=str(tmp_path / "root"))
    (tmp_path / "root" / "red.png").write_bytes(BLUE)
    with pytest.raises(DataError, match="a picture changed while it was being scored"):
        read_again(found.pictures or ())


@pytest.mark.slow
def test_texts_are_scored_without_pillow() -> None:
    code = "import sys, dpo_score.engine.run, dpo_score.cli.main; print('PIL' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert io.BytesIO(RED).read(4) == b"\x89PNG"
