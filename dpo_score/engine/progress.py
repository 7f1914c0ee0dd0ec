"""What a person sees while a run works: bars on a terminal, a plain line every 30 s elsewhere.

Promises: everything goes to standard error, untrusted text is escaped, and a quiet run says only warnings.
Nothing here changes a number or a file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from dpo_score.escape import safe

PLAIN_SECONDS = 30.0


class Progress:
    """The voice of one run. `rows` and `tokens` are added to the stage that is open; without one nothing is shown."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        self._label, self._total, self._tokens = "", 0, 0
        self._rows = self._begun = self._within = 0.0
        self._rows_a_token = 0.0
        self._started = self._said = 0.0
        self.warnings: list[str] = []

    def say(self, line: str) -> None:
        if not self._quiet:
            self._print(line)

    def warn(self, line: str, example: str = "") -> None:
        """Said once each, also by a quiet run, and kept for the summary; `example`, a text of the data, is not kept."""
        if line not in self.warnings:
            self.warnings.append(line)
            self._print(f"warning: {line}{example}")

    @contextmanager
    def stage(self, label: str, rows: int, done: int = 0) -> Iterator[None]:
        """A bar over `rows`, of which `done` were committed before."""
        self._label, self._total, self._tokens = label, rows, 0
        self._rows, self._begun, self._within = float(done), float(done), 0.0
        self._started = self._said = time.monotonic()
        on_terminal = self._stream.isatty() and not self._quiet
        if on_terminal:
            self._bar = tqdm(total=rows, initial=done, desc=safe(label, 40), unit="row", file=self._stream)
        try:
            yield
        finally:
            self._close()

    def block(self, rows: int, tokens: int) -> None:
        """A block begins: its tokens stand for its rows until it is done."""
        self._rows_a_token, self._within = rows / max(tokens, 1), 0.0

    def rows(self, count: int) -> None:
        """A block is done."""
        self._rows, self._within = self._rows + count, 0.0
        self._show()

    def tokens(self, count: int) -> None:
        """Unique tokens computed: a prompt once, each response once."""
        self._tokens += count
        self._within += count * self._rows_a_token
        self._show()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._rate():,.0f} tok/s", refresh=False)
            self._bar.update(round(self._rows + self._within) - self._bar.n)
        elif self._label and time.monotonic() - self._said > PLAIN_SECONDS:
            self._plain_line()

    def _rate(self) -> float:
        return self._tokens / max(time.monotonic() - self._started, 1e-9)

    def _plain_line(self) -> None:
        self._said = time.monotonic()
        rows = self._rows + self._within
        pace = (rows - self._begun) / max(self._said - self._started, 1e-9)
        left = f", about {(self._total - rows) / pace:,.0f} s left" if pace > 0 else ""
        self.say(f"{safe(self._label)}: {rows:,.0f}/{self._total:,} rows, {self._rate():,.0f} tok/s{left}")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._tokens:
            self.say(f"{safe(self._label)}: {self._rows:,.0f} rows, {self._rate():,.0f} tok/s")
        self._label = ""

    def _print(self, line: str) -> None:
        text = safe(line, keep_newlines=True)
        if self._bar is not None:
            tqdm.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)
