"""`dpo-score cache`: what is kept, whether it is sound, and what may go."""

from __future__ import annotations

from typing import Any

from dpo_score.errors import ConfigError, DamageError
from dpo_score.results.run_folder import Reading, unseen
from dpo_score.storage.cache.cache import open_cache
from dpo_score.storage.cache.location import cache_folder, cache_url

DAY = 86_400.0


def ls(cache_dir: str | None) -> list[dict[str, Any]]:
    """A line per model and numerics, largest first."""
    rows = [_line(item) for item in open_cache(cache_url(cache_dir) or cache_folder(cache_dir)).ls()]
    return sorted(rows, key=lambda row: -int(row["bytes"]))


def _line(item: dict[str, Any]) -> dict[str, Any]:
    fields = item.pop("fields")
    numerics = " ".join(str(fields.get(name, "?")) for name in ("dtype", "path", "kernel", "device_kind"))
    return {**item, "weights": str(fields.get("weights", "?"))[:12], "numerics": numerics}


def verify(cache_dir: str | None, reading: Reading = unseen) -> str:
    """One sentence. DamageError (exit 4) naming every damaged file."""
    cache = open_cache(cache_url(cache_dir) or cache_folder(cache_dir))
    with reading("reading the cache", cache.file_count(), "files") as read:
        damage = cache.verify(read)
    if damage:
        raise DamageError("\n".join((*damage, "The next run sets damaged files aside and computes their values again")))
    return f"{sum(row['entries'] for row in cache.ls()):,} entries, nothing damaged"


def gc(cache_dir: str | None, max_age_days: float | None, max_bytes: int | None) -> str:
    """Remove by age and by size; with neither, nothing is removed and the way to say so is named."""
    if max_age_days is None and max_bytes is None:
        raise ConfigError("cache gc removes nothing unasked: add --max-age-days N, --max-bytes N, or both")
    for option, value in (("--max-age-days", max_age_days), ("--max-bytes", max_bytes)):
        if value is not None and not value >= 0:  # nan is no number of days either
            raise ConfigError(f"cache gc {option} {value}: give a number from 0 on; 0 removes all that is kept")
    seconds = None if max_age_days is None else max_age_days * DAY
    removed = open_cache(cache_url(cache_dir) or cache_folder(cache_dir)).gc(max_age=seconds, max_bytes=max_bytes)
    return f"removed {removed.files:,} files, {removed.bytes:,} bytes"
