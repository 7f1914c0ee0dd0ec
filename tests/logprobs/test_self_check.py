"""The probe accepts models the fast path fits, and trips over each way a shared mask or a head can be wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_score.data.types import TokenSequence
from dpo_score.errors import ModelError
from dpo_score.logprobs import lengths
from dpo_score.logprobs import packed as fast
from dpo_score.logprobs import self_check as verify
from dpo_score.logprobs.attention import interface as attention
from dpo_score.logprobs.lengths import LengthRules, smallest_window
from dpo_score.logprobs.packing import lay_out
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.logprobs.self_check import check_model, probe_rows
from dpo_score.models.parts import ModelParts, model_parts
from tests.families import family
from tests.logprobs.engine import numerics_for
from tests.logprobs.sequences import ids
from tests.tiny import tiny_config


def check_of(name, dtype=torch.float32, **changes):
    model = family(name, dtype=dtype, **changes)
    return check_model(model, numerics_for(model, "fast", dtype=str(dtype).removeprefix("torch.")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_model_it_fits_passes(name, dtype):
    assert check_of(name, dtype).numerics.path == "fast"


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
        ("gpt_oss", argument_dropped("s_aux")),
    ],
)
def test_a_broken_path_trips_it(monkeypatch, name, breaks, dtype):
    breaks(monkeypatch)
    check = check_of(name, dtype)
    assert check.numerics.path == "plain"
    assert check.max_delta > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "breaks"),
    [("gemma2", final_cap_dropped), ("cohere", logit_scale_dropped), ("granite", logit_scale_dropped)],
)
def test_a_head_that_is_misread_is_an_error_because_every_path_reads_it(monkeypatch, name, breaks, dtype):
    breaks(monkeypatch)
    with pytest.raises(ModelError, match="do not get the values that its own"):
        check_of(name, dtype)


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon", "mamba"])
def test_a_model_it_does_not_fit_is_refused_even_when_asked(name):
    numerics = check_of(name).numerics
    assert (numerics.path, numerics.compile, numerics.one_row) == ("plain", False, False)


@pytest.mark.parametrize("path", ["fast", "plain"])
def test_an_accepted_model_keeps_its_numerics(path):
    model = family("llama")
    asked = numerics_for(model, path)
    assert check_model(model, asked).numerics == asked


def test_the_probe_holds_what_breaks_first():
    model = family("mistral")
    sequences = probe_rows(model.config)
    window = smallest_window(model.config.to_dict())
    assert {len(s.prompt) for s in sequences} >= {0, 1}
    assert any(len(s.prompt) > window for s in sequences)
    assert max(sum(t.prompt.tobytes() == s.prompt.tobytes() for t in sequences) for s in sequences) == 3


def test_a_16_bit_model_that_overflows_the_probe_is_judged_in_fp32():
    model = family("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3e4)
        model.model.layers[0].mlp.gate_proj.weight.mul_(1e2)
    model = model.to(torch.float16)
    check = check_model(model, numerics_for(model, "fast", dtype="float16"))
    assert check.numerics.path == "fast", check
    assert "agree" in check.reason


def test_an_error_inside_a_pack_is_a_reason_for_the_plain_path(monkeypatch):
    def fails(*_args, **_given):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(attention, "forward", fails)
    check = check_of("llama")
    assert check.numerics.path == "plain"
    assert "cannot be multiplied" in check.reason


@pytest.mark.parametrize("where", ["fast", "ordinary"])
def test_no_room_for_the_check_is_an_error_and_no_result(monkeypatch, where):
    """A result would be remembered, and the memory may be free the next time."""

    def full(*_args, **_given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(*((fast.PackedPath, "compute") if where == "fast" else (verify.Probe, "alone")), full)
    with pytest.raises(ModelError, match=r"check of LlamaForCausalLM in float32 does not fit on cpu .*--quantization"):
        check_of("llama")


LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64}


def length_dependent(name="phi3", kind="longrope"):
    """A model whose position encoding looks at the longest row of a forward."""
    if kind == "longrope":
        rope = {**LONG_ROPE, "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0]}
        own = {"sliding_window": None, "original_max_position_embeddings": 64} if name == "phi3" else {}
        return family(name, rope_parameters=rope, max_position_embeddings=512, **own)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
    return family(name, rope_parameters=rope, max_position_embeddings=64)


def rows_around(length):
    """Rows on both sides of a length and exactly at it, that share a prompt, and short ones."""
    rng = np.random.default_rng(0)
    prompt = ids(rng, length - 4)
    rows = [TokenSequence(prompt, ids(rng, n)) for n in (1, 3, 4, 5, 6, 30)]
    return [*rows, *(TokenSequence(ids(rng, p), ids(rng, n)) for p, n in ((0, 9), (12, 5), (12, 80), (90, 20)))]


@pytest.mark.parametrize("path", ["fast", "plain"])
@pytest.mark.parametrize(("name", "kind"), [("phi3", "longrope"), ("llama", "longrope"), ("llama", "dynamic")])
def test_rows_on_both_sides_of_a_length_get_the_values_they_have_alone(name, kind, path):
    model = length_dependent(name, kind)
    numerics = numerics_for(model, path, batch_tokens=4096)
    assert check_model(model, numerics).numerics == numerics
    rows = rows_around(64)
    together = PairScorer(model, numerics).score(rows)
    for result, row in zip(together, rows, strict=True):
        fresh = length_dependent(name, kind)
        np.testing.assert_allclose(result.token_logps, alone(fresh, row), atol=1e-4, rtol=0)


def alone(model, row):
    """Scored log-probabilities of a row from one forward of the model on it."""
    whole = torch.from_numpy(np.concatenate([row.prompt, row.response]).astype(np.int64))
    with torch.inference_mode():
        logp = torch.log_softmax(model(input_ids=whole[None], use_cache=False).logits[0].double(), -1)
    at = torch.from_numpy(row.scored_positions)
    return logp[at - 1, whole[at]].numpy()


@pytest.mark.parametrize("path", ["fast", "plain"])
def test_a_length_that_no_rule_knows_of_is_seen_and_rows_are_computed_one_at_a_time(monkeypatch, path):
    """Whatever a model is called: it is asked what it does."""
    for module in ("packed", "padded", "self_check"):
        monkeypatch.setattr(f"dpo_score.logprobs.{module}.length_rules", lambda config: LengthRules())
    model = length_dependent()
    numerics = check_model(model, numerics_for(model, path, batch_tokens=4096)).numerics
    assert (numerics.path, numerics.one_row) == ("plain", True)
    rows = rows_around(64)
    for result, row in zip(PairScorer(model, numerics).score(rows), rows, strict=True):
        np.testing.assert_allclose(result.token_logps, alone(model, row), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["phimoe", "mistral", "lfm2"])
def test_rows_above_a_length_that_was_not_tried_are_computed_by_the_model_itself(name, monkeypatch):
    """PhiMoE's attention does not say how wide its window is: the shared packs of rows above it would be wrong."""
    monkeypatch.setattr(lengths, "LONGEST_PROBE", 64)
    settings = {"phimoe": {"num_local_experts": 4}, "lfm2": {"layer_types": ["conv", "full_attention"]}}.get(name, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name, sliding_window=100, **settings)).eval()
    numerics = check_model(model, numerics_for(model, "fast", batch_tokens=4096)).numerics
    assert numerics.path == "fast"
    rows = rows_around(100)
    scorer = PairScorer(model, numerics)
    for result, row in zip(scorer.score(rows), rows, strict=True):
        np.testing.assert_allclose(result.token_logps, alone(model, row), atol=1e-4, rtol=0)
    assert scorer.forwards > sum(lengths.row_length(row) > 100 for row in rows)


