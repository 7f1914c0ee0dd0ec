"""A push sends a complete folder as one commit, and only after a yes; refusals say the way out."""

from __future__ import annotations

import base64
import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from dpo_score.config.schema import ModelSpec
from dpo_score.errors import ConfigError, DamageError, DpoScoreError, UsageError
from dpo_score.export import hub as upload
from dpo_score.results.source_text import stored_config
from dpo_score.results.verify.verify import verify
from dpo_score.storage.manifest import read_manifest, save_manifest
from dpo_score.storage.open import open_store
from tests.engine.whole_runs.small_run import small_run

TOKEN = "hf_write"


@dataclass
class Hub:
    """What a stand-in for the hub was sent. `status`: what it answers to everything instead, when set."""

    status: int | None = None
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0
    endpoint: str = ""

    @property
    def made_private(self) -> bool:
        """The library's versions say it by different names."""
        return bool(self.created[0].get("private")) or self.created[0].get("visibility") == "private"


class _Answers(BaseHTTPRequestHandler):
    hub: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.status:
            return self._send({"error": "no"}, self.hub.status)
        if self.path == "/api/repos/create":
            self.hub.created.append(json.loads(body))
            return self._send({"url": f"{self.hub.endpoint}/datasets/org/scores"})
        if self.path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]
            return self._send({"files": modes})
        return self._commit(body)

    def _commit(self, body: bytes) -> None:
        self.hub.commits += 1
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.hub.endpoint}/datasets/org/scores/commit/{'0' * 40}"
        self._send({"commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})

    def do_GET(self) -> None:
        self._send({"id": "org/scores", "sha": "0" * 40, "siblings": []}, self.hub.status or 200)

    do_HEAD = do_GET  # noqa: N815

    def _send(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Answers,), {"hub": hub})) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub()) as found:
        monkeypatch.setattr("huggingface_hub.hf_api.HfApi.__init__", _pointed_at(found.endpoint))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield found


def _pointed_at(endpoint: str) -> Any:
    from huggingface_hub.hf_api import HfApi

    original = HfApi.__init__

    def init(self: Any, **options: Any) -> None:
        original(self, **{**options, "endpoint": endpoint, "token": TOKEN})

    return init


@pytest.fixture(scope="module")
def out() -> Path:
    return small_run().out


def test_a_plan_lists_every_file_and_sends_nothing(out: Path, hub: Hub) -> None:
    found = upload.plan(str(out), "org/scores")
    on_disk = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and ".work" not in p.parts}
    assert set(found.files) == on_disk
    assert found.size == sum(len(content(found, name)) for name in on_disk)
    first = next(found.lines())
    assert first.startswith(f"{len(on_disk)} files, ")
    assert "to org/scores (private if it is made now)" in first
    assert (hub.created, hub.commits) == ([], 0)


def content(found: upload.Upload, name: str) -> bytes:
    what = found.content(name)
    return what if isinstance(what, bytes) else what.read_bytes()


def test_a_push_is_one_commit_with_the_bytes_of_the_folder(out: Path, hub: Hub) -> None:
    found = upload.plan(str(out), "org/scores", exclude=["manifest.json", "commits/*"])
    address = upload.push(found)
    assert address == f"{hub.endpoint}/datasets/org/scores/commit/{'0' * 40}"
    assert hub.commits == 1
    as_they_lie = {name: (out / name).read_bytes() for name in found.files if name not in found.rewritten}
    assert hub.files == {**as_they_lie, **found.rewritten}
    assert set(found.rewritten) == {"pipeline.yaml", "report.html"}
    assert "manifest.json" not in hub.files
    assert (hub.created[0]["type"], hub.made_private) == ("dataset", True)


def test_what_is_sent_names_no_host_and_no_folder_of_this_machine(out: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "mine"))
    warned(copy, f"{out.parent}/model0 is warm; {Path.home()}/.netrc and {Path.cwd()}/x are not")
    found = upload.plan(str(copy), "org/scores")
    assert set(found.rewritten) == {"manifest.json", "commits/manifest.json", "pipeline.yaml", "report.html"}
    secrets = [str(part).encode() for part in (out.parent, copy, Path.home(), Path.cwd(), tmp_path)]
    host = f'"{platform.node()}"'.encode()
    for name in found.files:
        assert not [secret for secret in (*secrets, host) if secret in content(found, name)], name
    assert b"  step-10:\n    model: model1\n" in content(found, "pipeline.yaml")
    assert json.loads(content(found, "manifest.json"))["warnings"] == ["model0 is warm; ~/.netrc and ./x are not"]


def test_what_is_sent_is_a_whole_folder(out: Path, tmp_path: Path) -> None:
    found = upload.plan(str(out), "org/scores")
    for name in found.files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content(found, name))
    assert verify(str(tmp_path)).damage == []
    assert stored_config(open_store(tmp_path)).reference == ModelSpec(model="model0")


def warned(out: Path, text: str) -> None:
    store = open_store(out)
    manifest = read_manifest(store)
    assert manifest is not None
    save_manifest(store, replace(manifest, warnings=(text,)))


def test_public_is_asked_for(out: Path, hub: Hub) -> None:
    upload.push(upload.plan(str(out), "org/scores", public=True, exclude=["scores/*", "reference/*"]))
    assert not hub.made_private


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [(401, UsageError, "log in with `hf auth login`"), (403, UsageError, "with a token that may write there"),
     (500, DpoScoreError, "nothing was committed; try again later")],
)  # fmt: skip
def test_a_refusal_is_one_paragraph(status: int, kind: type[DpoScoreError], message: str, out: Path, hub: Hub) -> None:
    hub.status = status
    with pytest.raises(kind, match=message) as error:
        upload.push(upload.plan(str(out), "org/scores"))
    assert "\n" not in str(error.value)
    assert TOKEN not in str(error.value)


def test_without_a_hub_nothing_is_sent(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="nothing was sent to org/scores: HF_HUB_OFFLINE is set"):
        upload.push(upload.plan(str(out), "org/scores"))


def test_an_incomplete_folder_is_refused(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    store = open_store(copy)
    manifest = read_manifest(store)
    assert manifest is not None
    save_manifest(store, replace(manifest, state="running"))
    with pytest.raises(UsageError, match="is not complete: the same run command finishes it"):
        upload.plan(str(copy), "org/scores")


def test_a_damaged_folder_is_refused(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    part = next((copy / "scores").rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(DamageError, match=part.name):
        upload.plan(str(copy), "org/scores")


def test_what_cannot_be_pushed_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write OWNER/NAME"):
        upload.plan(str(out), "scores")
    with pytest.raises(UsageError, match="is no folder on this machine"):
        upload.plan("s3://bucket/out", "org/scores")
    with pytest.raises(UsageError, match="holds no run"):
        upload.plan(str(tmp_path), "org/scores")
    with pytest.raises(ConfigError, match="leaves nothing of"):
        upload.plan(str(out), "org/scores", exclude=["*"])


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (12_340_000, "12.3 MB"), (5e15, "5000.0 TB")],
)
def test_amounts(size: int, shown: str) -> None:
    assert upload.amount(size) == shown
