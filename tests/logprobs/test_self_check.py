"""The probe accepts models the fast path fits, and trips over each way a shared mask or a head can be wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_score.errors import ModelError
from dpo_score.logprobs import packed as fast
from dpo_score.logprobs import self_check as verify
from dpo_score.logprobs.attention import interface as attention
from dpo_score.logprobs.packing import lay_out
from dpo_score.logprobs.self_check import probe, settle, smallest_window, verify_fast_path
from dpo_score.models.parts import ModelParts, model_parts
from tests.families import family
from tests.logprobs.engine import numerics_for


def verdict_of(name, dtype=torch.float32):
    model = family(name, dtype=dtype)
    return verify_fast_path(model, numerics_for(model, "fast", dtype=str(dtype).removeprefix("torch.")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_model_it_fits_passes(name, dtype):
    assert verdict_of(name, dtype).ok


def branches_see_each_other(monkeypatch):
    def one_segment_per_group(*given):
        pack = lay_out(*given)
        merged = [s for s in pack.segments if not s.prefix_length]
        ends = [s.start for s in merged[1:]] + [len(pack.ids)]
        table = np.array([(s.start, 0, s.start, end - s.start) for s, end in zip(merged, ends, strict=True)])
        return replace(pack, segment_table=table)

    monkeypatch.setattr(fast, "lay_out", one_segment_per_group)


def positions_do_not_restart(monkeypatch):
    def running_positions(*given):
        pack = lay_out(*given)
        return replace(pack, positions=np.arange(len(pack.ids)))

    monkeypatch.setattr(fast, "lay_out", running_positions)


def argument_dropped(name):
    def breaks(monkeypatch):
        whole = attention.forward
        monkeypatch.setattr(attention, "forward", lambda *args, **given: whole(*args, **{**given, name: None}))

    return breaks


def final_cap_dropped(monkeypatch):
    changed_head(monkeypatch, cap=None)


def logit_scale_dropped(monkeypatch):
    changed_head(monkeypatch, scale=1.0)


def changed_head(monkeypatch, **changes):
    def dissect_wrongly(model):
        parts = model_parts(model)
        return ModelParts(parts.model, parts.body, replace(parts.head, **changes), parts.stateful)

    monkeypatch.setattr(verify, "model_parts", dissect_wrongly)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "breaks"),
    [
        ("llama", branches_see_each_other),
        ("llama", positions_do_not_restart),
        ("gpt2", positions_do_not_restart),
        ("mistral", argument_dropped("sliding_window")),
        ("gemma3_text", argument_dropped("sliding_window")),
        ("gemma2", argument_dropped("softcap")),
        ("gemma2", final_cap_dropped),
        ("gpt_oss", argument_dropped("s_aux")),
        ("cohere", logit_scale_dropped),
        ("granite", logit_scale_dropped),
    ],
)
def test_a_broken_path_trips_it(monkeypatch, name, breaks, dtype):
    breaks(monkeypatch)
    verdict = verdict_of(name, dtype)
    assert not verdict.ok
    assert verdict.max_delta > 1e-3


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon", "mamba", "qwen3_next", "falcon_h1"])
def test_a_model_it_does_not_fit_is_refused_even_when_asked(name):
    assert not verdict_of(name).ok


def test_a_refused_model_settles_on_the_plain_path():
    model = family("bloom")
    numerics, verdict = settle(model, numerics_for(model, "fast", compile=True))
    assert (numerics.path, numerics.compile) == ("plain", False)
    assert not verdict.ok


def test_an_accepted_model_keeps_its_numerics():
    model = family("llama")
    asked = numerics_for(model, "fast")
    assert settle(model, asked)[0] == asked
    plain = numerics_for(model, "plain")
    assert settle(model, plain) == (plain, None)


def test_the_probe_holds_what_breaks_first():
    model = family("mistral")
    sequences = probe(model.config)
    window = smallest_window(model.config)
    assert {len(s.prompt) for s in sequences} >= {0, 1}
    assert any(len(s.prompt) > window for s in sequences)
    assert max(sum(t.prompt.tobytes() == s.prompt.tobytes() for t in sequences) for s in sequences) == 3


def test_a_16_bit_model_that_overflows_the_probe_is_judged_in_fp32():
    model = family("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3e4)
        model.model.layers[0].mlp.gate_proj.weight.mul_(1e2)
    model = model.to(torch.float16)
    verdict = verify_fast_path(model, numerics_for(model, "fast", dtype="float16"))
    assert verdict.ok, verdict
    assert "agree" in verdict.reason


def test_an_error_inside_a_model_is_a_verdict(monkeypatch):
    def fails(*_args, **_given):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(attention, "forward", fails)
    verdict = verdict_of("llama")
    assert not verdict.ok
    assert "cannot be multiplied" in verdict.reason


@pytest.mark.parametrize("where", ["fast", "twin"])
def test_no_room_for_the_check_is_an_error_and_no_verdict(monkeypatch, where):
    """A verdict would be remembered, and the memory may be free the next time."""

    def full(*_args, **_given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(*((fast.PackedPath, "compute") if where == "fast" else (verify, "_ordinary")), full)
    with pytest.raises(ModelError, match=r"fast path in float32 does not fit on cpu .*--quantization"):
        verdict_of("llama")
