"""Whatever stands in a file, reading and rendering it ends in pairs, rejects with a known code, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_score.config.schema import DataSpec, TextSpec
from dpo_score.data.dataset import open_datasets, read_pairs
from dpo_score.data.formats.registry import FORMATS
from dpo_score.data.types import REJECT_CODES, EncodedPair, Pair, Rejected
from dpo_score.errors import UsageError
from dpo_score.tokenization.render import Renderer
from tests.data.formats.golden import GOLDEN
from tests.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
COLUMNS = sorted({name for golden in GOLDEN for name, _ in golden.schema} | {"tools", "chat_template_kwargs"})
scalars = st.none() | st.booleans() | st.integers(-4, 2**33) | st.floats() | st.text(max_size=6)
roles = st.sampled_from(["user", "assistant", "system", "tool", "gpt", "human", "", None, 3])
messages = st.fixed_dictionaries({"role": roles, "content": scalars | st.just("text")}) | st.fixed_dictionaries(
    {"from": roles, "value": scalars, "tool_calls": scalars}
)
values = st.recursive(
    scalars | messages,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "rank", "answer"]), inner),
    max_leaves=6,
)
relaxed = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


def survives(path: Path, **options: Any) -> None:
    """Read and render the whole set; only a UsageError of one paragraph may stop it."""
    paragraph = ""
    try:
        [dataset] = open_datasets([DataSpec(name="set", path=str(path), **options)])
        found = list(read_pairs([dataset], 0, dataset.rows))
        encoded = Renderer(TOKENIZER, TextSpec(render="chat")).encode([p for p in found if isinstance(p, Pair)])
    except UsageError as error:
        paragraph = str(error)
    if paragraph:
        assert "\n" not in paragraph
        return
    assert len(found) >= dataset.rows
    for item in [*found, *encoded]:
        assert isinstance(item, Pair | EncodedPair | Rejected)
        if isinstance(item, Rejected):
            assert item.code in REJECT_CODES
    assert len({item.source.row_id for item in found}) == len(found)


@given(
    rows=st.lists(st.dictionaries(st.sampled_from(COLUMNS), values, min_size=1), min_size=1, max_size=4),
    auto=st.booleans(),
    data=st.data(),
)
@relaxed
def test_any_json_lines(rows: list[dict[str, Any]], auto: bool, data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    names = ["auto"] if auto else [row.full_name for row in FORMATS]
    survives(path, format=data.draw(st.sampled_from(names)))


@given(golden=st.sampled_from(GOLDEN), data=st.data())
@relaxed
def test_any_damage_to_a_good_row(golden: Any, data: st.DataObject, tmp_path: Path) -> None:
    """One cell of a row that the format knows is replaced by something else."""
    rows = [dict(row) for row in golden.rows]
    row = data.draw(st.sampled_from(rows))
    row[data.draw(st.sampled_from(sorted(row)))] = data.draw(values)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*golden.rows, *rows])))
    survives(path, format=golden.format, **golden.options)


TYPES = st.recursive(
    st.sampled_from(
        [pa.string(), pa.int64(), pa.float32(), pa.bool_(), pa.null(), pa.binary(), pa.date32(), pa.json_(), pa.int8()]
    ),
    lambda inner: (
        inner.map(pa.list_)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text"]), inner, min_size=1).map(
            lambda fields: pa.struct(list(fields.items()))
        )
    ),
    max_leaves=4,
)


@given(schema=st.dictionaries(st.sampled_from(COLUMNS), TYPES, min_size=1, max_size=5), count=st.integers(0, 3))
@relaxed
def test_any_arrow_schema_of_nulls(schema: dict[str, pa.DataType], count: int, tmp_path: Path) -> None:
    table = pa.table({name: pa.nulls(count, type_) for name, type_ in schema.items()})
    path = tmp_path / "rows.parquet"
    try:
        pq.write_table(table, path)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return
    survives(path)


@given(content=st.binary(max_size=200), name=st.sampled_from(["a.parquet", "a.jsonl", "a.json", "a.jsonl.gz"]))
@relaxed
def test_any_bytes(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    survives(tmp_path / name)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_in_a_parquet_file(share: float, data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(GOLDEN[9].table(), path, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(int(len(content) * (share - 0.2)), int(len(content) * share)))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(content))
    survives(path)
