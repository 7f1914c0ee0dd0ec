"""The numbers of pipelines/SCALE.md, from measured constants and named assumptions by arithmetic.

    python -m tests.benchmarks.scale            print the page's tables
    python -m tests.benchmarks.scale --write    put them into the page

test_scale.py compares the page with this file, so that neither changes without the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dpo_score.engine.plan import BYTES_PER_TOKEN, block_rows

PAGE = Path(__file__).parents[2] / "pipelines/SCALE.md"

# measured, by the benchmark that `constants` names
LOCAL_MS_A_BLOCK = 21.6
RAY_MS_A_BLOCK = 15.6
LOCAL_BYTES_A_BLOCK = 630
RAY_BYTES_A_BLOCK = 330
LOOK_MS_A_BLOCK = 0.26
RECORD_BYTES = 870
CACHE_MS_A_BLOCK = 3.7
CACHED_FILES = 40_000
REQUESTS = {"stage one": 7, "stage two": 9, "the end": 15, "a second look": 10}
AT_ONCE = 16
SUMMARY_BYTES_A_ROW = 292
SUMMARY_US_A_ROW = 15.8

# assumed
PEAK_FLOPS = 989e12
SHARE_OF_PEAK = 0.60
LATENCY_MS = 20.0
PASSES = 2
"""Models that read every token: the reference and one policy."""


@dataclass(frozen=True)
class Llama:
    """A Llama shape; the page's is that of the 70B models."""

    layers: int = 80
    hidden: int = 8192
    key_values: int = 1024
    intermediate: int = 28_672
    vocabulary: int = 128_256

    @property
    def body(self) -> int:
        """Weights that multiply every token."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.key_values
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        return self.body + 2 * self.vocabulary * self.hidden

    @property
    def flops_a_token(self) -> float:
        return 2.0 * self.body


MODEL = Llama()
SIZES = ((10**6, 215), (10**6, 1000), (10**8, 215), (10**8, 1000))
"""(pairs, unique tokens a pair: the prompt once, each answer once)."""


@dataclass(frozen=True)
class Run:
    """One reference and one policy over `pairs` pairs of `tokens` unique tokens each."""

    pairs: int
    tokens: int

    @property
    def rows_a_block(self) -> int:
        return block_rows(self.pairs, self.tokens * BYTES_PER_TOKEN, MODEL.parameters, "cuda")

    @property
    def blocks(self) -> int:
        return -(-self.pairs // self.rows_a_block)

    @property
    def seconds_a_block(self) -> float:
        """Of one model on one GPU."""
        return self.rows_a_block * self.tokens / tokens_a_second()

    @property
    def records(self) -> int:
        return PASSES * self.blocks

    @property
    def files(self) -> int:
        """In OUT at the end: a part and a record for each block and model."""
        return 2 * self.records

    @property
    def requests(self) -> int:
        """To an object store that holds data, cache and OUT, from the start to the end of one run."""
        return self.blocks * (REQUESTS["stage one"] + REQUESTS["stage two"] + REQUESTS["the end"])

    @property
    def end_minutes(self) -> float:
        """The end on an object store: its requests, AT_ONCE of them under way, and the arithmetic for one policy."""
        waiting = self.blocks * REQUESTS["the end"] * LATENCY_MS / 1000 / AT_ONCE
        return (waiting + self.pairs * SUMMARY_US_A_ROW / 1e6) / 60

    @property
    def look_minutes(self) -> float:
        """What a run that is begun again spends before its first new block, on an object store."""
        return self.blocks * REQUESTS["a second look"] * LATENCY_MS / 1000 / AT_ONCE / 60

    @property
    def driver_mib(self) -> float:
        """What the Ray driver's memory grows by while blocks are computed."""
        return self.records * RAY_BYTES_A_BLOCK / 2**20

    @property
    def end_gib(self) -> float:
        """What the summary of one policy holds at most."""
        return self.pairs * SUMMARY_BYTES_A_ROW / 2**30

    def hours(self, gpus: int) -> float:
        return PASSES * self.pairs * self.tokens / tokens_a_second() / gpus / 3600

    @property
    def driver_share(self) -> float:
        """The share of its time that the driver's machine is busy with 64 GPUs."""
        return 64 * RAY_MS_A_BLOCK / 1000 / self.seconds_a_block


def tokens_a_second() -> float:
    """One GPU, one model."""
    return PEAK_FLOPS * SHARE_OF_PEAK / MODEL.flops_a_token


def whole(number: float) -> str:
    return f"{number:,.0f}"


