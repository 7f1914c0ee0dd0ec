"""Which blocks a namespace of the cache holds, by content: asked for every block that is added.

Made from one listing and kept up to date by its owner, so that adding a block lists nothing however many files there
are. What other processes add meanwhile is not seen. About 40 bytes a file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ENDING = ".parquet"


def content_digest_of(name: str) -> str:
    """The digest in the name of a value file."""
    return name.removesuffix(_ENDING).rpartition("-")[2]


def file_name(hint: str, content: str) -> str:
    """The name of the value file that holds a block."""
    return f"{hint}-{content}{_ENDING}"


class Contents:
    """Digest → name, of the files listed (`names`) and of those added since."""

    def __init__(self, names: Sequence[str]) -> None:
        listed = np.array([content_digest_of(name).encode() for name in names], "S32")
        beginnings: dict[str, int] = {}  # few: what blocks are called
        numbers = [beginnings.setdefault(name[: -len(_ENDING) - 32], len(beginnings)) for name in names]
        order = np.argsort(listed)
        self._listed, self._numbers = listed[order], np.array(numbers, np.int32)[order]
        self._beginnings, self._added = list(beginnings), dict[str, str]()

    def find(self, content: str) -> str | None:
        """The name of the file that holds a block, None for a new block."""
        if content in self._added:
            return self._added[content]
        place = int(np.searchsorted(self._listed, content.encode()))
        if place == len(self._listed) or self._listed[place] != content.encode():
            return None
        return f"{self._beginnings[self._numbers[place]]}{content}{_ENDING}"

    def add(self, content: str, name: str) -> None:
        self._added[content] = name
