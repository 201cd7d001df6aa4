"""What was measured of runs and teachers: read from their folders, checked, and refused where it cannot stand in one table.

A run holds ``evaluations/<name>/``: a folder of tools/sample.py with the result of tools/fid.py in it as ``fid.json``; and
``training_cost.json``, if its training was counted. A teacher's folder holds evaluations alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.callbacks.training_cost import FILE as COST
from distill.command_line import Refusal, read_object
from distill.metrics.image_sets import SETTINGS
from distill.metrics.measuring import unequal

RESULT, MEND = "fid.json", "measure again"
PER_SET = ("steps", "evaluations", "sha256", "num", "device", "versions", "batch_size", "format", "shard_size")
"""Settings that may differ between the evaluations of one line of the table."""
OF_WEIGHTS = ("checkpoint", "batches_trained", "weights_sha256")
"""Likewise, where each number of steps has a student of its own: the rounds of progressive distillation."""
ASKED = ("prompts", "negative_prompt")
"""Settings that change what is drawn, not how."""


@dataclass(frozen=True)
class Evaluation:
    """One set of samples and its figures.

    Attributes:
        folder: of the samples.
        result: what tools/fid.py found.
    """

    folder: Path
    result: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """How the samples were drawn."""
        return self.result["samples"]["settings"]

    @property
    def steps(self) -> int:
        return self.settings["steps"]

    @property
    def distance(self) -> float:
        return self.result["distance"]

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends of the distance's interval, if there is one."""
        found = self.result["metrics"]["frechet"].get("interval")
        return (found["low"], found["high"]) if found else None


@dataclass(frozen=True)
class Contestant:
    """A line of the table: a run, or a teacher, whose samples were all drawn in one way.

    Attributes:
        name: of the folder, and in what its samples differ from the folder's others, if it has others.
        folder: the run.
        is_teacher: whether it is what the runs are compared with.
        evaluations: by the number of steps, ascending.
        cost: of its training; empty if it was not recorded.
    """

    name: str
    folder: Path
    is_teacher: bool
    evaluations: dict[int, Evaluation]
    cost: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Evaluation:
        """The one with the smallest distance."""
        return min(self.evaluations.values(), key=lambda each: each.distance)

    @property
    def method(self) -> str:
        """The class that trained it, or how the teacher was solved; empty if that was not recorded."""
        return self.best.settings.get("solver", "") if self.is_teacher else self.cost.get("method", "")

    def spent(self, key: str) -> float | None:
        """``evaluations``, ``seconds`` or ``device_seconds`` of training and of what was made for it; None if not recorded.

        What was made beforehand, pairs for instance, was made on one device.
        """
        own = self.cost.get("evaluations", {}).get("total") if key == "evaluations" else self.cost.get(key)
        made = self.cost.get("prepared", {}).get("seconds" if key == "device_seconds" else key, 0)
        return None if own is None else own + made


def read_evaluation(option: str, path: Path) -> Evaluation:
    """The evaluation in a ``fid.json``. Raises Refusal if it lacks something, or is of other samples than lie beside it."""
    result = read_object(option, path, MEND)
    try:
        found = Evaluation(path.parent, result)
        usable = isinstance(found.steps, int) and isinstance(found.distance, float) and "protocol" in result
        usable = usable and isinstance(found.settings["sha256"], str) and "frechet" in result["metrics"]
    except (KeyError, TypeError):
        usable = False
    if not usable:
        need = "has no Fréchet distance of samples that tools/sample.py drew"
        raise Refusal(f"{option}: {path} {need}; draw them, and measure by tools/fid.py --samples {path.parent} --out {path}")
    present = read_object(option, path.parent / SETTINGS, MEND).get("sha256")
    if present != found.settings["sha256"]:
        remedy = f"measure again by tools/fid.py --samples {path.parent} --out {path}"
        raise Refusal(f"{option}: {path} is stale, the samples beside it were drawn since; {remedy}")
    return found


