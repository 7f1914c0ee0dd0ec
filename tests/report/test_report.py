"""The report page: self-contained, strict, inert whatever the texts hold, and complete with little to show."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from dpo_score.report import charts as figures
from dpo_score.report.example_rows import CHANGED, SUSPECTS, WORST
from dpo_score.report.examples import SHOWN, merged
from dpo_score.report.page import render
from tests.metrics.scored import policies, scored
from tests.report.report_facts import HOSTILE_SUBSETS, facts


class Page(HTMLParser):
    """Tags, attributes and the contents of scripts and styles of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.text: list[str] = []
        self._inside: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in self.raw else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        (self.raw[self._inside] if self._inside else self.text).append(data)

    def attributes(self, name: str) -> list[str | None]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def hostile() -> Page:
    made = policies(3, 240, {"step-10": 0.1, "step-20": 0.4})
    names = [HOSTILE_SUBSETS[i % 3] for i in range(240)]
    policies_ = [
        scored(
            p.name,
            p.rows.values["margins_nats"].tolist(),
            subsets=names,
            marks=[("<i>mark",)] * 240,
            slices={'<b onclick="alert(6)">': names},
        )
        for p in made
    ]
    return Page(render(facts(policies_, hostile=True, title="<script>alert(0)</script>")))


def test_there_is_one_script_and_one_style_and_each_is_allowed_by_its_hash() -> None:
    page = Page(render(facts()))
    policy = next(attrs["content"] or "" for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name, texts in page.raw.items():
        (text,) = texts
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_nothing_is_fetched_and_nothing_has_a_handler_or_a_style_attribute() -> None:
    for page in (Page(render(facts())), hostile()):
        names = {name for _, attrs in page.tags for name in attrs}
        assert not {name for name in names if name.startswith("on")}
        assert not names & {"style", "src", "srcset", "action", "formaction", "poster", "background", "xlink:href"}
        assert all(link is not None and link.startswith("#") for link in page.attributes("href"))
        assert not {tag for tag, _ in page.tags} & {"img", "iframe", "link", "object", "embed", "base", "video"}


def test_hostile_texts_are_shown_as_text() -> None:
    page = hostile()
    assert [len(texts) for texts in page.raw.values()] == [1, 1]
    shown = "".join(page.text)
    assert "<script>alert('script ran')</script>" in shown
    assert "{{ 7*7 }}" in shown
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b\x07]", shown)
    assert "\\u202e" in shown
    assert HOSTILE_SUBSETS[0] in page.attributes("data-subset")


def test_a_megabyte_word_is_cut_and_said_to_be() -> None:
    page = hostile()
    assert f"{1_000_000 - SHOWN:,} more characters" in "".join(page.text)
    assert max(len(text) for text in page.text) < 3 * SHOWN


def test_everything_is_there_without_the_script() -> None:
    page = Page(render(facts()))
    shown = "".join(page.text)
    for heading in ("Policies", "Over checkpoints", "Subsets", "Margins", "Calibration", "Length", "Training health"):
        assert heading in shown
    for heading in ("What changed most from step-10", "labels in doubt", "Noise floor", "Provenance"):
        assert heading in shown
    hidden = [tag for tag, attrs in page.tags if "hidden" in attrs]
    assert hidden == ["form"]


def test_every_link_leads_somewhere_and_every_drawing_has_a_name() -> None:
    page = Page(render(facts()))
    places = set(page.attributes("id"))
    assert all((link or "")[1:] in places for link in page.attributes("href"))
    drawings = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert all(attrs.get("aria-hidden") == "true" or attrs.get("aria-label") for attrs in drawings)


def test_a_baseline_brings_a_table_of_differences() -> None:
    shown = "".join(Page(render(facts(baseline="step-10"))).text)
    assert "Margin in nats, minus the baseline (step-10)" in shown


def test_slices_have_a_section_with_a_row_for_every_group() -> None:
    column = [i % 50 for i in range(240)]
    made = policies(3, 240, {"step-10": 0.1, "step-20": 0.4})
    nats = {policy.name: policy.rows.values["margins_nats"].tolist() for policy in made}
    html = render(facts([scored(name, found, slices={"depth": column}) for name, found in nats.items()]))
    assert "By depth" in html
    assert "bins between its quartiles" in html
    for name in ("0 to 11", "12 to 23", "24 to 35", "36 to 49"):
        assert html.count(f'<th scope="row">{name}</th>') == 3, "the plot's row and one for each policy's means"
    assert 'href="#slices"' in html
    assert "#slices" not in render(facts(made))


def test_without_texts_the_numbers_stay() -> None:
    page = Page(render(facts(texts={}, tokens={}, notes=["Texts are left out, as asked (--no-text)."])))
    shown = "".join(page.text)
    assert "Texts are left out" in shown
    assert "Question" not in shown
    assert "Worst pairs" in shown


