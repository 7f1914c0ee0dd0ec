"""What the README and the recipes tell a reader to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PROJECT = Path(__file__).parents[2]
PAGES = {name: (PROJECT / name).read_text() for name in ("README.md", "pipelines/README.md", "dpo_score/README.md")}


def blocks(language: str, page: str = "README.md") -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(page: str = "README.md") -> list[str]:
    """Each command line, continuation lines joined."""
    text = "\n".join(blocks("bash", page)).replace("\\\n", " ")
    return [part.strip() for line in text.splitlines() for part in line.split("&&") if part.strip()]


def own_commands() -> list[list[str]]:
    """The words behind each `dpo-score` of all pages, in order, each once."""
    lines = (shlex.split(line, comments=True) for page in PAGES for line in commands(page))
    found = [words[1:] for words in lines if words and words[0].removeprefix(".venv/bin/") == "dpo-score"]
    return [words for index, words in enumerate(found) if words not in found[:index]]
