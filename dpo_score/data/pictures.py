"""Pictures of pairs: found in a cell, checked, and opened again when they are scored. Pillow is imported only here.

A `Picture` says where its bytes are: in a file under --media-root, or in a cell of a data file. Whatever cannot be
scored as it stands is `Unusable` with a code: nothing is scaled, flattened or cut to its first frame without a word.
"""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from dpo_score.data.column_types import Shape, is_text
from dpo_score.data.layout import Located
from dpo_score.data.row_reader import open_rows
from dpo_score.data.types import Message, Pair, Picture, Problem, Unusable
from dpo_score.errors import ConfigError, DataError
from dpo_score.escape import seen

MARKER = "<image>"
"""Stands for a picture in the text of a prompt, as LLaVA, LLaMA-Factory and MMPR write it."""
MAX_BYTES = 64 << 20
MAX_PIXELS = 1 << 26
"""67 million; decoded they take 200 MB. Checked before a picture is decoded."""
MAX_PICTURES = 64
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is opened: formats that decode without another program."""
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
"""Pillow's modes of 8 bits a channel and at most red, green, blue and transparency."""
NAMES = ("images", "image", "Image", "pictures", "picture", "photos", "photo", "screenshot")
PATH_NAMES = ("image_paths", "image_path", "img_path", "image_file")
FILMS = ((0, b"\x1aE\xdf\xa3", "a film"), (4, b"ftyp", "a film"), (0, b"ID3", "sound"), (0, b"OggS", "sound"))


def with_files(value: Any) -> Any:
    """A cell with every PIL image in it as its file, a PNG: the same pixels."""
    if hasattr(value, "getexif"):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    return [with_files(item) for item in value] if isinstance(value, list | tuple) else value


def holds_pictures(shape: Shape | None) -> bool:
    """Bytes, a struct with bytes as the datasets library writes it, a text with a path; or a list of these."""
    if shape is None:
        return False
    item = shape.item if shape.kind == "list" and shape.item is not None else shape
    return "bytes" in item.fields or is_text(item)


def holds_paths(shape: Shape) -> bool:
    """Whether the column has no bytes: its texts are paths, which --media-root must make whole."""
    item = shape.item if shape.kind == "list" and shape.item is not None else shape
    return is_text(item) and not item.binary


# --- from a cell to `Picture`s ----------------------------------------------------------------------------------------


class PictureColumn:
    """The column of pictures of one set. `file`: path of the data file that is read."""

    def __init__(self, column: str, root: str | None, file: str = "") -> None:
        self.column, self.root, self.file = column, root, file

    def pictures(self, cell: Any, row: int) -> tuple[Picture, ...]:
        """The pictures of a cell, each looked at. Raises Unusable."""
        items = cell if isinstance(cell, list | tuple) else [] if cell is None else [cell]
        if len(items) > MAX_PICTURES:
            raise Unusable("too_large", f"{self.column} has {len(items)} pictures (limit {MAX_PICTURES})", self.column)
        return tuple(self._picture(item, row, index) for index, item in enumerate(items))

    def _picture(self, item: Any, row: int, index: int) -> Picture:
        data = item.get("bytes") if isinstance(item, Mapping) else item
        if isinstance(data, bytes):
            place = {"path": self.file, "row": row, "column": self.column, "index": index}
        else:
            path = self._path(item.get("path") if isinstance(item, Mapping) else item)
            data, place = self._read(path), {"path": str(path)}
        width, height = checked_size(data, self.column)
        return Picture(hashlib.sha256(data).hexdigest(), width, height, **place)  # type: ignore[arg-type]

    def _path(self, value: Any) -> Path:
        """The file below --media-root that a cell names."""
        if not isinstance(value, str) or not value:
            raise Unusable("image_missing", f"{self.column} holds no picture and no path", self.column, value)
        if "://" in value[:32] or value.startswith("data:"):
            reason = f"{self.column} holds a URL: pictures are not fetched, save them and give --media-root"
            raise Unusable("image_missing", reason, self.column, value[:200])
        if self.root is None:
            reason = f"{self.column} holds a path: say --media-root FOLDER that it is relative to"
            raise Unusable("image_missing", reason, self.column, value)
        found = located(self.root, value)
        if found is None:
            reason = f"{self.column}: no such file below --media-root {seen(self.root, 120)}"
            raise Unusable("image_missing", reason, self.column, value)
        return found

    def _read(self, path: Path) -> bytes:
        try:
            if path.stat().st_size > MAX_BYTES:
                reason = f"the picture has {path.stat().st_size:,} bytes (limit {MAX_BYTES:,})"
                raise Unusable("image_too_large", reason, self.column, path.name)
            return path.read_bytes()
        except OSError as error:
            reason = f"the picture cannot be read: {error.strerror}"
            raise Unusable("image_missing", reason, self.column, path.name) from None


