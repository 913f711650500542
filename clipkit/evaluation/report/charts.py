"""Charts as inline SVG and HTML. Colours come from the style sheet, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from clipkit.evaluation.report.lines import Line
from clipkit.evaluation.report.tables import MARKS, mark
from clipkit.evaluation.report.words import number, short, span
from clipkit.evaluation.result import Metric
from clipkit.html import Html, el, join

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
POINTS = 120
"""Most points of a curve; more are averaged in equal parts."""


def bars(title: str, lines: Sequence[Line], names: Sequence[str]) -> Html:
    """A bar from 0 to 100 % for every line and run, with whiskers for the interval and a tick for chance."""
    above = ["", *(line.labels[0] for line in lines)]
    groups = [
        el("div", el("div", _bar_label(line, before), class_="bar-label"), _group(line, names), class_="bar")
        for line, before in zip(lines, above)
    ]
    axis = el("div", (el("span", f"{share}", style=f"left:{share}%") for share in (0, 25, 50, 75, 100)), class_="axis")
    legend = "Bars in percent; whisker: 95 % interval; dashed line: chance."
    foot = el("div", el("div", class_="bar-label"), el("div", el("div", axis, class_="track-foot")), class_="bar")
    return el("figure", el("figcaption", el("b", title), f" {legend}"), groups, foot, class_="bars")


def _bar_label(line: Line, above: str) -> Html:
    """The first label unless the line above has it too, the others in small."""
    first, *others = line.labels if line.anchor else line.labels[:1]
    return join(None if first == above else f"{first} ", el("small", ", ".join(others)) if others else None)


def _group(line: Line, names: Sequence[str]) -> Html:
    tracks = [_track(metric, line, run, names[run]) for run, metric in enumerate(line.metrics) if metric]
    return el("div", tracks)


def _track(metric: Metric, line: Line, run: int, name: str) -> Html:
    said = f"{name}: {number(metric.value, line.key)} ({span(metric, line.key)})"
    shapes = [
        el("rect", x=0, y="15%", width=_percent(metric.value), height="70%", rx=2, class_=f"fill {_run(run)}"),
        el("line", x1=_percent(metric.low), x2=_percent(metric.high), y1="50%", y2="50%", class_="whisker"),
        *(
            el("line", x1=_percent(end), x2=_percent(end), y1="28%", y2="72%", class_="whisker")
            for end in (metric.low, metric.high)
        ),
    ]
    if metric.chance is not None:
        shapes.append(
            el("line", x1=_percent(metric.chance), x2=_percent(metric.chance), y1=0, y2="100%", class_="chance")
        )
    picture = el("svg", el("title", said), shapes, class_="track", role="img")
    return el(
        "div", picture, el("span", mark(run), f" {number(metric.value, line.key)}", class_="bar-value"), class_="row"
    )


def _percent(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


def _run(run: int) -> str:
    return f"run-{run % len(MARKS)}"


@dataclass
class Frame:
    """Maps values to the pixels of a chart."""

    low: tuple[float, float]
    high: tuple[float, float]
    width: int = WIDTH
    height: int = HEIGHT

    def x(self, value: float) -> float:
        """Pixels from the left."""
        share = (value - self.low[0]) / (self.high[0] - self.low[0])
        return round(LEFT + share * (self.width - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        share = (value - self.low[1]) / (self.high[1] - self.low[1])
        return round(self.height - BOTTOM - share * (self.height - BOTTOM - TOP), 1)

    def grid(self) -> list[Html]:
        """Lines and labels at round values of both axes."""
        out = []
        for value in ticks(self.low[1], self.high[1]):
            out.append(el("line", x1=LEFT, x2=self.width - RIGHT, y1=self.y(value), y2=self.y(value), class_="grid"))
            out.append(el("text", short(value), x=LEFT - 6, y=self.y(value) + 4, class_="tick", text_anchor="end"))
        for value in ticks(self.low[0], self.high[0]):
            x = min(self.x(value), self.width - RIGHT - 8)
            out.append(el("text", short(value), x=x, y=self.height - BOTTOM + 16, class_="tick", text_anchor="middle"))
        return out


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most so many round values between low and high."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def curves(title: str, series: Sequence[Sequence[tuple[float, float]]], names: Sequence[str]) -> Html:
    """One quantity over the samples seen, a line for every run that has it."""
    thin = [_thinned(points) for points in series]
    xs, ys = zip(*(point for points in thin for point in points))
    low, high = _room(min(ys), max(ys))
    frame = Frame((0, low), (max(xs), high))
    shapes = frame.grid()
    for run, points in enumerate(thin):
        path = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in points)
        if len(points) == 1:
            shapes.append(
                el("circle", cx=frame.x(points[0][0]), cy=frame.y(points[0][1]), r=3, class_=f"fill {_run(run)}")
            )
        elif points:
            shapes.append(el("polyline", points=path, class_=f"curve {_run(run)}"))
    last = [
        f"{names[run]}: {short(points[0][1])} → {short(points[-1][1])}" for run, points in enumerate(thin) if points
    ]
    said = f"{title} over samples seen. {'; '.join(last)}"
    picture = el("svg", shapes, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=said)
    return el("figure", el("figcaption", title), picture)


def scatter(title: str, axes: tuple[str, str], points: Sequence[tuple[Metric, Metric]], names: Sequence[str]) -> Html:
    """Every run as a point of two shares with whiskers; a stepped line joins those that no other run beats in both."""
    width, height = 440, 340
    lows, highs = zip(
        *(_shares(100 * min(m.low for m in axis), 100 * max(m.high for m in axis)) for axis in zip(*points))
    )
    frame = Frame(lows, highs, width, height)
    shapes = [*frame.grid(), _front(frame, points)]
    for run, (x, y) in enumerate(points):
        cx, cy = frame.x(100 * x.value), frame.y(100 * y.value)
        shapes += [
            el("line", x1=frame.x(100 * x.low), x2=frame.x(100 * x.high), y1=cy, y2=cy, class_="whisker"),
            el("line", x1=cx, x2=cx, y1=frame.y(100 * y.low), y2=frame.y(100 * y.high), class_="whisker"),
            el("text", MARKS[run % len(MARKS)], x=cx, y=cy + 6, class_=f"point {_run(run)}", text_anchor="middle"),
            _name(names[run], cx, cy, width),
        ]
    shapes.append(el("text", axes[0], x=width - RIGHT, y=height - BOTTOM - 6, class_="axis-name", text_anchor="end"))
    shapes.append(el("text", axes[1], x=LEFT + 6, y=TOP + 12, class_="axis-name"))
    said = "; ".join(
        f"{n}: {axes[0]} {100 * x.value:.1f}, {axes[1]} {100 * y.value:.1f}" for n, (x, y) in zip(names, points)
    )
    picture = el("svg", shapes, viewBox=f"0 0 {width} {height}", role="img", aria_label=said)
    return el("figure", el("figcaption", title), picture, class_="scatter")


SPOKES = (3, 16)
"""Lines that a radar can show: fewest, most."""


def radar(title: str, lines: Sequence[Line], names: Sequence[str]) -> Html | None:
    """A spoke from 0 to 100 % for every line, a closed outline for every run that has all; None for too few or many."""
    if not SPOKES[0] <= len(lines) <= SPOKES[1]:
        return None
    width, height, radius = 460, 310, 122
    middle = (width / 2, height / 2)
    ways = [2 * math.pi * n / len(lines) - math.pi / 2 for n in range(len(lines))]

    def at(way: float, share: float) -> tuple[float, float]:
        return tuple(round(m + radius * share * turn(way), 1) for m, turn in zip(middle, (math.cos, math.sin)))  # type: ignore[return-value]

    def outline(shares: Sequence[float], kind: str) -> Html:
        corners = [at(way, min(1.0, max(0.0, share))) for way, share in zip(ways, shares)]
        return el("polygon", points=" ".join(f"{x},{y}" for x, y in corners), class_=kind)

    shapes = [outline([ring] * len(ways), "grid ring") for ring in (0.25, 0.5, 0.75, 1.0)]
    shapes += [el("line", x1=middle[0], y1=middle[1], x2=at(w, 1)[0], y2=at(w, 1)[1], class_="grid") for w in ways]
    shapes += [
        el("text", f"{100 * ring:.0f}", x=middle[0] + 3, y=at(-math.pi / 2, ring)[1] + 13, class_="tick")
        for ring in (0.5, 1.0)
    ]
    same = _shared_start([line.labels[0] for line in lines])
    for way, line in zip(ways, lines):
        x, y = at(way, 1.09)
        side = "middle" if abs(math.cos(way)) < 0.2 else "start" if math.cos(way) > 0 else "end"
        shown = _shortened(line.labels[0].removeprefix(same), 19)
        shapes.append(
            el("text", el("title", ", ".join(line.labels)), shown, x=x, y=y + 4, class_="tick", text_anchor=side)
        )
    said = []
    for run, name in enumerate(names):
        found = [line.metrics[run] for line in lines]
        if all(found):
            shares = [metric.value for metric in found if metric]
            shapes.append(outline(shares, f"curve {_run(run)}"))
            said.append(f"{name}: {', '.join(f'{n.labels[0]} {100 * v:.0f}' for n, v in zip(lines, shares))}")
    if not said:
        return None
    label = f"{title} {'; '.join(said)}"
    picture = el("svg", shapes, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)
    return el("figure", el("figcaption", title), picture, _legend(names), class_="scatter radar")


def reliability(found: Sequence[tuple[int, Sequence[dict[str, float]]]], names: Sequence[str]) -> Html:
    """How often answers are right against how sure the model is: a curve for every run (number, bins of `calibration`).

    A mark's area is its bin's share of the answers; on the dashed line probabilities are true.
    """
    width, height = 440, 340
    frame = Frame((0, 0), (100, 100), width, height)
    ends = {"x1": frame.x(0), "y1": frame.y(0), "x2": frame.x(100), "y2": frame.y(100)}
    shapes, said = [*frame.grid(), el("line", class_="front", **ends)], []
    for run, bins in found:
        points = [(frame.x(100 * one["sure"]), frame.y(100 * one["right"])) for one in bins]
        path = " ".join(f"{x},{y}" for x, y in points)
        total = sum(one["n"] for one in bins)
        shapes.append(el("polyline", points=path, class_=f"curve {_run(run)}"))
        for one, (x, y) in zip(bins, points):
            about = f"{names[run]}: {100 * one['sure']:.0f} % sure, {100 * one['right']:.0f} % right, n {one['n']:g}"
            size = round(3 + 9 * math.sqrt(one["n"] / total), 1)
            shapes.append(el("circle", el("title", about), cx=x, cy=y, r=size, class_=f"fill bubble {_run(run)}"))
        said.append("; ".join(f"{100 * one['sure']:.0f} % sure, {100 * one['right']:.0f} % right" for one in bins))
    shapes.append(
        el("text", "how sure, % →", x=width - RIGHT, y=height - BOTTOM - 6, class_="axis-name", text_anchor="end")
    )
    shapes.append(el("text", "how often right, % ↑", x=LEFT + 6, y=TOP + 12, class_="axis-name"))
    label = ". ".join(f"{names[run]}: {text}" for (run, _), text in zip(found, said))
    picture = el("svg", shapes, viewBox=f"0 0 {width} {height}", role="img", aria_label=f"Reliability. {label}")
    return el("figure", el("figcaption", "Reliability of probabilities"), picture, _legend(names), class_="scatter")


def _legend(names: Sequence[str]) -> Html | None:
    """Which line is whose."""
    if len(names) == 1:
        return None
    items = [
        el(
            "span",
            el(
                "svg",
                el("line", x1=0, x2=26, y1=5, y2=5, class_=f"curve {_run(run)}"),
                viewBox="0 0 26 10",
                class_="dash",
                role="img",
                aria_label=f"the line of {name}",
            ),
            f" {name}",
        )
        for run, name in enumerate(names)
    ]
    return el("p", items, class_="legend")


def _shared_start(names: Sequence[str]) -> str:
    """What all names begin with, up to a comma or colon: it says nothing beside the others."""
    start = "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*names)))
    return start[: max(start.rfind(", "), start.rfind(": ")) + 2] if ", " in start or ": " in start else ""


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _name(name: str, x: float, y: float, width: int) -> Html:
    """A point's name, on the side where there is room."""
    shown = _shortened(name, 24)
    at, anchor = (x - 10, "end") if x > width / 2 else (x + 10, "start")
    return el("text", shown, x=at, y=y - 8, class_="tick", text_anchor=anchor)


def _front(frame: Frame, points: Sequence[tuple[Metric, Metric]]) -> Html | None:
    values = sorted({(x.value, y.value) for x, y in points}, reverse=True)
    front, best = [], -1.0
    for x, y in values:
        if y > best:
            front.append((frame.x(100 * x), frame.y(100 * y)))
            best = y
    steps = [front[0], *(corner for (_, y), (x, top) in pairwise(front) for corner in ((x, y), (x, top)))]
    return el("polyline", points=" ".join(f"{x},{y}" for x, y in steps), class_="front")


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / POINTS) or 1
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _room(low: float, high: float) -> tuple[float, float]:
    """A little room above and below; never none."""
    spare = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - spare, high + spare


def _shares(low: float, high: float) -> tuple[float, float]:
    """Room for shares in percent."""
    low, high = _room(low, high)
    return max(0.0, low), min(100.0, high)
