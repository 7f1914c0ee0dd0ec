"""Token log-probabilities of one model, from the cache where it has them, else computed and added to it.

A block takes three steps, each in a thread of its own (`run.compute_blocks`): its values are looked up, what is missing
is computed, and that enters the cache. Promises: the model is loaded at the first miss and not before; only what is
missing is computed; lookups see the cache files listed when the run began, so what others add meanwhile changes
nothing. On its first load the fast path is compared with the plain one; a refusal is raised, for the caller to go on
with plain numerics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from dpo_score.config.schema import ComputeSpec
from dpo_score.data.types import TokenSequence
from dpo_score.engine.context import RunContext
from dpo_score.engine.environment import versions
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError, DamageError
from dpo_score.logprobs.numerics import another_way, in_effect, present
from dpo_score.logprobs.types import SequenceLogps, Unscored
from dpo_score.models.numerics import Numerics
from dpo_score.models.resolve import ModelSource
from dpo_score.results import noise
from dpo_score.storage.cache.cache import CacheSpace, CacheView
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.open import open_store
from dpo_score.tokenization.pictures import PictureInputs

if TYPE_CHECKING:
    from dpo_score.logprobs.scorer import PairScorer
    from dpo_score.logprobs.self_check import SelfCheck

Entry = SequenceLogps | Unscored
T = TypeVar("T")


class FastPathRefusedError(Exception):
    """The way to compute that the run decided on gives wrong values on this model; `numerics` give right ones."""

    def __init__(self, reason: str, numerics: Numerics) -> None:
        super().__init__(reason, numerics)  # both, so that another process reads it back
        self.numerics = numerics

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class Lookup:
    """Sequences of a block with their `keys`, and the values that are `known`; `redone`: keys of those among them that
    were computed again in float32."""

    sequences: Sequence[TokenSequence]
    keys: Sequence[bytes] = ()
    known: Mapping[bytes, Entry] = field(default_factory=dict)
    redone: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class Computed:
    """What a lookup lacked: `fresh` values by key, and what a commit record says of how they came about."""

    lookup: Lookup
    fresh: Mapping[bytes, SequenceLogps | Unscored]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> BlockLogprobs:
        """The values of all sequences, in order."""
        keys = self.lookup.keys
        entries = {**self.lookup.known, **self.fresh}
        again = {*self.lookup.redone, *(key for key, result in self.fresh.items() if _was_redone(result))}
        redone = frozenset(i for i, key in enumerate(keys) if key in again)
        return BlockLogprobs(self.lookup.sequences, [entries[key] for key in keys], redone, self.notes)


@dataclass(frozen=True, slots=True)
class BlockLogprobs:
    """`entries` in the order of the sequences; `redone`: places of those computed again in float32."""

    sequences: Sequence[TokenSequence]
    entries: list[Entry]
    redone: frozenset[int]
    notes: Mapping[str, Any] = field(default_factory=dict)


COMPUTING_LIBRARIES = ("torch", "transformers", "peft")
"""Their releases compute differently: what the cache answers for includes those that computed its values."""


def cache_fields(source: ModelSource, numerics: Numerics) -> dict[str, Any]:
    """What changes a number for given ids: weights × dtype × path, kernel and compilation × kind and number of
    devices that a model is sharded over × versions of the libraries that compute."""
    kept = ("dtype", "path", "kernel", "compile", "device_kind", "tensor_parallel", "one_row")
    written = numerics.to_json()
    libraries = {name: version for name in COMPUTING_LIBRARIES if (version := versions(None).get(name)) is not None}
    if source.adapter is None:
        libraries.pop("peft", None)
    return {
        "weights": source.digest,
        **{name: written[name] for name in kept if name in written},
        "libraries": libraries,
    }


def cache_state(context: RunContext, source: ModelSource, numerics: Numerics) -> dict[str, list[str]]:
    """What the cache holds for a model now, as the manifest keeps it: the value files that lookups of this OUT see, and
    the noise that was measured of their values."""
    space = context.cache.namespace(cache_fields(source, numerics))
    return {
        source.key: list(space.snapshot()),
        noise_name(source): noise.as_snapshot(context.cache.store, space.name),
    }


def noise_name(source: ModelSource) -> str:
    """Under which name a manifest's snapshots keep the noise of a model."""
    return f"noise/{source.key}"


