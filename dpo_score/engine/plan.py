"""What a run consists of: the tasks of both stages, the rows in blocks, data, tokenizer and identities.

A plan is data: it is made once (prepare.py) and not changed while blocks are computed. A policy that does not load is
part of the plan with its failure, so that the others are scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from dpo_score.config.schema import LossSpec, PolicySpec, RunConfig
from dpo_score.data.dataset import Dataset
from dpo_score.data.formats.base import Answers
from dpo_score.errors import ConfigError, HalfWrittenError, ModelError
from dpo_score.logprobs.numerics import SPEED
from dpo_score.losses.parse import ResolvedLoss
from dpo_score.models.numerics import Numerics
from dpo_score.models.resolve import ModelSource
from dpo_score.storage.fingerprint import Identities, has_reference
from dpo_score.storage.resume import BlockRange, block_count
from dpo_score.storage.stage import Stage
from dpo_score.tokenization.pictures import PictureInputs
from dpo_score.tokenization.render import Renderer

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """Which rows of all sets are scored, in blocks. Boundaries depend on `total` alone, so a `limit` shares them.

    `share` (i, n): this process works on the i-th of n contiguous runs of blocks, and iteration yields those alone.
    """

    total: int
    block_rows: int
    limit: int | None = None
    sample: tuple[int, ...] | None = None
    share: tuple[int, int] = (0, 1)

    @property
    def wanted(self) -> int:
        everything = self.total if self.sample is None else len(self.sample)
        return everything if self.limit is None else min(self.limit, everything)

    @property
    def blocks(self) -> int:
        """Blocks of the whole set: the `of` in part names, whatever the limit."""
        everything = self.total if self.sample is None else len(self.sample)
        return block_count(everything, self.block_rows)

    def span(self, block: int) -> tuple[int, int]:
        """First row and end of a block, as positions among the wanted rows."""
        start = block * self.block_rows
        return start, min(start + self.block_rows, self.wanted)

    def range(self, block: int) -> BlockRange:
        """`span`, with the number of the block."""
        return BlockRange(block, self.blocks, *self.span(block))

    @property
    def mine(self) -> int:
        """Rows of this process's share."""
        return self.count(self)

    def count(self, blocks: Iterable[int]) -> int:
        """Rows of some blocks."""
        return sum(stop - start for start, stop in map(self.span, blocks))

    def __iter__(self) -> Iterator[int]:
        blocks, (index, shares) = -(-self.wanted // self.block_rows), self.share
        return iter(range(blocks * index // shares, blocks * (index + 1) // shares))


@dataclass(frozen=True, slots=True)
class PolicyFailure:
    """Why a policy is not scored. `waits`: a glob found it half written, and the next run may find it whole."""

    reason: str
    waits: bool = False

    @classmethod
    def of(cls, policy: PolicySpec, error: ModelError) -> PolicyFailure:
        own = Path(policy.adapter or policy.model or "")
        waits = policy.glob is not None and isinstance(error, HalfWrittenError) and error.place.is_relative_to(own)
        return cls(str(error), waits)


@dataclass(frozen=True, slots=True)
class ReferenceTask:
    """Stage one for one reference. `name` is empty for the run's own, else the policy whose own reference it is.

    `source` is None where there is no model: no reference at all, or values that are columns of the data.
    """

    name: str
    source: ModelSource | None
    columns: tuple[str, str] | None
    numerics: Numerics | None
    fields: Mapping[str, Any]
    identity: str

    @property
    def stage(self) -> Stage:
        return Stage.reference(self.name)

    @property
    def exists(self) -> bool:
        """Whether policies are compared with a reference at all: a model, or columns of the data."""
        return self.source is not None or self.columns is not None or has_reference(self.fields)

    @property
    def label(self) -> str:
        return "reference" if not self.name else f"reference of {self.name}"


@dataclass(frozen=True, slots=True)
class PolicyTask:
    """Stage two for one policy. With a `failure` there is no `source`."""

    name: str
    source: ModelSource | None
    loss: ResolvedLoss
    loss_spec: LossSpec
    reference: ReferenceTask
    numerics: Numerics | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    identity: str = ""
    failure: PolicyFailure | None = None

    @property
    def stage(self) -> Stage:
        return Stage.scores(self.name)

    @property
    def label(self) -> str:
        return self.name

    @property
    def equals_reference(self) -> bool:
        """Same weights, same numerics: values are taken over without a forward pass, the margin is exactly 0."""
        reference = self.reference
        if self.source is None or reference.source is None:
            return False
        return self.source.digest == reference.source.digest and self.numerics == reference.numerics

    def identified(self, run: Identities) -> PolicyTask:
        """The task with the fields and the identity that follow from its source, numerics, loss and own reference."""
        fields: dict[str, Any] = {
            "weights": self.source.key if self.source else None,
            "numerics": self.numerics.to_json() if self.numerics else None,
            "loss": self.loss.identity(),
        }
        if self.reference.name:
            fields["reference"] = dict(self.reference.fields)
        alone = Identities(run.text, run.reference, {self.name: fields})
        return replace(self, fields=fields, identity=alone.policy_digest(self.name))


Task: TypeAlias = ReferenceTask | PolicyTask


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run, ready to be worked through. `numerics`: those of the run; a task may be on the plain path instead.
    `keeps_texts`: blocks of token ids are asked for again when the last task is done."""

    config: RunConfig
    datasets: tuple[Dataset, ...]
    rows: RowBlocks
    tokenizer: Any
    renderer: Renderer
    extra: tuple[pa.Field, ...]
    references: tuple[ReferenceTask, ...]
    policies: tuple[PolicyTask, ...]
    identities: Identities
    numerics: Numerics | None = None
    stats: tuple[str, ...] = ()
    cache_snapshots: Mapping[str, Sequence[str]] = field(default_factory=dict)
    keeps_texts: bool = False
    pictures: PictureInputs | None = None
    """What makes inputs of pictures; None where the data have none."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """In the order of the work: every reference before every policy."""
        return (*self.references, *self.policies)

    def task(self, stage: Stage) -> Task:
        return next(task for task in self.tasks if task.stage == stage)

    def reads_texts_after(self, task: Task) -> bool:
        """Whether somebody reads the token ids of blocks again once `task` has."""
        return self.keeps_texts or task.stage != self.tasks[-1].stage

    @property
    def models(self) -> tuple[tuple[str, ModelSource, Numerics], ...]:
        """(label, weights, numerics) of everything that would be loaded."""
        named = [(task.label, task.source, task.numerics) for task in self.tasks]
        return tuple((label, s, n) for label, s, n in named if s is not None and n is not None)

    @property
    def unloadable(self) -> dict[str, PolicyFailure]:
        """Policies whose files cannot be loaded as they are: no adapter base, a missing shard, a wrong path."""
        return {p.name: p.failure for p in self.policies if p.failure is not None and not p.failure.waits}

    def model_after(self, source: ModelSource) -> ModelSource | None:
        """The model that is loaded after `source`: its weights are read while `source` computes."""
        sources = [found for _, found, _ in self.models]
        later = sources[sources.index(source) + 1 :]
        return next((found for found in later if found.digest != source.digest), None)

    def with_numerics(self, task: Task, numerics: Numerics) -> RunPlan:
        """The plan with other numerics for one task, and the identities that follow from them: those of the task, and
        of the policies that are compared with it where it is a reference."""
        if isinstance(task, PolicyTask):
            again = replace(task, numerics=numerics).identified(self.identities)
            policies = tuple(again if policy.name == task.name else policy for policy in self.policies)
            return replace(self, policies=policies)
        reference = with_numerics(task, numerics, self.identities)
        policies = tuple(
            replace(policy, reference=reference).identified(self.identities)
            if policy.reference.name == task.name
            else policy
            for policy in self.policies
        )
        references = tuple(reference if other.name == task.name else other for other in self.references)
        return replace(self, references=references, policies=policies)


def with_numerics(reference: ReferenceTask, numerics: Numerics, run: Identities) -> ReferenceTask:
    """The reference with other numerics, and the identity that follows from them."""
    fields = {**reference.fields, "numerics": numerics.to_json()}
    return replace(
        reference, numerics=numerics, fields=fields, identity=replace(run, reference=fields).reference_digest
    )


def loss_spec(config: RunConfig, policy: PolicySpec) -> LossSpec:
    """The loss of one policy: its own, else the run's. ConfigError for a list of losses."""
    spec = policy.loss or config.loss
    if "," in spec.name:
        first = spec.name.split(",")[0]
        raise ConfigError(
            f"loss {spec.name!r}: a run scores one loss: run it with --loss {first}, then the grid costs no model: "
            f"dpo-score rescore {config.out or 'OUT'} --loss {spec.name}"
        )
    return spec if policy.beta is None else spec.model_copy(update={"beta": policy.beta})


def limited_rows(config: RunConfig, datasets: Sequence[Dataset]) -> tuple[int, ...] | None:
    """`--limit` with several sets: the first rows of each set, as numbers over all sets; None where one limit does.

    One set, or --sample, needs no list: the limit is then a number of rows from the beginning.
    """
    if config.limit is None or config.sample is not None or len(datasets) < 2:
        return None
    rows: list[int] = []
    before = 0
    for dataset in datasets:
        rows += range(before, before + min(config.limit, dataset.rows))
        before += dataset.rows
    return tuple(rows) if len(rows) < before else None


def sampled(total: int, count: int | None, seed: int) -> tuple[int, ...] | None:
    """`--sample`: `count` of `total` row numbers, ascending, the same for the same seed."""
    if count is None or count >= total:
        return None
    chosen = np.random.default_rng(seed).choice(total, size=count, replace=False)
    return tuple(int(row) for row in np.sort(chosen))


BYTES_PER_TOKEN = 4.0
MOST_ROWS = {"cpu": 512, "mps": 2048, "cuda": 32_768}
"""Rows of a block at most: a block is held in memory whole, and several are under way at once."""
PICTURE_ROWS = 64
"""Rows of a block at most where the data have pictures: the files of a block's pictures are held in memory."""


def block_rows(total: int, mean_text_bytes: float, parameters: int, device_kind: str) -> int:
    """About a minute of work, at most 1/50 of the rows, at least 64, at most what MOST_ROWS says."""
    flops_per_row = 2.0 * max(parameters, 1) * max(mean_text_bytes / BYTES_PER_TOKEN, 1.0)
    minute = int(60.0 * SPEED.get(device_kind, SPEED["cpu"]) / flops_per_row)
    return max(min(minute, total // 50, MOST_ROWS.get(device_kind, 512)), 64)


def extra_fields(datasets: Sequence[Dataset], keep: Sequence[str]) -> tuple[pa.Field, ...]:
    """Columns carried along: id, subset, group_id, num_correct where known, `tied` with --keep-ties, --keep-columns."""
    names = [*(name for name in ("id", "subset", "group_id", "num_correct") if _kinds(name, datasets)), *keep]
    fields = [pa.field(name, _common_type(name, datasets)) for name in dict.fromkeys(names)]
    if any(dataset.spec.keep_ties for dataset in datasets):
        fields.append(pa.field("tied", pa.bool_()))
    return tuple(fields)


def _kinds(name: str, datasets: Sequence[Dataset]) -> set[str]:
    """The kinds of values that the sets hold under `name`."""
    found: set[str] = set()
    for dataset in datasets:
        column = name if name in dataset.reader.kept else dataset.reader.carried.get(name)
        if column is not None:
            found.add(dataset.value_kind(column))
        elif name == "group_id" and dataset.format.answers is not Answers.PAIR:
            found.add("text")
        if name == "subset" and dataset.format.categories:
            found.add("text")
        if name == "num_correct" and column is None and dataset.format.answers is Answers.RIGHT_AND_WRONG:
            found.add("int")
    return found


def _common_type(name: str, datasets: Sequence[Dataset]) -> pa.DataType:
    """The type that all sets share, else string."""
    kinds = _kinds(name, datasets)
    known = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    return known.get(kinds.pop(), pa.string()) if len(kinds) == 1 else pa.string()


_UNUSED_TEMPLATE = "the tokenizer has a chat template: --render chat applies it"
_IDS = "token ids as they stand in the data"


def text_notice(plan: RunPlan) -> str:
    """How rows become text, in one sentence; names the flag where a chat template goes unused."""
    texts = [dataset for dataset in plan.datasets if not dataset.format.holds_ids]
    if plan.tokenizer is None or not texts:
        return _IDS
    parts = [_IDS] if len(texts) < len(plan.datasets) else []
    if plan.config.text.render == "chat":
        return "; ".join(["everything is rendered with the chat template", *parts])
    kinds = {dataset.is_conversational for dataset in texts}
    if False in kinds:
        parts.insert(0, _strings(plan))
    if True in kinds:
        parts.insert(0, "conversations are rendered with the chat template")
    return "; ".join(parts)


def _strings(plan: RunPlan) -> str:
    """What becomes of plain strings."""
    unused = _UNUSED_TEMPLATE if plan.tokenizer.chat_template and plan.config.text.render == "auto" else ""
    if "answer" in plan.renderer.bounds:
        apart = "prompts go to the encoder and answers to the decoder, each as the tokenizer ends a text"
        return apart + (f" ({unused})" if unused else "")
    return "strings are scored raw" + (f", as TRL does ({unused})" if unused else "")
