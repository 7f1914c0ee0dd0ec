"""What the host does for a pair: `python -m tests.benchmarks.bench_host --tokenizer FOLDER`.

A whole `precompute` whose values are all cached: reading, rendering, tokenising, looking values up, writing. No
forward pass, so all that is left is what a fast device would wait for. Two sets are made of hh_harmless_600.parquet:
transcripts as they are, and the same turns as conversations for a chat template; no two rows have the same texts. For
each number of worker processes it prints pairs per second of processor time (workers included), the main thread's
microseconds a pair, wall seconds, and microseconds a pair by step (of this process). Start-up (imports, opening, the
plan) is measured by a run over the first rows and taken off. Planning and laying out packs for a model are measured
beside it, on the same sequences. It prints; it judges nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DATA = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_600.parquet"
FIRST = 600
"""Rows of the run that start-up is measured by."""
STEPS = {
    "read": ("dpo_score.data.dataset", "PairReader.read"),
    "render": ("dpo_score.tokenization.render", "Renderer.encode"),
    "tokenise": ("dpo_score.tokenization.tokenizer", "BatchEncoder.ids"),
    "table": ("dpo_score.engine.block_inputs", "text_table"),
    "keys": ("dpo_score.engine.model_logprobs", "CachedLogprobs.look_up"),
    "cache": ("dpo_score.storage.cache.namespace", "CacheView.lookup"),
    "derive": ("dpo_score.engine.run", "reference_block"),
    "write": ("dpo_score.storage.local", "LocalStore.write_tables"),
    "data set": ("dpo_score.export.dataset", "DatasetWriter.write"),
}
AFTER = ("plan", "layout")


def write_data(folder: Path, source: Path, rows: int) -> dict[str, Path]:
    """`rows` pairs twice: transcripts, and conversations of the same turns. No two rows have the same texts."""
    from dpo_score.data.formats.transcripts import hh_messages

    given = pq.read_table(source).to_pylist()
    marked = [(given[i % len(given)], f" [{i}]") for i in range(rows)]
    sides = ("chosen", "rejected")
    text = [{side: row[side].replace("Human:", f"Human:{mark}", 1) for side in sides} for row, mark in marked]
    chat = [{side: [dict(turn) for turn in hh_messages(row[side]) or ()] for side in sides} for row in text]
    chat = [row for row in chat if all(turns and turns[-1]["role"] == "assistant" for turns in row.values())]
    paths = {"transcripts": folder / "text.parquet", "conversations": folder / "chat.parquet"}
    for path, pairs in zip(paths.values(), (text, chat), strict=True):
        pq.write_table(pa.Table.from_pylist(pairs), path)
    return paths


def write_model(folder: Path, tokenizer: str) -> Path:
    from transformers import AutoTokenizer

    from tests.tiny import tiny_model

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 2}
    tiny_model(vocab_size=len(loaded), **shape).save_pretrained(folder, safe_serialization=True)
    loaded.save_pretrained(folder)
    return folder


def made_up(self: Any, sequences: Sequence[Any]) -> list[Any]:
    """Values in place of a model's, to fill the cache with."""
    from dpo_score.logprobs.types import SequenceLogps

    noise = np.random.default_rng(0).gamma(1.0, 2.0, 1 << 16).astype(np.float32)
    return [SequenceLogps(-noise[: len(sequence.scored_positions)]) for sequence in sequences]


@contextmanager
def timed_steps(seconds: dict[str, float]) -> Iterator[None]:
    """Processor seconds inside each of STEPS, in whichever thread, without those of steps inside it."""
    local = threading.local()

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            inside = local.__dict__.setdefault("inside", [0.0])
            inside.append(0.0)
            begun = time.thread_time()
            try:
                return function(*args, **named)
            finally:
                spent = time.thread_time() - begun
                seconds[name] += spent - inside.pop()
                inside[-1] += spent

        return call

    with ExitStack() as stack:
        for name, (module, attribute) in STEPS.items():
            owner: Any = import_module(module)
            *classes, last = attribute.split(".")
            for part in classes:
                owner = getattr(owner, part)
            stack.enter_context(patch.object(owner, last, wrapped(name, getattr(owner, last))))
        yield