def continued_numerics(stored: Numerics, asked: ComputeSpec) -> Numerics:
    """What OUT decided, with what is now asked for by name: a difference shows up as another identity. Which of several
    GPUs computes is none (`on_device`)."""
    explicit: dict[str, Any] = {
        name: getattr(asked, name) for name in ("dtype", "batch_tokens", "path") if getattr(asked, name) != "auto"
    }
    if asked.compile != "auto":
        explicit["compile"] = asked.compile == "on"
    if asked.device != "auto" and asked.device.split(":")[0] != stored.device_kind:
        explicit |= {"device": asked.device, "device_kind": asked.device.split(":")[0]}
    if asked.threads is not None:
        explicit["threads"] = asked.threads
    explicit["tensor_parallel"] = asked.tensor_parallel
    return replace(stored, **explicit)


def on_device(numerics: Numerics, device: str) -> Numerics:
    """The same numbers on the GPU that is asked for by its index."""
    kind, _, index = device.partition(":")
    return replace(numerics, device=device) if index and kind == numerics.device_kind == "cuda" else numerics


class LogprobSource(Protocol):
    """Where a stage gets token log-probabilities from, a block of sequences at a time.

    `look_up` may run ahead of `compute`, and `keep` behind it, each in a thread of its own. `sample`: the noise floor
    is measured on so many of the first sequences. `name` names the cache file that new values go to.
    """

    def look_up(self, sequences: Sequence[TokenSequence]) -> Lookup: ...

    def compute(self, lookup: Lookup, sample: int = 0) -> Computed: ...

    def keep(self, name: str, computed: Computed) -> None: ...


