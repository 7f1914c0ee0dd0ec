"""The noise floor: zero where nothing is rounded differently, honest in 16 bits, a reason where it cannot be had."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpo_score.logprobs.noise_floor import noise_floor
from dpo_score.logprobs.padded import PaddedPath
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.logprobs.types import Unscored
from tests.families import family
from tests.logprobs.engine import numerics_for, sums
from tests.logprobs.sequences import awkward


def scored_by(model, dtype):
    numerics = numerics_for(model, "fast", dtype=dtype)
    return numerics, PairScorer(model, numerics).score(awkward())


def test_in_fp32_it_is_rounding():
    model = family("llama")
    numerics, results = scored_by(model, "float32")
    floor = noise_floor(model, numerics, awkward(), results)
    assert floor.logp_max < 1e-4
    assert floor.margin_max < 1e-4
    assert floor.sequences == len(awkward())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_it_is_the_distance_to_the_same_weights_in_fp32(dtype):
    model = family("llama", dtype=getattr(torch, dtype))
    numerics, results = scored_by(model, dtype)
    floor = noise_floor(model, numerics, awkward(), results, couples=[(0, 1), (2, 3)])
    twin = family("llama", dtype=getattr(torch, dtype)).float()
    exact = sums(PairScorer(twin, numerics_for(twin, "plain")).score(awkward()))
    deltas = sums(results) - exact
    np.testing.assert_allclose(floor.deltas, deltas, atol=1e-4)
    assert floor.logp_max == pytest.approx(np.abs(deltas).max(), abs=1e-4)
    margins = [deltas[0] - deltas[1], deltas[2] - deltas[3]]
    assert floor.margin_mean == pytest.approx(np.abs(margins).mean(), abs=1e-4)


def test_unscored_sequences_are_left_out():
    model = family("llama")
    numerics, results = scored_by(model, "float32")
    floor = noise_floor(model, numerics, awkward(), [Unscored("too_large", "no room"), *results[1:]])
    assert floor.sequences == len(awkward()) - 1


def test_nothing_scored_means_no_floor():
    model = family("llama")
    numerics, _ = scored_by(model, "float32")
    floor = noise_floor(model, numerics, awkward()[:1], [Unscored("too_large", "no room")])
    assert floor.logp_max is None
    assert "could be scored" in floor.reason


def test_quantised_weights_have_no_fp32_twin():
    model = family("llama")
    numerics, results = scored_by(model, "float32")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    floor = noise_floor(model, numerics, awkward(), results)
    assert floor.logp_max is None
    assert "int8" in floor.reason


def test_no_room_for_the_second_pass_is_a_reason_not_an_error(monkeypatch):
    model = family("llama")
    numerics, results = scored_by(model, "float32")

    def full(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(PaddedPath, "compute", full)
    floor = noise_floor(model, numerics, awkward(), results)
    assert (floor.logp_max, floor.deltas) == (None, ())
    assert "cpu has no room" in floor.reason


def test_another_error_of_the_second_pass_is_raised(monkeypatch):
    model = family("llama")
    numerics, results = scored_by(model, "float32")

    def breaks(*_args):
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(PaddedPath, "compute", breaks)
    with pytest.raises(RuntimeError, match="shape"):
        noise_floor(model, numerics, awkward(), results)
