"""One tokenizer for all models of a run, and the renderer that it needs.

In: the configuration, the data sets, and where each model keeps its tokenizer. Out: a tokenizer (None for sets of
token ids), a `Renderer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_score.config.schema import RunConfig, TextSpec
from dpo_score.data.dataset import Dataset, has_pictures, only_ids
from dpo_score.errors import ConfigError, ModelError
from dpo_score.tokenization.encoder_decoder import EncoderDecoderRenderer
from dpo_score.tokenization.pictures import (
    PROCESSOR_FILES,
    PictureProcessor,
    load_processor,
    processor_in,
    refuse_without_processor,
)
from dpo_score.tokenization.render import Renderer
from dpo_score.tokenization.rewardbench import make_renderer
from dpo_score.tokenization.tokenizer import TOKENIZER_FILES, load_tokenizer
from dpo_score.tokenization.truncation import SideLimits

Home = tuple[str, str]
"""What a model is called, and the folder or hub id of its tokenizer."""


REFERENCE = "the reference"


def choose_tokenizer(
    config: RunConfig, text: TextSpec, datasets: Sequence[Dataset], homes: Iterable[Home], say: Callable[[str], None]
) -> Any:
    """--tokenizer, else that of the first model of `homes`; None where nothing needs one and there is none.

    Where a chat template is called for and that one has none, as base models have not, the first of the others' that
    has. `homes` is read no further than needed.
    """
    homes = iter(homes)
    named = [("--tokenizer", text.tokenizer)] if text.tokenizer else homes
    label, name = next(iter(named), ("", ""))
    if not name or (only_ids(datasets) and not text.tokenizer and not _may_have_one(name)):
        return None
    found = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    if found.chat_template or text.tokenizer or text.chat_template or not _asks_for_template(text, datasets):
        return found
    others = (home for home in homes if home[1] != name and _may_have_one(home[1]))
    return _with_template(others, label, config.trust_remote_code, say) or found


def _asks_for_template(text: TextSpec, datasets: Sequence[Dataset]) -> bool:
    return text.render == "chat" or (text.render == "auto" and any(dataset.is_conversational for dataset in datasets))


def _with_template(homes: Iterator[Home], label: str, trust: bool, say: Callable[[str], None]) -> Any:
    """The first tokenizer that has a chat template, reported with `say`; None where none has."""
    for name, folder in homes:
        try:
            other = load_tokenizer(folder, trust_remote_code=trust)
        except ModelError:
            continue  # reported when that policy is scored
        if other.chat_template:
            say(f"the tokenizer of {label} has no chat template: that of {name} is used")
            return other
    return None


def _may_have_one(name: str) -> bool:
    """Whether there is a tokenizer: a folder shows it, a hub id is asked."""
    folder = Path(name)
    return not folder.is_dir() or any((folder / file).is_file() for file in (*TOKENIZER_FILES, "tokenizer_config.json"))


def choose_processor(
    config: RunConfig, text: TextSpec, datasets: Sequence[Dataset], homes: Iterable[str], given: Any = None
) -> PictureProcessor | None:
    """The processor for data with pictures: `given` in Python, that of --tokenizer, else of the first of `homes` that
    has one; None where no set has pictures. Raises ModelError where there is none."""
    if not has_pictures(datasets):
        return None
    if given is not None:
        return processor_in(given) or refuse_without_processor(given)
    places = [text.tokenizer] if text.tokenizer else list(dict.fromkeys(home for home in homes if home))
    if not places:
        raise ModelError("the data have pictures, and no model is named whose processor could be used")
    folders = [Path(place) for place in places]
    has_one = (any((folder / name).is_file() for name in PROCESSOR_FILES) for folder in folders)
    chosen = next((place for place, found in zip(places, has_one, strict=True) if found), places[0])
    return load_processor(chosen, config.trust_remote_code)


def renderer_of(
    config: RunConfig,
    tokenizer: Any,
    text: TextSpec,
    limits: int | SideLimits | None,
    processor: PictureProcessor | None = None,
) -> Renderer:
    """What makes token ids for a model within its limits (`models.limits.text_limits`).

    limits: tokens of prompt and answer together; `SideLimits` for an encoder-decoder; None: no limit, or no model.
    """
    if not isinstance(limits, SideLimits):
        return make_renderer(config.rewardbench, tokenizer, text, limits, processor)
    if processor is not None:
        raise ConfigError("the data have pictures, and the model is an encoder-decoder, which is given none here")
    if config.rewardbench == "exact":
        raise ConfigError("--rewardbench exact scores causal models, and this one is an encoder-decoder: say corrected")
    return EncoderDecoderRenderer(tokenizer, text, limits)
