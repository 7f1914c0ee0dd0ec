"""`dpo-score verify OUT --against trl`: sampled rows of a run, scored again by TRL's own reference pass.

The rows are read again from the data, the reference's weights from where OUT names them; tokenisation, cut, batches
and sums are the installed TRL's (trl_pass.py), in float32. Promises: data, tokenizer and weights are those that were
scored, or it is refused with the reason; the same rows for the same OUT and n; token ids are compared before values.
The bound is one for two correct programs: a thousandth of a nat for a float32 run, four times its own measured noise
more for a 16-bit one. Does not: look at policies (their values come from the same code), or repair anything.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from typing import Any

import numpy as np

from dpo_score.data.types import Pair
from dpo_score.errors import ConfigError, DamageError, UsageError, nearest
from dpo_score.export.contract import FLOAT32_TOLERANCE, tolerance
from dpo_score.export.layout import as_scored, rule_unlike_trl
from dpo_score.integrations.load_ref_logps import pair_digest
from dpo_score.integrations.trl_pass import VALUES, TrlRow, reference_pass
from dpo_score.models.loader import ModelLoader
from dpo_score.models.resolve import ModelSource, Resolver
from dpo_score.results.run_folder import open_out
from dpo_score.results.source_text import TextSource, stored_reader, text_source
from dpo_score.storage.base import Store
from dpo_score.storage.commits import CommitRecord, read_records
from dpo_score.storage.manifest import Manifest
from dpo_score.tokenization.chat_template import named_template

OTHERS = ("trl",)
RELATIVE = 2e-7
"""Of a sum's size: TRL keeps sums in float32."""
HALF_NOISE = 0.05
"""Nats a token that 16 bits may cost, whatever noise a run measured of itself."""
LISTED = 5


