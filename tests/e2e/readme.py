"""What the README tells a reader to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Each command line, continuation lines joined."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [part.strip() for line in text.splitlines() for part in line.split("&&") if part.strip()]


def own_commands() -> list[list[str]]:
    """The words behind each `dpo-score`."""
    lines = (shlex.split(line, comments=True) for line in commands())
    return [words[1:] for words in lines if words and words[0].removeprefix(".venv/bin/") == "dpo-score"]
