"""Which way of computing is right on this model? Asked of the loaded model, before its first block.

The ordinary way is the model called on one row at a time, its own logits, fp32 log-softmax. With it are compared, in
this order, the fast path (with each kernel that this machine has), padded batches, and padded batches of one row; the
first that agrees is used. Before that the model is asked whether it is causal: where the last token of a row moves
the log-probabilities of tokens before it, an answer would be scored with itself in view, and the model is refused.

The probe has what breaks shared packs and batches first: an empty prompt, a prompt of one token, three responses of
one prompt, a row longer than the smallest window, and rows on both sides of every length at which the configuration
changes something (`lengths.changing_lengths`). It runs under the numerics of the run: dtype, compiled layers, kernel,
padding and size of packs. In fp32 the two ways agree to 1e-4 nats a token; in 16 bits both are compared with fp32
arithmetic, and a way may be at most 1.5 times as far off as the ordinary one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpo_score.data.pictures import pillow
from dpo_score.data.types import Ids, Problem, TokenSequence
from dpo_score.errors import DpoScoreError, ModelError
from dpo_score.logprobs.attention.interface import Unshareable
from dpo_score.logprobs.encoder_decoder import EncoderDecoderPath, start_token
from dpo_score.logprobs.forked import ForkedPath
from dpo_score.logprobs.lengths import (
    PROBE_TAIL,
    LengthRules,
    changing_lengths,
    fresh_rope,
    length_rules,
    smallest_window,
)
from dpo_score.logprobs.lm_head import log_softmax
from dpo_score.logprobs.numerics import ways
from dpo_score.logprobs.packed import PackedPath, uncompile_layers
from dpo_score.logprobs.padded import PaddedPath
from dpo_score.logprobs.pictures import PicturePath, WrapperPath
from dpo_score.logprobs.torch_settings import running
from dpo_score.logprobs.types import RAISED_BY_MODELS, Values
from dpo_score.logprobs.upcast import CannotWiden, refuse_quantized, widened
from dpo_score.models.memory import is_out_of_memory, room_for
from dpo_score.models.numerics import Kernel, Numerics
from dpo_score.models.parallel.rank_zero import group_step
from dpo_score.models.parts import ModelParts, model_parts
from dpo_score.tokenization.pictures import PictureInputs

Logps = NDArray[np.float32]
TextPath = PackedPath | ForkedPath | PaddedPath | EncoderDecoderPath
Path = TextPath | PicturePath
FP32_BOUND = 1e-4
NARROW_RATIO = 1.5
CAUSAL_BOUND = 1e-3
"""Nats by which the last token may move the ones before it, in fp32: rounding alone, as of experts that get other
tokens. Models that are not causal move by some tenths and more."""
QUANTIZED_BOUND = 0.1
"""Root mean square in nats for weights that have no fp32 form to compare with."""
MISFITS = (Unshareable, *RAISED_BY_MODELS)
WINDOW_TAIL = 24
"""Scored tokens of the row that is longer than a window: the ones that the window hides something from."""
SWITCH_TAIL = 8
"""Scored tokens of a row that is exactly as long as a length at which something may change."""
PROBE_TOKENS = 1024
"""Size of the probe's packs and batches, if those of the run are smaller: rows must have neighbours."""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """`numerics`: those that give right values, as asked or a slower way. `max_delta`: largest |difference| of a token
    from the ordinary way in nats (None if the way that was asked for could not run at all). `reason`: what was found,
    a sentence; of the way that was asked for where it is not used. `overflows`: the probe is not finite in 16 bits,
    so that packs would be computed twice."""

    numerics: Numerics
    max_delta: float | None
    reason: str
    overflows: bool = False


class WeightsOverflowError(ModelError):
    """Weights that float16 cannot hold: they were infinite before anything was computed."""


def check_model(model: Any, numerics: Numerics, pictures: PictureInputs | None = None) -> SelfCheck:
    """Run the probe; with `pictures` it also has prompts with some. Raises ModelError for a model that is not causal or
    that no way computes right, and where the device has no room for the probe (which says nothing about the model)."""
    room = room_for(f"the check of {type(model).__name__}", numerics.device, numerics.dtype)
    with group_step(model, "verify", numerics), room, torch.inference_mode(), running(numerics):
        return _checked(model, numerics, pictures)


def _checked(model: Any, numerics: Numerics, pictures: PictureInputs | None) -> SelfCheck:
    _refuse_infinite_weights(model, numerics.dtype)
    probe = Probe.of(model, numerics, pictures)
    probe.refuse_if_not_causal()
    refused: list[Outcome] = []
    for candidate in ways(numerics):
        outcome = probe.tried(candidate)
        if outcome.ok:
            first = (refused or [outcome])[0]
            overflows = numerics.dtype != "float32" and not bool(np.isfinite(probe.ordinary).all())
            return SelfCheck(candidate, first.max_delta, first.sentence, overflows)
        refused.append(outcome)
    raise ModelError(
        f"{type(probe.model).__name__} cannot be scored: even one at a time, rows do not get the values that its own "
        f"logits give them ({refused[-1].sentence}). Its forward depends on what was computed before, or makes logits "
        "in a way that is not known here"
    )


def _refuse_infinite_weights(model: Any, dtype: str) -> None:
    if dtype != "float16":
        return
    names = [name for name, p in model.named_parameters() if p.dtype == torch.float16 and not p.isfinite().all()]
    if names:
        more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        raise WeightsOverflowError(
            f"{type(model).__name__} has weights beyond what float16 holds (65504): {names[0]}{more} became infinite. "
            "Say --dtype bfloat16, or --dtype float32"
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether one way gives the probe's values, and by how much it misses them at most (nats of a token)."""

    ok: bool
    max_delta: float | None
    sentence: str