@pytest.mark.parametrize(
    ("settings", "tried", "alone"),
    [
        ({"sliding_window": 4096}, (), None),
        ({"sliding_window": 32_768}, (), 32_768),
        ({"sliding_window": 32_768, "use_sliding_window": False}, (), None),
        ({"index_topk": 2048}, (2048,), None),
        ({"attention_chunk_size": 8192, "floor_scale": 8192}, (8192,), None),
        ({"sparse_config": {"block_size": 64, "topk": 16, "dense_len": 16_384}}, (16, 64), 16_384),
        ({"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 8192}}, (), None),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 16_384}}, (), None),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 16_384,
                              "llama_4_scaling_beta": 0.1}}, (), 16_384),
        ({"rope_parameters": {"rope_type": "new", "original_max_position_embeddings": 4096}}, (4096,), None),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32_768}}, (), 32_768),
        ({"vision_config": {"window_size": 112}, "quantization_config": {"weight_block_size": [128, 128]}}, (), None),
        ({"id2label": {0: "a"}, "moe_topk": True}, (), None),
    ],
)  # fmt: skip
def test_lengths_that_a_configuration_names(settings, tried, alone):
    config = {"max_position_embeddings": 131_072, **settings}
    assert lengths.changing_lengths(config) == tried
    assert lengths.length_rules(config).alone_above == alone


def bidirectional(name):
    if name == "bert":
        return family("bert", is_decoder=False)
    return family("gemma3_text", use_bidirectional_attention=True)


@pytest.mark.parametrize("path", ["fast", "plain"])
@pytest.mark.parametrize("name", ["bert", "gemma3_text"])
def test_a_model_that_is_not_causal_is_refused_with_the_measured_change(name, path):
    model = bidirectional(name)
    with pytest.raises(ModelError, match=r"not causal: another last token moves .* by up to [\d.e+-]+ nats"):
        check_model(model, numerics_for(model, path))


def test_a_model_that_remembers_earlier_rows_is_refused():
    model = family("llama")
    model.register_buffer("seen", torch.zeros(()))

    def drifts(module, args, output):
        module.seen += 1
        output.logits = output.logits * (1 + 0.01 * module.seen)

    model.register_forward_hook(drifts)
    with pytest.raises(ModelError, match="depends on what was computed before"):
        check_model(model, numerics_for(model, "plain"))