def located(root: str, name: str) -> Path | None:
    """The file `name` below the folder `root`; None where there is none, or where it lies elsewhere."""
    try:
        base = Path(root).resolve()
        path = (base / name).resolve()
        return path if path.is_relative_to(base) and path.is_file() else None
    except (OSError, ValueError):
        return None


def paths_of(cells: Iterable[Any]) -> Iterator[str]:
    """Every path that the cells of a column name."""
    for cell in cells:
        for item in cell if isinstance(cell, list | tuple) else [cell]:
            value = item.get("path") if isinstance(item, Mapping) and not item.get("bytes") else item
            if isinstance(value, str) and value:
                yield value


# --- what a picture is ------------------------------------------------------------------------------------------------


def checked_size(data: bytes, column: str) -> tuple[int, int]:
    """Width and height of a picture that can be scored as it stands, decoded once to be sure. Raises Unusable."""
    if not data:
        raise Unusable("image_broken", "the picture has 0 bytes", column)
    if len(data) > MAX_BYTES:
        reason = f"the picture has {len(data):,} bytes (limit {MAX_BYTES:,})"
        raise Unusable("image_too_large", reason, column)
    what = next((what for at, magic, what in FILMS if data[at : at + len(magic)] == magic), None)
    if what is not None:
        raise Unusable("image_broken", f"{column} holds {what}, which is not scored", column, repr(data[:12]))
    with _pillow_errors(data, column), _opened(data) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            reason = f"the picture has {width} × {height} pixels (limit {MAX_PIXELS:,} in all)"
            raise Unusable("image_too_large", reason, column, f"{width} × {height}")
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # a JPEG of some phones, with previews behind the picture
            reason = f"the picture has {frames} frames: save the one that is meant as a picture of its own"
            raise Unusable("image_animated", reason, column, f"{image.format}, {frames} frames")
        mode = _mode(image)
        if mode not in MODES:
            reason = f"the picture is {mode}, which models are not given as it is: convert it to 8-bit RGB"
            raise Unusable("image_mode", reason, column, mode)
        image.load()
        return _upright(image).size  # type: ignore[no-any-return]


def _mode(image: Any) -> str:
    """Pillow's mode; "16-bit" for colours of 16 bits, which Pillow halves while it opens them."""
    args = image.tile[0][3] if getattr(image, "tile", None) else ""
    raw = args if isinstance(args, str) else args[0] if isinstance(args, tuple) and args else ""
    return f"16-bit {image.mode}" if isinstance(raw, str) and ";16" in raw else str(image.mode)


def decoded(data: bytes) -> Any:
    """The picture as a PIL image, upright, as the datasets library hands it to a processor."""
    with _opened(data) as image:
        image.load()
        return _upright(image)


def _upright(image: Any) -> Any:
    from PIL import ExifTags, ImageOps

    turned = image.getexif().get(ExifTags.Base.Orientation) is not None
    return ImageOps.exif_transpose(image) if turned else image


def _opened(data: bytes) -> Any:
    return pillow().open(io.BytesIO(data), formats=FORMATS)


@contextmanager
def _pillow_errors(data: bytes, column: str) -> Iterator[None]:
    """What Pillow raises for a picture becomes the row's problem."""
    Image = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own limit on pixels, and of odd EXIF data
            yield
    except Image.DecompressionBombError:
        reason = f"the picture has more pixels than the limit of {MAX_PIXELS:,}"
        raise Unusable("image_too_large", reason, column) from None
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, MemoryError, EOFError) as error:
        reason = f"the picture cannot be decoded: {seen(' '.join(str(error).split()), 80)}"
        raise Unusable("image_broken", reason, column, repr(data[:12])) from None


