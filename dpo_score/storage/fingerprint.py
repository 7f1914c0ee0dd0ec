"""Identities: what numbers depend on, as canonical JSON, its digest, and the difference of two of them.

    text = data, format, map, template, tokenizer, truncation
    reference = text + reference weights + numerics
    policy = reference + policy weights + the loss with its parameters

Pure. Two identities differ exactly when `diff` is not empty.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

Fields: TypeAlias = Mapping[str, Any]
ABSENT = "(absent)"
SHOWN_CHANGES = 20
SHOWN_CHARACTERS = 160


def canonical_json(obj: Any) -> str:
    """One spelling per value: sorted keys, no spaces, ASCII, shortest floats. ValueError on NaN and infinities."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(obj: Any) -> str:
    """blake2b-256 of the canonical JSON, 64 hexadecimal digits."""
    return hashlib.blake2b(canonical_json(obj).encode("ascii"), digest_size=32).hexdigest()


@dataclass(frozen=True, slots=True)
class FieldChange:
    """One differing field: its path, and both values as JSON, or ABSENT."""

    path: str
    old: str
    new: str

    def __str__(self) -> str:
        old, new = (
            text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
            for text in (self.old, self.new)
        )
        return f"{self.path}: {old} → {new}"


class _Nothing:
    """A field that one side does not have."""


def diff(old: Any, new: Any, path: str = "") -> tuple[FieldChange, ...]:
    """Field by field below `path`, in the order of the paths; empty exactly when `digest(old) == digest(new)`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping) and (old or new):
        inner = [
            diff(old.get(key, _Nothing), new.get(key, _Nothing), f"{path}.{key}" if path else key)
            for key in sorted({*old, *new})
        ]
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and (old or new):
        inner = [
            diff(old[i] if i < len(old) else _Nothing, new[i] if i < len(new) else _Nothing, f"{path}[{i}]")
            for i in range(max(len(old), len(new)))
        ]
    else:
        shown = [ABSENT if value is _Nothing else canonical_json(value) for value in (old, new)]
        return (FieldChange(path, *shown),) if shown[0] != shown[1] else ()
    return tuple(change for changes in inner for change in changes)


def listed(changes: Sequence[FieldChange]) -> str:
    """The changes as indented lines, at most SHOWN_CHANGES of them."""
    lines = [f"  {change}" for change in changes[:SHOWN_CHANGES]]
    if len(changes) > SHOWN_CHANGES:
        lines.append(f"  … and {len(changes) - SHOWN_CHANGES} more fields")
    return "\n".join(lines)


def has_reference(reference: Fields) -> bool:
    """Whether the fields of a reference name one: a model, or columns of the data."""
    return reference.get("weights") is not None or reference.get("columns") is not None


@dataclass(frozen=True, slots=True)
class Identities:
    """The fields of the three identities of one output folder; policies by name, each with a `loss` mapping."""

    text: Fields
    reference: Fields = field(default_factory=dict)
    policies: Mapping[str, Fields] = field(default_factory=dict)

    @property
    def text_digest(self) -> str:
        return digest({"text": self.text})

    @property
    def reference_digest(self) -> str:
        return digest({"text": self.text, "reference": self.reference})

    def policy_digest(self, name: str) -> str:
        return digest({"text": self.text, "reference": self.reference, "policy": self.policies[name]})

    def reference_of(self, policy: str) -> Fields:
        """The fields of the reference that a policy is compared with: its own where it has one, else the run's."""
        own: Fields | None = self.policies.get(policy, {}).get("reference")
        return own or self.reference

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "reference": self.reference, "policies": self.policies}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Identities:
        """KeyError or TypeError when `fields` are no identities."""
        text, reference, policies = fields["text"], fields["reference"], fields["policies"]
        for value in (text, reference, policies, *policies.values(), *(p.get("loss", {}) for p in policies.values())):
            if not isinstance(value, Mapping):
                raise TypeError(f"identities hold {value!r:.60} where fields are needed")
        return cls(text, reference, policies)

    def changes(self, new: Identities) -> tuple[FieldChange, ...]:
        """What differs where both say something: a policy only one of them names is no change."""
        shared = sorted({*self.policies} & {*new.policies})
        found = diff(self._about(shared), new._about(shared))
        return tuple(replace(change, path=change.path.replace("text.text.", "text.", 1)) for change in found)

    def _about(self, policies: Sequence[str]) -> dict[str, Any]:
        return {**self.to_json(), "policies": {name: self.policies[name] for name in policies}}

    def joined(self, new: Identities) -> Identities:
        """These identities with the policies of both."""
        return Identities(self.text, self.reference, {**self.policies, **new.policies})

    def without_losses(self) -> Identities:
        """What log-probabilities depend on: everything but the `loss` of each policy."""
        kept = {name: {k: v for k, v in fields.items() if k != "loss"} for name, fields in self.policies.items()}
        return Identities(self.text, self.reference, kept)