def check_age(option: str, found: Evaluation, cost: dict[str, Any]) -> None:
    """Raises Refusal if the run was trained further than its samples know, or than its cost does."""
    seen, trained = found.settings.get("batches_trained"), cost.get("batches")
    if seen is None or trained is None or seen == trained:
        return
    if seen > trained:
        why = f"{COST} counts {trained} batches, {found.folder} was drawn after {seen}"
        raise Refusal(f"{option}: {why}; put back the {COST} of this training, or remove it")
    if found.settings.get("checkpoint", "last") == "last":
        why = f"{found.folder} is stale, drawn after {seen} batches of {trained}"
        raise Refusal(f"{option}: {why}; draw and measure again (tools/sample.py, tools/fid.py)")


def read_folder(option: str, folder: Path, is_teacher: bool) -> list[Contestant]:
    """All that was measured of one folder: one contestant for each way in which its samples were drawn. Raises Refusal."""
    if not folder.is_dir():
        raise Refusal(f"{option} {folder}: there is no such folder; give one with evaluations/*/{RESULT}")
    option, files = f"{option} {folder}", sorted(folder.glob(f"evaluations/*/{RESULT}"))
    if not files:
        raise Refusal(f"{option}: holds no evaluations/*/{RESULT}; draw by tools/sample.py and measure by tools/fid.py")
    cost = read_object(option, folder / COST, MEND) if (folder / COST).is_file() and not is_teacher else {}
    found = [read_evaluation(option, file) for file in files]
    for each in found:
        check_age(option, each, cost)
    steps = [each.steps for each in found]
    ways = by_way(option, found, PER_SET + OF_WEIGHTS if len(set(steps)) == len(steps) else PER_SET)
    names = differences([json.loads(way) for way in ways])
    return [
        Contestant(folder.resolve().name + name, folder, is_teacher, dict(sorted(alike.items())), cost)
        for name, alike in zip(names, ways.values())
    ]


def by_way(option: str, found: list[Evaluation], left_out: tuple[str, ...]) -> dict[str, dict[int, Evaluation]]:
    """By all settings but those left out, as JSON, then by steps. Raises Refusal for two of one way and number of steps."""
    ways: dict[str, dict[int, Evaluation]] = {}
    for each in found:
        way = {key: value for key, value in each.settings.items() if key not in left_out}
        alike = ways.setdefault(json.dumps(way, sort_keys=True), {})
        if each.steps in alike:
            both = f"{alike[each.steps].folder} and {each.folder}"
            raise Refusal(f"{option}: {both} are of {each.steps} steps and drawn alike; remove one")
        alike[each.steps] = each
    return ways


def differences(ways: list[dict[str, Any]]) -> list[str]:
    """In what each differs from the others, in words; one alone has nothing to say."""
    keys = sorted({key for way in ways for key in way if any(way.get(key) != other.get(key) for other in ways)})
    return [f" ({', '.join(f'{key}: {way.get(key)}' for key in keys)})" if keys else "" for way in ways]


def read_all(runs: list[Path], teacher: Path | None) -> list[Contestant]:
    """Runs by their best distance, then teachers. Raises Refusal where figures may not stand side by side."""
    if twice := [run for run in runs if [other.resolve() for other in runs].count(run.resolve()) > 1]:
        raise Refusal(f"RUN {twice[0]}: is given twice; give each run once")
    found = [each for run in runs for each in read_folder("RUN", run, False)]
    found += read_folder("--teacher", teacher, True) if teacher is not None else []
    sets = [each for contestant in found for each in contestant.evaluations.values()]
    first, remedy = sets[0], "measure all alike (tools/fid.py), or compare them apart"
    for other in sets[1:]:
        if difference := unequal(first.result["protocol"], other.result["protocol"]):
            raise Refusal(f"{first.folder} and {other.folder}: were measured by unequal protocols, {difference}; {remedy}")
        for key in ASKED:
            if (asked := [each.settings.get(key) for each in (first, other)])[0] != asked[1]:
                differ = f"were drawn for unequal {key}: {asked[0]} and {asked[1]}"
                raise Refusal(f"{first.folder} and {other.folder}: {differ}; draw all alike, or compare them apart")
    return sorted(found, key=lambda each: (each.is_teacher, each.best.distance, each.name))
