"""Blocks of rows as token ids: read, rendered and tokenised once, kept aside for the next model of the run.

Promises: a block is a pure function of the data and the text settings; what is kept aside lies under OUT/.work,
carries the text identity, and is made again where it is missing or stale. Holds one block at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from dpo_score.data.dataset import Dataset, PairReader, read_rows_at
from dpo_score.data.types import EncodedPair, Pair, Rejected, Source
from dpo_score.engine.context import RunContext
from dpo_score.engine.plan import RowBlocks, RunPlan
from dpo_score.errors import DamageError
from dpo_score.results.schemas import text_table
from dpo_score.tokenization.render import Renderer

TEXT_FOLDER = ".work/text"
_IDENTITY, _REJECTED = b"dpo_score.text", b"dpo_score.rejected"


@dataclass(frozen=True, slots=True)
class BlockText:
    """One block: `table` holds the pairs that can be scored (ids included), `rejected` the others, in order."""

    block: int
    start: int
    stop: int
    table: pa.Table
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True, slots=True)
class TextPlan:
    """What token ids of blocks depend on. `extra`: columns that are carried along."""

    datasets: tuple[Dataset, ...]
    rows: RowBlocks
    renderer: Renderer
    extra: tuple[pa.Field, ...]

    @classmethod
    def of(cls, plan: RunPlan) -> TextPlan:
        return cls(plan.datasets, plan.rows, plan.renderer, plan.extra)


def encoded_block(plan: TextPlan, reader: PairReader, block: int) -> BlockText:
    """The rows of one block, read, rendered and tokenised."""
    start, stop = plan.rows.span(block)
    sample = plan.rows.sample
    read = reader.read(start, stop) if sample is None else read_rows_at(plan.datasets, sample[start:stop])
    encoded = plan.renderer.encode([item for item in read if isinstance(item, Pair)])
    rejected = [item for item in [*read, *encoded] if isinstance(item, Rejected)]
    rejected.sort(key=lambda item: (item.source.file_index, item.source.row, item.source.part or 0))
    pairs = [item for item in encoded if isinstance(item, EncodedPair)]
    return BlockText(block, start, stop, text_table(pairs, plan.extra), tuple(rejected))


class BlockTexts:
    """Texts of one run's blocks. Not for two threads at once: the tokenizer and the reader have state."""

    def __init__(self, context: RunContext, plan: RunPlan, identity: str, keep: bool = True) -> None:
        """`keep`: somebody will ask for these blocks again."""
        self._context, self._plan, self._identity, self._keeps = context, TextPlan.of(plan), identity, keep
        self._reader = PairReader(plan.datasets)

    def missing(self, blocks: Sequence[int]) -> list[int]:
        """Those of `blocks` that are not kept aside."""
        return [block for block in blocks if not self._context.store.exists(self._name(block))]

    def each(self, blocks: Sequence[int], made: Iterable[BlockText] = ()) -> Iterator[BlockText]:
        """The texts of `blocks`, in order. `made`: some of them, in the same order, that others make."""
        others = iter(made)
        theirs = next(others, None)
        for block in blocks:
            if theirs is not None and theirs.block == block:
                yield self._new(theirs)
                theirs = next(others, None)
            else:
                yield self.block(block)

    def block(self, block: int) -> BlockText:
        kept = self._kept(block)
        return kept if kept is not None else self._new(encoded_block(self._plan, self._reader, block))

    def _new(self, made: BlockText) -> BlockText:
        if self._keeps:
            self._keep(made)
        return made

    def _name(self, block: int) -> str:
        return f"{TEXT_FOLDER}/{block:05d}-of-{self._plan.rows.blocks:05d}.parquet"

    def _kept(self, block: int) -> BlockText | None:
        name, span = self._name(block), self._plan.rows.span(block)
        if not self._context.store.exists(name):
            return None
        try:
            table = self._context.store.read_table(name)
        except DamageError:
            return None
        metadata = table.schema.metadata or {}
        if metadata.get(_IDENTITY, b"").decode() != self._stamp(span):
            return None
        rejected = tuple(_rejected(item) for item in json.loads(metadata[_REJECTED]))
        return BlockText(block, *span, table.replace_schema_metadata(None), rejected)

    def _keep(self, made: BlockText) -> None:
        metadata = {
            _IDENTITY.decode(): self._stamp((made.start, made.stop)),
            _REJECTED.decode(): json.dumps([asdict(item) for item in made.rejected]),
        }
        self._context.store.write_table(self._name(made.block), made.table, metadata)

    def _stamp(self, span: tuple[int, int]) -> str:
        return f"{self._identity}:{span[0]}:{span[1]}"


def _rejected(item: dict[str, object]) -> Rejected:
    source = item.pop("source")
    return Rejected(source=Source(**source), **item)  # type: ignore[arg-type]
