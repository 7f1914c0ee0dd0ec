"""`dpo-score run --watch SECONDS`: score checkpoints while training writes them.

    look at the globs → run what is new and whole → wait → look again …

In: how the configuration is made, since each look at the globs may find more policies. Out: the outcome of the last
run; summary and report are written anew by each. A checkpoint that is half written waits until its files change. The
folder is locked while a run works and free while this waits.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from dpo_score.config.schema import PolicySpec, RunConfig
from dpo_score.engine.executors import choose
from dpo_score.engine.finish import Outcome
from dpo_score.engine.progress import Progress
from dpo_score.engine.signals import signal_handlers
from dpo_score.errors import ConfigError

POLL_SECONDS = 0.2
Files = tuple[tuple[str, int, int], ...]
"""(path, size, time of change in ns) of every file of a checkpoint."""


def watch(
    configured: Callable[[], RunConfig],
    progress: Progress,
    seconds: float,
    until: int | None = None,
    finished: Callable[[Outcome], object] = lambda outcome: None,
) -> Outcome | None:
    """Run again whenever a glob finds a checkpoint that is not scored and has changed since the last look.

    Args:
        configured: makes the configuration anew, with the checkpoints that are there now.
        seconds: between two looks.
        until: end when a checkpoint of this step, or a later one, is scored.
        finished: called with the outcome of each run.

    Returns the last outcome; None where a signal came before the first. Raises what a run raises; a signal ends it
    between two runs, and interrupts a run as always.
    """
    if seconds <= 0:
        raise ConfigError(f"--watch {seconds:g}: a number of seconds above 0 between two looks")
    seen: dict[str, Files] = {}
    outcome: Outcome | None = None
    while True:
        config = _config_of(configured, progress, found_before=outcome is not None)
        if config is not None:
            _refuse_unwatchable(config)
            now = {policy.name: _files(policy) for policy in config.policies}
            scored = outcome.summary["policies"] if outcome is not None else {}
            if any(files != seen.get(name) for name, files in now.items() if name not in scored):
                seen = now
                outcome = choose.run(config, progress)
                finished(outcome)
                steps = (re.search(r"(\d+)$", name) for name in outcome.summary["policies"])
                if until is not None and any(int(step[1]) >= until for step in steps if step is not None):
                    return outcome
                waits = f"for step {until}" if until is not None else "for more checkpoints"
                progress.say(f"waiting {waits}: a look every {seconds:g} s, Ctrl-C ends")
        if not _slept(seconds):
            return outcome


def _config_of(configured: Callable[[], RunConfig], progress: Progress, found_before: bool) -> RunConfig | None:
    """The configuration; None while no checkpoint is there yet, which is no mistake here."""
    try:
        return configured()
    except ConfigError as error:
        if "matches" not in str(error) or found_before:
            raise
        progress.warn(f"waiting for the first checkpoint: {error}")
        return None


def _refuse_unwatchable(config: RunConfig) -> None:
    if config.blocks is not None:
        raise ConfigError("--watch and --blocks do not go together: watch with one process, or divide one run")
    if all(policy.glob is None for policy in config.policies):
        raise ConfigError("--watch looks for new checkpoints: name them by a glob, --policy 'dpo=runs/checkpoint-*'")


def _files(policy: PolicySpec) -> Files:
    place = Path(policy.adapter or policy.model or "")
    paths = sorted(place.rglob("*")) if place.is_dir() else [place]
    found = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:  # a trainer renames and deletes while it writes
            continue
        found.append((str(path), stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def _slept(seconds: float) -> bool:
    """Whether the time passed without a signal."""
    end = time.monotonic() + seconds
    with signal_handlers() as stop:
        while time.monotonic() < end:
            if stop():
                return False
            time.sleep(min(POLL_SECONDS, seconds))
    return True
