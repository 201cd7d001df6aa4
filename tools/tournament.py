"""Every recipe trained to the same budget on one teacher, sampled, measured and compared: which method for my teacher?

    python tools/tournament.py --teacher runs/digits/teacher/export --budget 300000ev --out runs/tournament
    python tools/tournament.py --teacher T --budget 120s --configs configs/digits/{cd,sid,dmd2}.yaml --out runs/three --dry-run

A budget is evaluations of networks on samples (``300000ev``, forwards of all roles in training) or seconds of training
(``120s``, approximate: by a trial of a few updates). Pairs that a recipe learns of are paid from a budget of evaluations. The
number of updates is computed before training, so that learning rates fall over the whole run; numbers of steps in a recipe are
rescaled as ``--dry-run`` says. What is complete is not done again: give the same command. A recipe that fails is reported,
and ends the command with 1.

Leaves OUT/<recipe>, runs with ``evaluations/``; OUT/teacher; OUT/tournament.json; OUT/report.html and report.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

# The folder of this file is on the path when it is run as a script.
from contest import Budget, Contest, Failed, Plan
from recipes import Recipe

from distill.checkpoints import atomic_writer
from distill.command_line import Parser, Refusal

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "digits"
FAMILIES = "cd ict ect lcm sid sim diff_instruct dmd2 reflow perflow progressive mmd_4step imm".split()
LEFT_OUT = (
    "Left out of the default: meng, agd, gft (one evaluation for a guided step's two, not fewer steps); snapfusion and the "
    "guided recipes (another law); reflow_pp, reflow_distill, mmd_1step (stand on further stages)."
)
STATED = ("teacher", "budget", "num", "seed", "reference", "features", "bootstrap", "solver")
"""Settings that one tournament has in common."""


def hash_of_folder(folder: Path) -> str:
    """sha256 of the names and contents of all files."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(folder)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


class Record:
    """OUT/tournament.json, written after each change. Raises Refusal if it is of another teacher, budget or measure."""

    def __init__(self, out: Path, stated: dict[str, Any], keep: bool):
        self.path, self.keep, self.lock = out / "tournament.json", keep, threading.Lock()
        self.content: dict[str, Any] = {**stated, "recipes": {}}
        if self.path.is_file():
            found = json.loads(self.path.read_text())
            for key, value in stated.items():
                if found.get(key) != value:
                    words = f"is a tournament with {key} {found.get(key)}, not {value}"
                    raise Refusal(f"--out {out}: {words}; give another folder, or the same {key}")
            self.content = found

    def note(self, recipe: str, **facts: Any) -> None:
        """Adds facts on a recipe."""
        with self.lock:
            self.content["recipes"].setdefault(recipe, {}).update(facts)
            if self.keep:
                with atomic_writer(self.path) as file:
                    file.write((json.dumps(self.content, indent=2) + "\n").encode())


def plan_lines(plans: list[Plan], jobs: int, contest: Contest) -> list[str]:
    """The plan as a Markdown table, and how long it will take."""
    headings = ("recipe", "updates", "evaluations an update", "prepared", "at steps", "numbers of steps", "remark")
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for plan in plans:
        changes = "; ".join(f"{path.rpartition('.')[2]} {old} -> {new}" for path, (old, new) in plan.rescaled.items())
        prepared = f"{plan.prepared['what']}: {plan.prepared['evaluations']:,}" if plan.prepared else ""
        steps = " ".join(map(str, plan.recipe.steps(contest.steps)))
        counts = [f"{plan.updates:,}", f"{plan.evaluations:,.0f}"]
        cells = [plan.recipe.name, *counts, prepared, steps, changes, plan.recipe.remark]
        lines.append(f"| {' | '.join(cells)} |")
    minutes = sum(contest.estimate(plan) for plan in plans) / jobs / 60
    return [*lines, "", f"About {minutes:.0f} minutes with {jobs} jobs at a time. {LEFT_OUT}"]


