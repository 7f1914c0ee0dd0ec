"""A run as a cell of a notebook shows it: the table of policies, the conclusion in a sentence, the main chart.

In: the folder and its summary. Out: HTML without scripts; names and texts are escaped. The chart lies in a sandboxed
frame, so that the report's style does not reach the notebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from dpo_score.escape import safe
from dpo_score.report.build import gather
from dpo_score.report.sections import curves
from dpo_score.results.run_folder import open_out

LARGEST = 50_000
"""Pairs up to which scores are read again for the sentence and the chart."""
_HEADS = ("policy", "data", "n", "loss", "accuracy", "95 % interval", "margin")


def run_html(out: str, summary: Mapping[str, Any], failures: Mapping[str, str]) -> str:
    """The fragment for one run."""
    policies = summary["policies"]
    rows = [
        _row(name, dataset, cell) for name, policy in policies.items() for dataset, cell in policy["datasets"].items()
    ]
    heads = Markup("").join(Markup("<th>{}</th>").format(head) for head in _HEADS)
    parts = [Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(heads, Markup("").join(rows))]
    for name, reason in failures.items():
        parts.append(Markup("<p>{}: not scored: {}</p>").format(safe(name), safe(reason)))
    pairs = max((policy["overall"]["scored"] for policy in policies.values()), default=0)
    if len(policies) > 1 and pairs <= LARGEST:
        store, manifest = open_out(out)
        facts = gather(store, manifest, out, no_text=True)
        parts.append(Markup("<p>{}</p>").format(safe(facts.found["sentence"])))
        drawn = curves(facts)["charts"]
        if drawn:
            parts.append(_framed(drawn[0]["svg"]))
    parts.append(Markup("<p>results in <code>{}</code></p>").format(safe(out)))
    return str(Markup("\n").join(parts))


def _row(name: str, dataset: str, cell: Mapping[str, Any]) -> Markup:
    accuracy = cell["accuracy"]
    interval = "" if accuracy["ci95"] is None else f"{accuracy['ci95'][0]:.1%} – {accuracy['ci95'][1]:.1%}"
    share = "-" if accuracy["value"] is None else f"{accuracy['value']:.1%}"
    means = [cell[key]["mean"] for key in ("loss", "margins")]
    loss, margin = ("-" if mean is None else f"{mean:.3f}" for mean in means)
    values = (safe(name), safe(dataset), f"{cell['scored']:,}", loss, share, interval, margin)
    return Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(value) for value in values))


def _framed(svg: Markup) -> Markup:
    style = (files("dpo_score.report") / "style.css").read_text(encoding="utf-8")
    page = f"<!doctype html><meta charset='utf-8'><style>{style}</style><body>{svg}</body>"
    frame = '<iframe sandbox srcdoc="{}" style="width:100%;max-width:560px;height:320px;border:0"></iframe>'
    return Markup(frame).format(page)  # noqa: S704  the frame is a constant, and format escapes the page
