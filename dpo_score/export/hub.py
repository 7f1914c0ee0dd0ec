"""`dpo-score push OUT`: a finished folder to a data-set repository of the Hugging Face hub.

Nothing is sent without a yes. Only a complete folder whose every file matches its record is sent, as one commit by
huggingface_hub's own upload, which skips what the repository has already. The repository is made private unless said
otherwise. Needs HF_TOKEN or a log-in with the right to write.

What is sent names neither this host nor folders of this machine, and `verify` passes on it: manifest.json and its twin
name the host and the models' paths, pipeline.yaml the data's, report.html the models'; in what is sent a path is its
last part, OUT and the cache are left out, and the manifest's seal and checksums hold. Texts of the data, and files that
somebody else put into the folder, are not looked into.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import huggingface_hub
import yaml
from huggingface_hub import errors
from markupsafe import escape

from dpo_score.config.load import default_cache_dir
from dpo_score.data.hub_errors import LOGIN, hub_failures, page_of
from dpo_score.errors import ConfigError, DpoScoreError, UsageError
from dpo_score.escape import safe
from dpo_score.results.run_folder import open_out
from dpo_score.results.verify.verify import verify
from dpo_score.storage.base import FileRecord, Store, json_bytes
from dpo_score.storage.commits import sealed, unsealed
from dpo_score.storage.manifest import MANIFEST, MANIFEST_COPY, Manifest

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
    try:
        return _sent(huggingface_hub.HfApi(), upload)
    except hub_failures() as error:
        raise _explained(error, upload.repository) from error


def _sent(api: Any, upload: Upload) -> str:
    api.create_repo(upload.repository, repo_type="dataset", private=upload.private, exist_ok=True)
    found = api.create_commit(
        repo_id=upload.repository,
        repo_type="dataset",
        operations=[huggingface_hub.CommitOperationAdd(name, upload.content(name)) for name in upload.files],
        revision=upload.revision,
        commit_message=f"Preference scores: {len(upload.files)} files",
    )
    return str(found.commit_url)


def _explained(error: Exception, repository: str) -> DpoScoreError:
    page = page_of(repository, "data set")
    if isinstance(error, (errors.RepositoryNotFoundError, errors.LocalTokenNotFoundError)):
        return UsageError(f"{repository} cannot be written to: {LOGIN}, with a token that may write to {page}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UsageError(f"nothing was sent to {repository}: HF_HUB_OFFLINE is set")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return UsageError(f"the hub answered {status} for {page}: {LOGIN}, with a token that may write there")
        return DpoScoreError(f"the hub answered {status} for {page}: nothing was committed; try again later")
    said = " ".join(str(error).split())[:300]
    return DpoScoreError(f"{repository} could not be reached, nothing was committed: {said or type(error).__name__}")


def amount(size: int) -> str:
    """A size for people: 12.3 MB."""
    value, unit = float(size), 0
    while value >= 1000.0 and unit < len(_UNITS) - 1:
        value, unit = value / 1000.0, unit + 1
    return f"{size} bytes" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


# --- files as others may see them -------------------------------------------------------------------------------------


PIPELINE, REPORT = "pipeline.yaml", "report.html"
_OWN_PLACES = ("out", "cache_dir")
Names: TypeAlias = Mapping[str, str]
"""A path of this machine → what is written in its place."""


def public_files(store: Store, manifest: Manifest) -> dict[str, bytes]:
    """File → its content for others, for those files that say where they were made."""
    pipeline = yaml.safe_load(store.read_bytes(PIPELINE)) if store.exists(PIPELINE) else {}
    names = _names([pipeline, dict(manifest.notes.get("names", {}))])
    found = {PIPELINE: _pipeline(pipeline, names)} if pipeline else {}
    if store.exists(REPORT):
        shown = {str(escape(safe(path))): str(escape(name)) for path, name in names.items()}
        found[REPORT] = _without(store.read_bytes(REPORT).decode("utf-8", "surrogateescape"), shown).encode(
            "utf-8", "surrogateescape"
        )
    about = _manifest(manifest, names, found)
    return {**found, MANIFEST: about, MANIFEST_COPY: about}


def _pipeline(pipeline: Mapping[str, Any], names: Names) -> bytes:
    kept = {key: value for key, value in pipeline.items() if key not in _OWN_PLACES}
    return yaml.safe_dump(_walked(kept, names), sort_keys=False, allow_unicode=True).encode()


def _manifest(manifest: Manifest, names: Names, changed: Mapping[str, bytes]) -> bytes:
    outputs = tuple(_again(record, changed) for record in manifest.outputs)
    fields = unsealed(replace(manifest, host="", outputs=outputs).to_json(), MANIFEST)
    return json_bytes(sealed({**fields, **{key: _walked(fields[key], names) for key in ("notes", "warnings")}}))


def _again(record: FileRecord, changed: Mapping[str, bytes]) -> FileRecord:
    content = changed.get(record.name)
    if content is None:
        return record
    return replace(record, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _names(values: Iterable[Any]) -> Names:
    """Every absolute path among the strings of some JSON values → its last part; longest first, so that a folder
    does not break up a path below it. The folders that paths here begin with come last."""
    texts = {part.rstrip("/") for value in values for text in _strings(value) for part in text.split("+")}
    paths = sorted((text for text in texts if text.startswith(("/", "~/"))), key=len, reverse=True)
    places = {default_cache_dir(): "CACHE/", Path.cwd(): "./", Path.home(): "~/"}
    own = {f"{path}/": name for path, name in places.items() if len(str(path)) > 1}
    return {**{path: Path(path).name for path in paths if len(path) > 1}, **own}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
        return
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for item in items:
        yield from _strings(item)


def _without(text: str, names: Names) -> str:
    """`text` with each path as its name; a path inside a longer word is not one."""
    for path, name in names.items():
        if path in text:
            end = "" if path.endswith("/") else r"(?![\w-])"
            text = re.sub(rf"(?<![\w.~-]){re.escape(path)}{end}", name.replace("\\", r"\\"), text)
    return text


def _walked(value: Any, names: Names) -> Any:
    if isinstance(value, str):
        return _without(value, names)
    if isinstance(value, Mapping):
        return {key: _walked(item, names) for key, item in value.items()}
    return [_walked(item, names) for item in value] if isinstance(value, list | tuple) else value
