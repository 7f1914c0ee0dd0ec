"""What a person sees while a run works: a bar for each stage on a terminal, a plain line every 30 s elsewhere.

Everything goes to standard error, text of the data is escaped, and a quiet run shows warnings alone. Nothing here
changes a number or a file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from dpo_score.escape import safe

PLAIN_SECONDS = 30.0
"""Between two lines where standard error is no terminal."""
SHORT_SECONDS = 2.0
"""A command that reads for less shows no bar."""


class Progress:
    """Progress of one run. Rows and tokens are added to the stage that is open; without one nothing is shown.

    Speed is in unique tokens of the rows that pass, computed or taken from the cache; the share of the latter is shown.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        self._stages, self._stage = 0, 0
        self._label, self._total = "", 0
        self._tokens = self._cached = 0
        self._rows = self._begun = self._within = 0.0
        self._block_rows = self._block_tokens = self._computed = 0
        self._started = self._said = 0.0
        self.warnings: list[str] = []

    def say(self, line: str) -> None:
        if not self._quiet:
            self._print(line)

    def warn(self, line: str, example: str = "") -> None:
        """Shown once each, also by a quiet run, and kept for the manifest; `example`, a text of the data, is not."""
        if line not in self.warnings:
            self.warnings.append(line)
            self._print(f"warning: {line}{example}")

    @contextmanager
    def run(self, stages: int) -> Iterator[None]:
        """A run of so many stages: each is shown with its place among all, and the time left is that of all."""
        self._stages, self._stage = stages, 0
        try:
            yield
        finally:
            self._stages = self._stage = 0

    def nothing_to_do(self, label: str) -> None:
        """A stage whose blocks were all committed before."""
        self._stage += 1

    @contextmanager
    def stage(self, label: str, rows: int, done: int = 0) -> Iterator[None]:
        """A bar over `rows`, of which `done` were committed before."""
        self._stage += 1
        of_all = f"{min(self._stage, self._stages)} of {self._stages}: " if self._stages > 1 else ""
        self._label, self._total = f"{of_all}{safe(label, 40)}", rows
        self._tokens = self._cached = 0
        self._rows, self._begun, self._within = float(done), float(done), 0.0
        self._started = self._said = time.monotonic()
        if self._stream.isatty() and not self._quiet:
            layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows, {postfix}"
            self._bar = tqdm(
                total=rows, initial=done, desc=self._label, file=self._stream, bar_format=layout, dynamic_ncols=True
            )
            self._bar.set_postfix_str("starting")
        try:
            yield
        finally:
            self._close()

    @contextmanager
    def reading(self, label: str, rows: int, unit: str = "rows") -> Iterator[Callable[[int], None]]:
        """A command that reads `rows` rows or files and computes no token; the result takes how many were read more."""
        on_terminal = self._stream.isatty() and not self._quiet
        bar = tqdm(
            total=rows,
            desc=safe(label, 40),
            unit=f" {unit}",
            file=self._stream,
            delay=SHORT_SECONDS,
            leave=False,
            disable=not on_terminal,
        )
        begun = said = time.monotonic()
        done = 0

        def read(more: int) -> None:
            nonlocal done, said
            done += more
            bar.update(more)
            now = time.monotonic()
            if not on_terminal and now - said > PLAIN_SECONDS:
                said = now
                left = (now - begun) * (rows - done) / max(done, 1)
                self.say(f"{label}: {done:,}/{rows:,} {unit}, about {clock(max(left, 0.0))} left")

        try:
            yield read
        finally:
            bar.close()

    def block(self, rows: int, tokens: int) -> None:
        """A block begins: `tokens` are the unique tokens of its rows."""
        self._block_rows, self._block_tokens, self._computed, self._within = rows, tokens, 0, 0.0

    def tokens(self, computed: int) -> None:
        """Unique tokens of the open block were computed: a prompt once, each response once."""
        computed = min(computed, self._block_tokens - self._computed) if self._block_tokens else computed
        self._computed += computed
        self._within = self._block_rows * self._computed / max(self._block_tokens, 1)
        self.count(computed)

    def rows(self, count: int) -> None:
        """A block is done. What was not computed of it came from the cache."""
        cached = self._block_tokens - self._computed
        self._rows, self._within = self._rows + count, 0.0
        self._block_tokens = self._computed = 0
        self.count(cached, cached)

    def count(self, tokens: int, cached: int = 0) -> None:
        """Tokens of rows that passed, `cached` of them with values from the cache."""
        self._tokens += tokens
        self._cached += cached
        self._show()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join([self._speed(), *self._time_left()]), refresh=False)
            self._bar.update(round(self._rows + self._within) - self._bar.n)
        elif self._label and time.monotonic() - self._said > PLAIN_SECONDS:
            self._said = time.monotonic()
            parts = [f"{self._rows + self._within:,.0f}/{self._total:,} rows", self._speed(), *self._time_left()]
            self.say(f"{self._label}: {', '.join(parts)}")

    def _speed(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        speed = f"{self._tokens / seconds:,.0f} tok/s"
        share = self._cached / self._tokens if self._tokens else 0.0
        return f"{speed} ({share:.0%} from the cache)" if share >= 0.005 else speed

    def _time_left(self) -> list[str]:
        """The time left, of this stage and of those that come after it at the same pace; nothing before any row."""
        rows = self._rows + self._within - self._begun
        if rows <= 0:
            return []
        pace = (time.monotonic() - self._started) / rows
        stage = (self._total - self._rows - self._within) * pace
        later = max(self._stages - self._stage, 0) * self._total * pace
        whole = f", {clock(stage + later)} for the whole run" if later else ""
        return [f"about {clock(stage)} left{whole}"]

    def _close(self) -> None:
        rows, computed = self._rows, self._tokens
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif computed:
            self.say(f"{self._label}: {rows:,.0f} rows, {self._speed()}")
        self._label = ""

    def _print(self, line: str) -> None:
        text = safe(line, keep_newlines=True)
        if self._bar is not None:
            tqdm.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)


def clock(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