@pytest.mark.parametrize("nats", [[0.0], [1.0], [-1.0, 2.0], [0.0] * 30, [5.0] * 30, [float("nan"), 1.0, 2.0]], ids=str)
def test_a_page_is_made_of_very_little(nats: list[float]) -> None:
    assert "</html>" in render(facts([scored("only", nats)]))


def test_pairs_that_were_left_out_are_called_what_they_are() -> None:
    ids = [f"pair {i}" for i in range(4)]
    a, b = (scored(name, [1.0, -1.0, 1.0, 1.0], pair_ids=ids) for name in "ab")
    c = scored("c", [1.0, -1.0, 1.0], pair_ids=ids[:3])
    assert "1 pairs that only a has are left out (row 0:3 …)" in render(facts([a, c]))
    three = render(facts([a, b, c]))
    assert "1 pairs of a that not all others have are left out (row 0:3 …)" in three
    assert "that only" not in three


def test_the_page_names_the_test_behind_each_p() -> None:
    made = policies(3, 60, {"a": 0.1, "b": 0.4})
    page = render(facts(made, baseline="a"))
    assert "either way: of accuracy by the pairs that flipped (McNemar), of means by a paired t test" in page


def test_many_policies_and_subsets_make_a_page() -> None:
    made = policies(1, 120, {f"p{i}": i / 20 for i in range(14)}, subsets=60)
    assert len(render(facts(made))) < 1_500_000


def test_ten_thousand_pairs_stay_below_five_megabytes() -> None:
    made = policies(2, 10_000, {f"step-{10 * i}": i / 10 for i in range(1, 7)}, subsets=40)
    page = facts(made)
    long = dict.fromkeys(("prompt", "chosen", "rejected"), "word " * 2000)
    run = [("word", 0.5 * (-1) ** i) for i in range(3000)]
    tokens = {key: {"chosen": run, "rejected": run} for key in page.tokens}
    html = render(facts(made, texts=dict.fromkeys(page.texts, long), tokens=tokens))
    assert len(html.encode()) < 5_000_000
    assert len(page.selection.changed) == 2 * CHANGED
    assert len(page.selection.listed) <= WORST + SUSPECTS


def test_the_same_facts_give_the_same_bytes() -> None:
    assert render(facts()) == render(facts())


def test_neighbours_without_a_colour_are_one_run() -> None:
    assert merged([("a", 0, 0.0), ("b", 0, 0.0), ("c", 2, 0.5), ("d", -3, -1.0), ("e", 0, 0.0)]) == [
        ("", "", "ab"),
        ("up2", "+0.500", "c"),
        ("down3", "−1.000", "d"),
        ("", "", "e"),
    ]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.3, 0.2), (1e-9, 3e-9), (-5e6, 9e6), (2.0, 2.0)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = figures.nice_ticks(low, high)
    assert 1 <= len(ticks) <= 9
    assert all(low - 1e-12 * abs(low) <= tick <= high + 1e-9 * max(abs(high), 1.0) for tick in ticks)


def test_labels_in_drawings_are_escaped() -> None:
    series = [figures.Series("<b>", [0.1, 0.2])]
    svg = figures.line_chart([0, 1], ["<i>&", "b"], series, '"><script>')
    assert "<script>" not in svg
    assert "<i>" not in svg


def test_chips_subset_differences_and_calibration_say_what_the_comparison_says() -> None:
    n = 400
    names = ["chat"] * 300 + ["safety"] * 100
    base = np.where(np.arange(n) % 10 < 7, 1.0, -1.0)
    new = np.where(np.arange(n) % 10 < np.repeat([9, 2], [300, 100]), 1.0, -1.0)
    tied = np.where(np.arange(n) < 4, 1.0, 0.0)
    made = [scored(name, nats, subsets=names) for name, nats in (("base", base), ("new", new), ("early", tied))]
    html = render(facts(made, baseline="base"))
    assert "In subset safety, new is 50.0 points below base" in html
    assert "Differences to base by subset, with adjusted p" in html
    assert "not ranked: ties" in html
    assert "if calibrated" in html


@pytest.mark.parametrize(
    ("right", "chip"),
    [
        ({"a": 60}, "nothing to compare with"),
        ({"a": 60, "b": 59}, "highest, not told apart"),
        ({"a": 60, "b": 59, "c": 20}, "highest"),
        ({"a": 90, "b": 20}, "best"),
    ],
)
def test_only_a_policy_that_every_other_is_worse_than_is_called_the_best(right: dict[str, int], chip: str) -> None:
    made = [
        scored(name, np.where((np.arange(100) * 37 + 11 * i) % 100 < share, 1.0, -1.0).tolist())
        for i, (name, share) in enumerate(right.items())
    ]
    chips = re.findall(r'<span class="chip strong">([^<]*)</span>', render(facts(made, baseline=None)))
    assert chips[0] == chip
