"""A comparison as one HTML file, which needs nothing but a browser, and as Markdown."""

from __future__ import annotations

import base64
import html
import io
import re
from pathlib import Path

import numpy
from charts import cost_chart, steps_chart
from evaluations import Contestant, Evaluation
from wording import (
    INTERVALS,
    LEGEND,
    all_steps,
    beside,
    commands,
    distance,
    elsewhere,
    facts,
    headline,
    interval,
    level,
    plural,
    protocol,
    provenance,
    ranked,
    way,
)

from distill.command_line import Refusal
from distill.metrics.image_sets import open_set

STYLE = (Path(__file__).resolve().parent / "report.css").read_text()
TITLE = "Which few-step generator?"
COLUMNS, ROWS, LARGEST = 10, 4, 96
"""Pictures of a set that are shown, and pixels of their longer side, to which larger ones are shrunk."""
BODY = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>
<h1>{title}</h1>
{headline}
<h2>Figures</h2>
<p>{legend} The best of each number of steps is marked; ≈ where an interval reaches that of the best.</p>
{table}
<p class="note">{intervals}</p>
<h2>Distance against steps</h2>
<figure class="chart">{steps}<figcaption>Both axes are logarithmic. One colour for each method; thin bars are intervals; the
teacher is dashed. Runs stand a little apart, so that bars can be seen.</figcaption></figure>
<h2>Distance against the cost of training</h2>
{cost}
<h2>Samples</h2>
{pictures}
<h2>What the figures depend on</h2>
{small}
</main></body></html>
"""


def escape(text: object) -> str:
    """For HTML: all that comes from files goes through here."""
    return html.escape(str(text), quote=True)


def breakable(name: str) -> str:
    """For HTML; a class's name may be broken between its words."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "<wbr>", escape(name))


def table(headings: list[str], lines: list[list[str]], kind: str = "") -> str:
    """A table in a box of its own that scrolls; cells are HTML."""
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>\n" for line in lines)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def marks(contestants: list[Contestant]) -> dict[tuple[str, int], str]:
    """``best`` or ``level`` by name and number of steps; nothing for others, nor where there is one run alone."""
    found: dict[tuple[str, int], str] = {}
    for steps in all_steps(contestants):
        (winner, best), *others = ranked(contestants, steps)
        if others:
            found[winner.name, steps] = "best"
        found |= {(each.name, steps): "level" for each, other in others if level(best, other)}
    return found


def figure_cell(found: Evaluation | None, mark: str) -> str:
    """Distance, interval, evaluations and accuracy of one set."""
    if found is None:
        return '<span class="none">–</span>'
    value = {"best": f"<b>{distance(found)}</b>", "level": f"≈ {distance(found)}"}.get(mark, distance(found))
    small = [escape(text) for text in (interval(found), beside(found)) if text]
    return f'<span class="value">{value}</span>' + "".join(f"<small>{text}</small>" for text in small)


