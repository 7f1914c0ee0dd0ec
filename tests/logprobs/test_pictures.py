"""Prompts with pictures: six families against the wrapper in float64, TRL's collator, and a check that has teeth."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from dpo_score.config.schema import ComputeSpec, DataSpec, TextSpec
from dpo_score.data.dataset import open_datasets, read_pairs
from dpo_score.data.types import EncodedPair, Pair, TokenSequence
from dpo_score.errors import ModelError
from dpo_score.logprobs import pictures
from dpo_score.logprobs.numerics import resolve_numerics
from dpo_score.logprobs.pictures import PicturePath, PromptStates, SharedPictures
from dpo_score.logprobs.scorer import PairScorer, make_path
from dpo_score.logprobs.self_check import check_model
from dpo_score.logprobs.types import SequenceLogps
from dpo_score.models.numerics import Numerics
from dpo_score.tokenization.pictures import AHEAD, KeptFeatures, PictureInputs, load_processor
from dpo_score.tokenization.render import Renderer
from tests.vision import FAMILIES, encoded, picture, save_vision, write_pairs

FILES = [[encoded(picture(i, 32 + 8 * (i % 3), 24 + 8 * (i % 2)))] * (2 if i == 2 else 1) for i in range(3)]


class Setting:
    """One family: its model in float64, its processor, and three pairs about pictures and one without."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder = save_vision(folder / family, family)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(self.folder).double().eval()
        self.processor = load_processor(str(self.folder))
        path = write_pairs(folder / "pairs.parquet", [*FILES, []])
        found = read_pairs(open_datasets([DataSpec(name="set", path=str(path))]), 0, 4)
        self.pairs = [pair for pair in found if isinstance(pair, Pair)]
        self.inputs = PictureInputs(self.processor)

    def numerics(self) -> Numerics:
        asked = ComputeSpec(device="cpu", dtype="float32", compile="off")
        return resolve_numerics(asked, self.model.config.to_dict(), 1000)

    def encoded(self, **text: Any) -> list[EncodedPair]:
        renderer = Renderer(self.processor.tokenizer, TextSpec(**text), None, self.processor)
        found = renderer.encode(self.pairs)
        assert all(isinstance(item, EncodedPair) for item in found), found
        return found  # type: ignore[return-value]

    def sequences(self) -> list[TokenSequence]:
        return [pair.sequence(side) for pair in self.encoded() for side in ("chosen", "rejected")]  # type: ignore[arg-type]

    def batch(self) -> tuple[dict[str, Any], torch.Tensor]:
        """TRL's own collator on the pairs with pictures: inputs in float64, and which tokens are answers."""
        examples = []
        for number, files in enumerate(FILES):
            texts = {"prompt": f"What is number {number}?", "rejected": f"A dog {number}."}
            texts["chosen"] = f"It is a cat, number {number}." * (1 + number % 2)
            turns = {n: [{"role": "user" if n == "prompt" else "assistant", "content": t}] for n, t in texts.items()}
            examples.append({"images": [Image.open(io.BytesIO(data)) for data in files], **turns})
        batch = dict(DataCollatorForVisionPreference(self.processor.processor)(copy.deepcopy(examples)))
        answers = batch.pop("completion_mask").bool()
        return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}, answers


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Setting]:
    made: dict[str, Setting] = {}

    def of(family: str) -> Setting:
        if family not in made:
            made[family] = Setting(tmp_path_factory.mktemp(family), family)
        return made[family]

    return of


def through(path: Any, sequences: Sequence[TokenSequence]) -> list[np.ndarray[Any, Any]]:
    found: dict[int, Any] = {}
    for pack in path.plan(sequences):
        for index, values in zip(pack, path.compute([sequences[i] for i in pack]), strict=True):
            found[index] = values["logp"]
    return [found[i] for i in range(len(sequences))]


