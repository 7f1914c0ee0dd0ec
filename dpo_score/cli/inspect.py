"""`dpo-score inspect`: one pair as the model sees it, or what a run stored of it, token by token.

Of a data file: needs a tokenizer and no weights. Of a folder that a run wrote: row N is the N-th row that the run read,
scored or rejected; values are shown as they are stored; texts only where the data is unchanged and the ids agree with
the stored digest. Without colours (a pipe, NO_COLOR) scored tokens are in brackets, and values follow their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.text import Text

from dpo_score.cli.console import console, is_plain
from dpo_score.config.load import load_config
from dpo_score.data.dataset import Dataset, open_data, read_rows_at
from dpo_score.data.types import EncodedPair, Pair, Picture, Rejected, Side, row_place
from dpo_score.errors import UsageError, nearest
from dpo_score.escape import safe
from dpo_score.losses.ops import Floats
from dpo_score.results.run_folder import open_out, policy_names, settings
from dpo_score.results.source_text import Reader, make_reader, stored_reader, text_source
from dpo_score.results.token_view import LEVELS, Token, level, scale_of, side_tokens, stored_shares, tokens
from dpo_score.storage.base import Store
from dpo_score.storage.commits import CommitRecord, read_records
from dpo_score.storage.manifest import Manifest
from dpo_score.storage.open import open_store
from dpo_score.storage.stage import part_file

Row = Mapping[str, Any]
SCORED = ("bold black on bright_cyan", "bold black on cyan")
"""Two shades in turn, so that the ends of tokens show."""
CONTEXT = "dim"
RAISED = ("", "black on #cfe3f5", "black on #7fb6e6", "bold black on #2b8cd9")
LOWERED = ("", "black on #fae0c3", "black on #f2ae66", "bold black on #e07b12")
SHOWN_PIECE = 200
SHOWN = ("chosen_rewards", "rejected_rewards", "margins", "margins_nats", "loss")
LOGPS = ("ref_chosen_logps", "ref_rejected_logps", "policy_chosen_logps", "policy_rejected_logps")
TOP = 5
NO_TOKENS = "no token values are stored: score again with --per-token (into another --out) to see which tokens count"
SIDES: tuple[Side, Side] = ("chosen", "rejected")


def inspect(target: str, row: int, settings: dict[str, Any]) -> None:
    """Print row `row` (from 0) of a data file, a pipeline's data, or a folder that a run wrote."""
    if row < 0:
        raise UsageError(f"--row {row}: rows are numbered from 0")
    if open_store(target).exists("manifest.json"):
        inspect_out(target, row, settings.get("policy"))
        return
    is_pipeline = target.endswith((".yaml", ".yml"))
    config = load_config(target, settings) if is_pipeline else load_config(None, {**settings, "data": [target]})
    datasets = open_data(config)
    total = sum(dataset.rows for dataset in datasets)
    if row >= total:
        raise UsageError(f"--row {row}: the data holds {total:,} rows, numbered from 0")
    screen = console()
    reader = make_reader(config, datasets, say=lambda line: screen.print(Text(safe(line))))
    for item in read_rows_at(datasets, [row]):
        found = item if isinstance(item, Rejected) else reader.encode(item)
        for line in described(found, datasets, reader, plain=is_plain(screen)):
            screen.print(line, soft_wrap=True)