def pillow() -> Any:
    """PIL.Image. Raises ConfigError where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("pairs about pictures need Pillow: pip install 'dpo-score[vision]'") from None
    Image.init()
    return Image


def thumbnail(data: bytes, side: int = 160) -> str:
    """A small copy as a data: URL: made anew as a JPEG, so nothing of the file but its look goes along."""
    image = decoded(data).convert("RGB")
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# --- where pictures stand in a conversation ---------------------------------------------------------------------------


def with_pictures(found: Pair, pictures: Sequence[Picture]) -> tuple[dict[str, Any], tuple[Picture, ...]]:
    """The sides of a conversation with image parts in their places, and the pictures that these stand for.

    Image parts that are there already keep their places; else a text's markers (`<image>`, with a line break behind
    it) are the places; else all pictures stand before the first question, as TRL puts them. Raises Unusable where
    their number is another.
    """
    turns = found.chosen if found.implicit else found.prompt
    assert not isinstance(turns, str)
    placed = _placed(turns, pictures)
    if not found.implicit:
        sides = {side: _without_pictures(getattr(found, side), side) for side in ("chosen", "rejected")}
        return {"prompt": placed, **sides}, tuple(pictures)
    assert not isinstance(found.rejected, str)
    return {"chosen": placed, "rejected": _placed(found.rejected, pictures)}, tuple(pictures)


def _placed(turns: Sequence[Message], pictures: Sequence[Picture]) -> tuple[Message, ...]:
    parted = [(turn, _parts(turn.get("content"))) for turn in turns]
    if not _count(parted):
        parted = [(turn, _split(parts) if turn["role"] == "user" else parts) for turn, parts in parted]
    if not _count(parted) and pictures:
        first = next((i for i, (turn, _) in enumerate(parted) if turn["role"] == "user"), None)
        if first is None:
            raise Unusable("image_count", "there are pictures, and no question that they could belong to", "prompt")
        turn, parts = parted[first]
        parted[first] = (turn, [*({"type": "image"} for _ in pictures), *(parts or [])])
    if _count(parted) != len(pictures):
        reason = f"the prompt has places for {_count(parted)} pictures, the row has {len(pictures)}"
        raise Unusable("image_count", reason, "images", _count(parted))
    rest = iter(pictures)
    done = []
    for turn, parts in parted:
        full = None if parts is None else tuple(_filled(part, rest) for part in parts)
        done.append(turn if full is None else {**turn, "content": full})
    return tuple(done)


def _filled(part: Mapping[str, Any], rest: Iterator[Picture]) -> Mapping[str, Any]:
    if part["type"] != "image":
        return part
    picture = next(rest)
    return {"type": "image", "sha256": picture.sha256, "width": picture.width, "height": picture.height}


def _parts(content: Any) -> list[Mapping[str, Any]] | None:
    """Content as parts; None where a message has none (it calls a tool)."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return None if content is None else list(content)


def _split(parts: list[Mapping[str, Any]] | None) -> list[Mapping[str, Any]] | None:
    """Texts divided at their markers; a line break behind one belongs to it."""
    if parts is None or not any(MARKER in part.get("text", "") for part in parts):
        return parts
    found: list[Mapping[str, Any]] = []
    for part in parts:
        for number, text in enumerate(part["text"].split(MARKER)):
            if number:
                found.append({"type": "image"})
                text = text.removeprefix("\n")
            if text:
                found.append({"type": "text", "text": text})
    return found


def _count(parted: Iterable[tuple[Message, list[Mapping[str, Any]] | None]]) -> int:
    return sum(part["type"] == "image" for _, parts in parted for part in parts or ())


def _without_pictures(side: Any, name: str) -> tuple[Message, ...]:
    """The messages of an answer in parts. Raises Unusable where one holds a picture."""
    refuse_image_parts(side, name)
    parted = ((turn, _parts(turn.get("content"))) for turn in side)
    return tuple(turn if parts is None else {**turn, "content": tuple(parts)} for turn, parts in parted)


def refuse_image_parts(side: Any, name: str) -> None:
    """Raises Unusable for messages with an image part that nothing stands for."""
    if any(has_image(turn) for turn in side if isinstance(turn, Mapping)):
        raise Unusable("non_text_content", f"a message of {name} holds image, not text", name, "image")


def has_image(turn: Message) -> bool:
    content = turn.get("content")
    return isinstance(content, tuple) and any(part["type"] == "image" for part in content)


# --- the bytes again, when they are scored ----------------------------------------------------------------------------


def read_again(pictures: Iterable[Picture]) -> dict[str, bytes]:
    """sha256 → bytes: one pass over each file that holds some. DataError where they are not what they were."""
    wanted = {picture.sha256: picture for picture in pictures}
    found: dict[str, bytes] = {}
    alone = [picture for picture in wanted.values() if picture.row is None]
    for picture in alone:
        try:
            found[picture.sha256] = Path(picture.path).read_bytes()
        except OSError as error:
            raise DataError(f"{picture.path} cannot be read any more: {error.strerror}") from None
    inside = sorted((p for p in wanted.values() if p.row is not None), key=lambda p: (p.path, p.column, p.row))
    for (path, column), some in groupby(inside, key=lambda p: (p.path, p.column)):
        found |= _from_file(path, column, list(some))
    for sha256, data in found.items():
        if hashlib.sha256(data).hexdigest() != sha256:
            place = wanted[sha256].path
            raise DataError(
                f"{place}: a picture changed while it was being scored: run the same command with --restart"
            )
    return found


def _from_file(path: str, column: str, pictures: Sequence[Picture]) -> dict[str, bytes]:
    rows = sorted({int(picture.row or 0) for picture in pictures})
    content = open_rows(Located(path, path, Path(path).stat().st_size if "://" not in path else 0))
    cells = {}
    for number, row in zip(rows, content.picked(rows, [column]), strict=True):
        if isinstance(row, Problem):
            raise DataError(f"{path}: row {number} cannot be read any more: {row.reason}")
        cells[number] = row.get(column)
    return {picture.sha256: _bytes_of(cells[int(picture.row or 0)], picture.index) for picture in pictures}


def _bytes_of(cell: Any, index: int) -> bytes:
    item = cell[index] if isinstance(cell, list | tuple) else cell
    data = item.get("bytes") if isinstance(item, Mapping) else item
    return data if isinstance(data, bytes) else b""
