"""How far our numbers are from those of other tools: a real model, every row of real data.

    python -m tests.parity.tables [trl] [rewardbench] [lm-eval] [--set NAME] [--rows N]

A line for each tool and data set: rows, sums compared, the largest |Δ| of a sum in nats, and how much of its bound that
is. TRL computes its reference pass itself; RewardBench's arithmetic is written out in tests/rewardbench_oracle.py, one
sequence at a time; lm-eval is asked where it is installed. All on CPU threads in float32. Ends with 1 when a bound is
passed or token ids differ. Every row takes about an hour on two cores; --rows takes as many, spread over each set.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_score
from dpo_score.config.schema import TextSpec
from dpo_score.engine.finish import Outcome
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.models.numerics import Numerics
from dpo_score.models.resolve import resolve
from dpo_score.storage.file_hashes import FileDigests
from dpo_score.tokenization.render import Renderer
from tests.exported import export
from tests.parity.test_lm_eval import SIDES, harness_sums, stable_rows
from tests.parity.trl_reference import DATA, RELATIVE, SMOL, TOLERANCE, agreement, rows_of, trl_pass
from tests.rewardbench_oracle import twin_ids, twin_logps

ADAPTER = Path(__file__).parents[2] / "data/quickstart-adapters/step-76"
SETS = {"llmbar raw": ("llmbar", False), "llmbar chat": ("llmbar", True), "hh": ("hh_harmless_600", False)}
SUBSETS = {
    "Natural": "llmbar-natural", "Adversarial/Neighbor": "llmbar-adver-neighbor",
    "Adversarial/GPTInst": "llmbar-adver-GPTInst", "Adversarial/GPTOut": "llmbar-adver-GPTOut",
    "Adversarial/Manual": "llmbar-adver-manual",
}  # fmt: skip
SUMS = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True, slots=True)
class Line:
    """`largest`: |Δ| of a sum in nats. `excess`: the largest over its bound. `note`: what else was compared."""

    tool: str
    data: str
    rows: int
    sums: int
    largest: float
    excess: float
    note: str = ""

    def __str__(self) -> str:
        shown = f"{self.tool:12} {self.data:12} {self.rows:5} rows {self.sums:5} sums   max |Δ| {self.largest:.1e} nats"
        return f"{shown}   {self.excess:.2f} of the bound   {self.note}".rstrip()


@dataclass(frozen=True, slots=True)
class Bench:
    """Where models and runs are; which sets, and how many rows of each are taken (None: all)."""

    work: Path
    rows: int | None
    sets: Sequence[str]

    @property
    def model(self) -> Path:
        return resolve(SMOL, cache_dir=self.work / "cache", sha256=FileDigests(self.work / "cache").sha256).folder

    def some(self, rows: list[Any]) -> list[Any]:
        return rows if self.rows is None else rows[:: max(1, len(rows) // self.rows)][: self.rows]


def against_trl(bench: Bench) -> Iterator[Line]:
    for name in bench.sets:
        file, chat = SETS[name]
        rows = bench.some(sorted(rows_of(file, chat), key=lambda row: len(str(row))))  # TRL pads each batch
        work = bench.work / "trl" / name.replace(" ", "-")
        work.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), work / "rows.parquet")
        options = {"emit_ids": True, "prompt_split": "trl", "path": "auto", "threads": None}
        export(work / "rows.parquet", SMOL, work / "out", cache_dir=str(bench.work / "cache"), **options)
        found = agreement(rows, work / "out", trl_pass(rows, bench.model, work / "trl", None))
        apart = f"ids equal; {len(found.only_ours)} rows by us alone, {len(found.only_theirs)} by TRL alone"
        yield Line("TRL", name, found.both, 2 * found.both, found.largest, found.excess, apart)


def against_rewardbench(bench: Bench) -> Iterator[Line]:
    """The bound holds for its arithmetic with a log-softmax in float64: torch's in float32 loses 1e-5 a token on CPUs,
    all to one side, which is more than all other rounding."""
    found = bench.some(pq.read_table(DATA / "llmbar.parquet").to_pylist())
    rows = [{**row, "subset": SUBSETS[row["subset"]]} for row in found]
    outcome = scored(rows, bench)
    ours = pl.read_parquet(sorted((bench.work / "bench/scores/p").glob("*.parquet"))).select(SUMS).to_numpy()
    theirs, precise = twin_sums(rows, bench.model)
    bound = np.maximum(TOLERANCE, RELATIVE * np.abs(theirs))
    cells = outcome.summary["policies"]["p"]["rewardbench"]["subsets"]
    same = {name: cell["accuracy"] for name, cell in cells.items()} == accuracies(rows, theirs)
    excess = float((np.abs(ours - precise) / bound).max()) if same else np.inf
    note = f"accuracies of {len(cells)} subsets {'equal' if same else 'DIFFER'}"
    for name, twin in (("RewardBench", precise), ("its float32", theirs)):
        apart = np.abs(ours - twin)
        yield Line(name, "llmbar", len(rows), apart.size, float(apart.max()), excess, note)


def scored(rows: list[dict[str, Any]], bench: Bench) -> Outcome:
    """A run in RewardBench's manner: the quickstart's last checkpoint against its base."""
    pq.write_table(pa.Table.from_pylist(rows), bench.work / "bench.parquet")
    outcome = dpo_score.run(
        data=f"llmbar={bench.work / 'bench.parquet'}", reference=SMOL, policy=f"p={ADAPTER}", policy_base="reference",
        rewardbench="exact", out=bench.work / "bench", cache_dir=bench.work / "cache",
    )  # fmt: skip
    outcome.raise_failures()
    return outcome


def twin_sums(rows: list[dict[str, Any]], folder: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """[row, SUMS] by RewardBench's arithmetic, each sequence alone; and again with a log-softmax in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [twin_ids(tokenizer, row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    sides = [[(pair.chosen, pair.chosen_start), (pair.rejected, pair.rejected_start)] for pair in ids]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = [[both_sums(base, *side) for side in pair] for pair in sides]
    policy = PeftModel.from_pretrained(base, str(ADAPTER)).eval()  # changes `base`, which is done with
    found = np.hstack([[[both_sums(policy, *side) for side in pair] for pair in sides], reference])
    return found[..., 0], found[..., 1]