@dataclass(frozen=True, slots=True)
class StoredRow:
    """What OUT holds of a row: the digest of its ids, the two sums (nats) and how many tokens are in each."""

    row_id: str
    file: str
    digest: str
    values: tuple[float, float]
    tokens: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Agreement:
    """`largest`: |Δ| (nats) over all sums; `bound`: what it may be there; `differences`: (file, what differs)."""

    out: str
    version: str
    rows: int
    largest: float
    bound: float
    differences: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        listed = [{"file": file, "what": what} for file, what in self.differences]
        return {
            "program": "trl", "version": self.version, "rows": self.rows, "largest": self.largest,
            "bound": self.bound, "differences": listed,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        yield from (f"differs: {file}: {what}" for file, what in self.differences[:LISTED])
        verdict = f"{len(self.differences)} differ" if self.differences else "agrees"
        yield (
            f"trl {self.version}: {self.rows} rows, {2 * self.rows} log-probs of the reference: largest |Δ| "
            f"{self.largest:.2g} nats, bound {self.bound:.2g}: {verdict}"
        )

    def raise_difference(self) -> None:
        """DamageError (exit 4) when anything differs beyond its bound."""
        if self.differences:
            file, what = self.differences[0]
            raise DamageError(
                f"{self.out}: {len(self.differences)} of {2 * self.rows} reference log-probs are not TRL's ({file}: "
                f"{what}). The files are as they were written, so the same command would keep them: score again into "
                "another --out, with --path plain if the difference stays"
            )


def comparison(out: str, against: str, rows: int) -> Agreement:
    """Scores `rows` sampled rows of OUT again. Raises UsageError where the two cannot be compared."""
    _refuse_request(against, rows)
    store, manifest = open_out(out)
    source = text_source(store, manifest)
    if isinstance(source, str):
        raise UsageError(f"--against trl: {source}")
    reference = _reference(source, manifest)
    _refuse_other_rules(source, manifest, reference)
    stored = sampled(store, rows)
    if not stored:
        raise UsageError(f"--against trl: {out} holds no scored row")
    theirs = _scored_again(source, manifest, reference, stored)
    return compared(out, stored, theirs, _tolerance(store, manifest))


def _refuse_request(against: str, rows: int) -> None:
    if against not in OTHERS:
        raise ConfigError(f"--against {against}: {nearest(against, OTHERS)}")
    if rows < 1:
        raise ConfigError(f"-n {rows}: at least one row")
    for package in ("trl", "datasets"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"--against trl needs {package}, which is not installed: `pip install 'trl>=1.16'`")


# --- what is compared -------------------------------------------------------------------------------------------------


def _reference(source: TextSource, manifest: Manifest) -> ModelSource:
    """The reference, if its weights are still those that OUT recorded."""
    config, recorded = source.config, manifest.identities.reference.get("weights")
    if config.reference is None or config.reference.columns is not None or recorded is None:
        raise UsageError("--against trl: the run has no reference model whose values could be computed again")
    if config.compute.quantization is not None:
        raise UsageError("--against trl: the run quantised its models at load, which TRL is not asked to do here")
    spec = config.reference
    found = Resolver.of(config).resolve_spec(spec)
    if found.key != recorded:
        raise UsageError(
            f"--against trl: {spec.model} no longer holds the weights that were scored (digest {recorded[:16]} then, "
            f"{found.key[:16]} now): give back the model that the run used"
        )
    return found


def _refuse_other_rules(source: TextSource, manifest: Manifest, reference: ModelSource) -> None:
    """Runs whose tokens are not those that TRL would score."""
    config, rendered = source.config, manifest.notes.get("date")
    rule = rule_unlike_trl(config, source.datasets, reference.is_encoder_decoder)
    if config.rewardbench == "exact":
        rule = "--rewardbench exact adds and drops tokens that no trainer would"
    if rendered not in (None, date.today().isoformat()):
        rule = f"the chat template prints its date, which was {rendered} and would be {date.today()} now"
    if rule is not None:
        raise UsageError(f"--against trl: {rule}, so TRL would score other tokens than this run did")


def sampled(store: Store, count: int) -> list[StoredRow]:
    """`count` of the scored rows, or all; always the same ones."""
    records = [record for record in read_records(store, "reference").values() if isinstance(record, CommitRecord)]
    sizes = [int(record.counts.get("scored", 0)) for record in records]
    total = sum(sizes)
    chosen = np.sort(np.random.default_rng(0).choice(total, size=min(count, total), replace=False))
    found, first = [], 0
    for record, size in zip(records, sizes, strict=True):
        mine = [int(place) - first for place in chosen if first <= place < first + size]
        found += _stored_rows(store, record.files[0].name, mine) if mine else []
        first += size
    return found


def _stored_rows(store: Store, name: str, places: Sequence[int]) -> list[StoredRow]:
    columns = ["row_id", "pair_digest", "chosen_tokens", "rejected_tokens", *VALUES]
    return [
        StoredRow(
            row["row_id"],
            name,
            row["pair_digest"],
            (row[VALUES[0]], row[VALUES[1]]),
            (row["chosen_tokens"], row["rejected_tokens"]),
        )
        for row in store.read_table(name, columns).take(places).to_pylist()
    ]


# --- scoring and comparing --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Float32:
    dtype: str = "float32"
    device: str = "cpu"


def _scored_again(
    source: TextSource, manifest: Manifest, reference: ModelSource, stored: Sequence[StoredRow]
) -> dict[str, TrlRow]:
    config = source.config
    reader = stored_reader(source, manifest)
    if isinstance(reader, str):
        raise UsageError(f"--against trl: {reader}")
    if config.text.chat_template is not None:
        reader.tokenizer.chat_template = named_template(reader.tokenizer, config.text.chat_template)
    pairs = source.pairs(row.row_id for row in stored)
    as_given = [as_scored(pair, config.text) for pair in pairs.values()]
    model = ModelLoader(config.trust_remote_code).load(reference, _Float32()).model
    limit = reader.renderer.limit
    return reference_pass([p for p in as_given if isinstance(p, Pair)], model, reader.tokenizer, config.text, limit)


def _tolerance(store: Store, manifest: Manifest) -> float:
    """Nats that a stored sum may be off TRL's: fixed for float32, else by what the run measured of its own noise."""
    dtype = (manifest.identities.reference.get("numerics") or {}).get("dtype", "float32")
    if dtype == "float32":
        return FLOAT32_TOLERANCE
    first = next(iter(read_records(store, "reference").values()), None)
    noise = (first.notes.get("noise") or {}) if isinstance(first, CommitRecord) else {}
    return tolerance(dtype, noise.get("logp_max")) or math.inf


def compared(out: str, stored: Sequence[StoredRow], theirs: Mapping[str, TrlRow], floor: float) -> Agreement:
    """Ids first, then sums, each against its own bound; the largest |Δ| is that nearest to, or furthest over, it."""
    differences: list[tuple[str, str]] = []
    worst = (0.0, 0.0, 1.0)
    for row in stored:
        other = theirs.get(row.row_id)
        if other is None or pair_digest(other.ids) != row.digest:
            differences.append((row.file, f"row {row.row_id}: TRL {'drops it' if other is None else _OTHER_IDS}"))
            continue
        for side, mine, value, tokens in zip(("chosen", "rejected"), row.values, other.values, row.tokens, strict=True):
            bound = max(min(floor, HALF_NOISE * tokens), RELATIVE * abs(mine))
            delta = abs(mine - value)
            worst = max(worst, (delta / bound, delta, bound))
            if not delta <= bound:
                what = f"row {row.row_id}, {side}: stored {mine:.4f}, TRL {value:.4f}, bound {bound:.2g}"
                differences.append((row.file, what))
    return Agreement(out, metadata.version("trl"), len(stored), worst[1], worst[2], tuple(differences))


_OTHER_IDS = "makes other token ids of it"
