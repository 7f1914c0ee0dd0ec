"""Compiled layers: how many graphs a model needs, however many layers it has and whatever sizes its packs have.

A graph more for each size would be compiled anew in the middle of a job.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpo_score.logprobs.packed import PackedPath
from dpo_score.models.parts import model_parts
from tests.families import family
from tests.logprobs.engine import numerics_for
from tests.logprobs.sequences import awkward


@pytest.mark.parametrize(("name", "graphs"), [("llama", 1), ("gemma2", 2)])  # gemma2: with and without a window
def test_layers_share_their_graphs_and_packs_of_all_sizes_do(name, graphs, monkeypatch):
    torch._dynamo.reset()
    made = []

    def counted(graph, inputs):
        made.append(graph)
        return graph.forward

    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda layer, **given: compiled(layer, **given, backend=counted))
    model = family(name)
    path = PackedPath(model_parts(model), numerics_for(model, "fast", compile=True))
    sequences = awkward()
    for begin, end in ((0, 3), (2, 9), (0, len(sequences)), (5, 7)):
        path.compute(sequences[begin:end])
    assert len(made) == graphs