class CachedLogprobs:
    """One model of one run. `stats` are the scorer's statistics that every entry must carry."""

    def __init__(
        self,
        context: RunContext,
        source: ModelSource,
        numerics: Numerics,
        stats: Sequence[str] = (),
        snapshot: Sequence[str] | None = None,
        upcoming: ModelSource | None = None,
        noise_then: Sequence[str] = (),
        pictures: PictureInputs | None = None,
    ) -> None:
        """`snapshot`, `noise_then`: value files and measured noise that the cache had when the run began (noise.py);
        those of now where they are not given."""
        self._context, self._source, self._begun, self._stats = context, source, numerics, tuple(stats)
        self._space: CacheSpace = context.cache.namespace(cache_fields(source, numerics))
        self.snapshot = tuple(self._space.snapshot() if snapshot is None else snapshot)
        self._view = self._space.view(self.snapshot)
        self._noise_then = tuple(noise_then)
        self._upcoming, self._pictures = upcoming, pictures
        self._scorer: PairScorer | None = None
        self._model: Any = None
        self._packs_split = 0

    def look_up(self, sequences: Sequence[TokenSequence]) -> Lookup:
        """What the cache knows of a block."""
        keys = [sequence.key for sequence in sequences]
        known: dict[bytes, Entry] = dict(self._view.lookup(list(dict.fromkeys(keys)), wanted=self._stats))
        again = self._known_redone([key for key in keys if key not in known])
        return Lookup(sequences, keys, {**known, **again}, frozenset(again))

    def compute(self, lookup: Lookup, sample: int = 0) -> Computed:
        """What is missing of a block: the only step that uses the model."""
        pairs = zip(lookup.keys, lookup.sequences, strict=True)
        missing = {key: sequence for key, sequence in pairs if key not in lookup.known}
        results = self._compute(list(missing.values())) if missing else []
        if missing:  # before anything enters the cache: these are the values of the weights that the digest names
            self._source.refuse_changed()
        notes = {"packs_split": self._packs_split} if self._packs_split and missing else {}
        computed = Computed(lookup, dict(zip(missing, results, strict=True)), notes)
        if not sample:
            return computed
        noise_found = self._noise(lookup.sequences[:sample], computed.values.entries[:sample])
        return replace(computed, notes={**notes, "noise": noise_found})

    def keep(self, name: str, computed: Computed) -> None:
        """New values into the cache, each under what computed it."""
        for redone in (False, True):
            entries = {
                key: result
                for key, result in computed.fresh.items()
                if isinstance(result, SequenceLogps) and _was_redone(result) == redone
            }
            if entries:
                (self._redone_space if redone else self._own_space).add(name, entries)

    @cached_property
    def _numerics(self) -> Numerics:
        """Those that the run began with, on the device asked for, with the kernel that runs here."""
        return in_effect(on_device(self._begun, self._context.compute.device))

    @cached_property
    def _own_space(self) -> CacheSpace:
        """Where new values go: that of the run's numerics, but for another kernel its own."""
        same = self._numerics.kernel == self._begun.kernel
        return self._space if same else self._context.cache.namespace(cache_fields(self._source, self._numerics))

    def _noise(self, sequences: Sequence[TokenSequence], entries: Sequence[Entry]) -> noise.Noise:
        store = self._context.cache.store
        if self._scorer is None:
            return noise.from_snapshot(self._noise_then, store, self._space.name)
        found = noise.measure(self._model, self._numerics, sequences, entries, self._pictures)
        noise.remember(store, self._own_space.name, found)
        return found

    def _compute(self, sequences: Sequence[TokenSequence]) -> Sequence[SequenceLogps | Unscored]:
        scorer = self.scorer()
        split_before = scorer.packs_split
        results = scorer.score(sequences)
        self._packs_split = scorer.packs_split - split_before
        for note in scorer.notes:
            self._context.progress.warn(f"{self._source.name}: {note}")
        return results

    @cached_property
    def _redone_space(self) -> CacheSpace:
        """Where values go whose packs overflowed 16 bits: the same weights, computed in fp32."""
        fields = {**cache_fields(self._source, self._numerics), "redone": "float32"}
        return self._context.cache.namespace(fields)

    @cached_property
    def _redone_view(self) -> CacheView:
        return self._redone_space.view(self._redone_space.snapshot())

    def _known_redone(self, keys: Sequence[bytes]) -> dict[bytes, SequenceLogps]:
        if not keys or self._begun.dtype == "float32":
            return {}
        return self._redone_view.lookup(list(dict.fromkeys(keys)), wanted=self._stats)

    def scorer(self) -> PairScorer:
        """The loaded model, verified; loads on the first call."""
        if self._scorer is None:
            self._scorer = self._load()
        return self._scorer

    def _load(self) -> PairScorer:
        from dpo_score.logprobs.scorer import PairScorer

        context = self._context
        _refuse_absent(self._source, self._numerics)
        context.progress.say(f"loading {self._source.name} ({self._numerics.dtype} on {self._numerics.device})")
        loaded = context.loader.load(self._source, self._numerics)
        self._verify(loaded.model)
        self._model = loaded.model
        for note in loaded.notes:
            context.progress.warn(f"{self._source.name}: {note}")
        if self._upcoming is not None:
            context.loader.prefetch(self._upcoming)
        return PairScorer(
            loaded.model,
            self._numerics,
            self._stats,
            on_progress=context.progress.tokens,
            should_stop=context.stop.check,
            pictures=self._pictures,
        )

    def _verify(self, model: Any) -> None:
        from dpo_score.logprobs.self_check import check_model

        check = check_model(model, self._numerics, self._pictures)
        if check.numerics != self._numerics:
            raise FastPathRefusedError(check.reason, another_way(self._begun, check.numerics))


def _refuse_absent(source: ModelSource, numerics: Numerics) -> None:
    """ConfigError for a device that a run was begun on and this machine lacks."""
    if present(numerics.device):
        return
    raise ConfigError(
        f"{source.name} is to be computed on {numerics.device}, and torch sees no such device here. Go on where there "
        "is one (another GPU: --device cuda:0), or choose another --out, whose numbers will be of another kind"
    )


def _was_redone(result: SequenceLogps | Unscored) -> bool:
    return isinstance(result, SequenceLogps) and result.redone_dtype is not None