@pytest.mark.parametrize("family", FAMILIES)
def test_packs_give_the_values_of_the_wrapper_and_the_tower_sees_each_prompt_once(
    family: str, setting: Callable[[str], Setting]
) -> None:
    case = setting(family)
    sequences = case.sequences()
    plain = make_path(case.model, case.numerics(), plain=True, pictures=case.inputs)
    shared = make_path(case.model, case.numerics(), pictures=case.inputs)
    assert isinstance(shared, PicturePath)
    assert isinstance(shared._shared, SharedPictures)
    with shared.session():
        packed = through(shared, sequences)
    for one, other in zip(through(plain, sequences), packed, strict=True):
        np.testing.assert_allclose(other, one, atol=5e-6)
    assert shared._shared.prompts_seen == len(FILES)
    assert shared.forwards == 2  # one pack of texts, one of prompts with pictures


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_model_with_the_same_tower_takes_what_the_first_made_of_the_pictures(
    family: str, setting: Callable[[str], Setting]
) -> None:
    case = setting(family)
    pictured = [sequence for sequence in case.sequences() if sequence.media is not None]
    inputs = PictureInputs(case.processor, room=2**24)

    def found(model: Any, inputs: PictureInputs) -> tuple[list[np.ndarray[Any, Any]], int]:
        path = make_path(model, case.numerics(), pictures=inputs)
        assert isinstance(path, PicturePath)
        assert path._shared is not None
        return through(path, pictured), path._shared.prompts_seen

    def equal(some: Sequence[np.ndarray[Any, Any]], others: Sequence[np.ndarray[Any, Any]]) -> bool:
        return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))

    values, seen = found(case.model, inputs)
    assert seen == len(FILES)
    assert equal(values, found(case.model, PictureInputs(case.processor))[0])
    assert 0 < inputs.kept.used <= inputs.kept.room

    trained = copy.deepcopy(case.model)  # the decoder alone was trained
    decoder = next(part for name in pictures.DECODERS if (part := getattr(trained.model, name, None)) is not None)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight += 0.01 * torch.randn_like(weight)
    values, seen = found(trained, inputs)
    assert seen == 0
    alone, _ = found(trained, PictureInputs(case.processor))
    assert equal(values, alone)
    assert not equal(values, found(case.model, inputs)[0])

    tower = next(
        p for name, p in trained.model.named_parameters() if "language_model" not in name and "text_" not in name
    )
    with torch.no_grad():
        tower += 0.5
    values, seen = found(trained, inputs)
    assert seen == len(FILES)
    assert equal(values, found(trained, PictureInputs(case.processor))[0])


def test_features_are_kept_as_long_as_there_is_room() -> None:
    kept = KeptFeatures(room=100)
    kept.put("a", "made of a", 60)
    kept.put("b", "made of b", 60)
    kept.put("c", "made of c", 40)
    kept.put("c", "again", 40)
    assert [kept.get(name) for name in "abc"] == ["made of a", None, "made of c"]
    assert kept.used == 100


def test_inputs_are_made_ahead_in_the_order_of_the_packs(setting: Callable[[str], Setting]) -> None:
    """A prompt that is asked for out of turn is made there and then; at most AHEAD wait; nothing is held afterwards."""
    inputs = PictureInputs(setting("llava").inputs.processor)
    media = [inputs.made([Image.new("RGB", (20 + i, 20), (i, 0, 0))]) for i in range(3 * AHEAD)]
    alone = [inputs.of(one) for one in media]

    def same(place: int) -> bool:
        found = inputs.of(media[place])
        return all(torch.equal(found[name], value) for name, value in alone[place].items())

    with inputs.preparing():
        inputs.fetch(media)
        begun = [one for one, _ in inputs._prepared]
        assert begun == media[:AHEAD]
        assert same(0)
        assert same(0)  # again, as after a pack that did not fit
        assert [one for one, _ in inputs._prepared] == media[1 : AHEAD + 1]
        assert same(2)
        assert [one for one, _ in inputs._prepared] == media[3 : AHEAD + 3]
        assert all(same(place) for place in range(3, len(media)))
        assert not inputs._prepared
        inputs.fetch(media)
    assert not inputs._prepared
    assert same(1)


