"""What a run would cost, without running it: only what is left to compute counts, and the largest model bounds."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_score.engine import dry_run as preview
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.errors import DataError
from dpo_score.models.loader import ModelLoader
from tests.engine.whole_runs.test_policies import save_adapter
from tests.families import family
from tests.run_fixtures import Runner, preference_rows, write_rows
from tests.tiny import byte_tokenizer, save_tiny

Looked = Callable[..., dict[str, Any]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.parquet", preference_rows(40))


@pytest.fixture
def probe(runner: Runner, data: Path) -> Looked:
    return lambda **options: preview.probe(
        runner.config(data, None, batch_tokens="256", **options), Progress(quiet=True), 3600.0
    )


@pytest.fixture
def dry_run(runner: Runner, data: Path) -> Looked:
    return lambda **options: preview.dry_run(runner.config(data, None, **options), Progress(quiet=True))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that were loaded."""
    seen: list[str] = []
    load = ModelLoader.load

    def noted(self: ModelLoader, source: Any, *how: Any) -> Any:
        seen.append(source.name)
        return load(self, source, *how)

    monkeypatch.setattr(ModelLoader, "load", noted)
    return seen


def still_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Whatever is measured takes so long."""
    monkeypatch.setattr(preview, "_timed", lambda work: (work(), seconds)[1])


def gib(found: dict[str, Any]) -> float:
    return float(found["memory"].split()[2])


def test_a_policy_that_cannot_be_loaded_is_said_before_any_work(runner: Runner, data: Path, tmp_path: Path) -> None:
    better = runner.models["better"]
    config = runner.config(data, tmp_path / "out", policy=[f"better={better}", "gone=/no/such/folder"])
    (line,) = preview.dry_run(config, Progress(quiet=True))["not scored"]
    assert line.startswith("gone: ")
    shown = io.StringIO()
    run(config, Progress(stream=shown))
    assert shown.getvalue().index("gone: cannot be loaded, so this run") < shown.getvalue().index("reference: 40")


# --- the probe ------------------------------------------------------------------------------------------------------


def test_what_the_cache_holds_costs_nothing_and_no_model_is_loaded_for_it(
    runner: Runner, data: Path, tmp_path: Path, probe: Looked, loads: list[str]
) -> None:
    runner(data, tmp_path / "out", batch_tokens="256")
    loads.clear()
    found = probe()
    assert found["hours"].startswith("0.000")
    assert found["rows/s"] == "nothing is left to compute"
    assert loads == []


def test_a_policy_that_equals_the_reference_is_not_counted(
    runner: Runner, probe: Looked, monkeypatch: pytest.MonkeyPatch
) -> None:
    still_clock(monkeypatch, 36.0)
    alone = probe(policy=[f"same={runner.models['reference']}"])
    both = probe()
    assert "same: equals its reference" in alone["cache"][1]
    assert float(both["cost"].split()[0]) == pytest.approx(2 * float(alone["cost"].split()[0]), rel=1e-3)


def test_half_of_the_sequences_cost_half_of_the_time(
    runner: Runner, tmp_path: Path, probe: Looked, monkeypatch: pytest.MonkeyPatch
) -> None:
    still_clock(monkeypatch, 36.0)
    whole = float(probe()["cost"].split()[0])
    runner(write_rows(tmp_path / "half.parquet", preference_rows(40)[::2]), tmp_path / "out", batch_tokens="256")
    found = probe()
    assert found["cache"] == [f"{name}: 40 of 80 sampled sequences are known" for name in ("reference", "better")]
    assert float(found["cost"].split()[0]) == pytest.approx(whole / 2, rel=0.1)


def test_models_of_one_kind_are_measured_once_and_others_apart(
    runner: Runner, tmp_path: Path, probe: Looked, loads: list[str]
) -> None:
    wide = save_tiny(tmp_path / "wide", seed=5, hidden_size=64, head_dim=16)
    found = probe(policy=[f"better={runner.models['better']}", f"wide={wide}", f"worse={runner.models['worse']}"])
    first, second = found["rows/s"]
    assert first.endswith("with reference; taken to be the same: better, worse")
    assert second.endswith("with wide")
    assert {Path(name).name for name in loads} == {"reference", "wide"}


def test_a_policy_that_the_fast_path_does_not_fit_is_measured_on_the_plain_one(
    runner: Runner, tmp_path: Path, probe: Looked
) -> None:
    family("bloom").save_pretrained(tmp_path / "bloom")
    byte_tokenizer().save_pretrained(tmp_path / "bloom")
    found = probe(policy=[f"bloom={tmp_path / 'bloom'}"])
    assert [line.rpartition(" ")[2] for line in found["rows/s"]] == ["reference", "bloom"]


def test_nothing_to_probe_where_no_row_can_be_scored(runner: Runner, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{**row, "chosen": None if i else "x"} for i, row in enumerate(preference_rows(5))]
    rows[0]["rejected"] = None
    config = runner.config(write_rows(tmp_path / "none.parquet", rows), None)
    with pytest.raises(DataError, match="no pair of 5 sampled rows can be scored; would be rejected: 5 null_field"):
        preview.probe(config, Progress(quiet=True), None)


# --- the dry run ----------------------------------------------------------------------------------------------------


def test_the_bound_is_that_of_the_largest_model(runner: Runner, tmp_path: Path, dry_run: Looked) -> None:
    big = save_tiny(tmp_path / "big", seed=5, hidden_size=256, intermediate_size=4096, num_hidden_layers=4, head_dim=64)
    small, large = str(runner.models["reference"]), str(big)
    alone = gib(dry_run(policy=[f"p={small}"]))
    bounds = [gib(dry_run(reference=a, policy=[f"p={b}"])) for a, b in ((small, large), (large, small), (large, large))]
    assert len(set(bounds)) == 1
    assert bounds[0] > alone + 0.1


def test_clones_of_what_adapters_change_are_in_the_bound(tmp_path: Path, dry_run: Looked) -> None:
    base = save_tiny(tmp_path / "base", hidden_size=1024, num_attention_heads=16, num_key_value_heads=16, head_dim=64)
    adapters = [save_adapter(tmp_path / f"adapter{seed}", base, seed) for seed in (0, 1)]
    both = {"reference": str(base), "policy": [f"{a.name}={base}+{a}" for a in adapters]}
    without = dry_run(reference=str(base), policy=[f"p={base}"])
    found = dry_run(**both)
    assert found["memory"].endswith("scratch, clones of what adapters change")
    layers_q_and_v = 2 * 2 * 1024 * 1024 * 4 / 2**30
    assert gib(found) - gib(without) == pytest.approx(layers_q_and_v, abs=0.011), "one copy for both adapters"
    assert gib(dry_run(**both, dtype="bfloat16")) < gib(without), "in 16 bits adapters stay apart"


def test_the_time_is_that_of_what_is_left(runner: Runner, data: Path, tmp_path: Path, dry_run: Looked) -> None:
    runner(data, tmp_path / "out")
    found = dry_run()
    assert found["time"].startswith("about 0 s for what is to be computed")
    assert found["cache"][0] == "reference: 80 of 80 sampled sequences are known"


def test_rows_are_sampled_in_short_runs_over_all_of_the_data(runner: Runner, tmp_path: Path) -> None:
    lines = (json.dumps({"prompt": str(i), "chosen": "yes", "rejected": "no"}) for i in range(30_000))
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    config = runner.config(tmp_path / "many.jsonl", None)
    with preview._scratch(config, Progress(quiet=True)) as context:
        job = preview.resolve_plan(config, context)
        sample, rows = preview._sampled(job)
    numbers = sorted(int(item.pair.prompt) for item in sample)  # type: ignore[union-attr,arg-type]
    assert rows == len(numbers) == len(set(numbers)) == preview.SAMPLE
    starts = [n for n in numbers if n - 1 not in set(numbers)]
    assert len(starts) == preview.SAMPLE // preview.SAMPLE_RUN
    assert (numbers[0], numbers[-1]) == (0, 29_999)
    assert np.ptp(np.diff(starts)) <= 1


@pytest.mark.parametrize("count", [3, 999])
def test_few_rows_are_all_looked_at(runner: Runner, tmp_path: Path, count: int) -> None:
    data = write_rows(tmp_path / "few.parquet", preference_rows(count))
    assert preview.dry_run(runner.config(data, None), Progress(quiet=True))["sampled"].startswith(f"{count} rows")


def test_a_bound_that_no_floating_point_number_holds_is_said_in_words() -> None:
    assert (preview._gib(3 * 2**29), preview._gib(10**400)) == ("1.50", "more than 2⁵⁰")
