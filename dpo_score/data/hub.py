"""`--data org/name[:config]`: a data set of the Hugging Face hub, as local files of one commit.

Everything goes through huggingface_hub, so its cache and HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT hold.
Promises: the commit is resolved first and every file is of it; only files that are read are fetched; without a
connection the cache answers, or the refusal says so; whatever goes wrong is one paragraph with the way out.
Does not: run loading scripts. A set without Parquet or JSON is read from the hub's own Parquet copy of it.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import errors

from dpo_score.config.schema import DataSpec
from dpo_score.data.hub_errors import explained, hub_failures, not_cached, page_of
from dpo_score.data.layout import (
    CONVERTED,
    Entry,
    Listing,
    Located,
    Selection,
    card_head,
    hub_name,
    is_commit,
    wanted,
)
from dpo_score.errors import DataError

_CARD = "README.md"
_SHA256 = re.compile(r"[0-9a-f]{64}")
Found = TypeVar("Found")


def fetch(spec: DataSpec) -> tuple[list[Located], Mapping[str, str]]:
    """The files of a hub data set, in the hub's cache, and the names left out with the reason. Raises DataError."""
    unreachable = None
    for revision in _revisions(spec):
        try:
            listing = _listing(spec, revision)
        except _Unreachable as error:
            unreachable = error
            continue
        chosen = wanted(listing, spec, hub_name(spec.path)[1])
        if chosen.entries:
            return _downloaded(spec, revision, listing, chosen), chosen.skipped
    if unreachable is not None:
        raise DataError(f"data set {spec.name!r}: {not_cached(spec.path, 'data set', spec.revision)}") from unreachable
    raise DataError(
        f"data set {spec.name!r}: {spec.path} holds neither Parquet nor JSON, and the hub keeps no Parquet copy of it"
        f"{_at(spec)}. Look at {page_of(spec.path, 'data set')}/tree/main, convert it and give the folder"
    )


def _revisions(spec: DataSpec) -> tuple[str, ...]:
    """What is looked at: the hub's Parquet copy too, which belongs to the newest commit, unless a revision is given."""
    return (spec.revision,) if spec.revision else ("main", CONVERTED)


def _listing(spec: DataSpec, revision: str) -> Listing:
    """What the repository holds; from the cache where the hub cannot be reached. Raises _Unreachable, DataError."""
    try:
        return _asked(lambda: _remote(huggingface_hub.HfApi(), spec, revision), spec, revision)
    except _Unreachable:
        with suppress(OSError, ValueError, errors.EntryNotFoundError):
            return _cached(spec, revision)
        raise


def _remote(api: Any, spec: DataSpec, revision: str) -> Listing:
    from huggingface_hub.hf_api import RepoFile  # which loads every part of the library

    repository = hub_name(spec.path)[0]
    try:
        commit = api.repo_info(repository, repo_type="dataset", revision=revision).sha
    except errors.RevisionNotFoundError:
        if revision == CONVERTED:
            return Listing("", (), {})
        raise
    tree = api.list_repo_tree(repository, repo_type="dataset", revision=commit, recursive=True)
    entries = tuple(_entry(item) for item in tree if isinstance(item, RepoFile))
    card: Mapping[str, Any] = {}
    if any(entry.name == _CARD for entry in entries):
        card = _card(Path(huggingface_hub.hf_hub_download(repository, _CARD, repo_type="dataset", revision=commit)))
    return Listing(commit, entries, card)


def _entry(item: Any) -> Entry:
    return Entry(item.path, item.size, item.lfs.sha256 if item.lfs is not None else None)


def _cached(spec: DataSpec, revision: str) -> Listing:
    """What an earlier run fetched. Raises OSError when it fetched nothing."""

    repository = hub_name(spec.path)[0]
    folder = Path(
        huggingface_hub.snapshot_download(
            repository, repo_type="dataset", revision=revision, local_files_only=True, allow_patterns=[_CARD]
        )
    )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = (Entry(p.relative_to(folder).as_posix(), p.stat().st_size, _stored_sha256(p)) for p in files)
    return Listing(folder.name, tuple(entries), _card(folder / _CARD), whole=False)


def _stored_sha256(path: Path) -> str | None:
    """The hub's cache names the blobs of large files by their sha256."""
    blob = path.resolve().name
    return blob if _SHA256.fullmatch(blob) else None


def _card(path: Path) -> Mapping[str, Any]:
    """The YAML head of a card; a card that cannot be read says nothing."""
    try:
        return card_head(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def _downloaded(spec: DataSpec, revision: str, listing: Listing, chosen: Selection) -> list[Located]:
    names = [glob.escape(entry.name) for entry in chosen.entries]

    def snapshot(at: str) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                hub_name(spec.path)[0],
                repo_type="dataset",
                revision=at,
                allow_patterns=[*names, _CARD],
                tqdm_class=None,
            )
        )

    try:
        folder = _asked(lambda: snapshot(revision), spec, revision)
        if folder.name != listing.commit:  # the branch moved between the two requests
            folder = _asked(lambda: snapshot(listing.commit), spec, revision)
    except _Unreachable as unreachable:
        raise DataError(f"data set {spec.name!r}: {not_cached(spec.path, 'data set', spec.revision)}") from unreachable
    return [Located(str(folder / e.name), e.name, e.size, e.sha256, listing.commit) for e in chosen.entries]


# --- what goes wrong --------------------------------------------------------------------------------------------


class _Unreachable(Exception):
    """No answer from the hub: no network, or HF_HUB_OFFLINE."""


def _asked(request: Callable[[], Found], spec: DataSpec, revision: str) -> Found:
    """The hub's answer. Raises _Unreachable without one, DataError for a refusal."""
    try:
        return request()
    except hub_failures() as error:
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        if not isinstance(cause, (errors.HfHubHTTPError, ValueError)):
            raise _Unreachable(str(error)) from error
        raise DataError(f"data set {spec.name!r}: {explained(cause, spec.path, 'data set', revision)}") from error


def _at(spec: DataSpec) -> str:
    if spec.revision is None:
        return ""
    return f" at {'commit' if is_commit(spec.revision) else 'revision'} {spec.revision}"
