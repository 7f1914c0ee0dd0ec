"""Where a run goes on: a difference is said and recorded, refused only when strict, and none where nothing computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_score.config.schema import RunConfig
from dpo_score.engine import prepare as preparing
from dpo_score.engine.context import open_context
from dpo_score.engine.environment import compared_environment, versions
from dpo_score.engine.executors import job_array as shares
from dpo_score.engine.executors.worker import Assignment, Report, Worker
from dpo_score.engine.prepare import prepare
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.errors import IdentityError
from dpo_score.logprobs import matmul as gemm
from dpo_score.models.numerics import Numerics
from dpo_score.results.status import status
from dpo_score.storage.manifest import read_manifest
from dpo_score.storage.open import open_store
from tests.run_fixtures import preference_rows, write_rows

ON_CPU = Numerics("cpu", "cpu", "float32", "plain", "model", False, 4096, 1)
BEGUN = {"torch": "2.13.0", "device": "NVIDIA H200", "kernel": "varlen"}


@pytest.fixture
def config(runner: Any, tmp_path: Path) -> RunConfig:
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(70))
    found: RunConfig = runner.config(data, tmp_path / "out", path="plain")
    return found


def elsewhere(monkeypatch: pytest.MonkeyPatch, **other: str) -> None:
    """From now on processes that compute are on another machine."""
    true = preparing.versions
    monkeypatch.setattr(preparing, "versions", lambda n: {**true(n), **(other if n else {})})


def test_the_processor_and_the_kernel_are_recorded() -> None:
    found = versions(ON_CPU)
    assert found["kernel"] == "model"
    assert len(found["device"]) > len(", AVX2")
    assert not {"kernel", "device"} & versions(None).keys()


def test_nothing_is_said_of_a_device_that_is_not_here() -> None:
    found = versions(replace(ON_CPU, device="cuda:99", device_kind="cuda"))
    assert not {"kernel", "device"} & found.keys()


def heard(begun: dict[str, str], here: dict[str, str]) -> list[str]:
    progress = Progress(quiet=True)
    compared_environment(begun, here, False, progress)
    return progress.warnings


def test_only_what_both_sides_tell_is_compared() -> None:
    assert heard(BEGUN, {"torch": "2.13.0"}) == heard({"torch": "2.13.0"}, BEGUN) == []
    assert heard(BEGUN, {**BEGUN, "device": "A10"}) == [
        'continued in another environment: device: "NVIDIA H200" → "A10"'
    ]
    assert len(heard(BEGUN, {"torch": "9.9", "peft": "1", "kernel": "flex"})) == 3


def test_a_change_is_said_and_recorded_and_refused_only_when_strict(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config, Progress(quiet=True))
    elsewhere(monkeypatch, torch="9.9", device="NVIDIA H200")
    progress = Progress(quiet=True)
    run(config, progress)
    for warnings in (progress.warnings, status(str(config.out))["warnings"]):
        assert [w for w in warnings if "torch:" in w and '→ "9.9"' in w]
        assert [w for w in warnings if "device:" in w and '→ "NVIDIA H200"' in w]
    with pytest.raises(IdentityError, match=r"(?s)--strict-env.*torch: .*9\.9"):
        run(config.model_copy(update={"strict_env": True}), Progress(quiet=True))


def test_a_kernel_that_is_not_to_be_had_here_is_a_change(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "onednn_is_true_fp32", lambda: True)
    run(config.model_copy(update={"limit": 64}), Progress(quiet=True))
    monkeypatch.setattr(gemm, "onednn_is_true_fp32", lambda: False)
    with pytest.raises(IdentityError, match=r'kernel: "model\+onednn" → "model"'):
        run(config.model_copy(update={"strict_env": True}), Progress(quiet=True))
    run(config, Progress(quiet=True))
    assert 'continued in another environment: kernel: "model+onednn" → "model"' in status(str(config.out))["warnings"]


def test_a_worker_tells_of_its_own_machine(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = prepare(config, open_context(config, Progress(quiet=True), open_store(str(config.out))))
    elsewhere(monkeypatch, device="NVIDIA A10")

    def reports(config: RunConfig) -> list[Report]:
        return list(Worker(config, str(Path.cwd())).work(Assignment.of(job.references[0], (0,))))

    assert any("NVIDIA A10" in line for report in reports(config) for line in report.warnings)
    with pytest.raises(IdentityError, match=r"(?s)--strict-env.*NVIDIA A10"):
        reports(config.model_copy(update={"strict_env": True}))


def test_who_has_others_compute_or_nobody_is_on_no_other_device(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares.run_share(config.model_copy(update={"blocks": "0/1"}), Progress(quiet=True))
    elsewhere(monkeypatch, device="the head's processor")
    progress = Progress(quiet=True)
    context = open_context(config, progress, open_store(str(config.out)))
    context = replace(context, workers=object())  # type: ignore[arg-type]
    prepare(config.model_copy(update={"strict_env": True}), context)
    shares.finish(str(config.out), progress)
    found = read_manifest(context.store)
    assert found is not None
    assert (found.state, progress.warnings, found.warnings) == ("complete", [], ())
