"""Entries in arrays and in Parquet: nothing changes on the way, and no change goes unseen."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_score.errors import DamageError
from dpo_score.storage.cache.blocks import SequenceLogps, entry_at, from_table, is_finite, pack, row_checks, to_table

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
STATS = st.sets(st.sampled_from(["entropy", "log_sum_sq_probs", "top1"]))


@st.composite
def entry(draw: st.DrawFn) -> SequenceLogps:
    length = draw(st.integers(0, 4))
    values = st.lists(FLOATS, min_size=length, max_size=length).map(lambda v: np.array(v, np.float32))
    return SequenceLogps(draw(values), {name: draw(values) for name in sorted(draw(STATS))})


ENTRIES = st.dictionaries(st.binary(min_size=16, max_size=16), entry(), max_size=6)


def same(one: SequenceLogps, two: SequenceLogps) -> bool:
    return (
        one.token_logps.tobytes() == two.token_logps.tobytes()
        and one.token_logps.dtype == two.token_logps.dtype == np.float32
        and {n: v.tobytes() for n, v in one.stats.items()} == {n: v.tobytes() for n, v in two.stats.items()}
    )


@settings(max_examples=200, deadline=None)
@given(ENTRIES)
def test_entries_survive_the_table_bit_for_bit(entries: Mapping[bytes, SequenceLogps]) -> None:
    block = from_table(to_table(pack(entries)), "x")
    assert [block.keys[i].tobytes() for i in range(len(entries))] == list(entries)
    assert all(same(entry_at(block, i), known) for i, known in enumerate(entries.values()))
    assert block.content_digest == pack(entries).content_digest


@settings(max_examples=100, deadline=None)
@given(ENTRIES.filter(bool), st.data())
def test_a_slice_of_a_table_reads_alike(entries: Mapping[bytes, SequenceLogps], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(entries) - 1))
    block = from_table(to_table(pack(entries)).slice(start), "x")
    assert all(same(entry_at(block, i), known) for i, known in enumerate(list(entries.values())[start:]))


def many(count: int = 40) -> dict[bytes, SequenceLogps]:
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(rng.integers(0, 6)).astype(np.float32) for _ in range(count)]
    return {rng.bytes(16): SequenceLogps(v, {"entropy": v * 2} if len(v) % 2 else {}) for v in values}


def test_any_flipped_bit_of_a_value_or_key_changes_its_row_check() -> None:
    block = pack(many())
    clean = row_checks(block)
    arrays = {"keys": block.keys.copy(), **{name: values.copy() for name, values in block.columns.items()}}
    for name, array in arrays.items():
        own = {n: v for n, v in arrays.items() if n != "keys"}
        changed = type(block)(arrays["keys"], block.offsets, own, block.present)
        raw = array.reshape(-1).view(np.uint8)
        skip = ~np.repeat(np.repeat(block.present["entropy"], np.diff(block.offsets)), 4) if name == "entropy" else None
        for byte in range(len(raw)):
            if skip is not None and skip[byte]:
                continue
            for bit in range(8):
                raw[byte] ^= 1 << bit
                assert (row_checks(changed) != clean).sum() == 1, (name, byte, bit)
                raw[byte] ^= 1 << bit


def test_values_moved_between_rows_or_columns_are_found() -> None:
    table = to_table(pack(many()))
    logps, entropy = table.column("token_logps"), table.column("entropy")
    position = table.schema.get_field_index("token_logps")
    with pytest.raises(DamageError, match=r"checksum|length"):
        from_table(table.set_column(position, "token_logps", logps.take(pa.array(range(39, -1, -1)))), "x")
    swapped = table.set_column(position, "token_logps", entropy.combine_chunks().fill_null([]))
    with pytest.raises(DamageError, match=r"checksum|length"):
        from_table(swapped, "x")


def test_finite() -> None:
    good, bad = np.zeros(2, np.float32), np.array([0, -np.inf], np.float32)
    assert is_finite(SequenceLogps(good, {"a": good}))
    assert not is_finite(SequenceLogps(bad, {"a": good}))
    assert not is_finite(SequenceLogps(good, {"a": np.full(2, np.nan, np.float32)}))


def test_a_statistic_of_another_length_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="one value per scored token"):
        pack({b"k" * 16: SequenceLogps(np.zeros(2, np.float32), {"entropy": np.zeros(3, np.float32)})})