@dataclass(slots=True, eq=False)
class Probe:
    """The probe's rows on one model, with the values of the ordinary way. `exact`: those in fp32 arithmetic, for a
    model in 16 bits; None where its weights have no fp32 form (`why_not_exact`). `packs_refused`: why the model does
    not fit packs, whatever the kernel."""

    model: Any
    parts: ModelParts
    numerics: Numerics
    rules: LengthRules
    sequences: list[TokenSequence]
    ordinary: Logps
    exact: Logps | None = None
    why_not_exact: str = ""
    packs_refused: str = ""
    pictures: PictureInputs | None = None

    @classmethod
    def of(cls, model: Any, numerics: Numerics, pictures: PictureInputs | None = None) -> Probe:
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = bare.config.to_dict()
        parts = EncoderDecoderPath(model, numerics).parts if bare.config.is_encoder_decoder else model_parts(model)
        rows = probe_rows(bare.config)
        if pictures is not None:
            rows[3:3] = picture_rows(pictures, bare.config)
        probe = cls(bare, parts, numerics, length_rules(config), rows, np.zeros(0, np.float32), pictures=pictures)
        probe.ordinary = probe.ordinary_values()
        try:
            refuse_quantized(bare)
            if numerics.dtype != "float32":
                with widened(bare):
                    probe.exact = probe.ordinary_values()
        except CannotWiden as error:
            probe.why_not_exact = str(error)
        return probe

    @property
    def last_read(self) -> int:
        """The place of the last token of an answer that the model reads: a decoder does not read its last label."""
        return -2 if self.model.config.is_encoder_decoder else -1

    def ordinary_values(self) -> Logps:
        """Scored log-probabilities of all rows, each in a forward of its own."""
        return np.concatenate([self.alone(sequence) for sequence in self.sequences])

    def alone(self, sequence: TokenSequence) -> Logps:
        """Scored log-probabilities of one row from the model's own logits (only the last ones where it can)."""
        if sequence.media is not None and self.pictures is not None:
            return WrapperPath(self.parts, self.pictures).values(sequence)["logp"]
        if self.rules:
            fresh_rope(self.model)
        device = self.parts.device
        if self.model.config.is_encoder_decoder:
            return self._answer_alone(sequence, device)
        ids = torch.from_numpy(np.concatenate([sequence.prompt, sequence.response]).astype(np.int64)).to(device)
        positions = torch.from_numpy(sequence.scored_positions).to(device)
        kept = len(ids) - int(positions[0]) + 1
        some = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        logits = self.model(input_ids=ids[None], use_cache=False, **some).logits[0]
        rows = positions - 1 - (len(ids) - len(logits))
        target = ids[positions].to(logits.device)
        return log_softmax(logits[rows.to(logits.device)].float()).gather(1, target[:, None])[:, 0].cpu().numpy()

    def _answer_alone(self, sequence: TokenSequence, device: torch.device) -> Logps:
        """The same of an encoder-decoder, called as its documentation does: prompt and labels, no state in between."""
        prompt, response = (
            torch.from_numpy(x.astype(np.int64)).to(device) for x in (sequence.prompt, sequence.response)
        )
        before = torch.cat([response.new_tensor([start_token(self.model)]), response[:-1]])
        logits = self.model(input_ids=prompt[None], decoder_input_ids=before[None], use_cache=False).logits[0]
        places = torch.from_numpy(sequence.scored_positions - len(prompt)).to(logits.device)
        target = response.to(logits.device)[places]
        return log_softmax(logits[places].float()).gather(1, target[:, None])[:, 0].cpu().numpy()

    def refuse_if_not_causal(self) -> None:
        """Raises ModelError where another last token moves the log-probabilities of tokens before it.

        Rows of odd and even length are asked, for models that read tokens in blocks.
        """
        bound = CAUSAL_BOUND if not self.why_not_exact else QUANTIZED_BOUND
        for sequence in (self.sequences[0], max(self.sequences[:3], key=lambda s: len(s.response)), self.sequences[-1]):
            changed = sequence.response.copy()
            changed[self.last_read] = next(i for i in self.sequences[0].prompt if i != changed[self.last_read])
            moved = self._moved(sequence, replace(sequence, response=changed))
            if moved > bound and self._moved(sequence, sequence) > bound:
                raise ModelError(
                    f"{type(self.model).__name__} cannot be scored: the same row gets other values when it is computed "
                    "again. Its forward depends on what was computed before, or on chance"
                )
            if moved > bound:
                raise ModelError(
                    f"{type(self.model).__name__} is not causal: another last token moves the log-probabilities of the "
                    f"tokens before it by up to {moved:.2g} nats, so every answer would be scored with itself in view. "
                    "It gives no next-token log-probabilities: score with a causal language model (if it is one, its "
                    "config.json says otherwise: see is_decoder, use_bidirectional_attention)"
                )

    def _moved(self, one: TokenSequence, other: TokenSequence) -> float:
        """Largest change of the log-probability of a token before the last that is read, which alone differs."""
        context: Any = widened(self.model) if self.exact is not None else nullcontext()
        with context, _outliers_as_others(self.model):
            change = (self.alone(one) - self.alone(other))[: self.last_read]
        return float(np.abs(change).max(initial=0.0)) if np.isfinite(change).all() else 0.0

    def tried(self, numerics: Numerics) -> Outcome:
        """The probe through the paths that scoring uses."""
        if numerics.path == "fast" and self.packs_refused:
            return Outcome(False, None, self.packs_refused)
        # RewardBench's softmax differs by design; which rows may share a forward does not depend on it
        kernel = Kernel.MODEL if numerics.kernel == Kernel.MODEL_OWN_SOFTMAX else numerics.kernel
        tokens = max(numerics.batch_tokens, PROBE_TOKENS)
        asked = replace(numerics, kernel=kernel, batch_tokens=tokens)
        try:
            return self._judged(self._path(asked))
        except MISFITS as error:
            if numerics.one_row or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
                raise
            what = "the fast path does" if numerics.path == "fast" else "padded batches do"
            own = isinstance(error, Unshareable | DpoScoreError)
            why = str(error) if own else f"its own code fails there ({type(error).__name__}: {error})"
            sentence = f"{what} not fit {type(self.model).__name__}: {why}"
            if isinstance(error, Unshareable):
                self.packs_refused = sentence
            return Outcome(False, None, sentence)

    def _path(self, numerics: Numerics) -> Path:
        """What scoring would use; prompts with pictures have a path of their own beside it."""
        text = self._text_path(numerics)
        return text if self.pictures is None else PicturePath(text, self.pictures)

    def _text_path(self, numerics: Numerics) -> TextPath:
        if self.model.config.is_encoder_decoder:
            return EncoderDecoderPath(self.model, numerics)
        if numerics.path == "plain":
            return PaddedPath(self.parts, numerics)
        if numerics.kernel.forked:
            return ForkedPath(self.parts, numerics)
        if not numerics.compile:
            uncompile_layers(self.parts.body)
        return PackedPath(self.parts, numerics)

    def _judged(self, path: Path) -> Outcome:
        packed = isinstance(path.text if isinstance(path, PicturePath) else path, PackedPath | ForkedPath)
        what = "fast" if packed else "a padded batch"
        found = self._through(path)
        if self.why_not_exact and not (packed and self.numerics.dtype == "float32"):
            return self._without_exact(found, packed)
        if self.numerics.dtype == "float32":
            return _fp32_outcome(found, self.ordinary, what)
        assert self.exact is not None
        if not (np.isfinite(found).all() and np.isfinite(self.ordinary).all()):
            with widened(self.model):  # where packs that overflow run
                return _fp32_outcome(self._through(path), self.exact, what)
        off, allowed = _rms(found - self.exact), max(NARROW_RATIO * _rms(self.ordinary - self.exact), FP32_BOUND)
        sentence = f"against fp32 {what} is off by {off:.1e} nats (root mean square), {allowed:.1e} is the bound"
        return Outcome(off <= allowed, _largest(found - self.ordinary), sentence)

    def _without_exact(self, found: Logps, packed: bool) -> Outcome:
        if packed:
            sentence = f"there is no fp32 form of its weights to verify against: {self.why_not_exact}"
            return Outcome(False, _largest(found - self.ordinary), sentence)
        off = _rms(found - self.ordinary)
        sentence = f"a row in a batch is off by {off:.1e} nats (root mean square), {QUANTIZED_BOUND} is the bound"
        return Outcome(off <= QUANTIZED_BOUND, _largest(found - self.ordinary), sentence)

    def _through(self, path: Path) -> Logps:
        """All rows by the path's own plan, in the order of the rows."""
        values: dict[int, Values] = {}
        with path.session():
            for pack in reversed(path.plan(self.sequences)):  # not in the order of the ordinary way: state would show
                values.update(zip(pack, path.compute([self.sequences[i] for i in pack]), strict=True))
        return np.concatenate([values[i]["logp"] for i in range(len(self.sequences))])