# --- the check of a model ---


def checked_numerics(
    context: RunContext,
    source: ModelSource,
    numerics: Numerics,
    any_dtype: bool = False,
    pictures: PictureInputs | None = None,
) -> Numerics:
    """`numerics` as they are where they give right values on the model, else slower ones that do, with a warning.

    `any_dtype`: the user asked for no dtype. Then float16 is kept only for a model whose weights and probe stay finite
    in it; others are computed in bfloat16.
    """
    may_widen = any_dtype and numerics.dtype == "float16"
    asked = (context, source, numerics, may_widen, pictures)
    way, reason = _remembered(*asked) or _find_out(*asked)
    if way.dtype != numerics.dtype:
        context.progress.warn(f"{source.name}: computed in {way.dtype}: {reason}")
    elif way != numerics:
        warn_slower(context.progress, source.name, way, reason)
    return way


def with_slower_way(progress: Progress, label: str, numerics: Numerics, attempt: Callable[[Numerics], T]) -> T:
    """`attempt(numerics)`; where the check at load refuses them, a warning and `attempt` with those that it names."""
    try:
        return attempt(numerics)
    except FastPathRefusedError as refusal:
        warn_slower(progress, label, refusal.numerics, refusal)
        return attempt(refusal.numerics)


def warn_slower(progress: Progress, label: str, numerics: Numerics, reason: object) -> None:
    progress.warn(f"{label}: {way_in_words(numerics)}, which is slower: {reason}")


def way_in_words(numerics: Numerics) -> str:
    """How rows are computed, for a message."""
    if numerics.one_row:
        return "scored one row at a time"
    if numerics.path == "plain":
        return "scored on the plain path"
    return f"scored with the kernel {numerics.kernel}" + ("" if numerics.compile else ", not compiled")


def _name(source: ModelSource, numerics: Numerics, may_widen: bool, pictures: PictureInputs | None) -> str:
    asked = {
        "may_widen": may_widen,
        "weights": source.base_digest,
        "numerics": numerics.to_json(),
        "versions": versions(numerics),
        "checked": CHECKED,
        **({"pictures": pictures.processor.preparation} if pictures is not None else {}),
    }
    return f"verdicts/{digest(asked)}.json"


CHECKED = "causal, alone and beside others"
"""What the check asks of a model; results of an earlier check, which asked less, have other names."""


def _remembered(
    context: RunContext, source: ModelSource, numerics: Numerics, may_widen: bool, pictures: PictureInputs | None
) -> tuple[Numerics, str] | None:
    store, name = open_store(context.cache_dir), _name(source, numerics, may_widen, pictures)
    if not store.exists(name):
        return None
    try:
        found = store.read_json(name)
        return Numerics.from_json(found["numerics"]), str(found["refused"])
    except (DamageError, KeyError, TypeError, ValueError):
        return None


def _find_out(
    context: RunContext, source: ModelSource, numerics: Numerics, may_widen: bool, pictures: PictureInputs | None
) -> tuple[Numerics, str]:
    from dpo_score.logprobs.self_check import WeightsOverflowError, check_model

    def checked(numerics: Numerics) -> SelfCheck:
        where = f"{numerics.dtype} on {numerics.device}"
        context.progress.say(f"loading {source.name} ({where}) to check how it may be scored")
        return check_model(context.loader.load(source, numerics).model, numerics, pictures)

    overflow = ""
    try:
        check = checked(numerics)
        if check.overflows:
            overflow = f"a few tokens of a check already overflow {numerics.dtype}"
    except WeightsOverflowError as error:
        if not may_widen:
            raise
        overflow = str(error)
    if overflow and may_widen:
        check = checked(replace(numerics, dtype="bfloat16"))
        reason = overflow
    else:
        reason = "" if check.numerics == numerics else check.reason
    delta = check.max_delta if check.max_delta is not None and math.isfinite(check.max_delta) else None
    found = {"numerics": check.numerics.to_json(), "refused": reason, "delta": delta}
    open_store(context.cache_dir).write_json(_name(source, numerics, may_widen, pictures), found)
    return check.numerics, reason
