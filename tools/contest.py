"""The commands of a tournament: trials, preparations, trainings and measurements, each a process of the real tool."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The folder of this file is on the path when a script beside it is run.
from recipes import Recipe

from distill.callbacks.training_cost import FILE as COST
from distill.checkpoints import atomic_writer
from distill.command_line import Refusal

TOOLS = Path(__file__).resolve().parent
TRIAL = 8
"""Updates of a trial, rounded up to whole cycles of the players."""
TRIAL_PAIRS = 256
SHARE = 0.5
"""Of a budget of evaluations at most so much is spent on pairs."""
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
NOT_FOR = "this student was trained for"
"""Of the refusal of tools/sample.py to draw in other numbers of steps."""
REFUSED = "not_for.json"
"""Beside the evaluations: numbers of steps that were refused."""


class Failed(Exception):
    """A command that failed; its last line."""


@dataclass(frozen=True)
class Budget:
    """What a recipe may cost: ``amount`` of ``unit``, ``evaluations`` or ``seconds``."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``300000ev`` or ``120s``. Raises Refusal."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(ev|s)", text)
        if not found or not float(found[1]) > 0:
            raise Refusal(f"--budget {text}: give evaluations of networks, e.g. 300000ev, or seconds of training, e.g. 120s")
        return cls(float(found[1]), {"ev": "evaluations", "s": "seconds"}[found[2]])

    def updates(self, trial: dict[str, float], prepared: float, unit: int) -> int:
        """The most updates that fit, a multiple of ``unit``.

        Args:
            trial: ``updates`` that were tried, and what they cost in the budget's own unit.
            prepared: what is spent beforehand.

        Raises:
            Refusal: not one unit fits.
        """
        each = trial[self.unit] / trial["updates"]
        count = math.floor((self.amount - prepared) / each / unit + 1e-9) * unit
        if count < unit:
            spent = f" after {prepared:,.0f} for its preparation" if prepared else ""
            raise Refusal(f"--budget {self.amount:g} {self.unit}: {unit} updates cost {unit * each:,.6g}{spent}; give more")
        return count


@dataclass(frozen=True)
class Plan:
    """What is to be done for a recipe.

    Attributes:
        recipe: the file.
        updates: of the run.
        trial: ``updates``, ``evaluations``, ``seconds`` of a trial, and ``wall``, seconds with the start of the process.
        prepared: what is made first: ``evaluations``, ``what``, ``count``; {} for nothing.
    """

    recipe: Recipe
    updates: int
    trial: dict[str, float]
    prepared: dict[str, Any]

    @property
    def evaluations(self) -> float:
        """Of an update, in the mean of the players."""
        return self.trial["evaluations"] / self.trial["updates"]

    @property
    def rescaled(self) -> dict[str, tuple[int, int]]:
        return self.recipe.rescaled(self.updates)

    def facts(self) -> dict[str, Any]:
        """As tournament.json keeps them."""
        sha256, rescaled = hashlib.sha256(self.recipe.path.read_bytes()).hexdigest(), self.rescaled
        facts = {"config": str(self.recipe.path), "sha256": sha256, "updates": self.updates, "trial": self.trial}
        return facts | {"prepared": self.prepared, "rescaled": rescaled, "remark": self.recipe.remark}


