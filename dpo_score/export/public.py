"""An OUT folder as others may see it: the same files, without the name of this host and the folders of this machine.

manifest.json and its twin name the host and the models' paths, pipeline.yaml the data's, report.html the models'. In
what is made here a path is its last part, OUT and the cache are left out, and the manifest says so of itself: its seal
and the checksums in it hold. Promises: every other file is sent as it lies, and holds no such name, for none was
written into it. Does not look into texts of the data, or into files that somebody else put into the folder.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from markupsafe import escape

from dpo_score.config.load import default_cache_dir
from dpo_score.escape import safe
from dpo_score.storage.base import FileRecord, Store, json_bytes
from dpo_score.storage.commits import sealed, unsealed
from dpo_score.storage.manifest import MANIFEST, TWIN, Manifest

PIPELINE, REPORT = "pipeline.yaml", "report.html"
_OWN_PLACES = ("out", "cache_dir")
Names: TypeAlias = Mapping[str, str]
"""A path of this machine → what stands in its place."""


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
    return {**found, MANIFEST: about, TWIN: about}


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
