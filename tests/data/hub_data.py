"""A local stand-in for the hub's interface to data sets: branches of files, private and gated repositories."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

SMALL = (".md", ".json", ".txt")
"""Endings of files that the stand-in keeps outside large-file storage."""
TOKEN = "hf_open-sesame"


@dataclass
class Hub:
    """`branches`: revision → file name → content. `refusal`: (status, error code) for everyone without TOKEN."""

    branches: dict[str, Mapping[str, bytes]]
    repository: str = "org/pairs"
    refusal: tuple[int, str] | None = None
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""

    def commit(self, revision: str) -> str | None:
        """Every branch is one commit, named by its content."""
        for branch, files in self.branches.items():
            commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            if revision in (branch, commit):
                return commit
        return None

    def files(self, commit: str) -> Mapping[str, bytes]:
        return next(files for branch, files in self.branches.items() if self.commit(branch) == commit)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The stand-in on a port of its own; `hub.endpoint` is what HF_ENDPOINT should say."""
    handler = type("Answers", (_Answers,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()


class _Answers(BaseHTTPRequestHandler):
    hub: Hub

    def _answer(self) -> None:
        hub, path = self.hub, self.path.split("?")[0].replace("%2F", "/")
        hub.asked.append(path)
        if hub.refusal and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(*hub.refusal)
        api = re.fullmatch(rf"/api/datasets/{hub.repository}(?:/(revision|tree)/(.+))?", path)
        resolve = re.fullmatch(rf"/datasets/{hub.repository}/resolve/((?:refs/convert/)?[^/]+)/(.+)", path)
        found = api or resolve
        if found is None:
            return self._refuse(404, "RepoNotFound")
        commit = hub.commit((found[2] if api else found[1]) or "main")
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        if resolve:
            return self._file(commit, resolve[2])
        return self._tree(commit) if found[1] == "tree" else self._info(commit)

    do_GET = do_HEAD = _answer  # noqa: N815 - the names that http.server calls

    def _info(self, commit: str) -> None:
        self._send(json.dumps({"id": self.hub.repository, "sha": commit, "siblings": []}).encode())

    def _tree(self, commit: str) -> None:
        self._send(json.dumps([_described(name, data) for name, data in self.hub.files(commit).items()]).encode())

    def _file(self, commit: str, name: str) -> None:
        data = self.hub.files(commit).get(name)
        if data is None:
            return self._refuse(404, "EntryNotFound")
        digest = hashlib.sha256(data).hexdigest()
        tag = digest[:40] if name.endswith(SMALL) else digest
        large = {} if name.endswith(SMALL) else {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        return self._send(data, {"X-Repo-Commit": commit, "ETag": f'"{tag}"', **large})

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"", {"X-Error-Code": code, "X-Error-Message": "stand-in"}, status)

    def _send(self, data: bytes, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


def _described(name: str, data: bytes) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    entry = {"type": "file", "path": name, "size": len(data), "oid": digest[:40]}
    large = {"oid": digest, "size": len(data), "pointerSize": 130}
    return entry if name.endswith(SMALL) else {**entry, "lfs": large}
