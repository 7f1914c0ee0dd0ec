"""Scoring speed, ours and the peers', on one input: `python -m tests.benchmarks.bench_scoring --help`.

Each system runs in its own process (so no flag or compiled code of one serves another) and scores the same token ids,
interleaved in rounds; figures are medians over rounds. Unique tokens count each prompt once and each response once:
padding and second copies of a prompt do not count. `of GEMM` is (2 · block parameters · unique tokens + 2 · H · V ·
scored rows) / seconds over the matrix-product rate measured between the same rounds. Prints, judges nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("scoring_systems.py")
HH = ROOT.parent / "shared" / "data" / "hh_harmless_600.parquet"
MARKER = "\n\nAssistant:"


@dataclass
class System:
    """A running worker and what it has answered."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    started: float = field(default_factory=time.perf_counter)
    start_up: float = 0.0
    passes: list[dict[str, Any]] = field(default_factory=list)

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit(f"{self.name} stopped:\n{self.log.read_text()[-2000:]}")
        return dict(json.loads(line))

    def ready(self) -> None:
        self.answer()
        self.start_up = time.perf_counter() - self.started

    def run(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.passes.append(self.answer())

    def end(self) -> None:
        with self.process:  # closes its pipes, then waits
            self.process.terminate()

    @property
    def seconds(self) -> float:
        """Median over rounds; the first pass warms up and is left out when there are others."""
        return median(p["seconds"] for p in (self.passes[1:] or self.passes))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, help="a model folder, or random:8b for that shape with random weights"
    )
    parser.add_argument("--data", type=Path, default=HH, help="Parquet with chosen and rejected, and prompt if not HH")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", default="fast,plain,trl,trl+onednn,lm-eval")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "cpu"), help="cpu, with --threads 1: a busy machine"
    )
    parser.add_argument("--batch-tokens", default="auto")
    parser.add_argument("--compile", default="off", choices=("on", "off"))
    parser.add_argument("--tokenizer", help="a folder; by default the model's")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has lm-eval")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def split_hh(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and answers of an HH transcript pair: cut behind the last assistant marker both share."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen))
    at = chosen.rfind(MARKER, 0, shared) + len(MARKER)
    return chosen[:at], chosen[at:], rejected[at:]


def token_pairs(asked: argparse.Namespace) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected ids, an end-of-text token after each answer; whole texts, cut where they part."""
    import polars as pl
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer or asked.model)
    rows = pl.read_parquet(asked.data).head(asked.rows).iter_rows(named=True)
    texts = [
        (r["prompt"], r["chosen"], r["rejected"]) if "prompt" in r else split_hh(r["chosen"], r["rejected"])
        for r in rows
    ]
    pairs = []
    for prompt, *answers in texts:
        whole = [tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"] for answer in answers]
        alone = tokenizer(prompt)["input_ids"]
        cut = next((i for i, ids in enumerate(zip(alone, *whole, strict=False)) if len(set(ids)) > 1), len(alone))
        pairs.append((alone[:cut], *(ids[cut:] for ids in whole)))
    return pairs


def start(name: str, job: Path, asked: argparse.Namespace) -> System:
    python = asked.peer_python if name == "lm-eval" else sys.executable
    command = [python, str(WORKER), name, str(job)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(Path.home())}
    log = job.with_name(f"{name}.log")
    with log.open("w") as messages:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True, env=environment
        )
    system = System(name, process, log)
    system.ready()
    return system


def work(model: str, pairs: list[tuple[list[int], list[int], list[int]]]) -> tuple[int, float]:
    """Unique tokens of the input, and the floating-point operations a scorer cannot do without."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    from tests.benchmarks.scoring_systems import SHAPES

    name = model.removeprefix("random:")
    config = AutoConfig.from_pretrained(model) if name == model else LlamaConfig(**SHAPES[name])
    import torch

    with torch.device("meta"):
        body = AutoModelForCausalLM.from_config(config).base_model
    blocks = sum(p.numel() for p in body.parameters()) - config.vocab_size * config.hidden_size
    tokens = sum(len(part) for pair in pairs for part in pair)
    rows = sum(len(c) + len(r) for _, c, r in pairs)
    return tokens, 2.0 * blocks * tokens + 2.0 * config.hidden_size * config.vocab_size * rows


def report(systems: list[System], tokens: int, flops: float, rows: int) -> list[dict[str, Any]]:
    rate = median(p["sums"][0] for s in systems if s.name == "products" for p in s.passes)
    scored = [s for s in systems if s.name != "products"]
    first = scored[0]
    return [
        {
            "system": s.name,
            "rows/s": rows / s.seconds,
            "unique tokens/s": tokens / s.seconds,
            "slower than the first": s.seconds / first.seconds,
            "of GEMM": flops / s.seconds / rate,
            "GEMM GFLOP/s": rate / 1e9,
            "peak MiB": max(p["peak"] for p in s.passes) / 2**20,
            "start-up s": s.start_up,
            "max |Δ| nats": float(np.abs(np.array(s.passes[-1]["sums"]) - np.array(first.passes[-1]["sums"])).max()),
        }
        for s in scored
    ]


def main() -> None:
    asked = options()
    pairs = token_pairs(asked)
    tokens, flops = work(asked.model, pairs)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pairs.json").write_text(json.dumps(pairs))
        job = {
            k: getattr(asked, k) for k in ("model", "dtype", "device", "threads", "batch_tokens", "compile", "clock")
        }
        path = Path(folder) / "job.json"
        path.write_text(json.dumps({**job, "pairs": f"{folder}/pairs.json"}))
        systems = [start(name, path, asked) for name in (*asked.systems.split(","), "products")]
        for _ in range(asked.rounds + 1):
            for system in systems:
                system.run()
        for system in systems:
            system.end()
    figures = report(systems, tokens, flops, len(pairs))
    for line in figures:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v:<11}" for k, v in line.items()))
    if asked.json:
        asked.json.write_text(json.dumps({"tokens": tokens, "flops": flops, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
