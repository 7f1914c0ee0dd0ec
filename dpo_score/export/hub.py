"""`dpo-score push OUT`: a finished folder to a data-set repository of the Hugging Face hub.

Promises: nothing is sent without a yes; only a complete folder whose every file matches its record is sent, as one
commit by huggingface_hub's own upload, which skips what the repository has already. The repository is made private
unless said otherwise. What is sent names neither this host nor folders of this machine (public.py), and `verify`
passes on it. `exclude` leaves files out. Needs HF_TOKEN or a log-in with the right to write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dpo_score.errors import ConfigError, DpoScoreError, UsageError
from dpo_score.export.public import public_files
from dpo_score.results.run_folder import open_out
from dpo_score.results.verify.verify import verify

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_SHOWN = 20
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True)
class Upload:
    """What would be sent: file → bytes. `rewritten`: the content of files that are not sent as they lie in OUT."""

    out: str
    repository: str
    files: Mapping[str, int]
    rewritten: Mapping[str, bytes] = field(default_factory=dict)
    private: bool = True
    revision: str | None = None

    @property
    def size(self) -> int:
        return sum(self.files.values())

    def content(self, name: str) -> bytes | Path:
        """What is sent under a name."""
        return self.rewritten.get(name, Path(self.out) / name)

    def to_json(self) -> dict[str, Any]:
        found = {"repository": self.repository, "private": self.private, "bytes": self.size, "files": dict(self.files)}
        return {**found, "rewritten": sorted(self.rewritten)}

    def lines(self) -> Iterator[str]:
        """What a person reads before saying yes."""
        kind = "private" if self.private else "public"
        branch = f", branch {self.revision}" if self.revision else ""
        yield f"{len(self.files)} files, {amount(self.size)}, to {self.repository} ({kind} if it is made now{branch}):"
        shown = list(self.files.items())[:_SHOWN]
        yield from (f"  {name:<60} {amount(size):>10}" for name, size in shown)
        if len(self.files) > _SHOWN:
            yield f"  and {len(self.files) - _SHOWN} more"
        if self.rewritten:
            yield f"sent without this host's name and folders: {', '.join(sorted(self.rewritten))}"


def plan(
    out: str, repository: str, *, exclude: Sequence[str] = (), public: bool = False, revision: str | None = None
) -> Upload:
    """What a push would send. Raises UsageError for a folder that is not complete, DamageError for a damaged one."""
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"--to {repository!r} is no repository of the hub: write OWNER/NAME")
    if not Path(out).is_dir():
        raise UsageError(f"{out} is no folder on this machine: copy it here first, then push it")
    store, manifest = open_out(out)
    if manifest.state != "complete":
        raise UsageError(
            f"{out} is not complete: the same run command finishes it (`dpo-score status {out}` says more)"
        )
    verify(out).raise_damage()
    names = store.list()
    kept = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in exclude)]
    sizes = {name: stat.size for name in kept if (stat := store.stat(name)) is not None}
    if not sizes:
        raise ConfigError(f"--exclude leaves nothing of {out} to push")
    rewritten = {name: data for name, data in public_files(store, manifest).items() if name in sizes}
    sizes |= {name: len(data) for name, data in rewritten.items()}
    return Upload(out, repository, sizes, rewritten, not public, revision)


def push(upload: Upload) -> str:
    """Send it; returns the address of the commit. Raises DpoScoreError in one paragraph."""
    from huggingface_hub import HfApi, errors

    # The HTTP library differs between versions of huggingface_hub; its root error is what theirs derives from.
    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        return _sent(HfApi(), upload)
    except (http_error, OSError, ValueError) as error:
        raise _explained(error, upload.repository) from error


def _sent(api: Any, upload: Upload) -> str:
    from huggingface_hub import CommitOperationAdd

    api.create_repo(upload.repository, repo_type="dataset", private=upload.private, exist_ok=True)
    found = api.create_commit(
        repo_id=upload.repository,
        repo_type="dataset",
        operations=[CommitOperationAdd(name, upload.content(name)) for name in upload.files],
        revision=upload.revision,
        commit_message=f"Preference scores: {len(upload.files)} files",
    )
    return str(found.commit_url)


def _explained(error: Exception, repository: str) -> DpoScoreError:
    from huggingface_hub import constants, errors

    page, login = f"{constants.ENDPOINT}/datasets/{repository}", "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.LocalTokenNotFoundError)):
        return UsageError(f"{repository} cannot be written to: {login}, with a token that may write to {page}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UsageError(f"nothing was sent to {repository}: HF_HUB_OFFLINE is set")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return UsageError(f"the hub answered {status} for {page}: {login}, with a token that may write there")
        return DpoScoreError(f"the hub answered {status} for {page}: nothing was committed; try again later")
    said = " ".join(str(error).split())[:300]
    return DpoScoreError(f"{repository} could not be reached, nothing was committed: {said or type(error).__name__}")


def amount(size: int) -> str:
    """A size for people: 12.3 MB."""
    value, unit = float(size), 0
    while value >= 1000.0 and unit < len(_UNITS) - 1:
        value, unit = value / 1000.0, unit + 1
    return f"{size} bytes" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"
