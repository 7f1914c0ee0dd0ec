"""What one process works with: the output folder, the cache, the loaded model, progress, the request to stop.

These have a lifetime; everything else in the engine is data. A context is complete when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dpo_score.config.schema import ComputeSpec, RunConfig
from dpo_score.engine.progress import Progress
from dpo_score.engine.signals import StopRequest, signal_handlers
from dpo_score.errors import ConfigError
from dpo_score.storage.base import Store
from dpo_score.storage.cache.cache import LogpCache, open_cache
from dpo_score.storage.cache.location import cache_folder, cache_url
from dpo_score.storage.file_hashes import FileDigests
from dpo_score.storage.manifest import read_manifest, reopen_manifest
from dpo_score.storage.open import open_store

if TYPE_CHECKING:
    from dpo_score.engine.plan import RunPlan, Task
    from dpo_score.models.loader import ModelLoader

ManifestLock = Callable[[], AbstractContextManager[None]]


class Workers(Protocol):
    """Other processes that compute blocks in place of this one."""

    def work(self, plan: RunPlan, task: Task, blocks: Sequence[int]) -> None:
        """Return when all `blocks` are committed. Raises what computing them here would raise."""


@dataclass(frozen=True)
class RunContext:
    """Shared by the stages of one process. The model loader is made on first use: a full cache needs no torch model.

    Args:
        cache_dir: what this machine keeps: converted models, file hashes, and the log-probs where `cache_url` is None.
        cache_url: the object store that log-probs are kept in.
        manifest_lock: taken while the manifest is changed; other shares of the same folder may change it too.
        workers: who computes the blocks; None: this process.
    """

    store: Store
    cache_dir: Path
    progress: Progress
    compute: ComputeSpec = field(default_factory=ComputeSpec)
    trust_remote_code: bool = False
    cache_url: str | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    manifest_lock: ManifestLock = nullcontext
    workers: Workers | None = None

    @cached_property
    def cache(self) -> LogpCache:
        return open_cache(self.cache_url or self.cache_dir, self.progress.warn)

    @cached_property
    def file_hashes(self) -> FileDigests:
        return FileDigests(self.cache_dir, self.stop.check)

    @cached_property
    def loader(self) -> ModelLoader:
        from dpo_score.models.loader import ModelLoader

        compute = self.compute
        return ModelLoader(self.trust_remote_code, compute.device_map, compute.quantization, compute.tensor_parallel)

    def reopen_manifest(self) -> None:
        """State `running` again, before anything that a complete manifest promises is computed anew."""
        found = read_manifest(self.store)
        if found is not None and found.state == "complete":
            with self.manifest_lock():
                reopen_manifest(self.store)

    def close(self) -> None:
        """Give the model's memory back, and end the processes that hold parts of it."""
        if "loader" in self.__dict__:
            self.loader.close()


def open_context(
    config: RunConfig,
    progress: Progress,
    store: Store,
    stop: StopRequest | None = None,
    manifest_lock: ManifestLock = nullcontext,
) -> RunContext:
    """What one process works with. Takes no lock."""
    return RunContext(
        store,
        cache_folder(config.cache_dir),
        progress,
        compute=config.compute,
        trust_remote_code=config.trust_remote_code,
        cache_url=cache_url(config.cache_dir),
        stop=stop or StopRequest(),
        manifest_lock=manifest_lock,
    )


@contextmanager
def run_context(config: RunConfig, progress: Progress, out: str, share: str | None = None) -> Iterator[RunContext]:
    """The folder `out`, or one share of it, locked and swept; signals are noticed; the model is released at the end."""
    if config.blocks is not None and share is None:
        raise ConfigError("--blocks divides `dpo-score run` alone: leave it out here")
    store = open_store(out, warnings_to=progress.warn)
    with store.share(share) if share else store.lock(), signal_handlers() as stop:
        store.sweep()
        lock = store.turn if share else nullcontext
        with closing(open_context(config, progress, store, stop, lock)) as context:
            yield context
