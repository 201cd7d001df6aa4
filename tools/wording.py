"""The words of a comparison, the same in HTML and Markdown: figures, costs, headline, commands."""

from __future__ import annotations

import shlex
from typing import Any

from evaluations import RESULT, Contestant, Evaluation

UNKNOWN = "not recorded"


def plural(count: float, unit: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{count:g} {unit}{'' if count == 1 else 's'}"


def number(value: float | None) -> str:
    """A count in three digits, with its unit of thousands."""
    if value is None:
        return UNKNOWN
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return UNKNOWN
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def distance(found: Evaluation) -> str:
    """In four digits."""
    return f"{found.distance:.4g}"


def interval(found: Evaluation) -> str:
    """Both ends; empty if it was not asked for."""
    return f"{found.interval[0]:.4g} to {found.interval[1]:.4g}" if found.interval else ""


def facts(each: Contestant) -> list[tuple[str, str]]:
    """The columns of a contestant beside its distances: heading and content. A teacher was not trained here."""
    cost, nothing = each.cost, "" if each.is_teacher else UNKNOWN
    counted: dict[str, Any] = cost.get("evaluations", {})
    device = duration(cost.get("device_seconds")) + (f" on {cost['devices']} x {cost['device']}" if "devices" in cost else "")
    found = [
        ("method", each.method or UNKNOWN),
        ("trainable parameters", number(cost.get("parameters", {}).get("trained"))),
        ("training images", number(cost.get("images"))),
        ("network evaluations in training", number(counted.get("total"))),
        ("wall time", duration(cost.get("seconds"))),
        ("device time", device),
    ]
    return [(heading, nothing if content == UNKNOWN and each.is_teacher else content) for heading, content in found]


def all_steps(contestants: list[Contestant]) -> list[int]:
    """Every number of steps that something was measured at."""
    return sorted({steps for each in contestants for steps in each.evaluations})


def ranked(contestants: list[Contestant], steps: int) -> list[tuple[Contestant, Evaluation]]:
    """The runs measured at so many steps, the smallest distance first."""
    found = [(each, each.evaluations[steps]) for each in contestants if not each.is_teacher and steps in each.evaluations]
    return sorted(found, key=lambda pair: pair[1].distance)


def level(first: Evaluation, other: Evaluation) -> bool:
    """Whether the intervals overlap, so that other samples might have given another order. False without intervals."""
    return bool(first.interval and other.interval and other.interval[0] <= first.interval[1])


def headline(contestants: list[Contestant]) -> list[tuple[str, str]]:
    """The answer in a few lines: a question, and which run it is."""
    lines = []
    for steps in all_steps(contestants):
        if not (order := ranked(contestants, steps)):
            continue
        (winner, best), others = order[0], order[1:]
        words = f"{winner.name}, at {distance(best)}" + (f" ({interval(best)})" if best.interval else "")
        if tied := [each.name for each, found in others if level(best, found)]:
            words += f"; intervals overlap with {', '.join(tied)}"
        lines.append((f"Best in {plural(steps, 'step')}", words if others else f"{words}; no other run was measured there"))
    for each in contestants:
        if each.is_teacher:
            lines.append(("The teacher", f"{each.name}: {distance(each.best)} in {plural(each.best.steps, 'step')}"))
    return lines


def commands(contestants: list[Contestant]) -> list[str]:
    """What draws and measures each set again, from the settings that were written down."""
    return [line for each in contestants for found in each.evaluations.values() for line in commands_of(each, found)]


def commands_of(each: Contestant, found: Evaluation) -> list[str]:
    """Of one set: two lines of shell."""
    settings, out = found.settings, str(found.folder)
    source = settings.get("run", settings.get("teacher"))
    named = source["path"] if isinstance(source, dict) else source
    draw = ["python", "tools/sample.py", "--run" if "run" in settings else "--teacher", str(named)]
    for key in ("checkpoint", "weights", "steps", "num", "seed", "guidance", "solver", "adapters", "negative_prompt"):
        if settings.get(key) is not None:
            draw += [f"--{key.replace('_', '-')}", str(settings[key])]
    draw += ["--prompts", *settings["prompts"]] if settings.get("prompts") else []
    reference, features = found.result["reference"]["path"], found.result["features"]["name"]
    measure = ["python", "tools/fid.py", "--samples", out, "--reference", str(reference), "--features", str(features)]
    measure += ["--num", str(found.result["protocol"]["num"]), "--metrics", *found.result["metrics"]]
    if drawn := found.result["metrics"]["frechet"].get("interval"):
        measure += ["--bootstrap", str(drawn["resamples"]), "--seed", str(drawn["seed"])]
    return [shlex.join([*draw, "--out", out]), shlex.join([*measure, "--out", str(found.folder / RESULT)])]


def provenance(contestants: list[Contestant]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of what each figure depends on, one line for each set of samples."""
    headings = ["run", "steps", "evaluations a sample", "samples", "seed", "weights", "checkpoint", "batches trained"]
    headings += ["guidance", "samples' sha256", "resamples, seed", "versions"]
    lines = []
    for each in contestants:
        for found in each.evaluations.values():
            settings, drawn = found.settings, found.result["metrics"]["frechet"].get("interval")
            known = [settings.get(key) for key in ("evaluations", "num", "seed", "weights", "checkpoint", "batches_trained")]
            known[0] = None if known[0] is None else f"{known[0]:g}"
            versions = ", ".join(f"{name} {version}" for name, version in found.result["versions"].items())
            line = [each.name, found.steps, *known, settings.get("guidance"), found.result["samples"]["sha256"][:12]]
            line += [f"{drawn['resamples']}, {drawn['seed']}" if drawn else "none", versions]
            lines.append(["-" if value is None else str(value) for value in line])
    return headings, lines


def protocol(contestants: list[Contestant]) -> list[tuple[str, str]]:
    """What all figures have in common."""
    result = contestants[0].best.result
    reference, features = result["reference"], result["features"]
    said = f"{reference['path']}, {reference['count']} images" if "count" in reference else str(reference["path"])
    lines = [("distance", "Fréchet distance, smaller is better; of n samples, the same n for all"), ("n", str(result["protocol"]["num"]))]
    lines += [("features", f"{features['name']}: {features['protocol']}"), ("hash of the features", str(features["hash"]))]
    return lines + [("reference", said), ("hash of the reference", str(result["protocol"]["reference"]))]


INTERVALS = (
    "Intervals are of 95 %, by resampling the generated set: what another n samples of the same network would give, with this "
    "reference. They leave out what another training seed would give. Where two overlap, the order of the two is not settled."
)
