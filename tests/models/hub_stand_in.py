"""A local stand-in for the hub's HTTP interface: one repository served from a folder, or one answer to everything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Refusal(BaseHTTPRequestHandler):
    """Answers every request with one status and one of the hub's error codes."""

    status = 404
    code = "RepoNotFound"

    def _answer(self) -> None:
        self.send_response(self.status)
        self.send_header("X-Error-Code", self.code)
        self.send_header("X-Error-Message", "stand-in")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = _answer  # noqa: N815 - the names that http.server calls

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


class Repository(Refusal):
    """Serves the files of `folder` at one commit; large files bear their sha256 as the hub's do."""

    folder = Path()
    asked: list[str]

    def _answer(self) -> None:
        self.asked.append(self.path)
        path = self.path.split("?")[0]
        if f"/resolve/{COMMIT}/" in path:
            self._send_file(self.folder / path.split(f"/resolve/{COMMIT}/")[1])
        elif "/tree/" in path:
            self._send(json.dumps([{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in self._list()]))
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name, _ in self._list()]
            self._send(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}))
        else:
            super()._answer()

    do_GET = do_HEAD = _answer  # noqa: N815

    def _list(self) -> list[tuple[str, int]]:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [(path.relative_to(self.folder).as_posix(), path.stat().st_size) for path in files]

    def _send_file(self, path: Path) -> None:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        large = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        extra = large if path.suffix in (".safetensors", ".bin", ".gguf") else {}
        self._send(data, {"X-Repo-Commit": COMMIT, "ETag": f'"{digest[:40]}"', **extra})

    def _send(self, content: str | bytes, headers: dict[str, str] | None = None) -> None:
        data = content.encode() if isinstance(content, str) else content
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """huggingface_hub talks to `handler` instead of the hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield
        server.shutdown()
