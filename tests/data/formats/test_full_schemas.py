"""Public data sets with all their columns: one format fits, and it prefers what the labels prefer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.formats.full_schemas import FULL, Full
from tests.data.formats.test_registry import opened, preference, read

each_set = pytest.mark.parametrize("full", FULL, ids=lambda full: full.dataset)


@each_set
def test_the_whole_schema_has_one_format_and_one_polarity(full: Full, tmp_path: Path) -> None:
    found = opened(tmp_path, full.table(), **full.options).format
    assert (found.full_name, found.polarity) == (full.format, full.better)


@each_set
def test_the_labels_are_read_among_all_columns(full: Full, tmp_path: Path) -> None:
    assert [preference(item) for item in read(tmp_path, full.table(), **full.options)] == full.expected


@each_set
def test_a_turned_label_turns_every_pair(full: Full, tmp_path: Path) -> None:
    straight = {found for found in full.expected if isinstance(found, tuple)}
    turned = {preference(item) for item in read(tmp_path, full.table(flipped=True), **full.options)}
    assert {(b, a) for a, b in straight} == {found for found in turned if isinstance(found, tuple)}
