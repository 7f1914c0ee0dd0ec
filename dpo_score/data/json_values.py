"""The values of a JSON file one after the other: the items of one array, or objects printed over several lines.

Memory is that of one value, however long the file is, and a value may have MAX_VALUE characters.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

PIECE_BYTES = 1 << 20
MAX_VALUE = 128 << 20
_BETWEEN = re.compile(r"[ \t\r\n]*")
_OF_NUMBERS = "0123456789+-.eE"
"""Where one of these, or nothing yet, follows a number, more of it may be in what is not read yet."""


def json_values(handle: Any) -> Iterator[Any]:
    """Every value of a binary file that holds one array, or values that follow each other.

    Raises:
        UnicodeDecodeError: not UTF-8.
        ValueError: not JSON, or a value that is too long; says what is wrong, in which line and column.
        RecursionError: a value that is nested too deep to be decoded.
    """
    text, count = _Text(handle), 0
    in_array = text.next_character() == "["
    if in_array:
        text.at += 1
    while (begins := text.next_character()) and not (in_array and begins == "]"):
        if in_array and count:
            if begins != ",":
                raise text.error("Expecting ',' delimiter")
            text.at += 1
        yield text.value()
        count += 1
    if in_array:
        if begins != "]":
            raise text.error("Expecting ']'")
        text.at += 1
        if text.next_character():
            raise text.error("Extra data")


class _Text:
    """What of the file is in memory: its text from `at` on is not decoded yet."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._ended = "", False
        self._line, self._column = 1, 1  # where `_text` begins
        self.at = 0

    def next_character(self) -> str:
        """The first character that is no space, which `at` then points to; empty at the end of the file."""
        while True:
            self.at = _BETWEEN.match(self._text, self.at).end()  # type: ignore[union-attr]  # matches nothing, too
            if self.at < len(self._text):
                return self._text[self.at]
            if self._ended:
                return ""
            self._read()

    def value(self) -> Any:
        """The next value; more text follows it, or the end of the file."""
        self.next_character()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                if self._ended:
                    self.at = error.pos
                    raise self.error(error.msg) from None
            else:
                goes_on = isinstance(value, int | float) and self._text[end : end + 1] in _OF_NUMBERS
                if self._ended or not goes_on:
                    self.at = end
                    return value
            if len(self._text) - self.at > MAX_VALUE:
                raise self.error(f"a value of more than {MAX_VALUE:,} characters, or without an end")
            self._read()

    def error(self, what: str) -> ValueError:
        line, column = self._place()
        return ValueError(f"{what}: line {line} column {column}")

    def _place(self) -> tuple[int, int]:
        """Line and column of `at` in the file, from 1."""
        passed = self._text[: self.at]
        lines = passed.count("\n")
        return self._line + lines, self.at - passed.rfind("\n") if lines else self._column + self.at

    def _read(self) -> None:
        """At least as much again as is there, so that a long value is not decoded too often."""
        self._line, self._column = self._place()
        self._text, self.at = self._text[self.at :], 0
        data = self._handle.read(max(PIECE_BYTES, len(self._text)))
        self._ended = not data
        self._text += self._decoder.decode(data, final=self._ended)
