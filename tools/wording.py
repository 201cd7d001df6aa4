"""The words of a comparison, the same in HTML and Markdown: figures, costs, headline, commands."""

from __future__ import annotations

import shlex

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


def digits(value: float) -> str:
    """Three of them, zeros at the end among them."""
    return f"{value:#.3g}".rstrip(".")


def distance(found: Evaluation) -> str:
    """The figure."""
    return digits(found.distance)


def interval(found: Evaluation) -> str:
    """Both ends; empty if it was not asked for."""
    return " to ".join(map(digits, found.interval)) if found.interval else ""


def beside(found: Evaluation) -> str:
    """What is known of a set beside its distance: evaluations a sample, accuracy."""
    spent, accuracy = found.settings.get("evaluations"), found.result.get("accuracy")
    said = [f"{spent:.3g} eval." if spent is not None else "", f"{accuracy:.1%}" if accuracy is not None else ""]
    return " · ".join(filter(None, said))


def way(each: Contestant) -> str:
    """The method of a run, or that it is a teacher, and how it was solved."""
    if each.is_teacher:
        return f"teacher, {each.method}" if each.method else "teacher"
    return each.method or UNKNOWN


def facts(each: Contestant) -> list[tuple[str, str]]:
    """The columns of a contestant beside its distances: heading and content. A teacher was not trained here."""
    cost, evaluated = each.cost, number(each.spent("evaluations"))
    if made := cost.get("prepared"):
        part = f"{number(made['evaluations'])} of them for" if made["evaluations"] else "and"
        evaluated += f", {part} {made['what']}"
    found = [
        ("trainable parameters", number(cost.get("parameters", {}).get("trained"))),
        ("training images", number(cost.get("images"))),
        ("training evaluations", evaluated),
        ("wall time", duration(each.spent("seconds"))),
        ("device time", duration(each.spent("device_seconds"))),
        ("devices", f"{cost['devices']} x {cost['device']}" if "device" in cost else UNKNOWN),
    ]
    return [(heading, "" if each.is_teacher else content) for heading, content in found]


def all_steps(contestants: list[Contestant]) -> list[int]:
    """Every number of steps that a run was measured at."""
    return sorted({steps for each in contestants if not each.is_teacher for steps in each.evaluations})


def elsewhere(each: Contestant, steps: list[int]) -> list[str]:
    """Figures of a teacher at other numbers of steps than the runs'."""
    others = [found for count, found in each.evaluations.items() if count not in steps]
    return [f"{plural(found.steps, 'step')}: {distance(found)}" for found in others]


def ranked(contestants: list[Contestant], steps: int) -> list[tuple[Contestant, Evaluation]]:
    """The runs measured at so many steps, the smallest distance first."""
    found = [(each, each.evaluations[steps]) for each in contestants if not each.is_teacher and steps in each.evaluations]
    return sorted(found, key=lambda pair: pair[1].distance)


def level(first: Evaluation, other: Evaluation) -> bool:
    """Whether the intervals overlap, so that other samples might have given another order. False without intervals."""
    return bool(first.interval and other.interval and other.interval[0] <= first.interval[1])


def headline(contestants: list[Contestant]) -> list[tuple[str, str]]:
    """The answer in a few lines: of what, and which run it is."""
    lines = []
    for steps in all_steps(contestants):
        (winner, best), *others = ranked(contestants, steps)
        words = f"{winner.name}, {distance(best)}" + (f" ({interval(best)})" if best.interval else "")
        tied = [each.name for each, found in others if level(best, found)]
        if tied:
            more = f" and {len(tied) - 4} more" if len(tied) > 4 else ""
            words += f"; not told apart from {', '.join(tied[:4])}{more}"
        lines.append((f"Best in {plural(steps, 'step')}", words if others else f"{words}; no other run was measured there"))
    for each in contestants:
        if each.is_teacher:
            lines.append(("For comparison", f"{each.name}, {distance(each.best)} in {plural(each.best.steps, 'step')}"))
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
    lines = [("distance", "Fréchet distance of n samples to the reference"), ("n", str(result["protocol"]["num"]))]
    lines += [("features", str(features["protocol"])), ("hash of the features", str(features["hash"]))]
    return lines + [("reference", said), ("hash of the reference", str(result["protocol"]["reference"]))]


LEGEND = (
    "Fréchet distance to the reference, smaller is better; with it its interval, evaluations of the network a sample, and the "
    "share that a classifier reads as what they should be, where there is one. Runs are in the order of their best distance."
)
INTERVALS = (
    "Intervals are of 95 %, by resampling the generated set: what another n samples of the same network would give, with this "
    "reference. They leave out what another training seed would give. Where two overlap, the order of the two is not settled."
)
