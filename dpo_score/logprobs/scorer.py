"""PairScorer: token sequences in, token log-probabilities out, in input order, each distinct sequence once.

A path (packed.py, padded.py, encoder_decoder.py) plans and computes; here is what all of them share: duplicates,
progress, stopping between packs, a pack that runs out of memory, a pack that overflows 16 bits. Not here: sums,
caching, reading, writing.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from dpo_score.data.types import TokenSequence
from dpo_score.errors import ConfigError, DpoScoreError, Interrupted, ModelError, nearest
from dpo_score.logprobs.encoder_decoder import EncoderDecoderPath
from dpo_score.logprobs.forked import ForkedPath
from dpo_score.logprobs.packed import PackedPath, PackOnDevice
from dpo_score.logprobs.padded import PaddedPath
from dpo_score.logprobs.pictures import PicturePath
from dpo_score.logprobs.torch_settings import running
from dpo_score.logprobs.transfer import Returning
from dpo_score.logprobs.types import RAISED_BY_MODELS, STATS, SequenceLogps, Unscored, Values
from dpo_score.logprobs.upcast import CannotWiden, is_wide, widened
from dpo_score.models import memory
from dpo_score.models.numerics import Numerics
from dpo_score.models.parallel.process_group import group_of
from dpo_score.models.parallel.rank_zero import RankZero
from dpo_score.models.parts import ModelParts, model_parts
from dpo_score.models.weights import brief
from dpo_score.tokenization.pictures import PictureInputs

T = TypeVar("T")
Result = SequenceLogps | Unscored
IndexPack: TypeAlias = tuple[int, ...]
PackResults: TypeAlias = Generator[tuple[IndexPack, Sequence[Result]], None, None]


class Path(Protocol):
    """One way to compute. `plan` is a pure function of the sequences; `compute` runs one of its packs; `session` makes
    once what all packs need."""

    parts: ModelParts

    @property
    def forwards(self) -> int: ...

    def plan(self, sequences: Sequence[TokenSequence]) -> list[tuple[int, ...]]: ...

    def session(self) -> AbstractContextManager[None]: ...

    def compute(self, sequences: Sequence[TokenSequence]) -> list[Values]: ...


class PairScorer:
    """Scores sequences with one loaded model under fixed numerics.

    `stats`: names from `types.STATS`. `on_progress` gets the unique tokens of each pack as it is done.
    `should_stop` is asked between packs; when it says yes, `Interrupted` is raised and nothing is returned.
    `notes` collects one sentence for each thing that did not go as planned; `packs_split` counts packs that were
    too large for the device. `runs_ahead`: packs are queued before the values of the last have arrived.
    """

    def __init__(
        self,
        model: Any,
        numerics: Numerics,
        stats: Sequence[str] = (),
        on_progress: Callable[[int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        pictures: PictureInputs | None = None,
    ) -> None:
        for name in stats:
            if name not in STATS:
                raise ConfigError(f"unknown statistic {name!r}: {nearest(name, STATS)}")
        self.numerics = numerics
        self.notes: list[str] = []
        self.packs_split = 0
        with memory.room_for(type(model).__name__, numerics.device, numerics.dtype):
            self._path = make_path(model, numerics, stats, pictures=pictures)
        if isinstance(self._path, PackedPath):
            self.notes += self._path.notes
        self.runs_ahead = numerics.device_kind == "cuda"
        self._on_progress = on_progress or (lambda _: None)
        self._should_stop = should_stop or (lambda: False)

    @property
    def forwards(self) -> int:
        """Forward passes of the model so far."""
        return self._path.forwards

    def score(self, sequences: Sequence[TokenSequence]) -> list[Result]:
        """Values or the reason there are none, one per sequence, in order. Raises Interrupted."""
        keys = [s.key for s in sequences]
        unique = dict(zip(reversed(keys), reversed(sequences), strict=True))
        order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        with running(self.numerics), self._path.session():
            done = self._score_unique([unique[key] for key in order])
        return [done[order[key]] for key in keys]

    def _score_unique(self, sequences: Sequence[TokenSequence]) -> dict[int, Result]:
        empty = [i for i, s in enumerate(sequences) if len(s.scored_positions) == 0]
        done: dict[int, Result] = {i: SequenceLogps(np.zeros(0, np.float32)) for i in empty}
        left = [i for i in range(len(sequences)) if i not in done]
        costs = token_costs(sequences)
        packs = [tuple(left[i] for i in pack) for pack in self._path.plan([sequences[i] for i in left])]
        ahead = self.runs_ahead and isinstance(self._path, PackedPath)
        computed = self._one_behind(packs, sequences) if ahead else self._one_by_one(packs, sequences)
        with closing(computed):
            for pack, results in computed:
                done.update(zip(pack, results, strict=True))
                self._on_progress(sum(costs[i] for i in pack))
        return done

    def _one_by_one(self, packs: Sequence[IndexPack], sequences: Sequence[TokenSequence]) -> PackResults:
        """Each pack and its results; one that does not fit on the device is split."""
        waiting = deque(packs)
        while waiting:
            self._refuse_to_go_on()
            pack = waiting.popleft()
            results = self._attempt([sequences[i] for i in pack])
            if results is None:
                waiting.extendleft((pack[len(pack) // 2 :], pack[: len(pack) // 2]))
                continue
            yield pack, results

    def _one_behind(self, packs: Sequence[IndexPack], sequences: Sequence[TokenSequence]) -> PackResults:
        """As `_one_by_one`, with a device that never waits: a thread lays out and copies the pack after the one that is
        queued, and the values of a pack are awaited when the next has been queued behind it. A pack that does not fit
        is computed again, and split, by `_one_by_one`."""
        path = self._path
        assert isinstance(path, PackedPath)
        alone = [pack for pack in packs if path.is_alone([sequences[i] for i in pack])]
        packs = [pack for pack in packs if pack not in alone]
        queued: tuple[IndexPack, PackOnDevice, Returning] | None = None
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="layout") as thread:
            laid_out = deque(thread.submit(path.lay_out, [sequences[i] for i in pack]) for pack in packs[:1])
            for number, pack in enumerate(packs):
                self._refuse_to_go_on()
                for later in packs[number + 1 : number + 2]:
                    laid_out.append(thread.submit(path.lay_out, [sequences[i] for i in later]))
                members = [sequences[i] for i in pack]
                begun = self._unless_too_large(members, partial(_begun, path, laid_out.popleft()))
                if queued is not None:
                    yield from self._arrived(queued[0], queued[2], sequences)
                queued = None if begun is None else (pack, *begun)
                if begun is None:
                    yield from self._one_by_one([pack], sequences)
            if queued is not None:
                yield from self._arrived(queued[0], queued[2], sequences)
        yield from self._one_by_one(alone, sequences)

    def _arrived(self, pack: IndexPack, returning: Returning, sequences: Sequence[TokenSequence]) -> PackResults:
        """The results of a pack that was queued."""
        members = [sequences[i] for i in pack]
        results = self._unless_too_large(members, lambda: self._checked(members, returning.arrived()))
        if results is not None:
            yield pack, results
        else:
            yield from self._one_by_one([pack], sequences)

    def _refuse_to_go_on(self) -> None:
        if self._should_stop():
            raise Interrupted(signal.SIGINT)

    def _unless_too_large(self, members: Sequence[TokenSequence], call: Callable[[], T]) -> T | None:
        """What `call` returns for a pack of `members`, or None where the device has no room for it; what it held is
        given back. ModelError where the model's own code fails on the pack."""
        try:
            return call()
        except DpoScoreError:
            raise
        except RAISED_BY_MODELS as error:
            if not (isinstance(error, RuntimeError) and memory.is_out_of_memory(error)):
                longest = max(len(s.prompt) + len(s.response) for s in members)
                raise ModelError(
                    f"the model's own code failed on {len(members)} sequences of up to {longest:,} tokens: "
                    f"{type(error).__name__}: {brief(error)}. Where only long rows fail, --max-length N cuts them"
                ) from error
        memory.release(self.numerics.device_kind)
        return None

    def _attempt(self, members: Sequence[TokenSequence]) -> Sequence[Result] | None:
        """The results of one pack, or None when it must be split to fit."""
        results = self._unless_too_large(members, lambda: self._checked(members, self._path.compute(members)))
        if results is not None:
            return results
        if len(members) == 1:
            tokens = len(members[0].prompt) + len(members[0].response)
            return [Unscored("too_large", f"{tokens} tokens alone do not fit on {self.numerics.device}")]
        self.packs_split += 1
        self.notes.append(f"a pack of {len(members)} sequences did not fit on {self.numerics.device} and was split")
        return None

    def _checked(self, members: Sequence[TokenSequence], values: list[Values]) -> list[Result]:
        """The results of a pack; one that overflows 16 bits is computed again in fp32 and marked."""
        if all(map(is_finite, values)):
            return [finished(v) for v in values]
        if self.numerics.dtype == "float32":
            return [finished(v) for v in self._apart(members, values)]
        try:
            with widened(self._path.parts.model):
                redone = self._apart(members, self._path.compute(members))
        except CannotWiden as reason:
            self.notes.append(f"a pack overflowed {self.numerics.dtype} and could not be redone in float32: {reason}")
            return [finished(v) for v in values]
        self.notes.append(f"a pack of {len(members)} sequences overflowed {self.numerics.dtype}: redone in float32")
        return [finished(v, "float32") for v in redone]

    def _apart(self, members: Sequence[TokenSequence], values: list[Values]) -> list[Values]:
        """A value that is not finite may come from a neighbour in the pack: such sequences are computed alone."""
        if len(members) == 1:
            return values
        return [v if is_finite(v) else self._path.compute([m])[0] for m, v in zip(members, values, strict=True)]