def described(
    item: EncodedPair | Rejected, datasets: Sequence[Dataset], reader: Reader, plain: bool = False
) -> Iterator[Text]:
    """One pair of a data file, line by line. `plain`: brackets instead of colours."""
    source = item.source if isinstance(item, Rejected) else item.pair.source
    dataset = next(d for d in datasets if d.spec.name == source.dataset)
    yield Text(safe(f"row {source.row_id}: row {source.row} of {source.file}; {dataset.summary()}"))
    if isinstance(item, Rejected):
        yield Text(safe(f"rejected, {item.code}: {item.reason}"), style="bold")
        if item.value_seen is not None:
            yield Text(safe(f"{item.column or 'value'}: {item.value_seen}", 300))
        return
    limit, truncation = reader.renderer.limit or "none", reader.renderer.text.truncation
    yield Text(f"pair {item.pair.pair_id}; limit {limit} tokens, {truncation}")
    yield Text(f"marks: {', '.join(item.marks) or 'none'}")
    mask = item.tokens.prompt_mask
    prompt = tokens(reader.tokenizer, item.tokens.prompt, mask, default=False)
    yield from pictures_of(item, reader)
    yield _heading("prompt", f"{len(prompt)} tokens, not scored" if mask is None else _counts(prompt))
    yield coloured(prompt, plain)
    for side in SIDES:
        found = side_tokens(reader.tokenizer, item, side)
        cut = ", cut" if getattr(item.tokens, f"{side}_truncated") else ""
        yield _heading(f"{side} (begins at token {len(prompt)})", _counts(found) + cut)
        yield coloured(found, plain)


def pictures_of(item: EncodedPair, reader: Reader) -> Iterator[Text]:
    """One line a picture: its size, its tokens, and where its file is."""
    processor = reader.renderer.processor
    for number, picture in enumerate(item.pair.pictures or ()):
        tokens_of = 0 if processor is None else processor.count(processor.ids(processor.replacement(*_size(picture))))
        place = picture.path if picture.row is None else f"{picture.column} of row {picture.row}"
        size = f"{picture.width} × {picture.height} pixels, {tokens_of} tokens"
        yield Text(safe(f"picture {number + 1}: {size}; {place}, sha256 {picture.sha256[:12]}"))


def _size(picture: Picture) -> tuple[int, int]:
    return picture.width, picture.height


def _counts(found: Sequence[Token]) -> str:
    return f"{len(found)} tokens, {sum(token.scored for token in found)} scored"


def _heading(name: str, note: str) -> Text:
    return Text.assemble((f"\n{name}", "bold"), f"  {note}")


def coloured(found: Sequence[Token], plain: bool) -> Text:
    """One line of tokens. A token that completes no character shows as ·."""
    line = Text()
    count = 0
    for token in found:
        shown = safe(token.text, SHOWN_PIECE, keep_newlines=True) or "·"
        if not token.scored:
            line.append(shown, CONTEXT)
            continue
        line.append(f"[{shown}]" if plain else shown, "" if plain else SCORED[count % 2])
        count += 1
    return line


# --- a folder that a run wrote ----------------------------------------------------------------------------------------


def inspect_out(out: str, number: int, asked: Sequence[str] | str | None) -> None:
    """Print row `number` (from 0) of the rows that OUT was scored from, for the policies asked for, or all."""
    store, manifest = open_out(out)
    known = policy_names(store, manifest)
    names = [asked] if isinstance(asked, str) else list(asked or known)
    for name in names:
        if name not in known:
            raise UsageError(f"{out} has no scored policy {name!r}; {nearest(name, known)}")
    row_id = row_id_at(store, manifest, number)
    screen = console()
    screen.print(Text(f"row {number}: {row_id}"))
    for line in _stored_lines(store, manifest, row_id, number, names, plain=is_plain(screen)):
        screen.print(line, soft_wrap=True)


def row_id_at(store: Store, manifest: Manifest, number: int) -> str:
    """The row id (without the part of an expanded row) of the `number`-th row that was read."""
    for record in read_records(store, "reference").values():
        if isinstance(record, CommitRecord) and record.start <= number < record.stop:
            return _sorted_ids(store, record)[number - record.start]
    raise UsageError(f"--row {number}: no committed block holds it; {manifest.total_rows:,} rows, numbered from 0")


def _sorted_ids(store: Store, record: CommitRecord) -> list[str]:
    """Every row of a block, scored or rejected, once, in reading order."""
    names = [
        part_file(folder, record.block, record.blocks) for folder in ("reference", "rejects/data", "rejects/reference")
    ]
    found: set[tuple[int, ...]] = set()
    for name in names:
        if store.exists(name):
            ids = store.read_table(name, ["row_id"])["row_id"].to_pylist()
            found |= {row_place(row_id)[:2] for row_id in ids}
    return [f"{file}:{row}" for file, row in sorted(found)]