class Contest:
    """Runs the commands of one tournament.

    Args:
        options: of the command line.
        budget: of each recipe.
        began: seconds of the monotonic clock.
    """

    def __init__(self, options: argparse.Namespace, budget: Budget, began: float):
        self.options, self.budget, self.began = options, budget, began
        self.out, self.steps, self.teacher = options.out, sorted(options.steps), options.teacher.resolve()
        self.trials, self.prepared = self.out / ".trials", self.out / "prepared"
        self.locks = {"pairs": threading.Lock(), "classifier": threading.Lock(), "trial": threading.Lock()}

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{(time.monotonic() - self.began) / 60:5.1f} min] {text}", file=sys.stderr, flush=True)

    def call(self, *words: str | Path) -> float:
        """Runs a command of this Python; its seconds. Raises Failed with its last line."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.options.threads)}
        began = time.monotonic()
        done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
            raise Failed(lines[-1].strip() if lines else f"{words[0]} ended with {done.returncode}")
        return time.monotonic() - began

    # ---------------------------------------------------------------------------------------------------------- plans

    def plan(self, recipe: Recipe, known: dict[str, Any]) -> Plan:
        """By a trial of a few updates, unless ``known`` facts are of this file. Raises Failed, Refusal."""
        if known.get("sha256") == hashlib.sha256(recipe.path.read_bytes()).hexdigest():
            return Plan(recipe, known["updates"], known["trial"], known["prepared"])
        prepared = self.preparation(recipe)
        trial = self.trial(recipe)
        spent = prepared["evaluations"] if prepared and self.budget.unit == "evaluations" else 0
        return Plan(recipe, self.budget.updates(trial, spent, recipe.unit), trial, prepared)

    def preparation(self, recipe: Recipe) -> dict[str, Any]:
        """What the recipe needs beside the teacher."""
        if recipe.on_pairs:
            most = SHARE * self.budget.amount if self.budget.unit == "evaluations" else math.inf
            count, each, what = recipe.pairs(most)
            return {"evaluations": count * each, "what": what, "count": count}
        if recipe.on_classifier:
            return {"evaluations": 0, "what": "a classifier, whose evaluations are not counted", "count": 1}
        return {}

    def trial(self, recipe: Recipe) -> dict[str, float]:
        """Trains for a few updates in a folder of its own, and reads what they cost."""
        folder, updates = self.trials / recipe.name, recipe.cycle * math.ceil(TRIAL / recipe.cycle)
        pairs = self.trials / "pairs"
        if recipe.on_pairs:
            with self.locks["trial"]:
                self.make_pairs(recipe, pairs, TRIAL_PAIRS)
        shutil.rmtree(folder, ignore_errors=True)
        words = [f"--trainer.max_steps={updates}", "--trainer.limit_val_batches=0", *self.of_teacher(recipe, pairs)]
        fit = ["-m", "distill", "fit", "--config", recipe.path, f"--trainer.default_root_dir={folder}"]
        wall = self.call(*fit, *words, *QUIET)
        found = json.loads((folder / COST).read_text())
        shutil.rmtree(folder)
        self.say(f"{recipe.name}: {found['evaluations']['total'] / updates:,.0f} evaluations an update")
        total = found["evaluations"]["total"]
        return {"updates": updates, "evaluations": total, "seconds": found["seconds"], "wall": wall}

    def of_teacher(self, recipe: Recipe, pairs: Path) -> list[str]:
        """The options that put this tournament's teacher, pairs and classifier into a recipe."""
        words = [f"--seed_everything={self.options.seed}"]
        words += [f"--model.init_args.{key}.init_args.path={self.teacher}" for key in recipe.teacher_keys]
        if recipe.on_pairs:
            words.append(f"--data.init_args.folder={pairs}")
        if recipe.on_classifier:
            features = [{"class_path": "ClassifierFeatures", "init_args": {"path": str(self.classifier(recipe))}}]
            words.append(f"--model.init_args.features={json.dumps(features)}")
        return words

    def estimate(self, plan: Plan) -> float:
        """Seconds of what is left to do for a recipe, on one job."""
        each, start = plan.trial["seconds"] / plan.trial["evaluations"], plan.trial["wall"] - plan.trial["seconds"]
        steps = plan.recipe.steps(self.steps)
        drawn = self.options.num * sum(steps) + plan.prepared.get("evaluations", 0)
        return plan.updates * plan.trial["seconds"] / plan.trial["updates"] + drawn * each / 2 + (1 + 2 * len(steps)) * start

    # ----------------------------------------------------------------------------------------------------- preparations

    def make_pairs(self, recipe: Recipe, folder: Path, count: int) -> None:
        """Pairs of the teacher; shards that are there are not made again."""
        words = [f"--teacher.init_args.path={self.teacher}", f"--count={count}", "--out", str(folder)]
        self.call(TOOLS / "make_pairs.py", "--config", recipe.pairs_config, *words)

    def classifier(self, recipe: Recipe) -> Path:
        """The export of a classifier, trained here if it is not there."""
        run = self.prepared / "classifier"
        with self.locks["classifier"]:
            if not (run / "DONE").is_file():
                words = ["--config", str(recipe.classifier_config), "--ckpt_path=last", f"--trainer.default_root_dir={run}"]
                self.call("-m", "distill", "fit", *words, *QUIET)
        return run / "export"

    def prepare(self, plan: Plan) -> Path:
        """Makes what the recipe needs; the folder of its pairs."""
        folder, note = self.prepared / f"pairs_{plan.prepared.get('count')}", self.prepared / "seconds.json"
        if not plan.recipe.on_pairs:
            return folder
        with self.locks["pairs"]:
            seconds = json.loads(note.read_text()) if note.is_file() else {}
            if folder.name not in seconds:
                self.prepared.mkdir(parents=True, exist_ok=True)
                began = time.monotonic()
                self.make_pairs(plan.recipe, folder, plan.prepared["count"])
                note.write_text(json.dumps(seconds | {folder.name: time.monotonic() - began}))
                self.say(f"{plan.recipe.name}: made {plan.prepared['what']}")
            plan.prepared["seconds"] = json.loads(note.read_text())[folder.name]
        return folder

    # ------------------------------------------------------------------------------------------------------------- runs

    def run(self, plan: Plan) -> None:
        """Trains and measures. Raises Failed."""
        recipe, run = plan.recipe, self.out / plan.recipe.name
        if not (run / "DONE").is_file():
            pairs = self.prepare(plan)
            snapshots = max(plan.updates // 4, 1) if recipe.keeps_best else plan.updates
            words = [f"--trainer.max_steps={plan.updates}", f"--trainer.val_check_interval={snapshots}"]
            words += [] if recipe.keeps_best else ["--trainer.limit_val_batches=0"]
            if recipe.rounds:
                words += [f"--checkpoint.every_n_steps={plan.updates // len(recipe.rounds)}"]
                words += [f"--checkpoint.keep={len(recipe.rounds)}"]
            words += [f"--{path}={own}" for path, (_, own) in plan.rescaled.items()] + self.of_teacher(recipe, pairs)
            fit = ["-m", "distill", "fit", "--config", recipe.path, "--ckpt_path=last", f"--trainer.default_root_dir={run}"]
            self.call(*fit, *words, *QUIET)
            self.say(f"{recipe.name}: trained {plan.updates:,} updates")
        if plan.prepared:
            cost = json.loads((run / COST).read_text())
            with atomic_writer(run / COST) as file:
                file.write((json.dumps(cost | {"prepared": plan.prepared}, indent=2) + "\n").encode())
        for steps in recipe.steps(self.steps):
            which = recipe.checkpoint(steps, plan.updates)
            words = ["--checkpoint", str(run / which) if "/" in which else which]
            words += [] if recipe.guidance is None else ["--guidance", str(recipe.guidance)]
            self.measure(recipe.name, steps, ["--run", str(run), *words])

    def measure(self, name: str, steps: int, source: list[str]) -> None:
        """Draws and measures in OUT/<name>/evaluations/steps_N, unless that is complete, or the student is not for it."""
        folder = self.out / name / "evaluations" / f"steps_{steps}"
        cost = self.out / name / COST
        batches = json.loads(cost.read_text())["batches"] if "last" in source else None
        refused = folder.parent / REFUSED
        others = json.loads(refused.read_text()) if refused.is_file() else []
        if steps in others or is_complete(folder, batches):
            return
        shutil.rmtree(folder, ignore_errors=True)
        own = self.options
        drawn = ["--steps", str(steps), "--num", str(own.num), "--seed", str(own.seed), "--out", str(folder)]
        try:
            self.call(TOOLS / "sample.py", *source, *drawn)
        except Failed as error:
            if NOT_FOR not in str(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            refused.write_text(json.dumps([*others, steps]))
            return
        words = ["--reference", own.reference, "--features", own.features, "--bootstrap", str(own.bootstrap)]
        self.call(TOOLS / "fid.py", "--samples", folder, *words, "--out", folder / "fid.json")
        distance = json.loads((folder / "fid.json").read_text())["distance"]
        self.say(f"{name}: distance {distance:.4f} at {steps} steps")

    def measure_teacher(self) -> None:
        """Draws and measures the teacher."""
        for steps in sorted(self.options.teacher_steps):
            self.measure("teacher", steps, ["--teacher", str(self.teacher), "--solver", self.options.solver])

    def compare(self, runs: list[Path]) -> None:
        """Writes the report."""
        self.call(TOOLS / "compare.py", *runs, "--teacher", self.out / "teacher", "--out", self.out)
        self.say(f"compared in {self.out / 'report.html'}")


def is_complete(folder: Path, batches: int | None) -> bool:
    """Whether the figures in a folder are of the samples in it, and those of a student after so many batches (None: any)."""
    try:
        settings = json.loads((folder / "samples.json").read_text())
        found = json.loads((folder / "fid.json").read_text())["samples"]["settings"]
    except (OSError, ValueError, KeyError):
        return False
    return found["sha256"] == settings["sha256"] and batches in (None, settings.get("batches_trained"))