def test_what_goes_wrong_ahead_is_said_where_the_inputs_are_asked_for(
    setting: Callable[[str], Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = PictureInputs(setting("llava").inputs.processor)
    media = inputs.made([Image.new("RGB", (20, 20))])

    def refuse(*_: Any) -> Any:
        raise ModelError("the processor takes no such picture")

    monkeypatch.setattr(type(inputs.processor), "inputs", refuse)
    with inputs.preparing():
        inputs.fetch([media])
        with pytest.raises(ModelError, match="takes no such picture"):
            inputs.of(media)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_sums_are_those_of_trl(family: str, setting: Callable[[str], Setting]) -> None:
    case = setting(family)
    batch, answers = case.batch()
    pairs = case.encoded(prompt_split="trl")[: len(FILES)]
    with torch.no_grad():
        logits = case.model(**batch).logits
    own = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    sums = (own * answers[:, 1:]).sum(1)
    sequences = [pair.sequence(side) for side in ("chosen", "rejected") for pair in pairs]  # type: ignore[arg-type]
    ours = through(make_path(case.model, case.numerics(), pictures=case.inputs), sequences)
    for row, sequence in enumerate(sequences):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == [*sequence.prompt, *sequence.response]
        assert int(answers[row].sum()) == len(sequence.response)
        assert abs(ours[row].sum(dtype=np.float64) - float(sums[row])) < 1e-5


def _causal(states: PromptStates) -> PromptStates:
    """As if a picture were read from left to right (Gemma 3)."""
    return PromptStates(states.embeds, states.positions, {}, states.seen, states.deep)


def _full_layers_alone(states: PromptStates) -> PromptStates:
    """As if windows hid the rest of a picture from its tokens."""
    two_way = {windowed: mask for windowed, mask in states.two_way.items() if not windowed}
    return PromptStates(states.embeds, states.positions, two_way, states.seen, states.deep)


def _flat(states: PromptStates) -> PromptStates:
    """As if a picture had no height and width (Qwen)."""
    return PromptStates(states.embeds, None, states.two_way, states.seen, states.deep)


def _shallow(states: PromptStates) -> PromptStates:
    """As if only the embeddings knew of a picture (Qwen3-VL)."""
    return PromptStates(
        states.embeds, states.positions, states.two_way, states.seen, tuple(torch.zeros_like(d) for d in states.deep)
    )


@pytest.mark.parametrize(
    ("family", "broken"),
    [("gemma3", _causal), ("gemma3", _full_layers_alone), ("qwen2_5_vl", _flat), ("qwen3_vl", _shallow)],
)
def test_the_check_at_load_finds_what_is_broken_and_goes_on_slower(
    family: str, broken: Callable[[PromptStates], PromptStates], setting: Callable[[str], Setting], monkeypatch: Any
) -> None:
    case = setting(family)
    right = check_model(case.model, case.numerics(), case.inputs)
    assert (right.numerics.path, right.max_delta is not None and right.max_delta < 1e-4) == ("fast", True)
    made = SharedPictures.prompt_states
    monkeypatch.setattr(SharedPictures, "prompt_states", lambda self, sequence: broken(made(self, sequence)))
    found = check_model(case.model, case.numerics(), case.inputs)
    assert found.numerics.path == "plain"
    assert found.max_delta is not None
    assert found.max_delta > 1e-4
    assert "differ" in found.reason


def test_a_decoder_argument_that_is_not_known_leads_to_the_plain_way(
    setting: Callable[[str], Setting], monkeypatch: Any
) -> None:
    case = setting("llava")
    monkeypatch.setattr(pictures, "READ", pictures.READ - {"attention_mask"})
    found = check_model(case.model, case.numerics(), case.inputs)
    assert found.numerics.path == "plain"
    assert "'attention_mask'" in found.reason


def test_the_same_ids_with_another_picture_are_another_sequence(setting: Callable[[str], Setting]) -> None:
    case = setting("llava")
    first, second = case.encoded()[0], case.encoded()[1]
    other = TokenSequence(first.tokens.prompt, first.tokens.chosen, media=second.media)
    assert other.key != first.sequence("chosen").key
    scorer = PairScorer(case.model, case.numerics(), pictures=case.inputs)
    results = scorer.score([first.sequence("chosen"), other])
    values = [result.token_logps for result in results if isinstance(result, SequenceLogps)]
    assert not np.allclose(values[0], values[1])


def test_places_and_pictures_must_agree_and_no_cut_touches_a_picture(setting: Callable[[str], Setting]) -> None:
    case = setting("llava")
    long = Renderer(case.processor.tokenizer, TextSpec(max_length=20, truncation="keep_end"), None, case.processor)
    assert [getattr(item, "code", "scored") for item in long.encode(case.pairs[:1])] == ["image_cut"]
    start = Renderer(case.processor.tokenizer, TextSpec(max_length=60), None, case.processor)
    kept = start.encode(case.pairs[:1])[0]
    assert isinstance(kept, EncodedPair)
    assert kept.tokens.chosen_truncated
    template = "{% for m in messages %}{{ m['role'] }}: no place</s>{% endfor %}"
    blind = Renderer(case.processor.tokenizer, TextSpec(chat_template=template), None, case.processor)
    assert [getattr(item, "code", "") for item in blind.encode(case.pairs[:1])] == ["image_count"]
