"""Charts as inline SVG: lines with intervals, histograms, dots with intervals, reliability. Pure text in, text out.

Colours, line widths and fonts are classes that the page's style sheet defines, so one drawing serves light, dark and
paper. Series differ in shape as well as colour. Every label goes through `escape`; numbers are written in fixed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 330, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 34
COLOURS = 6
ALL, CHOSEN, REJECTED = "all", "chosen", "rejected"
PARTS = 5
"""Shades of the parts of a bar. Colours with their shapes are policies and nothing else on the page."""
Number = float | None
Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: a point per x, None where there is none; `low` and `high` bound its interval.

    `colour`: a policy's (< COLOURS); or ALL, a line through all policies; or a side, CHOSEN solid, REJECTED dashed.
    """

    label: str
    y: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    colour: int | str = 0


@dataclass(frozen=True, slots=True)
class Frame:
    """A plotting area: data coordinates → drawing coordinates."""

    x0: float
    x1: float
    y0: float
    y1: float
    width: int = WIDTH
    height: int = HEIGHT

    def x(self, value: float) -> float:
        share = (value - self.x0) / (self.x1 - self.x0) if self.x1 != self.x0 else 0.5
        return LEFT + share * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y0) / (self.y1 - self.y0) if self.y1 != self.y0 else 0.5
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Three significant digits, a true minus sign, no exponent between 0.001 and 100,000."""
    if value == 0.0:
        return "0"
    text = f"{value:.3g}" if not 1000 <= abs(value) < 100_000 else f"{value:.0f}"
    return text.replace("-", "−")


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _svg(body: Iterable[str], title: str, width: int = WIDTH, height: int = HEIGHT, kind: str = "chart") -> Markup:
    inside = f"<title>{escape(title)}</title>{''.join(body)}"
    head = f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return Markup(f"{head}{inside}</svg>")  # noqa: S704 (texts are escaped, numbers formatted)


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def marker(x: float, y: float, colour: int, size: float = 4.0) -> str:
    """A filled shape that differs from colour to colour."""
    kind = f"mark c{colour % COLOURS}"
    shape = colour % COLOURS
    if shape == 0:
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    if shape == 1:
        corner = f'x="{x - size:.1f}" y="{y - size:.1f}"'
        return f'<rect class="{kind}" {corner} width="{2 * size:.1f}" height="{2 * size:.1f}"/>'
    angles = {2: (90, 210, 330), 3: (0, 90, 180, 270), 4: (270, 30, 150), 5: (90, 162, 234, 306, 18)}[shape]
    points = " ".join(f"{x + 1.35 * size * _cos(a):.1f},{y - 1.35 * size * _sin(a):.1f}" for a in angles)
    return f'<polygon class="{kind}" points="{points}"/>'


def _dot(x: float, y: float, kind: str, radius: float) -> str:
    return f'<circle class="mark {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'


def _cos(degrees: float) -> float:
    return math.cos(math.radians(degrees))


def _sin(degrees: float) -> float:
    return math.sin(math.radians(degrees))


def _look(colour: int | str) -> str:
    """The style class of a policy's colour or of a side."""
    return colour if isinstance(colour, str) else f"c{colour % COLOURS}"


def swatch(colour: int | str) -> Markup:
    """A policy's marker, or the line of a side, on its own: for tables and legends."""
    if isinstance(colour, str):
        line = _line(0, 7, 26, 7, f"line {colour}")
        return Markup(f'<svg class="swatch long" viewBox="0 0 26 14" aria-hidden="true">{line}</svg>')  # noqa: S704
    return Markup(f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">{marker(7, 7, colour, 4.5)}</svg>')  # noqa: S704


# --- lines over checkpoints ------------------------------------------------------------------------------------------


def line_chart(
    x: Sequence[float],
    names: Sequence[str],
    series: Sequence[Series],
    title: str,
    form: Format = short,
    across: float | None = None,
) -> Markup:
    """Series over x with their intervals as bands. `names`: the label under each x; `across`: a line to read by."""
    values = [v for s in series for v in (*s.y, *s.low, *s.high) if v is not None] + (
        [] if across is None else [across]
    )
    low, high = padded(values)
    frame = Frame(min(x), max(x), low, high)
    body = [*_y_axis(frame, form), *_x_names(frame, x, names)]
    if across is not None:
        body.append(_line(LEFT, frame.y(across), WIDTH - RIGHT, frame.y(across), "across"))
    for one in series:
        body += [_band(frame, x, one), _path(frame, x, one), *_marks(frame, x, one)]
    return _svg(body, title)


def padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values with a margin around it; never empty."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or max(abs(high), 1e-6) * 0.1
    return low - room, high + room


def _y_axis(frame: Frame, form: Format) -> list[str]:
    body = []
    for tick in nice_ticks(frame.y0, frame.y1):
        y = frame.y(tick)
        body += [_line(LEFT, y, frame.width - RIGHT, y, "grid"), _text(LEFT - 6, y + 4, form(tick), "end")]
    return body


def _x_names(frame: Frame, x: Sequence[float], names: Sequence[str]) -> list[str]:
    """Names under the axis, leaving out those that would touch the one before."""
    body, free = [], -math.inf
    for value, name in zip(x, names, strict=True):
        at = frame.x(value)
        half = 3.3 * min(len(name), 12) + 4
        if at - half < free:
            continue
        free = at + half
        anchor = "end" if at > frame.width - RIGHT - half + 4 and len(x) > 1 else "middle"
        body.append(_text(at, frame.height - BOTTOM + 18, name if len(name) <= 12 else f"{name[:11]}…", anchor))
    return body


def _points(frame: Frame, x: Sequence[float], y: Sequence[Number]) -> list[tuple[float, float]]:
    return [(frame.x(a), frame.y(b)) for a, b in zip(x, y, strict=True) if b is not None]


def _path(frame: Frame, x: Sequence[float], one: Series) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in _points(frame, x, one.y))
    return f'<polyline class="line {_look(one.colour)}" points="{points}"/>'


