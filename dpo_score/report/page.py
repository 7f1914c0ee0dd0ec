"""The report as one HTML file: template, style and script put together, each allowed by its hash and nothing else.

Promises: no request leaves the page, nothing in the data runs (autoescape, a Content-Security-Policy without
`unsafe-inline`, no style attributes), all of it readable with scripts off. The script only filters and sorts.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dpo_score.escape import safe
from dpo_score.metrics.diagnostics import DEFINITIONS
from dpo_score.metrics.sentences import sentences
from dpo_score.report import diagnostics, examples, sections
from dpo_score.report.content import Facts, palette
from dpo_score.report.training_set import training_set


def render(facts: Facts) -> str:
    """The whole page."""
    colours = palette(facts.aligned, facts.found)
    return page(
        {
            "facts": facts,
            "sentences": sentences(facts.found),
            "tiles": sections.tiles(facts),
            "levels": sections.levels(facts, colours),
            "asides": sections.asides(facts),
            "curves": sections.curves(facts),
            "differences": sections.differences(facts),
            "subsets": sections.subsets(facts, colours),
            "subset_differences": sections.subset_differences(facts),
            "slices": sections.slices(facts, colours),
            "margins": sections.margins(facts, colours),
            "calibration": diagnostics.calibration(facts, colours),
            "length": diagnostics.length(facts, colours),
            "health": diagnostics.health(facts),
            "noise": diagnostics.noise(facts),
            "training": training_set(facts.aligned),
            "changed": examples.changed(facts),
            "listed": examples.listed(facts),
            "definitions": DEFINITIONS,
        }
    )


def page(values: dict[str, Any]) -> str:
    """The template with `values`; style and script inlined. No control or bidi character of any value comes through."""
    style, script = _asset("style.css"), _asset("script.js")
    allowed = f"script-src {_hash(script)}; style-src {_hash(style)}"
    pictures = "; img-src data:" if getattr(values.get("facts"), "pictures", None) else ""
    policy = f"default-src 'none'; {allowed}{pictures}; base-uri 'none'; form-action 'none'"
    template = _environment().get_template("page.html.jinja")
    rendered = template.render(values | {"csp": policy, "style": Markup(style), "script": Markup(script)})  # noqa: S704
    return safe(rendered, keep_newlines=True)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("dpo_score.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
