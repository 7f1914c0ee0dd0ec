"""A whole run in RewardBench's manner gives the numbers of its arithmetic, written out independently."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_score.config.load import load_config
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.errors import ConfigError
from dpo_score.results.rewardbench import Setting
from dpo_score.storage.manifest import read_manifest
from dpo_score.storage.open import open_store
from tests.rewardbench_oracle import twin_ids, twin_logps, twin_sections, twin_ties
from tests.run_fixtures import Runner, sentence, write_rows
from tests.tiny import byte_tokenizer, save_tiny

SUBSETS = ("llmbar-natural", "mt-bench-hard", "hep-go", "math-prm", "elsewhere")


def bench_rows(count: int = 15) -> list[dict[str, Any]]:
    draw = random.Random(1)
    return [
        {
            "prompt": sentence(draw, 6),
            "chosen": sentence(draw, 8),
            "rejected": sentence(draw, 8),
            "subset": SUBSETS[i % len(SUBSETS)],
            "id": i,
        }
        for i in range(count)
    ]


def load(folder: Path, dtype: str = "float32") -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def in_dtype(value: float, dtype: str) -> float:
    return float(torch.tensor(value, dtype=torch.float64).float().to(getattr(torch, dtype)))


def twin_scores(rows: list[dict[str, Any]], policy: Any, reference: Any, dtype: str) -> list[tuple[float, float]]:
    """πc − ρc and πr − ρr of each row, sums and differences in `dtype`."""
    tokenizer, found = byte_tokenizer(), []
    for row in rows:
        ids = twin_ids(tokenizer, row["prompt"], row["chosen"], row["rejected"])
        scores = []
        for side, start in ((ids.chosen, ids.chosen_start), (ids.rejected, ids.rejected_start)):
            sums = [in_dtype(sum(twin_logps(model, side, start)), dtype) for model in (policy, reference)]
            scores.append(in_dtype(sums[0] - sums[1], dtype))
        found.append((scores[0], scores[1]))
    return found


def accuracies(rows: list[dict[str, Any]], scores: list[tuple[float, float]]) -> dict[str, float]:
    """A tie is wrong."""
    found: dict[str, list[bool]] = {}
    for row, (chosen, rejected) in zip(rows, scores, strict=True):
        found.setdefault(row["subset"], []).append(chosen > rejected)
    return {name: sum(wins) / len(wins) for name, wins in found.items()}


def run_options(folder: Path, **options: Any) -> Any:
    given = {"out": str(folder / "out"), "cache_dir": str(folder / "cache"), "threads": 1, **options}
    return run(load_config(None, given, environment={}), Progress(quiet=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_is_the_twins_arithmetic(dtype: str, tmp_path: Path, runner: Runner, models: Mapping[str, Path]) -> None:
    rows = bench_rows()
    outcome = runner(write_rows(tmp_path / "b.parquet", rows), tmp_path / "out", rewardbench="exact", dtype=dtype)
    found = outcome.summary["policies"]["better"]["rewardbench"]
    scores = twin_scores(rows, load(models["better"], dtype), load(models["reference"], dtype), dtype)
    expected = accuracies(rows, scores)
    assert {name: cell["accuracy"] for name, cell in found["subsets"].items()} == pytest.approx(expected)
    assert found["sections"] == pytest.approx(twin_sections(expected))
    assert found["leaderboard"] == pytest.approx(sum(twin_sections(expected).values()) / 2)
    assert (found["mode"], found["score"]) == ("exact", "log-ratio")


def test_exact_sums_are_the_twins(tmp_path: Path, runner: Runner, models: Mapping[str, Path]) -> None:
    import polars as pl

    rows = bench_rows(6)
    runner(write_rows(tmp_path / "b.parquet", rows), tmp_path / "out", rewardbench="exact", path="plain")
    scores = pl.read_parquet(tmp_path / "out" / "scores" / "better" / "*.parquet")
    policy, tokenizer = load(models["better"]), byte_tokenizer()
    for row, ours in zip(rows, scores.iter_rows(named=True), strict=True):
        ids = twin_ids(tokenizer, row["prompt"], row["chosen"], row["rejected"])
        theirs = sum(twin_logps(policy, ids.chosen, ids.chosen_start))
        assert ours["policy_chosen_logps"] == pytest.approx(theirs, abs=1e-3, rel=2e-7)


def test_a_policy_that_is_the_reference_loses_every_tie(
    tmp_path: Path, runner: Runner, models: Mapping[str, Path]
) -> None:
    data = write_rows(tmp_path / "b.parquet", bench_rows())
    same = [f"same={models['reference']}"]
    exact = runner(data, tmp_path / "exact", rewardbench="exact", policy=same)
    corrected = runner(data, tmp_path / "corrected", rewardbench="corrected", policy=same)
    assert exact.summary["policies"]["same"]["rewardbench"]["leaderboard"] == 0.0
    cell = corrected.summary["policies"]["same"]["rewardbench"]
    assert cell["leaderboard"] is None
    assert all(subset["ties"] == subset["n"] for subset in cell["subsets"].values())


def test_without_a_reference_the_mean_log_prob_decides(
    tmp_path: Path, runner: Runner, models: Mapping[str, Path]
) -> None:
    rows, policy, tokenizer = bench_rows(), load(models["better"]), byte_tokenizer()
    outcome = run_options(
        tmp_path,
        data=[str(write_rows(tmp_path / "b.parquet", rows))],
        policy=[f"better={models['better']}"],
        loss="simpo",
        rewardbench="exact",
        per_token=True,
    )
    found = outcome.summary["policies"]["better"]["rewardbench"]
    scores: dict[str, list[tuple[float, float]]] = {"avg": [], "sum": [], "norm": []}
    for row in rows:
        ids = twin_ids(tokenizer, row["prompt"], row["chosen"], row["rejected"])
        sides = [twin_logps(policy, ids.chosen, ids.chosen_start), twin_logps(policy, ids.rejected, ids.rejected_start)]
        scores["avg"].append((sum(sides[0]) / len(sides[0]), sum(sides[1]) / len(sides[1])))
        scores["sum"].append((sum(sides[0]), sum(sides[1])))
        scores["norm"].append((-(sum(x * x for x in sides[0]) ** 0.5), -(sum(x * x for x in sides[1]) ** 0.5)))
    assert found["score"] == "avg"
    assert found["sections"] == pytest.approx(twin_sections(accuracies(rows, scores["avg"])))
    for rule in ("sum", "norm"):
        expected = twin_sections(accuracies(rows, scores[rule]))
        assert found["other_scores"][rule]["sections"] == pytest.approx(expected)


def test_prior_sets_go_by_the_name_of_the_data_set(tmp_path: Path, models: Mapping[str, Path]) -> None:
    shp = write_rows(tmp_path / "a.parquet", [{**row, "subset": "askacademia"} for row in bench_rows(4)])
    core = write_rows(tmp_path / "b.parquet", bench_rows(5))
    outcome = run_options(
        tmp_path,
        data=[f"core={core}", f"shp={shp}"],
        reference=str(models["reference"]),
        policy=[f"better={models['better']}"],
        rewardbench="corrected",
    )
    found = outcome.summary["policies"]["better"]["rewardbench"]
    assert set(found["subsets"]) == {*SUBSETS, "shp"}
    assert found["sections"]["Prior Sets"] == found["subsets"]["shp"]["accuracy"]


# --- RewardBench 2 ------------------------------------------------------------------------------------------------


def lists() -> list[dict[str, Any]]:
    """Three prompts of four answers, and two tied ones with their references."""
    draw = random.Random(3)

    def row(name: str, subset: str, right: int, wrong: int) -> dict[str, Any]:
        answers = [sentence(draw, 8) + f" {i}" for i in range(right + wrong)]
        return {
            "id": name,
            "prompt": sentence(draw, 6) + name,
            "chosen": answers[:right],
            "rejected": answers[right:],
            "num_correct": right,
            "subset": subset,
        }

    best = [row(str(i), ("Math", "Focus")[i % 2], 1, 3) for i in range(3)]
    tied = [row(f"{kind}:{i}", "Ties", n, 4) for i in range(2) for kind, n in (("ref", 1), ("tied", 3))]
    return [*best, *tied]


def test_best_of_four_and_ties(tmp_path: Path, runner: Runner, models: Mapping[str, Path]) -> None:
    rows = lists()
    outcome = runner(write_rows(tmp_path / "b.parquet", rows), tmp_path / "out", rewardbench="exact")
    found = outcome.summary["policies"]["better"]["rewardbench"]["best_of_n"]
    policy, reference, tokenizer = load(models["better"]), load(models["reference"]), byte_tokenizer()

    def reward(row: dict[str, Any], answer: str) -> float:
        ids = twin_ids(tokenizer, row["prompt"], answer, answer)
        return sum(twin_logps(policy, ids.chosen, ids.chosen_start)) - sum(
            twin_logps(reference, ids.chosen, ids.chosen_start)
        )

    rewards = [([reward(r, a) for a in r["chosen"]], [reward(r, a) for a in r["rejected"]]) for r in rows]
    wins: dict[str, list[bool]] = {}
    for row, (right, wrong) in zip(rows[:3], rewards[:3], strict=True):
        wins.setdefault(row["subset"], []).append(right[0] > max(wrong))
    for subset, hits in wins.items():
        assert found["subsets"][subset]["score"] == sum(hits) / len(hits)
    tied = {row["id"]: scores for row, scores in zip(rows[3:], rewards[3:], strict=True)}
    assert found["subsets"]["Ties"]["score"] == pytest.approx(twin_ties(tied), abs=1e-6)
    assert found["incomplete"] == 0


def test_a_prompt_that_lost_an_answer_is_left_out(tmp_path: Path, runner: Runner) -> None:
    rows = lists()[:3]
    rows[1]["rejected"][2] = "x" * 2000
    outcome = runner(
        write_rows(tmp_path / "b.parquet", rows), tmp_path / "out", rewardbench="corrected", max_length=1500,
        truncation="reject",
    )  # fmt: skip
    found = outcome.summary["policies"]["better"]["rewardbench"]["best_of_n"]
    assert found["incomplete"] == 1
    assert {name: cell["prompts"] for name, cell in found["subsets"].items()} == {"Math": 2}


@pytest.mark.parametrize("pairing", ["random", "adjacent"])
@pytest.mark.parametrize("mode", ["exact", "corrected"])
def test_a_pairing_that_leaves_answers_out_is_refused(tmp_path: Path, runner: Runner, pairing: str, mode: str) -> None:
    data = write_rows(tmp_path / "b.parquet", lists())
    with pytest.raises(ConfigError, match=f"--rewardbench {mode}: data set 'b' .* --pairing {pairing} .* best-worst"):
        runner(data, tmp_path / "out", rewardbench=mode, pairing=pairing)
    assert not list(tmp_path.glob("out/scores/*"))


def test_every_other_pairing_gives_the_same_table(tmp_path: Path, runner: Runner) -> None:
    data = write_rows(tmp_path / "b.parquet", lists())
    tables = [
        runner(data, tmp_path / pairing, rewardbench="corrected", pairing=pairing).summary["policies"]["better"]
        for pairing in ("best-worst", "all")
    ]
    assert tables[0]["rewardbench"] == tables[1]["rewardbench"]


def test_pairs_of_ranked_lists_may_be_drawn(tmp_path: Path, runner: Runner) -> None:
    rows = [{"prompt": f"q {i}", "responses": ["a b", "c", "d"], "scores": [3.0, 2.0, 1.0]} for i in range(4)]
    data = write_rows(tmp_path / "b.parquet", rows)
    found = runner(data, tmp_path / "out", rewardbench="corrected", pairing="random")
    assert found.summary["policies"]["better"]["rewardbench"]["subsets"]["b"]["n"] == 4


def test_one_pair_a_prompt_scored_earlier_is_no_benchmark(tmp_path: Path, runner: Runner) -> None:
    """A folder may hold such scores from a run that asked for no benchmark."""
    data = write_rows(tmp_path / "b.parquet", lists())
    runner(data, tmp_path / "out", pairing="random")
    manifest = read_manifest(open_store(tmp_path / "out"))
    assert manifest is not None
    with pytest.raises(ConfigError, match="--pairing random keeps one pair a prompt"):
        Setting.of(manifest, "corrected", "better")


def test_the_table_is_shown(tmp_path: Path, runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    from dpo_score.cli import console as show

    data = write_rows(tmp_path / "b.parquet", bench_rows())
    show.outcome(runner(data, tmp_path / "out", rewardbench="exact"))
    shown = capsys.readouterr().out
    assert "RewardBench, exact, score: log-ratio" in shown
    assert "Chat Hard   Reasoning   average" in shown


def test_the_pipeline_file_is_a_rewardbench_run() -> None:
    config = load_config(str(Path(__file__).parents[2] / "pipelines" / "rewardbench.yaml"), {}, environment={})
    assert (config.rewardbench, config.data[0].split) == ("corrected", ("filtered",))


def test_a_base_model_without_a_template_borrows_the_policys(tmp_path: Path, models: Mapping[str, Path]) -> None:
    bare = save_tiny(tmp_path / "bare")
    byte_tokenizer(chat_template=None).save_pretrained(bare)
    (bare / "chat_template.jinja").unlink()
    data = [str(write_rows(tmp_path / "b.parquet", bench_rows()))]
    outcome = run_options(
        tmp_path, data=data, reference=str(bare), policy=[f"p={models['better']}"], rewardbench="exact"
    )
    assert outcome.summary["policies"]["p"]["overall"]["scored"] == 15