def _begun(path: PackedPath, laid_out: Future[PackOnDevice]) -> tuple[PackOnDevice, Returning]:
    """A pack queued on the device; it must live until its values have arrived."""
    pack = laid_out.result()
    return pack, path.start(pack)


def make_path(
    model: Any,
    numerics: Numerics,
    stats: Sequence[str] = (),
    plain: bool = False,
    pictures: PictureInputs | None = None,
) -> Path:
    """The way to compute that `numerics` names for this model; `plain`: the plain path whatever they name. With
    `pictures`, one that also takes prompts with pictures.

    Of a model that this process leads a group in holding, all ranks compute together.
    """
    group = group_of(model)
    if isinstance(group, RankZero):
        return LedPath(group, model, numerics, stats, plain)
    text = _own_path(model, numerics, stats, plain)
    return text if pictures is None else PicturePath(text, pictures, stats)


class LedPath:
    """A path that every rank of a group has: a pack is computed by all of them, and its values are the leader's."""

    def __init__(self, leader: RankZero, model: Any, numerics: Numerics, stats: Sequence[str], plain: bool) -> None:
        self._rank_zero, self._number = leader, leader.number()
        with leader.step("path", self._number, numerics, tuple(stats), plain, is_wide(model)):
            self._path = _own_path(model, numerics, stats, plain)
        self.parts = self._path.parts
        self.plan = self._path.plan
        self.session = self._path.session

    @property
    def forwards(self) -> int:
        return self._path.forwards

    def compute(self, sequences: Sequence[TokenSequence]) -> list[Values]:
        """One pack, on all ranks; in fp32 on all of them where it is here."""
        with self._rank_zero.step("compute", self._number, list(sequences), is_wide(self.parts.model)):
            return self._path.compute(sequences)


