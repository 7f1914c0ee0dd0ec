"""From OUT to report.html and tables: gathers what was stored, makes the page, writes one file.

Promises: loads no model; imports neither torch nor transformers, except that a run which kept token values has its
tokenizer read (imports transformers) to colour tokens; texts come only from unchanged data, else the page says why
not; a report never fails for want of texts. Reads every score part once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo_score.config.checkpoint_glob import natural
from dpo_score.data.pictures import read_again, thumbnail
from dpo_score.data.types import MARKS, EncodedPair, Pair
from dpo_score.errors import DataError, UsageError, nearest
from dpo_score.escape import safe
from dpo_score.heap import return_memory
from dpo_score.metrics.compare import AlignedPolicies, align_policies, compare_policies
from dpo_score.metrics.suspect_labels import label_audit
from dpo_score.report.content import Facts
from dpo_score.report.example_rows import ExampleRows, choose_examples
from dpo_score.report.numbers import numbers
from dpo_score.report.page import render
from dpo_score.report.tables import FORMATS, write
from dpo_score.results.groups import numbered_groups, read_policies
from dpo_score.results.run_folder import (
    Reading,
    chosen_names,
    open_out,
    parts,
    read_summary,
    unseen,
)
from dpo_score.results.source_text import Reader, TextSource, plain_text, stored_config, stored_reader, text_source
from dpo_score.results.token_view import side_tokens, stored_shares
from dpo_score.storage.base import Store
from dpo_score.storage.manifest import Manifest, read_manifest
from dpo_score.tokenization.prompt import arranged

FILE = "report.html"
Tokens = dict[tuple[int, str], dict[str, list[tuple[str, float]]]]
Pictures = dict[int, list[tuple[str, str]]]
PICTURE_BYTES = 2 << 20
"""Characters of the small pictures of a page, all together."""


def report(
    out: str,
    no_text: bool = False,
    baseline: str | None = None,
    slices: Sequence[str] = (),
    reading: Reading = unseen,
) -> tuple[str, Mapping[str, Any]]:
    """Write OUT/report.html; returns where it is and the compare_policies it shows. Raises UsageError, StorageError.

    slices: columns to group pairs by; none: those that the run was asked for.
    """
    store, manifest = open_out(out)
    facts = gather(store, manifest, out, no_text=no_text, baseline=baseline, slices=slices, reading=reading)
    write_page(store, facts)
    return store.url(FILE), facts.found


def write_report(store: Store, out: str, no_text: bool = False) -> str:
    """The report of a run that has just ended: OUT/report.html. Needs summary.json and pipeline.yaml in place."""
    manifest = read_manifest(store)
    assert manifest is not None
    write_page(store, gather(store, manifest, out, no_text=no_text))
    return FILE


def write_page(store: Store, facts: Facts) -> None:
    store.write_bytes(FILE, render(facts).encode("utf-8", "backslashreplace"))


def gather(
    store: Store,
    manifest: Manifest,
    out: str,
    no_text: bool = False,
    baseline: str | None = None,
    slices: Sequence[str] = (),
    reading: Reading = unseen,
) -> Facts:
    """Everything the page needs."""
    summary = read_summary(store, manifest, out)
    names = [name for name in chosen_names(store, manifest, None, out) if name in summary["policies"]]
    aligned, unsliced = sliced_policies(store, manifest, names, out, slices)
    aligned = numbered_groups(aligned) if no_text else aligned
    if baseline is not None and baseline not in aligned.names:
        raise UsageError(f"--baseline {baseline}: not among the compared policies {', '.join(aligned.names)}")
    found, audit = compare_policies(aligned, baseline), label_audit(aligned)
    selection = choose_examples(aligned, audit, found["best"])
    return_memory()
    texts, tokens, pictures, notes = _passages(store, manifest, aligned, selection, no_text)
    return Facts(
        title=safe(out.rstrip("/").rsplit("/", 1)[-1], 120),
        aligned=aligned,
        found=found,
        audit=audit,
        selection=selection,
        data=_data(summary),
        texts=texts,
        tokens=tokens,
        noise={name: summary["policies"][name].get("noise", {}) for name in aligned.names},
        marks=_marks(summary),
        warnings=[safe(warning) for warning in manifest.warnings],
        notes=[*_skipped(summary), *unsliced, *notes],
        provenance=_provenance(manifest, names, aligned),
        pictures=pictures,
    )


def sliced_policies(
    store: Store,
    manifest: Manifest,
    names: Sequence[str],
    out: str,
    slices: Sequence[str],
    reading: Reading = unseen,
) -> tuple[AlignedPolicies, list[str]]:
    """The policies, grouped by what was asked for now, else by what the run was asked for.

    Of the latter, what cannot be had any more is said in the second result instead of raised.
    """
    if slices or not store.exists("pipeline.yaml") or not (stored := stored_config(store).slices):
        return aligned_policies(store, manifest, names, out, slices, reading), []
    try:
        return aligned_policies(store, manifest, names, out, stored, reading), []
    except UsageError as error:
        return aligned_policies(store, manifest, names, out), [f"No slices: {safe(error)}"]


def aligned_policies(
    store: Store,
    manifest: Manifest,
    names: Sequence[str],
    out: str,
    slices: Sequence[str] = (),
    reading: Reading = unseen,
) -> AlignedPolicies:
    """The policies of one folder on their common pairs. Raises UsageError when there are none."""
    if not names:
        raise UsageError(f"{out} holds no finished policy yet: let `dpo-score run` finish one")
    scored = read_policies(store, manifest, sorted(names, key=natural), slices, reading)
    try:
        return align_policies(scored, of_one_run=True)
    except ValueError:
        raise UsageError(f"{out}: no pair was scored by all of {', '.join(names)}") from None


# --- texts and tokens ------------------------------------------------------------------------------------------------


def _passages(
    store: Store, manifest: Manifest, aligned: AlignedPolicies, selection: ExampleRows, no_text: bool
) -> tuple[dict[int, dict[str, str]], Tokens, Pictures, list[str]]:
    """Texts by row, tokens of the changed pairs, small pictures, and what to say where something is left out."""
    if no_text or not selection.rows:
        return {}, {}, {}, ["Texts are left out, as asked (--no-text)."] if no_text else []
    source = text_source(store, manifest)
    if isinstance(source, str):
        return {}, {}, {}, [f"Texts are left out: {safe(source)}."]
    ids = {row: aligned.first.row_ids[row] for row in selection.rows}
    pairs = source.pairs(ids.values())
    texts = {row: _texts(pairs[row_id], source) for row, row_id in ids.items() if row_id in pairs}
    tokens, notes = _tokens(store, manifest, aligned, selection, source, pairs)
    pictures, left_out = _pictures({row: pairs[row_id] for row, row_id in ids.items() if row_id in pairs})
    return texts, tokens, pictures, [*notes, *left_out]


def _pictures(pairs: Mapping[int, Pair]) -> tuple[Pictures, list[str]]:
    """Small copies of the pictures of each pair, at most PICTURE_BYTES in all; one that cannot be had is left out."""
    found: Pictures = {}
    size = lost = 0
    for row, pair in pairs.items():
        try:
            held = read_again(pair.pictures or ())
        except DataError:
            lost += len(pair.pictures or ())
            continue
        for picture in pair.pictures or ():
            url = thumbnail(held[picture.sha256]) if size < PICTURE_BYTES else ""
            size += len(url)
            if not url or size > PICTURE_BYTES:
                lost += 1
                continue
            found.setdefault(row, []).append((url, f"{picture.width} × {picture.height} pixels"))
    return found, [f"{lost} pictures are left out: the page holds {PICTURE_BYTES >> 20} MB of them."] if lost else []


def _texts(pair: Pair, source: TextSource) -> dict[str, str]:
    """As they are scored: an implicit prompt divided from its answers."""
    whole = arranged(pair, source.config.text) if pair.implicit else pair
    shown = whole if isinstance(whole, Pair) else pair
    return {side: plain_text(getattr(shown, side)) for side in ("prompt", "chosen", "rejected")}


def _tokens(
    store: Store,
    manifest: Manifest,
    aligned: AlignedPolicies,
    selection: ExampleRows,
    source: TextSource,
    pairs: Mapping[str, Pair],
) -> tuple[Tokens, list[str]]:
    if not selection.changed or not manifest.identities.reference.get("per_token"):
        return {}, []
    reader = stored_reader(source, manifest)
    if isinstance(reader, str):
        return {}, [f"Tokens are not coloured: {safe(reader)}."]
    tokens: Tokens = {}
    for name in (selection.before, selection.after):
        assert name is not None
        policy = aligned[name]
        rows = _stored_rows(store, name, [policy.row_ids[row] for row in selection.changed])
        for row in selection.changed:
            stored = rows.get(policy.row_ids[row])
            found = _token_run(stored, pairs.get(policy.row_ids[row]), policy.settings.beta, reader)
            if found:
                tokens[row, name] = found
    return tokens, []


def _stored_rows(store: Store, policy: str, row_ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """row_id → the stored row with its token values."""
    wanted, columns = pa.array(row_ids, pa.string()), ["row_id", "pair_digest"]
    columns += [f"{role}_{side}_token_logps" for role in ("policy", "ref") for side in ("chosen", "rejected")]
    found = {}
    for name in parts(store, policy):
        table = store.read_table(name, columns)
        for row in table.filter(pc.is_in(table["row_id"], value_set=wanted)).to_pylist():
            found[row["row_id"]] = row
    return found


def _token_run(
    stored: Mapping[str, Any] | None, pair: Pair | None, beta: float, reader: Reader
) -> dict[str, list[tuple[str, float]]] | None:
    """side → (token, β·log-ratio), None where the ids of the data are not those that were scored."""
    encoded = None if stored is None or pair is None else reader.encode(pair)
    if stored is None or not isinstance(encoded, EncodedPair) or encoded.pair_digest != stored["pair_digest"]:
        return None
    shares = stored_shares(stored, beta)
    if shares is None:
        return None
    return {
        "chosen": _with_text(reader, encoded, "chosen", shares["chosen"].tolist()),
        "rejected": _with_text(reader, encoded, "rejected", shares["rejected"].tolist()),
    }


def _with_text(reader: Reader, encoded: EncodedPair, side: Any, values: Sequence[float]) -> list[tuple[str, float]]:
    scored = [token.text for token in side_tokens(reader.tokenizer, encoded, side) if token.scored]
    return list(zip(scored, values, strict=True))


# --- what was read, and with what ------------------------------------------------------------------------------------


def _data(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    lines = [
        {"name": safe(name, 80), "value": safe(f"{found['rows']:,} rows, {found['format']}: {found['polarity']}")}
        for name, found in summary["data"]["datasets"].items()
    ]
    text = summary.get("text", {})
    if text.get("render"):
        lines.append({"name": "rendering", "value": safe(text["render"])})
    rejected: dict[str, int] = {}
    for policy in summary["policies"].values():
        for code, count in (policy["overall"]["rejected"] or {}).items():
            rejected[code] = max(rejected.get(code, 0), count)
    if rejected:
        listed = ", ".join(f"{count:,} {code}" for code, count in sorted(rejected.items()))
        lines.append({"name": "not scored", "value": safe(f"{listed} (rejects/ has each row and its reason)")})
    return lines


def _skipped(summary: Mapping[str, Any]) -> list[str]:
    """Checkpoints that the last run left for the next."""
    return [f"{safe(name)} is not here: {safe(reason)}." for name, reason in summary.get("skipped", {}).items()]


def _marks(summary: Mapping[str, Any]) -> dict[str, str]:
    found = summary.get("text", {}).get("marks", {})
    return {
        safe(mark): safe(f"{note['pairs']:,} pairs, first row {note['first']}: {MARKS.get(mark, '')}")
        for mark, note in found.items()
    }


def _provenance(manifest: Manifest, names: Sequence[str], aligned: AlignedPolicies) -> list[tuple[str, str]]:
    models = manifest.notes.get("names", {})
    numerics = manifest.numerics.get("run", {})
    identities = manifest.identities
    lines = [("reference", str(models.get("reference", "none")))]
    lines += [(f"policy {name}", str(models.get(name, "?"))) for name in names]
    lines += [(f"loss of {name}", _loss(identities.policies[name]["loss"])) for name in names[:1]]
    lines += [
        ("numerics", ", ".join(f"{key} {value}" for key, value in sorted(numerics.items()))),
        ("libraries", ", ".join(f"{key} {value}" for key, value in sorted(manifest.versions.items()))),
        ("begun, ended", f"{manifest.started}, {manifest.finished or 'still running'}"),
        ("text identity", identities.text_digest),
        ("reference identity", identities.reference_digest),
        *((f"identity of {name}", identities.policy_digest(name)) for name in names),
    ]
    return [(safe(name), safe(value, 400)) for name, value in lines]


def _loss(fields: Mapping[str, Any]) -> str:
    return f"{fields.get('name')}, β {fields.get('beta')}"


def tables(out: str, form: str, baseline: str | None = None, slices: Sequence[str] = (), no_text: bool = False) -> str:
    """The report's tables as md, csv or tex. Raises UsageError."""
    if form not in FORMATS:
        raise UsageError(f"--format {form}: {nearest(form, ('html', *FORMATS))}")
    store, manifest = open_out(out)
    aligned, _ = sliced_policies(store, manifest, chosen_names(store, manifest, None, out), out, slices)
    if baseline is not None and baseline not in aligned.names:
        raise UsageError(f"--baseline {baseline}: {nearest(baseline, aligned.names)}")
    aligned = numbered_groups(aligned) if no_text else aligned
    return write(compare_policies(aligned, baseline), form, numbers(aligned))
