"""The stages of a run by name: whose blocks a record or a part belongs to.

    Stage.reference()               reference      the run's reference
    Stage.reference("p")            reference/p    the own reference of policy p
    Stage.scores("p")               scores/p       policy p
    Stage(StageKind.DATA, "train")  data/train     a split of a data set that is written with its values

The name is the folder of the stage's parts, and the folder of its commit records under `commits/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dpo_score.storage.commits import part_name

REJECTED_ROWS = "rejects/data"
"""Where rows are listed that give no pair: found by the run's reference, for every model alike."""


class StageKind(Enum):
    REFERENCE = "reference"
    SCORES = "scores"
    DATA = "data"


@dataclass(frozen=True, slots=True)
class Stage:
    """`of`: a policy, or a split; empty for the run's own reference."""

    kind: StageKind
    of: str = ""

    def __str__(self) -> str:
        return self.name

    @classmethod
    def reference(cls, policy: str = "") -> Stage:
        """Stage one: of the run, or of a policy that has its own reference."""
        return cls(StageKind.REFERENCE, policy)

    @classmethod
    def scores(cls, policy: str) -> Stage:
        """Stage two of one policy."""
        return cls(StageKind.SCORES, policy)

    @classmethod
    def parse(cls, name: str) -> Stage:
        """`reference/p` → the stage. ValueError for a name that is none."""
        kind, _, of = name.partition("/")
        return cls(StageKind(kind), of)

    @property
    def name(self) -> str:
        return f"{self.kind.value}/{self.of}" if self.of else self.kind.value

    @property
    def rejects(self) -> str:
        """The folder of the rows that this stage could not score."""
        return f"rejects/{self.of}" if self.kind is StageKind.SCORES else f"rejects/{self.name}"

    @property
    def folders(self) -> tuple[str, ...]:
        """Every folder that a block of this stage puts a part into."""
        run_reference = self == Stage.reference()
        return (self.name, self.rejects, REJECTED_ROWS) if run_reference else (self.name, self.rejects)

    def part(self, block: int, blocks: int) -> str:
        """The file of one block: `scores/p/part-00000-of-00012.parquet`."""
        return part_file(self.name, block, blocks)


def part_file(folder: str, block: int, blocks: int) -> str:
    return f"{folder}/part-{part_name(block, blocks)}.parquet"
