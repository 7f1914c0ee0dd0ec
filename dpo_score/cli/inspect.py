"""`dpo-score inspect`: one pair as the model sees it, or what a run stored of it.

Promises: needs a tokenizer and no weights; text of the data reaches the terminal only through `escape.safe`, never as
markup. Without colours (a pipe, NO_COLOR) scored tokens stand in brackets. Computes no log-probability.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.text import Text

from dpo_score.cli.console import console
from dpo_score.config.load import load_config
from dpo_score.data.dataset import Dataset, open_data, read_rows_at
from dpo_score.data.types import EncodedPair, Pair, Rejected, Side
from dpo_score.errors import UsageError
from dpo_score.escape import safe
from dpo_score.results.source_text import Reader, make_reader, pieces
from dpo_score.storage.open import open_store

SCORED = ("bold black on bright_cyan", "bold black on cyan")
"""Two shades in turn, so that the ends of tokens show."""
CONTEXT = "dim"
SHOWN_PIECE = 200


@dataclass(frozen=True, slots=True)
class Token:
    """A token as text, whether it is scored."""

    text: str
    scored: bool


def inspect(target: str, row: int, settings: dict[str, Any]) -> None:
    """Print row `row` (from 0) of a data file, a pipeline's data, or a folder that a run wrote."""
    if row < 0:
        raise UsageError(f"--row {row}: rows are numbered from 0")
    if open_store(target).exists("manifest.json"):
        from dpo_score.cli.inspect_output import inspect_out

        inspect_out(target, row, settings.get("policy"))
        return
    is_pipeline = target.endswith((".yaml", ".yml"))
    config = load_config(target, settings) if is_pipeline else load_config(None, {**settings, "data": [target]})
    datasets = open_data(config)
    items = _row(datasets, row)
    screen = console()
    reader = make_reader(config, datasets, say=lambda line: screen.print(Text(safe(line))))
    for item in items:
        found = item if isinstance(item, Rejected) else reader.encode(item)
        for line in described(found, datasets, reader, plain=screen.color_system is None):
            screen.print(line, soft_wrap=True)


def _row(datasets: Sequence[Dataset], row: int) -> list[Pair | Rejected]:
    total = sum(dataset.rows for dataset in datasets)
    if row >= total:
        raise UsageError(f"--row {row}: the data holds {total:,} rows, numbered from 0")
    return read_rows_at(datasets, [row])


def described(
    item: EncodedPair | Rejected, datasets: Sequence[Dataset], reader: Reader, plain: bool = False
) -> Iterator[Text]:
    """What is to be said of one pair, line by line. `plain`: brackets instead of colours."""
    source = item.source if isinstance(item, Rejected) else item.pair.source
    dataset = next(d for d in datasets if d.spec.name == source.dataset)
    yield Text(safe(f"row {source.row_id}: row {source.row} of {source.file}; {dataset.summary()}"))
    if isinstance(item, Rejected):
        yield Text(safe(f"rejected, {item.code}: {item.reason}"), style="bold")
        if item.value_seen is not None:
            yield Text(safe(f"{item.column or 'value'}: {item.value_seen}", 300))
        return
    yield Text(
        f"pair {item.pair.pair_id}; limit {reader.renderer.limit or 'none'} tokens, {reader.renderer.text.truncation}"
    )
    yield Text(f"marks: {', '.join(item.marks) or 'none'}")
    yield from _sides(item, reader.tokenizer, plain)


def _sides(item: EncodedPair, tokenizer: Any, plain: bool) -> Iterator[Text]:
    mask = item.tokens.prompt_mask
    prompt = tokens(tokenizer, item.tokens.prompt, mask, default=False)
    yield _heading("prompt", f"{len(prompt)} tokens, not scored" if mask is None else _scored(prompt))
    yield coloured(prompt, plain)
    sides: tuple[Side, Side] = ("chosen", "rejected")
    for side in sides:
        found = side_tokens(tokenizer, item, side)
        cut = ", cut" if getattr(item.tokens, f"{side}_truncated") else ""
        yield _heading(f"{side} (begins at token {len(prompt)})", _scored(found) + cut)
        yield coloured(found, plain)


def side_tokens(tokenizer: Any, item: EncodedPair, side: Side) -> list[Token]:
    """The tokens of one answer; the very first token of a sequence has no predecessor and is never scored."""
    positions = item.sequence(side).scored_positions - len(item.tokens.prompt)
    ids = item.tokens.chosen if side == "chosen" else item.tokens.rejected
    mask = np.zeros(len(ids), bool)
    mask[positions[positions >= 0]] = True
    return tokens(tokenizer, ids, mask, default=True)


def tokens(tokenizer: Any, ids: Any, mask: Any, default: bool) -> list[Token]:
    """Ids as text with what is scored; without a tokenizer the ids themselves stand for their text."""
    texts = pieces(tokenizer, ids) if tokenizer is not None else [f"{i} " for i in ids]
    scored = [default] * len(ids) if mask is None else [bool(flag) for flag in mask]
    return [Token(text, flag) for text, flag in zip(texts, scored, strict=True)]


def _scored(found: Sequence[Token]) -> str:
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
