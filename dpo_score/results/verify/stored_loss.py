"""The loss that a part of scores says it was computed with, resolved again. Nothing that a file names is run.

A loss of the user's own is code, and OUT may come from somebody else. It is run only from a file that the command
line names and whose sha256 is the stored one; without it everything is known but its value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dpo_score.config.schema import LossSpec
from dpo_score.errors import ConfigError
from dpo_score.losses.custom import CustomLoss, is_custom, load_custom, not_run
from dpo_score.losses.parse import ResolvedLoss, parse_loss, parse_modifiers
from dpo_score.storage.faults import translated
from dpo_score.storage.manifest import Manifest

OF_CUSTOM = ("loss", "loss_code")
"""The derived columns that only the function of a custom loss can give."""
Allowed = Mapping[tuple[str, str], CustomLoss]
"""(sha256, function) → the function, from a file that the user named."""


def allowed_losses(paths: Sequence[str], manifest: Manifest) -> Allowed:
    """What may be run, imported once. ConfigError for a file that no scores of this run were computed with."""
    known, found = sorted(set(_customs(manifest))), {}
    for path in paths:
        sha256 = _sha256(path)
        functions = [function for _, digest, function in known if digest == sha256]
        if not functions:
            stored = ", ".join(f"{name} (sha256 {digest})" for name, digest, _ in known) or "no custom loss"
            raise ConfigError(f"--loss-file {path}: its sha256 is {sha256}; the scores were computed with {stored}")
        found.update({(sha256, function): load_custom(f"{path}:{function}") for function in functions})
    return found


def _customs(manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    """Name, sha256 and function of every custom loss of a run."""
    for fields in manifest.identities.policies.values():
        loss = fields.get("loss", {})
        if "custom" in loss:
            yield str(loss.get("name")), str(loss["custom"].get("sha256")), str(loss["custom"].get("function"))


def _sha256(path: str) -> str:
    with translated(path):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def stored_loss(metadata: Mapping[bytes, bytes], allowed: Allowed) -> ResolvedLoss:
    """ConfigError, ValueError, LookupError or TypeError when the metadata of a part does not say which loss it was."""
    spec = LossSpec.model_validate_json(metadata[b"dpo_score.loss_spec"])
    if not is_custom(spec.name):
        return parse_loss(spec)
    known = json.loads(metadata[b"dpo_score.loss"])
    function, sha256 = str(known["custom"]["function"]), str(known["custom"]["sha256"])
    custom = allowed.get((sha256, function), CustomLoss("", function, sha256, not_run))
    return ResolvedLoss(spec.name, float(known["beta"]), None, (), parse_modifiers(spec.params), custom)


def is_unknown(loss: ResolvedLoss) -> bool:
    """Whether a loss is code that the user has not named."""
    return loss.custom is not None and loss.custom.call is not_run
