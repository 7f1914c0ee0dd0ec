"""Sums equal lm-evaluation-harness's `HFLM.loglikelihood` on rows whose token boundary is stable.

Needs the `bench` extra and the LLMBar rows of shared/data; without them it is skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dpo_score.config.schema import TextSpec
from dpo_score.data.types import EncodedPair, Pair, Side, Source
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.models.numerics import Numerics
from dpo_score.tokenization.render import Renderer
from tests.tiny import byte_tokenizer, tiny_model

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "llmbar.parquet"
ROWS, LONGEST = 20, 700
SIDES: tuple[Side, Side] = ("chosen", "rejected")
BOUND = 1e-4, 2e-7
"""Largest |Δ| of a sum: absolute, and relative to it."""

pytestmark = [
    pytest.mark.skipif(not DATA.exists(), reason="shared/data is not here"),
    pytest.mark.filterwarnings("default"),
]


def stable_rows(renderer: Renderer, longest: int | None = LONGEST, most: int | None = ROWS) -> list[EncodedPair]:
    """Rows of less than `longest` bytes, no token of which spans the boundary, and no space for lm-eval to move
    across it."""
    rows = pq.read_table(DATA).to_pylist()
    short = [row for row in rows if longest is None or sum(len(row[k].encode()) for k in ("prompt", *SIDES)) < longest]
    pairs = [Pair(Source("llmbar", "f", 0, i), *(row[k] for k in ("prompt", *SIDES))) for i, row in enumerate(short)]
    found = [item for item in renderer.encode(pairs) if isinstance(item, EncodedPair)]
    stable = [item for item in found if "boundary_shift" not in item.marks and not str(item.pair.prompt)[-1:].isspace()]
    return stable[:most]


def harness_sums(model: Any, tokenizer: Any, rows: list[EncodedPair], softmax: str | None = None) -> list[float]:
    """`softmax`: the dtype of its log-softmax, where not the model's own."""
    instance = pytest.importorskip("lm_eval.api.instance")
    harness = pytest.importorskip("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype=softmax
    )
    asked = [
        (str(row.pair.prompt), str(getattr(row.pair, side)) + tokenizer.eos_token) for row in rows for side in SIDES
    ]
    requests = [
        instance.Instance(request_type="loglikelihood", doc={}, arguments=texts, idx=i) for i, texts in enumerate(asked)
    ]
    return [total for total, _ in harness.loglikelihood(requests, disable_tqdm=True)]


@pytest.mark.parametrize("bos", [False, True])
def test_sums_are_those_of_the_harness(bos: bool, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="the bench extra is not installed")
    torch.set_num_threads(1)
    model, tokenizer = tiny_model(), byte_tokenizer(bos=bos)
    rows = stable_rows(Renderer(tokenizer, TextSpec()))
    theirs = np.array(harness_sums(model, tokenizer, rows))
    scorer = PairScorer(model, Numerics("cpu", "cpu", "float32", "plain", "model", False, 8192, 1))
    results = scorer.score([row.sequence(side) for row in rows for side in SIDES])
    ours = np.array([float(np.sum(result.token_logps, dtype=np.float64)) for result in results])
    apart = np.abs(ours - theirs)
    with capsys.disabled():
        print(
            f"\nlm-eval: {len(ours)} answers of {-ours.max():.0f} to {-ours.min():.0f} nats, max |Δ| {apart.max():.1e}"
        )
    assert len(ours) == 2 * ROWS
    assert (apart <= np.maximum(BOUND[0], BOUND[1] * np.abs(ours))).all()
