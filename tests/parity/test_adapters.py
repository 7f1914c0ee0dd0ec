"""A spread of adapters as PEFT writes them, ours against PEFT's own; the rest by `python -m tests.parity.adapters`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.adapters import KINDS, SPREAD, not_described, tried


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, while the test makes and reads the adapter
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", SPREAD)
def test_gives_what_peft_gives(name: str, tmp_path: Path) -> None:
    line = tried(name, tmp_path)
    assert not line.wrong, line
    assert (line.found == "refused") == bool(KINDS[name].refused), line


def test_every_kind_of_peft_is_described() -> None:
    assert not_described() == []