def rounded(number: float) -> str:
    """Two digits that count, and no more than one after the point from 1 on."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}" if number >= 1 else f"{number:.2g}"


ROWS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("tokens through two models", lambda run: f"{PASSES * run.pairs * run.tokens:.1e}"),
    ("hours on 1 GPU", lambda run: rounded(run.hours(1))),
    ("hours on 8 GPUs", lambda run: rounded(run.hours(8))),
    ("hours on 64 GPUs", lambda run: rounded(run.hours(64))),
    ("pairs a block", lambda run: whole(run.rows_a_block)),
    ("seconds a block, one GPU and model", lambda run: rounded(run.seconds_a_block)),
    ("blocks", lambda run: whole(run.blocks)),
    ("commit records", lambda run: whole(run.records)),
    ("MiB of records", lambda run: rounded(run.records * RECORD_BYTES / 2**20)),
    ("files in OUT at the end", lambda run: whole(run.files)),
    ("requests to an object store", lambda run: whole(run.requests)),
    ("minutes of a second look there", lambda run: rounded(run.look_minutes)),
    ("minutes of the end there", lambda run: rounded(run.end_minutes)),
    ("MiB that the driver grows by", lambda run: rounded(run.driver_mib)),
    ("GiB of the summary", lambda run: rounded(run.end_gib)),
    ("driver busy, 64 GPUs", lambda run: f"{100 * run.driver_share:.1f} %"),
)


def constants() -> list[str]:
    """The table of what the other one is computed from."""
    requests = ", ".join(f"{phase} {count}" for phase, count in REQUESTS.items())
    rows = [
        ("a block, one process, all but the model", f"{LOCAL_MS_A_BLOCK:g} ms", "bench_blocks"),
        ("a block, Ray, two workers on two cores", f"{RAY_MS_A_BLOCK:g} ms", "bench_blocks --engine ray"),
        (
            f"a block into a cache of {CACHED_FILES:,} files, or of none",
            f"{CACHE_MS_A_BLOCK:g} ms",
            f"bench_blocks --cached {CACHED_FILES}",
        ),
        ("memory of one process, a block", f"{LOCAL_BYTES_A_BLOCK:,} bytes", "bench_blocks"),
        (
            "memory of the Ray driver, a block",
            f"{RAY_BYTES_A_BLOCK:,} bytes",
            "bench_blocks --engine ray, 20,000 blocks",
        ),
        ("a look at a committed block, local disk", f"{LOOK_MS_A_BLOCK:g} ms", "bench_blocks"),
        ("a commit record", f"{RECORD_BYTES:,} bytes", "bench_blocks"),
        ("requests to an object store, a block", requests, "bench_requests"),
        (
            "summary of one policy, a pair",
            f"{SUMMARY_BYTES_A_ROW:,} bytes, {SUMMARY_US_A_ROW:g} µs",
            "bench_summary, a million rows",
        ),
        ("assumed: a GPU", f"{PEAK_FLOPS / 1e12:.0f} TFLOP/s dense in 16 bits, {SHARE_OF_PEAK:.0%} of it used", "H100"),
        ("assumed: a token", f"{MODEL.flops_a_token / 1e9:.1f} GFLOP", "2 × weights of the 80 layers"),
        ("so: one GPU, one model", f"{tokens_a_second():,.0f} tokens a second", "the two above"),
        ("assumed: an answer of the store", f"{LATENCY_MS:g} ms, {AT_ONCE} under way", "where many are needed at once"),
    ]
    return [*_head("constant", "value", "from"), *(_line(*row) for row in rows)]


def estimates() -> list[str]:
    """The table of runs: one column for each of SIZES."""
    runs = [Run(*size) for size in SIZES]
    heads = [f"10{'⁶' if run.pairs == 10**6 else '⁸'} pairs of {run.tokens:,} tokens" for run in runs]
    return [*_head("", *heads), *(_line(name, *(show(run) for run in runs)) for name, show in ROWS)]


def _head(*names: str) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def tables() -> dict[str, str]:
    return {"constants": "\n".join(constants()), "estimates": "\n".join(estimates())}


def rewritten(page: str) -> str:
    """The page with its tables made anew: what stands between `<!-- NAME -->` and `<!-- end -->`."""
    for name, table in tables().items():
        before, rest = page.split(f"<!-- {name} -->\n", 1)
        page = f"{before}<!-- {name} -->\n{table}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return page


def main(arguments: list[str]) -> None:
    if arguments == ["--write"]:
        PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    print("\n\n".join(tables().values()))


if __name__ == "__main__":
    main(sys.argv[1:])