def _own_path(model: Any, numerics: Numerics, stats: Sequence[str], plain: bool) -> Path:
    if model.config.is_encoder_decoder:
        return EncoderDecoderPath(model, numerics, stats)
    parts = model_parts(model)
    if numerics.path == "fast" and numerics.kernel.forked and not plain:
        return ForkedPath(parts, numerics, stats)
    if numerics.path == "fast" and not plain:
        return PackedPath(parts, numerics, stats)
    return PaddedPath(parts, numerics, stats)


def is_finite(values: Values) -> bool:
    return bool(np.isfinite(values["logp"]).all())


def finished(values: Values, redone_dtype: str | None = None) -> Result:
    """Values as a result; a value that is not finite makes the sequence unscored."""
    logps = values["logp"]
    bad = np.flatnonzero(~np.isfinite(logps))
    if len(bad):
        return Unscored("nonfinite_logp", f"scored token {bad[0]} of {len(logps)} has log-probability {logps[bad[0]]}")
    stats: Mapping[str, Any] = {name: array for name, array in values.items() if name != "logp"}
    return SequenceLogps(np.minimum(logps, 0.0, dtype=np.float32), stats, redone_dtype)


def token_costs(sequences: Sequence[TokenSequence]) -> list[int]:
    """Unique tokens by sequence: its prompt is charged to the first that has it, a repeated response to none."""
    prompts: set[bytes] = set()
    responses: set[tuple[bytes, bytes]] = set()
    costs = []
    for s in sequences:
        prompt, response = s.prompt_key, s.response.tobytes()
        new = (prompt, response) not in responses
        costs.append((0 if prompt in prompts else len(s.prompt)) + (len(s.response) if new else 0))
        prompts.add(prompt)
        responses.add((prompt, response))
    return costs
