"""What `verify` found: damage, what it could not prove, and how much it looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from dpo_score.errors import DamageError


class Comparison(Protocol):
    """Stored values compared with those of another program."""

    def to_json(self) -> dict[str, Any]: ...
    def lines(self) -> Iterator[str]: ...
    def raise_difference(self) -> None: ...


@dataclass(slots=True)
class Findings:
    """`damage`: (file, what is wrong with it). `unproved`: what was left out, and why: no failure. `checked`: files
    read. `against`: what --against found."""

    out: str
    checked: int = 0
    rows: int = 0
    damage: list[tuple[str, str]] = field(default_factory=list)
    unproved: dict[str, str] = field(default_factory=dict)
    against: Comparison | None = None

    def add(self, name: str, what: str) -> None:
        self.damage.append((name, what))

    def to_json(self) -> dict[str, Any]:
        damage = [{"file": name, "what": what} for name, what in self.damage]
        found = {"out": self.out, "files": self.checked, "rows": self.rows, "damage": damage}
        if self.unproved:
            found["unproved"] = [{"file": name, "what": what} for name, what in self.unproved.items()]
        return found if self.against is None else {**found, "against": self.against.to_json()}

    def lines(self) -> Iterator[str]:
        yield from (f"damaged: {name}: {what}" for name, what in self.damage)
        yield from (f"{name}: {what}" for name, what in self.unproved.items())
        verdict = "nothing damaged" if not self.damage else f"{len(self.damage)} findings"
        yield f"{self.out}: {self.checked:,} files, {self.rows:,} scored rows checked: {verdict}"
        if self.against is not None:
            yield from self.against.lines()

    def raise_damage(self) -> None:
        """DamageError (exit 4) when anything was found, or differs from another program."""
        if self.damage:
            names = ", ".join(dict.fromkeys(name for name, _ in self.damage))
            raise DamageError(f"{self.out}: damaged: {names}. The same run command computes these blocks again")
        if self.against is not None:
            self.against.raise_difference()
