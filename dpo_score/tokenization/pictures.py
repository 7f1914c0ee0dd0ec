"""Processors: what a model folder says of how pictures become ids and inputs, and what identifies it.

A picture's place in a text grows to as many tokens as the processor gives a picture of that size; the ids follow by
the text path's rule. A processor is used through its public calls; where one demands a video processor that cannot be
loaded here (torchvision), it is made without, as no video is ever given to it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from huggingface_hub.errors import StrictDataclassError

from dpo_score.data.pictures import decoded, pillow, read_again
from dpo_score.data.types import Ids, Media, Message, Picture, Problem
from dpo_score.errors import ConfigError, ModelError
from dpo_score.escape import seen
from dpo_score.tokenization.chat_template import ChatTemplate
from dpo_score.tokenization.tokenizer import checked, refuse_remote_code, settings_file

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")
"""What a processor makes of a text; everything else that it returns is of the pictures."""
NO_SETTINGS = ("tokenizer", "chat_template", "video_processor", "auto_map", "_name_or_path", "name_or_path")


class PictureProcessor:
    """A processor of transformers, used for pictures and their places in a text.

    `preparation`: digest of all that decides what a model is given for a picture, Pillow's release included; `digest`
    leaves that out, so that a folder is resumed with another one.
    """

    def __init__(self, processor: Any, home: tuple[str, bool] | None = None) -> None:
        """`home`: what `load_processor` made it of, so that another process can."""
        self._home = home
        for name in ("image_processor", "tokenizer", "image_token"):
            if getattr(processor, name, None) is None:
                raise ModelError(f"{type(processor).__name__} has no {name}: it cannot place pictures in a text")
        self.processor = processor
        self.tokenizer = checked(processor.tokenizer, type(processor).__name__)
        self.place: str = processor.image_token
        self.token_id = int(processor.image_token_ids[0])
        self.digest = _digest(processor)
        self.preparation = hashlib.sha256(f"{self.digest} pillow {pillow().__version__}".encode()).hexdigest()
        self._converts = bool(getattr(processor.image_processor, "do_convert_rgb", False))
        self.replacement: Callable[[int, int], str] = lru_cache(4096)(self._replacement)

    def __reduce__(self) -> tuple[Any, ...]:
        """Loaded again where it can be: the class of a processor without videos has no name elsewhere."""
        return (PictureProcessor, (self.processor,)) if self._home is None else (load_processor, self._home)

    def media(self, pictures: Sequence[Picture]) -> Media | None:
        """The pictures of a prompt under this processor."""
        return Media(tuple(pictures), self.preparation) if pictures else None

    def expanded(self, text: str, sizes: Sequence[tuple[int, int]]) -> str | Problem:
        """`text` with as many tokens at every place of a picture as the processor gives one of its size."""
        found = text.split(self.place)
        if len(found) - 1 != len(sizes):
            reason = f"the rendered text has {len(found) - 1} places ({self.place}) for {len(sizes)} pictures"
            return Problem("image_count", reason, "images", len(found) - 1)
        try:
            grown = [self.replacement(*size) for size in sizes]
        except ValueError as error:
            reason = f"the processor refuses a picture: {seen(' '.join(str(error).split()), 120)}"
            return Problem("image_broken", reason, "images", sizes)
        return "".join(part for pair in zip(found, [*grown, ""], strict=True) for part in pair)

    def _replacement(self, width: int, height: int) -> str:
        blank = pillow().new("RGB", (width, height))
        made = self.processor(text=[self.place], images=[[blank]], return_text_replacement_offsets=True)
        return str(made["text_replacement_offsets"][0][0]["replacement"])

    def count(self, ids: Ids) -> int:
        """Tokens that stand for pictures."""
        return int(np.count_nonzero(ids == self.token_id))

    def inputs(self, images: Sequence[Any]) -> dict[str, Any]:
        """What a model is given for the pictures of one prompt (PIL images): tensors by name."""
        given = [image if self._converts else image.convert("RGB") for image in images]
        made = self.processor(text=[self.place * len(given)], images=[given], return_tensors="pt")
        return {name: value for name, value in made.items() if name not in TEXT_INPUTS}

    def ids(self, text: str) -> Ids:
        """The ids of a text as it stands."""
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


AHEAD = 4
"""Prompts whose pictures are decoded and resized while those before them are computed with."""


class KeptFeatures:
    """What towers made of pictures, for the next models of the run that have the same tower; `room` bytes at most.

    What comes first stays: models go over the data in one order, so a newer entry in an older one's place would be
    gone, too, before it is asked for.
    """

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self.used = 0
        self._found: dict[Any, Any] = {}

    def get(self, key: Any) -> Any:
        """None for what is not kept."""
        return self._found.get(key)

    def put(self, key: Any, value: Any, size: int) -> None:
        """`size`: the bytes of `value`. It is not kept where there is no room."""
        if key not in self._found and self.used + size <= self.room:
            self._found[key] = value
            self.used += size


class PictureInputs:
    """The inputs of prompts with pictures. Bytes are read for the sequences of a block and dropped after it.

    `kept`: features of pictures, from one model of a run to the next.
    """

    def __init__(self, processor: PictureProcessor, room: int = 0) -> None:
        """`room`: bytes that `kept` may take."""
        self.processor = processor
        self.kept = KeptFeatures(room)
        self._bytes: dict[str, bytes] = {}
        self._made: dict[str, bytes] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._coming: deque[Media] = deque()
        self._prepared: deque[tuple[Media, Future[dict[str, Any]]]] = deque()

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Inside, the inputs of prompts that were fetched are made ahead of `of` by threads, in the order in which they
        will be asked for; at the end what was read is forgotten."""
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="pictures") as self._threads:
            try:
                yield
            finally:
                self._threads.shutdown(cancel_futures=True)
                self._threads = None
                self._coming.clear()
                self._prepared.clear()
                self._bytes.clear()

    def fetch(self, media: Sequence[Media]) -> None:
        """Read the bytes of all pictures, one pass over each file. Raises DataError where they changed."""
        known = self._bytes.keys() | self._made.keys()
        missing = [p for one in media for p in one.pictures if p.sha256 not in known]
        self._bytes |= read_again(missing)
        self._coming = deque(media)
        self._prepare()

    def of(self, media: Media) -> dict[str, Any]:
        """Tensors by name for the pictures of one prompt. One that is not the next of those fetched is made here."""
        found = next((place for place, (other, _) in enumerate(self._prepared) if other == media), None)
        if found is None:
            return self._inputs(media)
        for _ in range(found):
            self._prepared.popleft()
        _, future = self._prepared.popleft()
        self._prepare()
        return future.result()

    def _prepare(self) -> None:
        while self._threads is not None and self._coming and len(self._prepared) < AHEAD:
            media = self._coming.popleft()
            self._prepared.append((media, self._threads.submit(self._inputs, media)))

    def _inputs(self, media: Media) -> dict[str, Any]:
        known = self._made | self._bytes
        missing = [picture for picture in media.pictures if picture.sha256 not in known]
        held = known | read_again(missing)
        return self.processor.inputs([decoded(held[picture.sha256]) for picture in media.pictures])

    def made(self, images: Sequence[Any]) -> Media:
        """Pictures that are in no file: `images` (PIL), held for as long as this is."""
        found = []
        for image in images:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            data = buffer.getvalue()
            width, height = image.size
            picture = Picture(hashlib.sha256(data).hexdigest(), width, height, path="")
            self._made[picture.sha256] = data
            found.append(picture)
        return Media(tuple(found), self.processor.preparation)


