"""Which blocks are handed out next: contiguous runs, long at first and short at the end. Pure; knows no cluster."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from dpo_score.errors import StorageError

LONGEST_RUN = 32
"""Blocks handed out at once: a large row group is read once for them, and what is lost is asked for again soon."""
ATTEMPTS = 3


class BlockQueue:
    """Blocks of one stage that nobody works on yet, in order."""

    def __init__(self, todo: Sequence[int]) -> None:
        self._runs: deque[list[int]] = deque([list(todo)] if todo else [])
        self._losses: Counter[int] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def take(self, workers: int) -> tuple[int, ...]:
        """The next run for one of `workers`; empty when nothing is left."""
        if not self._runs:
            return ()
        size = max(1, min(LONGEST_RUN, len(self) // (2 * max(workers, 1))))
        first = self._runs[0]
        taken, rest = first[:size], first[size:]
        if rest:
            self._runs[0] = rest
        else:
            self._runs.popleft()
        return tuple(taken)

    def lost(self, blocks: Iterable[int]) -> None:
        """Blocks whose worker died, the one it was at first. StorageError when that happens to a block too often."""
        run = list(blocks)
        if not run:
            return
        self._losses[run[0]] += 1
        if self._losses[run[0]] >= ATTEMPTS:
            raise StorageError(
                f"block {run[0]} has cost {ATTEMPTS} workers their lives (out of memory is the usual cause: a smaller "
                "--batch-tokens in a new output folder needs less). The same command resumes"
            )
        self._runs.appendleft(run)
