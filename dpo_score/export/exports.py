"""Who reads an exported data set, and which runs it can be exported from.

A reference value belongs to the tokens that were scored. A consumer that would split, mask or cut a row in another
way puts other tokens behind the same number, so an export for it is refused and the rule is named. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_score.config.schema import RunConfig
from dpo_score.errors import ConfigError, nearest

VALUES = ("ref_chosen_logps", "ref_rejected_logps")
TEXTS = ("prompt", "chosen", "rejected")
TOKEN_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
MASKS = ("prompt_mask", "chosen_mask", "rejected_mask")
LABELS = ("row_id", "pair_id", "pair_digest")


@dataclass(frozen=True, slots=True)
class Consumer:
    """`texts`: it tokenises prompt, chosen and rejected itself; else it takes token ids as they are."""

    name: str
    texts: bool


CONSUMERS = {consumer.name: consumer for consumer in (Consumer("trl", texts=True), Consumer("ids", texts=False))}


def consumer_of(name: str, config: RunConfig, codes: Sequence[str], encoder_decoder: bool) -> Consumer:
    """The consumer called `name`; ConfigError when there is none, or when it would score other tokens.

    `codes`: format codes of the sets, "F0" being token ids.
    """
    if name not in CONSUMERS:
        raise ConfigError(f"--to {name}: {nearest(name, CONSUMERS)}")
    consumer = CONSUMERS[name]
    rule = rule_unlike_trl(config, codes, encoder_decoder) if consumer.texts else None
    if rule is not None:
        raise ConfigError(
            f"--to trl: {rule}, so its trainer would put other tokens behind these values. Use --to ids for a trainer "
            "of your own, which gets the very ids that were scored"
        )
    return consumer


def rule_unlike_trl(config: RunConfig, codes: Sequence[str], encoder_decoder: bool) -> str | None:
    """Which of TRL's rules a run breaks, as a clause: completion tokens alone, cut from the end, a causal model, text
    that it tokenises itself. None where TRL would score the same tokens."""
    text = config.text
    if text.score != "completion":
        return f"TRL scores every token of the answer, this run --score {text.score}"
    if text.truncation == "keep_end":
        return "TRL keeps the first max_length tokens of a row, this run the last ones (--truncation keep_end)"
    if "F0" in codes:
        return "TRL tokenises text, and this data is token ids"
    if encoder_decoder:
        return "TRL trains causal models only, and the reference is an encoder-decoder"
    return None


def renaming(given: str | None) -> dict[str, str]:
    """`a=b,c=d` → {a: b, c: d}."""
    pairs = [item.strip() for item in (given or "").split(",") if item.strip()]
    found = {}
    for pair in pairs:
        old, equals, new = (part.strip() for part in pair.partition("="))
        if not (old and equals and new):
            raise ConfigError(f"--rename takes OLD=NEW, a comma list; got {pair!r}")
        found[old] = new
    return found


def renamed(names: Sequence[str], changes: dict[str, str]) -> list[str]:
    """`names` after --rename; ConfigError for a column that is not written, or two of one name."""
    for old in changes:
        if old not in names:
            raise ConfigError(f"--rename {old}=…: no such column is written; {nearest(old, names)}")
    found = [changes.get(name, name) for name in names]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise ConfigError(f"--rename leaves two columns called {twice[0]!r}: choose another name")
    return found
