"""`dpo-score compare`: policies of one folder or of two against each other, pair by pair. Loads no model.

Promises: only pairs that all compared policies have are compared, joined by pair_id, and what stands on one side is
said; rewards of unlike things are never subtracted; a --fail-if condition that holds ends in FailIfError (exit 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from dpo_score.errors import FailIfError, UsageError, nearest
from dpo_score.metrics.compare import AlignedPolicies, ScoredPolicy, align_policies, compare_policies
from dpo_score.metrics.gate import failed_conditions, gate_notes, needs_baseline, parse_condition
from dpo_score.results.groups import read_policies
from dpo_score.results.run_folder import Reading, chosen_names, open_out, unseen


def compare(
    outs: Sequence[str],
    policies: str | None = None,
    baseline: str | None = None,
    fail_if: Sequence[str] = (),
    slices: Sequence[str] = (),
    reading: Reading = unseen,
) -> dict[str, Any]:
    """The comparison as strict JSON; `failed` holds a sentence for each condition that holds.

    outs: one folder or two. baseline: a policy's name; of two folders the first one's only policy by default.
    slices: columns to group pairs by, as the first folder has them. A condition that names a baseline takes the
    first policy where none is named; `notes` says so, and what a condition overlooks.
    """
    conditions = [parse_condition(text) for text in fail_if]
    scored = _scored(outs, policies, baseline, slices, reading)
    aligned = _joined(scored, of_one_run=len(outs) == 1)
    if conditions and aligned.partial:
        raise UsageError(
            f"--fail-if: {aligned.partial[0].policy} has scores of {aligned.partial[0].pairs:,} pairs only, less than "
            "half of what others have, and cannot be set against them all; name some with --policies"
        )
    baseline = _baseline(aligned, baseline, outs, scored)
    notes = [note for condition in conditions for note in gate_notes(condition)]
    if baseline is None and any(needs_baseline(condition) for condition in conditions):
        baseline = aligned.names[0]
        notes.append(f"the baseline is {baseline}, the first policy; name another with --baseline")
    found = compare_policies(aligned, baseline)
    failed = [sentence for condition in conditions for sentence in failed_conditions(condition, aligned, baseline)]
    return found | {"folders": list(outs), "notes": notes, "failed": failed}


def raise_failed(found: dict[str, Any]) -> None:
    """FailIfError when a condition holds."""
    if found["failed"]:
        raise FailIfError("--fail-if holds: " + "; ".join(found["failed"]))


def _scored(
    outs: Sequence[str], policies: str | None, baseline: str | None, slices: Sequence[str], reading: Reading
) -> list[ScoredPolicy]:
    """Groups follow the first policy's rows, so only those are read with the slices."""
    if len(outs) == 1:
        return _of_folder(outs[0], policies, baseline, slices, reading)
    found = [_of_folder(out, policies, None, () if place else slices, reading) for place, out in enumerate(outs)]
    return [replace(policy, name=name) for policy, name in zip(_flat(found), _labels(outs, found), strict=True)]


def _flat(found: Sequence[Sequence[ScoredPolicy]]) -> list[ScoredPolicy]:
    return [policy for policies in found for policy in policies]


def _of_folder(
    out: str, policies: str | None, baseline: str | None, slices: Sequence[str], reading: Reading
) -> list[ScoredPolicy]:
    store, manifest = open_out(out)
    names = chosen_names(store, manifest, policies, out)
    if baseline is not None and baseline not in names:
        names = [*chosen_names(store, manifest, baseline, out), *names]
    return read_policies(store, manifest, names, slices, reading)


def _labels(outs: Sequence[str], found: Sequence[Sequence[ScoredPolicy]]) -> list[str]:
    """Policy names where they tell the sides apart, else FOLDER/NAME, else 1/NAME and 2/NAME."""
    names = [policy.name for policy in _flat(found)]
    if len(set(names)) == len(names):
        return names
    folders = [PurePosixPath(out.rstrip("/")).name for out in outs]
    if len(set(folders)) < len(folders):
        folders = [str(index) for index in range(1, len(outs) + 1)]
    return [f"{folder}/{policy.name}" for folder, side in zip(folders, found, strict=True) for policy in side]


def _joined(scored: Sequence[ScoredPolicy], of_one_run: bool) -> AlignedPolicies:
    try:
        return align_policies(scored, of_one_run)
    except ValueError:
        names = ", ".join(policy.name for policy in scored)
        raise UsageError(
            f"no pair is in all of {names}: pairs are joined by a digest of their texts, so these were scored "
            "from different data"
        ) from None


def _baseline(
    aligned: AlignedPolicies, asked: str | None, outs: Sequence[str], scored: Sequence[ScoredPolicy]
) -> str | None:
    if asked is not None:
        few = [one for one in aligned.partial if one.policy == asked]
        if few:
            raise UsageError(
                f"--baseline {asked} has scores of {few[0].pairs:,} pairs only, less than half of what others have; "
                f"compare two: --policies {asked},{aligned.names[0]}"
            )
        if asked not in aligned.names:
            raise UsageError(f"--baseline {asked}: not among the compared policies; {nearest(asked, aligned.names)}")
        return asked
    return scored[0].name if len(outs) == 2 and len(scored) == 2 else None
