"""A spread of architectures, tiny and random, scored as a run would and held against float64; the rest by
`python -m tests.parity.architectures`."""

from __future__ import annotations

import pytest

from tests.parity.architectures import SPREAD, tried

PLAIN = ("bert", "bloom", "mamba", "llama4_text", "t5", "fsmt")
ONE_ROW = ("deepseek_v32",)
REFUSED = ("gemma3_text+bidirectional", "bert+encoder", "cpmant")


@pytest.mark.parametrize("name", SPREAD)
def test_is_scored_right_or_refused(name):
    line = tried(name)
    assert not line.wrong, line
    way = {**dict.fromkeys(PLAIN, "plain"), **dict.fromkeys(ONE_ROW, "plain, one row")}.get(name, "fast")
    assert line.way == ("refused" if name in REFUSED else way), line