def both_sums(model: Any, ids: list[int], start: int) -> tuple[float, float]:
    return sum(twin_logps(model, ids, start)), sum(twin_logps(model, ids, start, torch.float64))


def accuracies(rows: list[dict[str, Any]], sums: np.ndarray[Any, Any]) -> dict[str, float]:
    """By subset, of the log-ratios' order; a tie is wrong."""
    wins: dict[str, list[bool]] = {}
    for row, (chosen, rejected, ref_chosen, ref_rejected) in zip(rows, sums, strict=True):
        wins.setdefault(row["subset"], []).append(chosen - ref_chosen > rejected - ref_rejected)
    return {name: sum(found) / len(found) for name, found in wins.items()}


def against_lm_eval(bench: Bench) -> Iterator[Line]:
    """The bound holds for its sums with `softmax_dtype=float64`, for the reason given above; also as it comes."""
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).eval()
    rows = bench.some(stable_rows(Renderer(tokenizer, TextSpec()), None, None))
    numerics = Numerics("cpu", "cpu", "float32", "fast", "model", False, 4096, torch.get_num_threads())
    results = PairScorer(model, numerics).score([row.sequence(side) for row in rows for side in SIDES])
    ours = np.array([np.sum(result.token_logps, dtype=np.float64) for result in results])
    bound = np.maximum(TOLERANCE, RELATIVE * np.abs(ours))
    precise, theirs = (np.array(harness_sums(model, tokenizer, rows, softmax)) for softmax in ("float64", None))
    excess = float((np.abs(ours - precise) / bound).max())
    for name, twin in (("lm-eval", precise), ("its float32", theirs)):
        yield Line(name, "llmbar raw", len(rows), len(ours), float(np.abs(ours - twin).max()), excess)


TOOLS: Mapping[str, Callable[[Bench], Iterator[Line]]] = {
    "trl": against_trl, "rewardbench": against_rewardbench, "lm-eval": against_lm_eval,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", choices=[[], *TOOLS], help="all, where none is named")
    parser.add_argument("--set", action="append", choices=SETS, help="for trl: all, where none is named")
    parser.add_argument("--rows", type=int)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="parity-") as work:
        bench = Bench(Path(work), asked.rows, asked.set or list(SETS))
        return max(shown(line) for name in asked.tools or TOOLS for line in TOOLS[name](bench))


def shown(line: Line) -> int:
    print(line, flush=True)
    return int(line.excess > 1.0)


if __name__ == "__main__":
    sys.exit(main())
