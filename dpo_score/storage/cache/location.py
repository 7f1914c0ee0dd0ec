"""Where the cache of log-probs is: a folder of this machine, or an object store with a folder beside it.

In: what --cache-dir or `cache_dir:` asks for. Out: the folder and, where one is named, the URL.
"""

from __future__ import annotations

import os
from pathlib import Path

from dpo_score.config.load import default_cache_dir


def cache_folder(asked: str | None) -> Path:
    """The folder asked for; the user's own where a URL was asked for, or nothing."""
    return Path(asked).expanduser() if asked and cache_url(asked) is None else default_cache_dir()


def cache_url(asked: str | None) -> str | None:
    """The fsspec URL that log-probs are kept under, if it is one."""
    named = asked or os.environ.get("DPO_SCORE_CACHE_DIR")
    return named if named and "://" in named else None