def folded(summary: str, content: str, is_open: bool = False) -> str:
    """A part of the page that is shown on demand."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{content}</details>"


def figures_table(contestants: list[Contestant]) -> str:
    """A line for each contestant: its figures, then what it took."""
    steps, mark = all_steps(contestants), marks(contestants)
    headings = ["", *(plural(number, "step") for number in steps), *(heading for heading, _ in facts(contestants[0]))]
    lines = []
    for each in contestants:
        said = [way(each), *elsewhere(each, steps)]
        name = f"<b>{escape(each.name)}</b>" + "".join(f"<small>{breakable(text)}</small>" for text in said)
        cells = [figure_cell(each.evaluations.get(number), mark.get((each.name, number), "")) for number in steps]
        lines.append([name, *cells, *(escape(content) for _, content in facts(each))])
    return table(headings, lines, "figures")


def picture(found: Evaluation) -> str:
    """The first samples of a set as a PNG in an ``img``; a sentence if they are no longer there."""
    from PIL import Image

    try:
        source = open_set("samples", str(found.folder)).source
        shown = [source[index] for index in range(min(COLUMNS * ROWS, len(source)))]
    except (Refusal, ValueError):
        return "<p>The samples were not kept.</p>"
    images = [Image.fromarray(numpy.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy()) for pixels in shown]
    for image in images:
        image.thumbnail((LARGEST, LARGEST))
    width, height = max(image.width for image in images) + 1, max(image.height for image in images) + 1
    sheet = Image.new("RGB", (COLUMNS * width - 1, -(-len(images) // COLUMNS) * height - 1), (128, 128, 128))
    for index, image in enumerate(images):
        sheet.paste(image, (index % COLUMNS * width, index // COLUMNS * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="samples" width="{sheet.width}" height="{sheet.height}" src="data:image/png;base64,{content}">'


def pictures(contestants: list[Contestant]) -> str:
    """Samples side by side, a block for each number of steps, in the order of distance; the first block is open."""
    teachers = [(each, each.best) for each in contestants if each.is_teacher]
    blocks = []
    drawn = {id(found): picture(found) for each in contestants for found in each.evaluations.values()}
    for place, steps in enumerate(all_steps(contestants)):
        shown = []
        for each, found in [*ranked(contestants, steps), *teachers]:
            caption = f"<b>{escape(each.name)}</b> {plural(found.steps, 'step')}, {distance(found)}"
            shown.append(f"<figure>{drawn[id(found)]}<figcaption>{caption}</figcaption></figure>")
        blocks.append(folded(plural(steps, "step"), f'<div class="grids">{"".join(shown)}</div>', place == 0))
    seeds = {found.settings.get("seed") for each in contestants for found in each.evaluations.values()}
    same = "Pictures at one place have one seed. " if len(seeds) == 1 else "Sets have unequal seeds: see below. "
    return f"<p>{same}The first {COLUMNS * ROWS} of each set, none chosen.</p>" + "\n".join(blocks)


def costs_part(contestants: list[Contestant]) -> str:
    """The chart, and who is not in it."""
    runs = [each for each in contestants if not each.is_teacher]
    missing = [each.name for each in runs if not each.spent("evaluations")]
    said = f'<p class="note">Cost not recorded, so not drawn: {escape(", ".join(missing))}.</p>' if missing else ""
    drawn = cost_chart(runs, all_steps(runs))
    return (f'<figure class="chart">{drawn}</figure>' if drawn else "") + said


def small_print(contestants: list[Contestant], command: str) -> str:
    """Protocol, settings and hashes of each set, and the commands."""
    common = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in protocol(contestants))
    headings, lines = provenance(contestants)
    sets = table(headings, [[escape(cell) for cell in line] for line in lines], "sets")
    folders = "".join(f"<li>{escape(each.name)}: <code>{escape(each.folder)}</code></li>" for each in contestants)
    shell = escape("\n".join([command, *commands(contestants)]))
    parts = [folded("Each set of samples", sets), folded("Folders", f"<ul>{folders}</ul>")]
    return f"<dl>{common}</dl>{''.join(parts)}{folded('Commands that give the figures', f'<pre>{shell}</pre>')}"


def html_page(contestants: list[Contestant], command: str) -> str:
    """The page."""
    answers = "".join(f"<li><span>{escape(key)}:</span> {escape(value)}</li>" for key, value in headline(contestants))
    return BODY.format(
        title=TITLE,
        style=STYLE,
        headline=f'<ul class="answer">{answers}</ul>',
        legend=escape(LEGEND),
        table=figures_table(contestants),
        intervals=escape(INTERVALS),
        steps=steps_chart(contestants),
        cost=costs_part(contestants),
        pictures=pictures(contestants),
        small=small_print(contestants, command),
    )


def plain(text: object) -> str:
    """For a cell of Markdown: nothing in it is markup or ends the cell."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"\\{sign}" if sign in "\\`*_[]|$~" else sign for sign in escaped)


def markdown_table(headings: list[str], lines: list[list[str]]) -> str:
    """Cells are text."""
    rows = [headings, ["---"] * len(headings), *([plain(cell) or " " for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown(contestants: list[Contestant], command: str) -> str:
    """The same without pictures and curves."""
    steps = all_steps(contestants)
    headings = ["run", "method", *(plural(number, "step") for number in steps)]
    headings += [heading for heading, _ in facts(contestants[0])]
    lines = []
    for each in contestants:
        found = [each.evaluations.get(number) for number in steps]
        cells = ["; ".join(filter(None, [distance(one), interval(one), beside(one)])) if one else "–" for one in found]
        said = "; ".join([way(each), *elsewhere(each, steps)])
        lines.append([each.name, said, *cells, *(content for _, content in facts(each))])
    answers = "\n".join(f"- **{plain(key)}**: {plain(value)}" for key, value in headline(contestants))
    common = "\n".join(f"- {plain(key)}: {plain(value)}" for key, value in protocol(contestants))
    shell = "\n".join(f"    {line}" for line in [command, *commands(contestants)])
    parts = [f"# {TITLE}", answers, "## Figures", LEGEND, markdown_table(headings, lines), INTERVALS]
    parts += ["## What the figures depend on", common, markdown_table(*provenance(contestants)), "## Commands", shell]
    return "\n\n".join(parts) + "\n"
