"""A server that speaks S3, for tests: moto's, from PyPI, in a process of its own, which can be told to fail.

    python -m tests.storage.s3_server      moto's application, served as `python -m moto.server` does; prints its port

Credentials are dummies. Before moto sees a request, a plan may answer it with an error, answer with an error
although the request was carried out, or kill a process: the one that sent the request, or any other.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
PLAN, SEEN = "/-/plan", "/-/seen"
CODES = {500: "InternalError", 503: "SlowDown"}
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass
class Fault:
    """What befalls requests of `method` whose path holds `part`: the first `skip` none, the next `count` this.

    `status` is answered; with `applied`, after the request was carried out. `kill`: this process dies at that moment.
    """

    method: str
    part: str
    status: int = 503
    count: int = 1
    skip: int = 0
    applied: bool = False
    kill: int | None = None

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or self.part not in path or self.count <= 0:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.count -= 1
        return True


class Faulty:
    """A WSGI application before another: remembers every request, and follows the plan."""

    def __init__(self, application: Application) -> None:
        self._application, self._lock = application, threading.Lock()
        self._plan: list[Fault] = []
        self._seen: list[str] = []

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == PLAN:
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            self._plan = [Fault(**fields) for fields in json.loads(body)]
            return _answer(start, 200, b"")
        if path == SEEN:
            seen, self._seen = self._seen, []
            return _answer(start, 200, json.dumps(seen).encode())
        with self._lock:
            self._seen.append(f"{method} {path}?{environ.get('QUERY_STRING', '')}")
            fault = next((fault for fault in self._plan if fault.strikes(method, path)), None)
        return self._application(environ, start) if fault is None else self._struck(fault, environ, start)

    def _struck(self, fault: Fault, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if fault.applied:
            b"".join(self._application(environ, lambda *_: None))
        if fault.kill is not None:
            os.kill(fault.kill, signal.SIGKILL)
        body = f"<Error><Code>{CODES[fault.status]}</Code><Message>as planned</Message></Error>".encode()
        return _answer(start, fault.status, body)


def _answer(start: Callable[..., Any], status: int, body: bytes) -> list[bytes]:
    start(f"{status} as planned", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def serve() -> None:
    from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    application = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    print(server.port, flush=True)
    server.serve_forever()


@dataclass(frozen=True)
class Server:
    """A running server, as a test sees it."""

    url: str

    def plan(self, *faults: Fault) -> None:
        """From now on these, and none of those before."""
        self._sent(PLAN, json.dumps([asdict(fault) for fault in faults]).encode())

    def seen(self) -> list[str]:
        """`METHOD path?query` of every request since the last call."""
        found: list[str] = json.loads(self._sent(SEEN))
        return found

    def _sent(self, path: str, body: bytes | None = None) -> bytes:
        with urllib.request.urlopen(self.url + path, body, timeout=60) as answer:
            data: bytes = answer.read()
        return data


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def serving() -> Iterator[Server]:
    """A fresh server, and this process's environment such that S3 is there: one bucket, `bucket`."""
    import s3fs

    command = [sys.executable, "-m", "tests.storage.s3_server"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    before = {name: os.environ.get(name) for name in (*ENVIRONMENT, "AWS_ENDPOINT_URL")}
    try:
        server = Server(f"http://127.0.0.1:{_port(process)}")
        os.environ.update({**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url})
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield server
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        _restore(before)
        process.kill()
        process.wait()


def _restore(environment: dict[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _port(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    with process.stdout as said:
        line = said.readline()
    assert line, "the S3 server does not start"
    return int(line)


if __name__ == "__main__":
    serve()
