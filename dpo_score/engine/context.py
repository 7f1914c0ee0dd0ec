"""What one process works with: OUT, the cache, the loaded model, the voice, the stop request.

These have a lifetime; everything else in this room is data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from dpo_score.config.schema import RunConfig
from dpo_score.engine.progress import Progress
from dpo_score.engine.signals import StopRequest
from dpo_score.storage.base import Store
from dpo_score.storage.cache.cache import LogpCache, open_cache
from dpo_score.storage.cache.location import cache_folder, cache_url
from dpo_score.storage.file_hashes import FileDigests
from dpo_score.storage.manifest import read_manifest, reopen_manifest

if TYPE_CHECKING:
    from dpo_score.engine.plan import PolicyTask, ReferenceTask, RunPlan
    from dpo_score.models.loader import ModelLoader
    from dpo_score.storage.commits import CommitRecord


class WorkerPool(Protocol):
    """Other processes that compute blocks. `work` returns when all of `todo` is committed, or raises as a stage does
    that runs here."""

    def work(self, plan: RunPlan, task: ReferenceTask | PolicyTask, todo: Sequence[int]) -> None: ...


def _unnoticed(_record: CommitRecord) -> None:
    """Nobody asked to hear of commits."""


@dataclass
class RunContext:
    """Shared by the stages of one process. The model shelf is made on first use: a full cache needs no torch model.

    `cache_url`: where log-probs are kept when that is an object store; what only this machine needs is in `cache_dir`.
    `device`: as asked for. `crew`: who computes blocks in this process's stead. `committed` hears of every block
    committed here.
    `skipped`: policy → why it is left for the next run; only checkpoints that a glob found can be.
    `turn`: held while the manifest is changed where other shares of OUT may change it too.
    """

    store: Store
    cache_dir: Path
    progress: Progress
    stop: StopRequest = field(default_factory=StopRequest)
    trust_remote_code: bool = False
    device: str = "auto"
    device_map: str | None = None
    quantization: Literal["int8", "nf4"] | None = None
    tensor_parallel: int = 1
    cache_url: str | None = None
    pool: WorkerPool | None = None
    committed: Callable[[CommitRecord], None] = _unnoticed
    skipped: dict[str, str] = field(default_factory=dict)
    turn: Callable[[], AbstractContextManager[None]] = nullcontext

    @cached_property
    def cache(self) -> LogpCache:
        return open_cache(self.cache_url or self.cache_dir, self.progress.warn)

    @cached_property
    def digests(self) -> FileDigests:
        return FileDigests(self.cache_dir, lambda: self.stop.check())

    @cached_property
    def shelf(self) -> ModelLoader:
        from dpo_score.models.loader import ModelLoader

        return ModelLoader(self.trust_remote_code, self.device_map, self.quantization, self.tensor_parallel)

    def reopen(self) -> None:
        """State `running` again, before anything that a complete manifest vouches for is computed anew."""
        found = read_manifest(self.store)
        if found is not None and found.state == "complete":
            with self.turn():
                reopen_manifest(self.store)

    def close(self) -> None:
        """Let the model go, and the processes that held it with this one."""
        if "shelf" in self.__dict__:
            self.shelf.close()


def open_context(config: RunConfig, progress: Progress, store: Store) -> RunContext:
    """What one process works with; takes no lock."""
    return RunContext(
        store,
        cache_folder(config.cache_dir),
        progress,
        trust_remote_code=config.trust_remote_code,
        device=config.compute.device,
        device_map=config.compute.device_map,
        quantization=config.compute.quantization,
        tensor_parallel=config.compute.tensor_parallel,
        cache_url=cache_url(config.cache_dir),
    )