def run_once(asked: Mapping[str, Any]) -> dict[str, Any]:
    """One `precompute` in this process. Times begin after the imports."""
    from dpo_score.config.load import load_config
    from dpo_score.engine.progress import Progress
    from dpo_score.export.precompute import precompute
    from dpo_score.heap import collect_garbage_rarely

    import_module("dpo_score.logprobs.scorer")
    collect_garbage_rarely()  # as the command does
    options = {key: asked[key] for key in ("data", "reference", "out", "cache_dir", "limit", "threads")}
    options |= {"text_processes": asked["processes"]}
    config = load_config(None, options, environment={})
    seconds: dict[str, float] = defaultdict(float)
    with ExitStack() as stack:
        if asked["fill"]:
            stack.enter_context(patch("dpo_score.logprobs.scorer.PairScorer.score", made_up))
        if asked["steps"]:
            stack.enter_context(timed_steps(seconds))
        wall, main, own = time.perf_counter(), time.thread_time(), time.process_time()
        if asked["steps"]:
            blocks: list[Any] = []
            made = import_module("dpo_score.results.schemas").sequences
            stack.enter_context(
                patch("dpo_score.engine.run.sequences", lambda ids: blocks.append(made(ids)) or blocks[-1])
            )
        outcome = precompute(config, Progress(quiet=True))
        found = {"wall": time.perf_counter() - wall, "main": time.thread_time() - main}
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = time.process_time() - own
    if asked["steps"]:
        seconds |= packed(blocks, asked["budget"])
    return {
        **found,
        "own": own,
        "processor": own + children.ru_utime + children.ru_stime,
        "pairs": outcome.summary["scored"],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "steps": seconds,
    }


def in_a_process(**asked: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_host", "--once", json.dumps(asked)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, data: Path, model: Path, folder: Path, processes: Sequence[int]) -> None:
    common = {"data": [str(data)], "reference": str(model), "cache_dir": str(folder / "cache"), "threads": 1}

    def run(label: str, **asked: Any) -> dict[str, Any]:
        given = {"limit": None, "processes": 0, "fill": False, "steps": False, "budget": 65_536, **asked}
        return in_a_process(**common, out=str(folder / f"{name}-{label}"), **given)

    run("fill", fill=True)
    first = run("first", limit=FIRST)
    for count in processes:
        start = first if not count else run(f"first-{count}", limit=FIRST, processes=count)
        whole = run(f"whole-{count}", processes=count)
        pairs = whole["pairs"] - start["pairs"]
        each = {key: 1e6 * (whole[key] - start[key]) / pairs for key in ("processor", "main", "wall")}
        speed = f"{1e6 / each['processor']:6,.0f} pairs a processor second, {1e6 / each['wall']:6,.0f} a second"
        main = f"main thread {each['main']:4.0f} µs a pair, start {start['processor']:4.1f} s, {whole['peak']:,.0f} MiB"
        print(f"{name}, {count} worker processes: {speed}, {main}", flush=True)
    steps = run("steps", steps=True)
    spent = {step: 1e6 * steps["steps"].get(step, 0.0) / steps["pairs"] for step in (*STEPS, *AFTER)}
    rest = 1e6 * (steps["own"] - first["own"]) / steps["pairs"] - sum(spent[step] for step in STEPS)
    print(
        "  µs a pair: " + ", ".join(f"{step} {each:.0f}" for step, each in spent.items()) + f", rest {rest:.0f}",
        flush=True,
    )


def packed(blocks: Sequence[Sequence[Any]], budget: int) -> dict[str, float]:
    """Processor seconds to plan packs of these blocks of sequences, and to lay them out."""
    from dpo_score.logprobs.packing import lay_out, plan
    from dpo_score.logprobs.scorer import token_costs

    begun = time.thread_time()
    plans = [(token_costs(block), plan(block, budget))[1] for block in blocks]
    planned = time.thread_time()
    for block, packs in zip(blocks, plans, strict=True):
        for pack in packs:
            lay_out([block[i] for i in pack])
    return {"plan": planned - begun, "layout": time.thread_time() - planned}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder or hub id of a tokenizer with a chat template")
    parser.add_argument("--data", type=Path, default=DATA, help="transcripts: hh_harmless_600.parquet, or as hh-rlhf's")
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--processes", default="0,1,2", help="numbers of worker processes; 0 is this process alone")
    parser.add_argument("--sets", default="transcripts,conversations")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.once:
        print(json.dumps(run_once(json.loads(asked.once))))
        return
    with tempfile.TemporaryDirectory(prefix="bench-host-") as name:
        folder = Path(name)
        model = write_model(folder / "model", asked.tokenizer)
        for kind, data in write_data(folder, asked.data, asked.rows).items():
            if kind in asked.sets:
                measure(kind, data, model, folder, [int(count) for count in asked.processes.split(",")])


if __name__ == "__main__":
    main()