@contextmanager
def _outliers_as_others(model: Any) -> Iterator[None]:
    """8-bit layers of bitsandbytes compute columns with large values in another way, chosen from all tokens of a
    forward: noise of the quantisation, by which a later token moves an earlier one. Not so inside the block."""
    states = [module.state for module in model.modules() if getattr(getattr(module, "state", None), "threshold", 0)]
    before = [state.threshold for state in states]
    try:
        for state in states:
            state.threshold = 0.0
        yield
    finally:
        for state, threshold in zip(states, before, strict=True):
            state.threshold = threshold


def _fp32_outcome(found: Logps, expected: Logps, what: str) -> Outcome:
    neither = ~np.isfinite(found) & ~np.isfinite(expected)  # the model's own values are not finite: rows are rejected
    largest = _largest(np.where(neither, 0.0, found - expected))
    if largest <= FP32_BOUND:
        return Outcome(True, largest, f"{what} and the ordinary way agree to {largest:.1e} nats per token")
    sentence = f"{what} and the ordinary way differ by {largest:.1e} nats on a token; {FP32_BOUND} is the bound"
    return Outcome(False, largest, sentence)


def probe_rows(config: Any) -> list[TokenSequence]:
    """The probe's rows for a model of this configuration, always the same ones; the longest last."""
    settings = config.to_dict()
    ids = _Ids(config)
    shared = ids.draw(13)
    rows = [TokenSequence(shared, ids.draw(n)) for n in (7, 1, 18)]
    rows += [TokenSequence(ids.draw(1), ids.draw(6)), TokenSequence(ids.draw(0), ids.draw(9))]
    window = smallest_window(settings)
    if window is not None:
        rows.append(TokenSequence(ids.draw(window + 5), ids.draw(WINDOW_TAIL)))
    for length in changing_lengths(settings):
        tail = min(SWITCH_TAIL, length)
        prompt = ids.draw(length - tail)
        rows += [
            TokenSequence(prompt, ids.draw(tail + more)) for more in (0, 1, PROBE_TAIL // 2, PROBE_TAIL - SWITCH_TAIL)
        ]
    if config.is_encoder_decoder:  # an encoder cannot read an empty prompt
        return [row for row in rows if len(row.prompt)]
    return rows


def picture_rows(pictures: PictureInputs, config: Any) -> list[TokenSequence]:
    """Rows about pictures of noise: one picture with three answers, two pictures of other sizes with text between."""
    ids, random, place = _Ids(config), np.random.default_rng(1), pictures.processor.place
    rows = []
    for text, sizes in ((f"{place}What is this?", [(60, 40)]), (f"{place} or {place}?", [(40, 48), (64, 36)])):
        noise = [random.integers(0, 256, (height, width, 3), np.uint8) for width, height in sizes]
        media = pictures.made([pillow().fromarray(pixels) for pixels in noise])
        expanded = pictures.processor.expanded(text, sizes)
        if isinstance(expanded, Problem):
            raise ModelError(f"the processor cannot place a picture: {expanded.reason}")
        prompt = pictures.processor.ids(expanded)
        rows += [TokenSequence(prompt, ids.draw(n), media=media) for n in (9, 4, 14)]
    return rows


class _Ids:
    """Ordinary token ids: below the vocabulary, none of those that a configuration gives a meaning to."""

    def __init__(self, config: Any) -> None:
        text = config.get_text_config(decoder=True)
        settings = {**config.to_dict(), **text.to_dict()}
        special = {v for k, v in settings.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
        self.pool = np.array([i for i in range(min(int(text.vocab_size), 4096)) if i not in special], np.int32)
        self.random = np.random.default_rng(0)

    def draw(self, n: int) -> Ids:
        return self.random.choice(self.pool, n).astype(np.int32)


def _largest(difference: Logps) -> float:
    """Largest absolute difference; anything not finite counts as infinite."""
    return float(np.abs(difference).max(initial=0.0)) if np.isfinite(difference).all() else float("inf")


def _rms(difference: Logps) -> float:
    if not np.isfinite(difference).all():
        return float("inf")
    return float(np.sqrt(np.mean(difference.astype(np.float64) ** 2)))