def _band(frame: Frame, x: Sequence[float], one: Series) -> str:
    if not one.low or not one.high:
        return ""
    upper, lower = _points(frame, x, one.high), _points(frame, x, one.low)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in [*upper, *reversed(lower)])
    if len(upper) == 1 and len(lower) == 1:
        return _line(upper[0][0], upper[0][1], lower[0][0], lower[0][1], f"whisker {_look(one.colour)}")
    return f'<polygon class="band {_look(one.colour)}" points="{points}"/>'


def _marks(frame: Frame, x: Sequence[float], one: Series) -> list[str]:
    points = _points(frame, x, one.y)
    if len(points) > 40:
        return []
    if isinstance(one.colour, str):
        return [_dot(a, b, one.colour, 2.2) for a, b in points]
    return [marker(a, b, one.colour, 3.6) for a, b in points]


# --- distributions ---------------------------------------------------------------------------------------------------


def histogram(
    counts: Sequence[int], edges: Sequence[float], title: str, colour: int = 0, top: int | None = None
) -> Markup:
    """Bars over equal bins; what lies below 0 is hatched. `top`: the count at full height, to share one scale."""
    height = 120
    frame = Frame(edges[0], edges[-1], 0.0, float(max(top or 0, *counts, 1)), height=height)
    body = [_bar(frame, count, edges[i], edges[i + 1], colour) for i, count in enumerate(counts) if count]
    body.append(_line(LEFT, frame.y(0), WIDTH - RIGHT, frame.y(0), "axis"))
    if edges[0] <= 0.0 <= edges[-1]:
        body.append(_line(frame.x(0), TOP - 4, frame.x(0), frame.y(0) + 4, "across"))
    body += [_text(frame.x(tick), height - BOTTOM + 18, short(tick)) for tick in nice_ticks(edges[0], edges[-1])]
    return _svg(body, title, height=height)


def _bar(frame: Frame, count: int, low: float, high: float, colour: int) -> str:
    x, y = frame.x(low), frame.y(count)
    kind = f"bar c{colour % COLOURS}" + (" below" if (low + high) / 2 < 0 else "")
    width, height = max(frame.x(high) - x - 1, 0.5), frame.y(0) - y
    return f'<rect class="{kind}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def tiny_histogram(counts: Sequence[int], colour: int, title: str) -> Markup:
    """A histogram the size of a word, for a table cell."""
    top, width, height = max([*counts, 1]), 96, 22
    step = width / max(len(counts), 1)
    body = [
        f'<rect class="bar c{colour % COLOURS}" x="{i * step:.1f}" y="{height - height * count / top:.1f}" '
        f'width="{step - 0.6:.1f}" height="{height * count / top:.1f}"/>'
        for i, count in enumerate(counts)
        if count
    ]
    return _svg(body, title, width, height, "tiny")


# --- dots with intervals ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dot:
    """An estimate with its interval."""

    value: Number
    low: Number
    high: Number
    colour: int


def dot_row(dots: Sequence[Dot], low: float, high: float, title: str, across: float | None = None) -> Markup:
    """Estimates under each other on one scale: one row of a dot plot."""
    width, line = 300, 13
    height = line * max(len(dots), 1) + 6

    def at(value: float) -> float:
        return 6 + (width - 12) * (min(max(value, low), high) - low) / (high - low)

    body = [] if across is None else [_line(at(across), 0, at(across), height, "across")]
    for index, dot in enumerate(dots):
        y = 3 + line * (index + 0.5)
        if dot.low is not None and dot.high is not None:
            body.append(_line(at(dot.low), y, at(dot.high), y, f"whisker c{dot.colour % COLOURS}"))
        if dot.value is not None:
            body.append(marker(at(dot.value), y, dot.colour))
    return _svg(body, title, width, height, "dots")


