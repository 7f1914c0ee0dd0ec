"""From a folder name or URL to the store that reads and writes there."""

from __future__ import annotations

from pathlib import Path

from dpo_score.storage.base import Store, WarningsTo, log
from dpo_score.storage.local import LocalStore


def open_store(where: str | Path, warnings_to: WarningsTo = log.warning) -> Store:
    """The store at a folder, or at an fsspec URL (s3://, gs://, memory://)."""
    text = str(where)
    if "://" in text and not text.startswith("file://"):
        from dpo_score.storage.object_store import RemoteStore  # fsspec, which a local run does not need

        return RemoteStore(text, warnings_to)
    return LocalStore(text.removeprefix("file://"), warnings_to)