# --- the chat template of a model with pictures -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class PictureTemplate(ChatTemplate):
    """A chat template whose places of pictures grow to what the processor makes of them."""

    processor: PictureProcessor | None = None

    def render(
        self, messages: Sequence[Message], tools: Any, kwargs: Mapping[str, Any], to_answer: bool = False
    ) -> str | Problem:
        text = ChatTemplate.render(self, messages, tools, kwargs, to_answer)
        parts = [part for turn in messages for part in _parts(turn.get("content"))]
        if isinstance(text, Problem) or self.processor is None:
            return text
        sizes = [(part["width"], part["height"]) for part in parts if part["type"] == "image"]
        return self.processor.expanded(text, sizes) if sizes or self.processor.place in text else text


def _parts(content: Any) -> Sequence[Mapping[str, Any]]:
    return content if isinstance(content, tuple) else ()


# --- loading ----------------------------------------------------------------------------------------------------------


def load_processor(folder: str, trust_remote_code: bool = False) -> PictureProcessor:
    """The processor of a model folder or hub id. Raises ModelError where there is none for pictures."""
    import transformers

    pillow()
    if not trust_remote_code:
        instead = "leave the pictures out with --ignore-columns"
        refuse_remote_code(folder, PROCESSOR_FILES, "AutoProcessor", "processor", instead)
    wrong = (OSError, ValueError, ImportError, LookupError, AttributeError, TypeError, RuntimeError)
    with _quiet():
        try:
            found = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (*wrong, StrictDataclassError) as error:
            try:
                found = _without_videos(folder)
            except (*wrong, StrictDataclassError):
                raise ModelError(_no_processor(folder, str(error))) from None
    if getattr(found, "image_processor", None) is None:
        raise ModelError(_no_processor(folder, f"{type(found).__name__} takes no pictures"))
    return PictureProcessor(found, (folder, trust_remote_code))


