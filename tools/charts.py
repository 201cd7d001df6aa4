"""Curves of a comparison, as SVG to lie in a page: each line and point bears its name, colours go by method."""

from __future__ import annotations

import io
import re
from typing import Any

from evaluations import Contestant
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from wording import number, plural

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA3377", "#E69F00", "#56B4E9", "#444444")
"""Told apart by the colour-blind: Okabe and Ito's, but for two that are pale on white."""
MARKERS = "osD^vPX"
STYLE: dict[Any, Any] = {"font.size": 10.5, "font.family": "sans-serif", "svg.fonttype": "none", "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "axes.edgecolor": "#777777", "axes.labelcolor": "#222222", "grid.color": "#dddddd"}
APART = 0.2
"""Doublings of steps over which the contestants of one number of steps are spread."""
TIE: dict[str, Any] = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
WORDS: dict[str, Any] = {"textcoords": "offset points", "arrowprops": TIE, "va": "center"}
WORDS |= {"annotation_clip": False, "parse_math": False}
NEAR = [(8, 0), (-8, 0), (0, 11), (0, -11), (8, 8), (-8, 8), (8, -8), (-8, -8)]
PLACES = NEAR + [(side, up) for up in (0, 12, -12, 24, -24, 36, -36, 48, -48) for side in (26, -26, 90, -90)]
"""Where a name may stand, in points right of and above its point: the first ones are tried first."""
DISTANCES = (1, 1.5, 2, 3, 5, 7)
"""Marks of a power of ten on the axes of distances, which often span less than a factor of 2."""
HALO: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
"""Behind names, which may lie on lines."""


Point = tuple[str, float, float, str]
"""A name, its place in figures, its colour."""


def looks(contestants: list[Contestant]) -> dict[str, tuple[str, str]]:
    """Colour and marker by name: one colour for each method, one marker for each run of it. Teachers are black."""
    methods: dict[str, int] = {}
    for each in contestants:
        if not each.is_teacher:
            methods.setdefault(each.method, 0)
    places, found = {method: place for place, method in enumerate(methods)}, {}
    for each in contestants:
        if each.is_teacher:
            found[each.name] = ("black", "*")
            continue
        place, number = places[each.method], methods[each.method]
        methods[each.method] += 1
        found[each.name] = (COLOURS[place % len(COLOURS)], MARKERS[(number + place // len(COLOURS)) % len(MARKERS)])
    return found


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an SVG element without a size of its own, whose names begin with ``prefix``."""
    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": prefix}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text[text.index("<svg") :])
    return re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{prefix}">', text)


def logarithmic(axis: Any, marks: tuple[float, ...] = (1, 2, 5)) -> None:
    """Figures often lie within one power of ten, which by itself would have no labels: ``marks`` of each have."""
    axis.set_major_locator(LogLocator(subs=marks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_locator(NullLocator())


def spread(places: list[float], gap: float) -> list[float]:
    """Places in the same order, at least ``gap`` apart, as near to the given ones as a few passes bring them."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    found = [places[index] for index in order]
    for _ in range(200):
        for low in range(len(found) - 1):
            if (lack := gap - (found[low + 1] - found[low])) > 1e-6:
                found[low], found[low + 1] = found[low] - lack / 2, found[low + 1] + lack / 2
    result = [0.0] * len(places)
    for index, place in zip(order, found):
        result[index] = place
    return result


def label_column(axes: Axes, points: list[Point], size: float) -> None:
    """Names in one column right of all points, in their order from below, each tied to its own."""
    scale = axes.get_figure(root=True).dpi / 72
    places = [axes.transData.transform((x, y)) / scale for _, x, y, _ in points]
    heights, right = spread([height for _, height in places], 1.35 * size), max(place for place, _ in places) + 12
    for (name, x, y, colour), height in zip(points, heights):
        words: dict[str, Any] = {**WORDS, "textcoords": "figure points", "arrowprops": TIE | {"color": colour, "alpha": 0.6}}
        axes.annotate(name, (x, y), (right, height), color=colour, fontsize=size, bbox=HALO, zorder=5, **words)


def steps_chart(contestants: list[Contestant]) -> str:
    """Distance against steps, with intervals, both axes logarithmic; teachers are dashed."""
    look, ends = looks(contestants), []
    with rc_context(STYLE):
        figure = Figure(figsize=(10, max(4.6, 0.26 * len(contestants) + 1.5)))
        figure.subplots_adjust(left=0.075, right=0.86, top=0.97, bottom=0.1)
        axes = figure.add_subplot(xlabel="sampler steps", ylabel="Fréchet distance")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for place, each in enumerate(contestants):
            colour, marker = look[each.name]
            apart = 2 ** (APART * (place / max(len(contestants) - 1, 1) - 0.5))
            steps, values = [count * apart for count in each.evaluations], [one.distance for one in each.evaluations.values()]
            axes.plot(steps, values, "--" if each.is_teacher else "-", marker=marker, color=colour, linewidth=1.3, markersize=5)
            for x, found in zip(steps, each.evaluations.values()):
                # an end at 0 has no place on this axis
                low, high = found.interval or (found.distance, found.distance)
                axes.plot([x, x], [max(low, found.distance / 10), high], color=colour, alpha=0.6, linewidth=1.2)
            ends.append((each.name, steps[-1], values[-1], colour))
        ticks = sorted({steps for each in contestants for steps in each.evaluations})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        logarithmic(axes.yaxis, DISTANCES)
        axes.grid(True, which="major")
        figure.draw_without_rendering()
        for last in {max(each.evaluations) for each in contestants}:
            label_column(axes, [end for end, each in zip(ends, contestants) if max(each.evaluations) == last], 10.5)
        return svg(figure, "steps")


def costs(contestants: list[Contestant], steps: int | None, key: str) -> list[tuple[Contestant, float, float]]:
    """Those whose cost is known: what it is, and the distance in so many steps, or the best one."""
    found = []
    for each in contestants:
        value = each.spent(key)
        if value and (steps is None or steps in each.evaluations):
            found.append((each, value, each.best.distance if steps is None else each.evaluations[steps].distance))
    return found


def cost_chart(contestants: list[Contestant], steps: list[int]) -> str:
    """Distance against what training took: a panel for each number of steps, then the best one; empty without costs."""
    panels: list[tuple[str, int | None, str]] = [(f"in {plural(count, 'step')}", count, "evaluations") for count in steps]
    panels += [("best, whatever the steps", None, key) for key in ("evaluations", "device_seconds")]
    filled = [(title, key, found) for title, count, key in panels if (found := costs(contestants, count, key))]
    if not filled:
        return ""
    names = {"evaluations": "network evaluations in training", "device_seconds": "seconds of training x devices"}
    look, rows = looks(contestants), -(-len(filled) // 2)
    with rc_context(STYLE):
        most = max(len(found) for _, _, found in filled)
        figure, parts = Figure(figsize=(10, max(3.6, 0.17 * most + 1.1) * rows), layout="constrained"), []
        for place, (title, key, found) in enumerate(filled):
            axes = figure.add_subplot(rows, 2, place + 1, xlabel=names[key], ylabel="Fréchet distance")
            axes.set_title(title, loc="left", fontweight="bold", fontsize=10.5)
            points = [(each.name, cost, distance, look[each.name][0]) for each, cost, distance in found]
            for (name, cost, distance, colour) in points:
                axes.plot([cost], [distance], look[name][1], color=colour, markersize=6)
            parts.append((axes, points, scale_costs(axes, [cost for _, cost, _, _ in points])))
        figure.draw_without_rendering()
        for axes, points, are_equal in parts:
            if are_equal:
                label_column(axes, sorted(points, key=lambda point: point[2]), 9)
            else:
                label_points(axes, points)
        return svg(figure, "cost")


def scale_costs(axes: Axes, values: list[float]) -> bool:
    """Both axes logarithmic. Whether the costs are so equal that points stand above each other, as of equal budgets."""
    low, high = min(values), max(values)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(0.12, 0.12)
    middle = (low * high) ** 0.5
    axes.set_xlim(min(low / 1.25, middle / 2.2), max(high * 1.25, middle * 2.2))
    logarithmic(axes.xaxis)
    logarithmic(axes.yaxis, DISTANCES)
    axes.grid(True, which="major")
    return high < 1.3 * low


def label_points(axes: Axes, points: list[Point]) -> None:
    """A name by each point, at the first place where it covers no other name or point, else where it covers least."""
    marks = [axes.transData.transform((x, y)) for _, x, y, _ in points]
    taken: list[Any] = []
    inside = axes.get_window_extent()
    for (name, x, y, colour), own in zip(points, marks):
        text = axes.annotate(name, (x, y), (8, 0), fontsize=9, color=colour, **WORDS)
        others: list[Any] = [mark for mark in marks if mark is not own]
        tried = []
        for place, (side, up) in enumerate(PLACES):
            text.set(position=(side, up), ha=alignment(side))
            box = text.get_window_extent()
            covered = sum(box.overlaps(other) for other in taken) + sum(box.padded(5).contains(*mark) for mark in others)
            tried.append((covered + 3 * (box.x0 < inside.x0 or box.x1 > inside.x1 + 20), place, box))
            if not tried[-1][0]:
                break
        _, place, box = min(tried, key=lambda each: each[:2])
        text.set(position=PLACES[place], ha=alignment(PLACES[place][0]))
        taken.append(box)


def alignment(side: int) -> str:
    """Which end of a name is at its place."""
    return "left" if side > 0 else "right" if side < 0 else "center"