def add_notes(out: Path, lines: list[str]) -> None:
    """Appends the plan, and what failed, to both reports."""
    markdown, page = out / "report.md", out / "report.html"
    markdown.write_text(markdown.read_text() + "\n## The tournament\n\n" + "\n".join(lines) + "\n")
    rows = [[escape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    words = "".join(f"<p>{escape(line)}</p>" for line in lines if line and not line.startswith("|"))
    section = f"<section><h2>The tournament</h2><table>{cells}</table>{words}</section>"
    text = page.read_text()
    end = text.rindex("</main>")
    page.write_text(text[:end] + section + text[end:])


def attempt(work: Callable[[], Any], name: str, record: Record) -> Any:
    """What the work gives; None where a command fails, which is noted."""
    try:
        return work()
    except (Failed, Refusal) as error:
        record.note(name, status="failed", error=str(error))
        print(f"{name} failed: {error}", file=sys.stderr, flush=True)
        return None


def hold(options: argparse.Namespace, recipes: list[Recipe], contest: Contest, record: Record) -> int:
    """Plans, trains, measures, compares; 1 if anything failed."""

    def planned(recipe: Recipe) -> Plan | None:
        return attempt(lambda: contest.plan(recipe, record.content["recipes"].get(recipe.name, {})), recipe.name, record)

    def done(plan: Plan) -> Path | None:
        def work() -> Path:
            record.note(plan.recipe.name, **plan.facts(), status="running", error=None)
            contest.run(plan)
            record.note(plan.recipe.name, status="complete")
            return contest.out / plan.recipe.name

        return attempt(work, plan.recipe.name, record)

    def measured_teacher() -> bool:
        contest.measure_teacher()
        record.note("teacher", status="complete", error=None)
        return True

    with ThreadPoolExecutor(options.jobs) as pool:
        plans = [plan for plan in pool.map(planned, recipes) if plan]
        lines = plan_lines(plans, options.jobs, contest)
        print("\n".join(lines), flush=True)
        if options.dry_run:
            return int(len(plans) < len(recipes))
        teacher = pool.submit(attempt, measured_teacher, "teacher", record)
        runs = [run for run in pool.map(done, plans) if run]
    failed = {name: facts["error"] for name, facts in record.content["recipes"].items() if facts["status"] == "failed"}
    if runs and teacher.result():
        contest.compare(runs)
        add_notes(contest.out, lines + [f"{name} failed: {error}" for name, error in failed.items()])
    return int(bool(failed))


def checked(options: argparse.Namespace) -> tuple[list[Recipe], Budget]:
    """The recipes and the budget. Raises Refusal for what cannot be followed."""
    budget = Budget.parse(options.budget)
    for key, least in (("num", 2), ("seed", 0), ("bootstrap", 0), ("jobs", 1), ("threads", 1)):
        if (value := getattr(options, key)) < least:
            raise Refusal(f"--{key} {value}: give at least {least}")
    if 0 < options.bootstrap < 40:
        raise Refusal(f"--bootstrap {options.bootstrap}: give at least 40 resamples, or 0 for no interval")
    if wrong := [steps for steps in (*options.steps, *options.teacher_steps) if steps < 1]:
        raise Refusal(f"--steps {wrong[0]}: give at least 1")
    if not (options.teacher / "model_index.json").is_file() and not any(options.teacher.glob("**/config.json")):
        make = "make one: python -m distill fit --config configs/digits/teacher.yaml"
        raise Refusal(f"--teacher {options.teacher}: holds no diffusers model; {make} (leaves runs/digits/teacher/export)")
    recipes = [Recipe(path) for path in options.configs or [CONFIGS / f"{name}.yaml" for name in FAMILIES]]
    names = [recipe.name for recipe in recipes]
    for recipe in recipes:
        if not recipe.path.is_file():
            raise Refusal(f"--configs {recipe.path}: there is no such file; give recipes of configs/")
        if names.count(recipe.name) > 1 or recipe.name == "teacher":
            raise Refusal(f"--configs {recipe.path}: another run has its name; rename the file")
        recipe.teacher_keys, recipe.on_pairs  # refused now rather than after an hour
    return recipes, budget


def main(arguments: list[str] | None = None) -> None:
    """Holds the tournament; ends with 2 and one line if it cannot be, with 1 if a recipe failed."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="diffusers folder")
    add("--budget", required=True, help="of each recipe: 300000ev (evaluations of networks) or 120s (seconds of training)")
    add("--configs", type=Path, nargs="+", help="recipes (default: one of each family, of configs/digits)")
    add("--out", type=Path, required=True, help="folder of all runs and the report")
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="at which students are drawn, as far as they can be")
    add("--teacher-steps", type=int, nargs="+", default=[1, 2, 4, 8, 32], help="at which the teacher is drawn")
    add("--solver", default="euler", help="of the teacher, see tools/sample.py")
    add("--num", type=int, default=1800, help="samples a measurement")
    add("--seed", type=int, default=0, help="of training and of the samples")
    add("--reference", default="digits", help="see tools/fid.py")
    add("--features", default="pixels", help="see tools/fid.py")
    add("--bootstrap", type=int, default=1000, help="resamples for the interval of a distance")
    add("--jobs", type=int, default=2, help="runs at a time")
    add("--threads", type=int, default=1, help="threads a run")
    add("--dry-run", action="store_true", help="print the plan, after a trial of a few updates of each recipe, and end")
    options = parser.parse_args(arguments)
    try:
        recipes, budget = checked(options)
        stated = {key: getattr(options, key) for key in STATED} | {"teacher": hash_of_folder(options.teacher)}
        record = Record(options.out, stated, keep=not options.dry_run)
        contest = Contest(options, budget, time.monotonic())
        code = hold(options, recipes, contest, record)
        shutil.rmtree(contest.trials, ignore_errors=True)
    except (Refusal, Failed) as error:
        parser.error(str(error).removeprefix("error: "))
    sys.exit(code)


if __name__ == "__main__":
    main()