def dot_axis(low: float, high: float, form: Format = percent) -> Markup:
    """The scale under a dot plot."""
    body = []
    for tick in nice_ticks(low, high, 5):
        share = (tick - low) / (high - low)
        anchor = "start" if share < 0.02 else "end" if share > 0.98 else "middle"
        body.append(_text(6 + 288 * share, 12, form(tick), anchor))
    return _svg(body, f"scale from {form(low)} to {form(high)}", 300, 16, "dots")


# --- calibration -----------------------------------------------------------------------------------------------------


def reliability(series: Sequence[tuple[str, int, Sequence[tuple[float, float, int]]]], title: str) -> Markup:
    """Accuracy against confidence, both from 0.5 or less to 1. series: (label, colour, [(confidence, accuracy, n)])."""
    least = min([0.5, *(accuracy for _, _, points in series for _, accuracy, _ in points)])
    frame = Frame(0.5, 1.0, max(0.0, least - 0.03), 1.02)
    body = [*_y_axis(frame, percent), _line(frame.x(0.5), frame.y(0.5), frame.x(1), frame.y(1), "across")]
    body += [_text(frame.x(tick), HEIGHT - BOTTOM + 18, percent(tick)) for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
    for _, colour, points in series:
        drawn = " ".join(f"{frame.x(c):.1f},{frame.y(a):.1f}" for c, a, _ in points)
        body.append(f'<polyline class="line c{colour % COLOURS}" points="{drawn}"/>')
        largest = max([n for *_, n in points], default=1)
        body += [marker(frame.x(c), frame.y(a), colour, 2.0 + 3.0 * math.sqrt(n / largest)) for c, a, n in points]
    return _svg(body, title)


# --- sets of pairs ---------------------------------------------------------------------------------------------------


def heat_map(values: Sequence[Sequence[Number]], names: Sequence[str], title: str) -> Markup:
    """Shares from 0 to 1 as squares with their number: row name, column number. Columns are numbered as rows are."""
    size, left = 44, 118
    width, height = left + size * len(names), 20 + size * len(names)
    body = [_text(left + size * (i + 0.5), 14, str(i + 1)) for i in range(len(names))]
    for row, cells in enumerate(values):
        y = 20 + size * row
        body.append(_text(left - 8, y + size / 2 + 4, f"{row + 1} {names[row]}", "end"))
        for column, value in enumerate(cells):
            x, share = left + size * column, value or 0.0
            corner = f'x="{x + 1}" y="{y + 1}" width="{size - 2}" height="{size - 2}"'
            body.append(f'<rect class="bar all" {corner} fill-opacity="{0.6 * share:.2f}"/>')
            body.append(_text(x + size / 2, y + size / 2 + 4, "–" if value is None else f"{100 * share:.0f}"))
    return _svg(body, title, width, height)


def scatter(
    groups: Sequence[tuple[str, Sequence[tuple[float, float]]]], title: str, bounds: tuple[float, float, float, float]
) -> Markup:
    """Points of several groups, later ones on top. groups: (style class, [(x, y)]); bounds: x from, to, y from, to."""
    frame = Frame(*bounds)
    body = [*_y_axis(frame, short)]
    body += [_text(frame.x(tick), HEIGHT - BOTTOM + 18, short(tick)) for tick in nice_ticks(bounds[0], bounds[1])]
    if bounds[0] <= 0.0 <= bounds[1]:
        body.append(_line(frame.x(0), TOP, frame.x(0), HEIGHT - BOTTOM, "across"))
    if bounds[2] <= 0.0 <= bounds[3]:
        body.append(_line(LEFT, frame.y(0), WIDTH - RIGHT, frame.y(0), "across"))
    for kind, points in groups:
        body += [_dot(frame.x(x), frame.y(y), kind, 1.6) for x, y in points]
    return _svg(body, title)


def stacked_bar(shares: Sequence[float], title: str) -> Markup:
    """Parts of a whole side by side, in order, each in its shade; beyond PARTS parts the rest is left unfilled."""
    width, height, at = 300, 18, 0.0
    body = []
    for index, share in enumerate(shares[:PARTS]):
        corner = f'x="{width * at:.1f}" y="2" width="{max(width * share - 1, 0.5):.1f}" height="{height - 4}"'
        body.append(f'<rect class="bar part{index}" {corner}/>')
        at += share
    return _svg(body, title, width, height, "dots")


def part_swatch(index: int) -> Markup:
    """The shade of a part of `stacked_bar`, for its legend."""
    inside = f'<rect class="bar part{index}" x="1" y="2" width="24" height="10"/>'
    return Markup(f'<svg class="swatch long" viewBox="0 0 26 14" aria-hidden="true">{inside}</svg>')  # noqa: S704