def _no_processor(folder: str, why: str) -> str:
    torchvision = (
        " torchvision is installed and does not fit this torch: uninstall it." if "torchvision::" in why else ""
    )
    return (
        f"the data have pictures, and no processor can be loaded from {folder}: {seen(' '.join(why.split()), 200)}."
        f"{torchvision} Name a vision-language model, or leave the pictures out with --ignore-columns"
    )


def _without_videos(folder: str) -> Any:
    """The processor with nothing in the place of its video processor, which needs torchvision to be loaded."""
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer

    kind = getattr(transformers, _class_name(folder))

    class WithoutVideos(kind):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    WithoutVideos.__name__ = kind.__name__
    settings, _ = kind.get_processor_dict(folder)
    parts = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    given = [parts[name].from_pretrained(folder) if name in parts else None for name in kind.get_attributes()]
    made = WithoutVideos.from_args_and_dict(given, settings)
    if made.chat_template is None:
        made.chat_template = made.tokenizer.chat_template
    return made


def _class_name(folder: str) -> str:
    """The class that a folder names, or that its type of model has."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    for name in (*PROCESSOR_FILES, "tokenizer_config.json"):
        found = _json(folder, name).get("processor_class")
        if isinstance(found, str):
            return found
    return str(PROCESSOR_MAPPING_NAMES[_json(folder, "config.json").get("model_type", "")])


def _json(folder: str, name: str) -> Mapping[str, Any]:
    from transformers.utils.hub import cached_file

    path = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
    return {} if path is None else settings_file(Path(path))


@contextmanager
def _quiet() -> Any:
    """Without the notices that transformers prints about the kinds of processors it chooses among."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _digest(processor: Any) -> str:
    """SHA-256 (hex) of the class and the settings of a processor and its image processor."""
    own = {name: value for name, value in processor.to_dict().items() if name not in NO_SETTINGS}
    image = processor.image_processor
    settings = {**own, "image_processor": image.to_dict(), "classes": [type(processor).__name__, type(image).__name__]}
    settings["image_processor"] = {k: v for k, v in settings["image_processor"].items() if k not in NO_SETTINGS}
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def processor_in(given: Any) -> PictureProcessor | None:
    """The processor that a caller gave in the place of a tokenizer; None for a tokenizer."""
    return PictureProcessor(given) if getattr(given, "image_processor", None) is not None else None


def refuse_without_processor(tokenizer: Any) -> NoReturn:
    """Raises ConfigError for a tokenizer given in Python beside data with pictures."""
    raise ConfigError(
        f"the data have pictures, and tokenizer= is a {type(tokenizer).__name__}: give the model's processor"
    )
