"""`dpo-score inspect OUT --row N`: what a run stored of one pair, token by token where it kept them.

Promises: row N is the N-th row that the run read, whether it was scored or rejected; the stored values are shown as
they are; texts only when the data is unchanged and the ids agree with the stored digest. Loads no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.text import Text

from dpo_score.cli.console import console
from dpo_score.cli.inspect import side_tokens
from dpo_score.data.types import EncodedPair, Pair, row_place
from dpo_score.engine.stages import part
from dpo_score.errors import UsageError, nearest
from dpo_score.escape import safe
from dpo_score.losses.ops import Floats
from dpo_score.results.run_folder import open_out, policy_names, settings
from dpo_score.results.source_text import Reader, stored_reader, text_source
from dpo_score.results.token_view import LEVELS, level, scale_of, token_shares
from dpo_score.storage.base import Store
from dpo_score.storage.commits import CommitRecord, read_records
from dpo_score.storage.manifest import Manifest

Row = Mapping[str, Any]
RAISED = ("", "black on #cfe3f5", "black on #7fb6e6", "bold black on #2b8cd9")
LOWERED = ("", "black on #fae0c3", "black on #f2ae66", "bold black on #e07b12")
SHOWN = ("chosen_rewards", "rejected_rewards", "margins", "margins_nats", "loss")
LOGPS = ("ref_chosen_logps", "ref_rejected_logps", "policy_chosen_logps", "policy_rejected_logps")
TOP = 5
NO_TOKENS = "no token values are stored: score again with --per-token (into another --out) to see which tokens count"


def inspect_out(out: str, number: int, asked: Sequence[str] | str | None) -> None:
    """Print row `number` (from 0) of the rows that OUT was scored from, for one policy or all."""
    store, manifest = open_out(out)
    names = _names(store, manifest, asked, out)
    row_id = row_id_at(store, manifest, number)
    screen = console()
    screen.print(Text(f"row {number}: {row_id}"))
    for line in _lines(store, manifest, row_id, number, names, plain=screen.color_system is None):
        screen.print(line, soft_wrap=True)


def _names(store: Store, manifest: Manifest, asked: Sequence[str] | str | None, out: str) -> list[str]:
    known = policy_names(store, manifest)
    names = [asked] if isinstance(asked, str) else list(asked or known)
    for name in names:
        if name not in known:
            raise UsageError(f"{out} has no scored policy {name!r}; {nearest(name, known)}")
    return names


def row_id_at(store: Store, manifest: Manifest, number: int) -> str:
    """The row id (without the part of an expanded row) of the `number`-th row that was read."""
    for record in read_records(store, "reference").values():
        if isinstance(record, CommitRecord) and record.start <= number < record.stop:
            return _sorted_ids(store, record)[number - record.start]
    raise UsageError(f"--row {number}: no committed block holds it; {manifest.total_rows:,} rows, numbered from 0")


def _sorted_ids(store: Store, record: CommitRecord) -> list[str]:
    """Every row of a block, scored or rejected, once, in reading order."""
    names = [part(folder, record.block, record.blocks) for folder in ("reference", "rejects/data", "rejects/reference")]
    found: set[tuple[int, ...]] = set()
    for name in names:
        if store.exists(name):
            ids = store.read_table(name, ["row_id"])["row_id"].to_pylist()
            found |= {row_place(row_id)[:2] for row_id in ids}
    return [f"{file}:{row}" for file, row in sorted(found)]


def _lines(
    store: Store, manifest: Manifest, row_id: str, number: int, names: Sequence[str], plain: bool
) -> Iterator[Text]:
    rows = {name: _stored(store, f"scores/{name}", row_id, number) for name in names}
    if not any(rows.values()):
        yield from _rejections(store, row_id, number, names)
        return
    reader, pairs = _texts(store, manifest, [row for found in rows.values() for row in found])
    if isinstance(reader, str):
        yield Text(safe(f"texts are left out: {reader}"), style="italic")
    for name, found in rows.items():
        beta = settings(manifest, name).beta
        for row in found:
            yield Text(f"\n{safe(name)} (β {beta:g})", style="bold")
            yield from _values(row)
            yield from _tokens(row, beta, reader, pairs.get(row["row_id"]), plain)


def _stored(store: Store, folder: str, row_id: str, number: int) -> list[Row]:
    """The rows of a source row (one, or several where it was expanded), from the block that holds it."""
    for record in read_records(store, folder if folder.startswith("scores/") else "reference").values():
        if isinstance(record, CommitRecord) and record.start <= number < record.stop:
            name = part(folder, record.block, record.blocks)
            return _matching(store.read_table(name), row_id) if store.exists(name) else []
    return []


def _matching(table: pa.Table, row_id: str) -> list[Row]:
    same = pc.or_(pc.equal(table["row_id"], row_id), pc.starts_with(table["row_id"], f"{row_id}:"))
    rows: list[Row] = table.filter(same).to_pylist()
    return rows


def _rejections(store: Store, row_id: str, number: int, names: Sequence[str]) -> Iterator[Text]:
    for folder in ("rejects/data", "rejects/reference", *(f"rejects/{name}" for name in names)):
        for row in _stored(store, folder, row_id, number):
            yield Text(safe(f"not scored ({folder}), {row['code']}: {row['reason']}"), style="bold")


def _texts(store: Store, manifest: Manifest, rows: Sequence[Row]) -> tuple[Reader | str, dict[str, Pair]]:
    source = text_source(store, manifest)
    if isinstance(source, str):
        return source, {}
    return stored_reader(source, manifest), source.pairs({row["row_id"] for row in rows})


def _values(row: Row) -> Iterator[Text]:
    counts = ", ".join(f"{side} {row[f'{side}_tokens']}" for side in ("prompt", "chosen", "rejected"))
    cut = [side for side in ("chosen", "rejected") if row[f"{side}_truncated"]]
    yield Text(f"tokens: {counts}{'; cut: ' + ', '.join(cut) if cut else ''}")
    yield Text(f"marks: {', '.join(row['marks'] or ()) or 'none'}")
    for names in (LOGPS, SHOWN):
        yield Text("  ".join(f"{name} {_number(row.get(name))}" for name in names))


def _number(value: float | None) -> str:
    return "null" if value is None else f"{value:.4f}"


def _tokens(row: Row, beta: float, reader: Reader | str, pair: Pair | None, plain: bool) -> Iterator[Text]:
    shares = stored_shares(row, beta)
    if shares is None:
        yield Text(NO_TOKENS, style="italic")
        return
    encoded = None if isinstance(reader, str) or pair is None else reader.encode(pair)
    if not isinstance(encoded, EncodedPair) or encoded.pair_digest != row["pair_digest"] or isinstance(reader, str):
        yield Text("token values are stored, but the text that they belong to cannot be made again", style="italic")
        return
    scale = scale_of(*shares.values())
    yield Text("β·(log π − log ρ) by token: blue raises a side's reward, orange lowers it", style="italic")
    for side, values in shares.items():
        found = side_tokens(reader.tokenizer, encoded, "chosen" if side == "chosen" else "rejected")
        scored = [token.text for token in found if token.scored]
        yield Text.assemble((side, "bold"), f"  {values.sum():+.4f}; most by {_most(scored, values)}")
        yield painted(scored, values, scale, plain)


def stored_shares(row: Row, beta: float) -> dict[str, Floats] | None:
    """β·(log π − log ρ) of each scored token of both sides, None where token values are not stored."""
    shares = {}
    for side in ("chosen", "rejected"):
        policy, reference = row.get(f"policy_{side}_token_logps"), row.get(f"ref_{side}_token_logps")
        if policy is None or reference is None:
            return None
        shares[side] = token_shares(policy, reference, beta)
    return shares


def _most(texts: Sequence[str], values: Floats) -> str:
    largest = np.argsort(-np.abs(values), kind="stable")[:TOP]
    return ", ".join(f"{safe(repr(texts[i]), 40)} {values[i]:+.3f}" for i in largest)


def painted(texts: Sequence[str], values: Floats, scale: float, plain: bool = False) -> Text:
    """Tokens coloured by value; `plain`: the value behind each token that has a colour."""
    line = Text()
    for text, value in zip(texts, values, strict=True):
        shown, strength = safe(text, 200, keep_newlines=True) or "·", level(float(value), scale)
        if plain:
            line.append(f"{shown}({value:+.2f})" if strength else shown)
            continue
        line.append(shown, (RAISED if strength >= 0 else LOWERED)[min(abs(strength), LEVELS)])
    return line