def _stored_lines(
    store: Store, manifest: Manifest, row_id: str, number: int, names: Sequence[str], plain: bool
) -> Iterator[Text]:
    rows = {name: _stored(store, f"scores/{name}", row_id, number) for name in names}
    if not any(rows.values()):
        for folder in ("rejects/data", "rejects/reference", *(f"rejects/{name}" for name in names)):
            for row in _stored(store, folder, row_id, number):
                yield Text(safe(f"not scored ({folder}), {row['code']}: {row['reason']}"), style="bold")
        return
    reader, pairs = _texts(store, manifest, [row for found in rows.values() for row in found])
    if isinstance(reader, str):
        yield Text(safe(f"texts are left out: {reader}"), style="italic")
    for name, found in rows.items():
        beta = settings(manifest, name).beta
        for row in found:
            yield Text(f"\n{safe(name)} (β {beta:g})", style="bold")
            yield from _values(row)
            yield from _token_lines(row, beta, reader, pairs.get(row["row_id"]), plain)


def _stored(store: Store, folder: str, row_id: str, number: int) -> list[Row]:
    """The rows of a source row (one, or several where it was expanded), from the block that holds it."""
    for record in read_records(store, folder if folder.startswith("scores/") else "reference").values():
        if isinstance(record, CommitRecord) and record.start <= number < record.stop:
            name = part_file(folder, record.block, record.blocks)
            return _matching(store.read_table(name), row_id) if store.exists(name) else []
    return []


def _matching(table: pa.Table, row_id: str) -> list[Row]:
    same = pc.or_(pc.equal(table["row_id"], row_id), pc.starts_with(table["row_id"], f"{row_id}:"))
    rows: list[Row] = table.filter(same).to_pylist()
    return rows


def _texts(store: Store, manifest: Manifest, rows: Sequence[Row]) -> tuple[Reader | str, dict[str, Pair]]:
    """What renders the texts again, or why nothing does; and the pairs by row_id."""
    source = text_source(store, manifest)
    if isinstance(source, str):
        return source, {}
    return stored_reader(source, manifest), source.pairs({row["row_id"] for row in rows})


def _values(row: Row) -> Iterator[Text]:
    counts = ", ".join(f"{side} {row[f'{side}_tokens']}" for side in ("prompt", *SIDES))
    cut = [side for side in SIDES if row[f"{side}_truncated"]]
    yield Text(f"tokens: {counts}{'; cut: ' + ', '.join(cut) if cut else ''}")
    yield Text(f"marks: {', '.join(row['marks'] or ()) or 'none'}")
    for names in (LOGPS, SHOWN):
        shown = {name: row.get(name) for name in names}
        yield Text("  ".join(f"{n} {'null' if value is None else f'{value:.4f}'}" for n, value in shown.items()))


def _token_lines(row: Row, beta: float, reader: Reader | str, pair: Pair | None, plain: bool) -> Iterator[Text]:
    """Each side with the value of every token, where both the values and the text are there."""
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
    for side in SIDES:
        values, found = shares[side], side_tokens(reader.tokenizer, encoded, side)
        scored = [token.text for token in found if token.scored]
        yield Text.assemble((side, "bold"), f"  {values.sum():+.4f}; most by {_most(scored, values)}")
        yield painted(scored, values, scale, plain)


def _most(texts: Sequence[str], values: Floats) -> str:
    largest = np.argsort(-np.abs(values), kind="stable")[:TOP]
    return ", ".join(f"{safe(repr(texts[i]), 40)} {values[i]:+.3f}" for i in largest)


def painted(texts: Sequence[str], values: Floats, scale: float, plain: bool = False) -> Text:
    """Tokens coloured by value; `plain`: the value behind each token that has a colour."""
    line = Text()
    for text, value in zip(texts, values, strict=True):
        shown, strength = safe(text, SHOWN_PIECE, keep_newlines=True) or "·", level(float(value), scale)
        if plain:
            line.append(f"{shown}({value:+.2f})" if strength else shown)
            continue
        line.append(shown, (RAISED if strength >= 0 else LOWERED)[min(abs(strength), LEVELS)])
    return line
