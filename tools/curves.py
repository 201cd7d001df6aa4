"""How a sampler's quality depends on its steps, and how straight the flow is: ``curves.json`` and ``curves.png`` in a folder.

    python tools/curves.py --teachers runs/digits/teacher/export --runs runs/digits/reflow runs/digits/reflow_pp \
        --reference digits --steps 1 2 4 8 16 --out runs/curves

Distances are those of tools/fid.py, over samples drawn as by tools/sample.py: a run's by the sampler of its config, a teacher's
by ``--solver`` in equal steps of the rectified flow's time, whatever schedule it was trained in. Straightness and transport
cost (Liu et al. 2209.03003; distill/straightness.py) are means over the same samples' flows in ``--flow-steps`` Euler steps,
in model space.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# The folder of this file is on the path when it is run as a script.
from fid import ImageSet, Sampling, find_extractor, make_extractor, measure_set, read_set, statistics

from distill.command_line import Parser, Refusal
from distill.denoiser import Denoiser
from distill.metrics.features import to_uint8
from distill.sample_folders import SOLVERS, RunSource, TeacherSource, draw_all, requests, rows
from distill.types import Batch, Cond


def parse_arguments() -> argparse.Namespace:
    """The command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    parser.add_argument("--runs", nargs="+", default=[], help="run folders of students")
    parser.add_argument("--teachers", nargs="+", default=[], help="diffusers folders of teachers")
    parser.add_argument("--reference", required=True, help="the images to measure against, see tools/fid.py")
    parser.add_argument("--features", default="pixels", help="what is compared, see tools/fid.py")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="sampler steps")
    parser.add_argument("--flow-steps", type=int, default=64, help="Euler steps along which straightness is measured")
    parser.add_argument("--solver", choices=sorted(SOLVERS), default="euler", help="of the teachers")
    parser.add_argument("--checkpoint", default="last", help="of the runs: last, best, or a file")
    parser.add_argument("--weights", default="ema", choices=["ema", "student"], help="of the runs: averaged or present")
    parser.add_argument("--num", type=int, default=1800, help="samples a measurement")
    parser.add_argument("--seed", type=int, default=0, help="seed of the set")
    parser.add_argument("--prompts", nargs="+", help="prompts to run through")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 is none")
    parser.add_argument("--batch-size", type=int, default=300, help="samples at once; does not change them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    if not arguments.runs + arguments.teachers:
        parser.error("--runs and --teachers are missing: give folders of at least one of the two.")
    try:
        find_extractor(arguments.features)
    except (ValueError, FileNotFoundError) as error:
        parser.error(f"--features {error}")
    for folder in arguments.runs + arguments.teachers:
        if not Path(folder).is_dir():
            parser.error(f"{folder}: there is no such folder; give run folders to --runs, diffusers folders to --teachers.")
    for name, least in (("steps", 1), ("flow_steps", 2), ("num", 2), ("seed", 0), ("batch_size", 1)):
        value = getattr(arguments, name)
        if min(value) < least if isinstance(value, list) else value < least:
            parser.error(f"--{name.replace('_', '-')}={value}: give at least {least}.")
    arguments.steps = sorted(set(arguments.steps))
    return arguments


def load(kind: str, folder: str, options: argparse.Namespace) -> tuple[Any, argparse.Namespace]:
    """A ``run`` or a ``teacher`` as tools/sample.py draws from it, and the options that it draws by."""
    from distill.grids import UniformGrid
    from distill.samplers import OdeSampler
    from distill.schedules import RectifiedFlow

    unused = dict.fromkeys(("labels", "negative_prompt", "adapters", "run", "teacher"))
    settings = {**vars(options), **unused, kind: folder}
    arguments = argparse.Namespace(**settings)
    if kind == "run":
        return RunSource(arguments), arguments
    source = TeacherSource(arguments)
    source.denoiser = source.denoiser.under(RectifiedFlow())
    source.sampler = OdeSampler(source.sampler.solver, UniformGrid())
    source.record["grid"] = "UniformGrid under RectifiedFlow"
    return source, arguments


def flow(source: Any, arguments: argparse.Namespace, ready: Batch) -> tuple[Denoiser, Cond]:
    """The denoiser that is drawn from, and its conditions."""
    from distill.guidance import guided

    if arguments.run is not None:
        method = source.method
        module = method.ema.module if arguments.weights == "ema" else method.student
        return method.guided_generator(method.generator(module), ready.cond, ready.null, arguments.guidance)
    if arguments.guidance is None:
        return source.denoiser, ready.cond
    return guided(source.denoiser, ready.cond, ready.null, arguments.guidance)


@torch.no_grad()
def measure_flow(source: Any, arguments: argparse.Namespace, wanted: Batch) -> dict[str, float]:
    """Mean straightness and transport cost of the samples' flows, and the first over the second."""
    from distill.noise import SeededNoise
    from distill.straightness import follow

    shape = source.method.model_shape if arguments.run is not None else source.shape
    sums = torch.zeros(2, dtype=torch.float64)
    for first in range(0, arguments.num, arguments.batch_size):
        indices = range(first, min(first + arguments.batch_size, arguments.num))
        denoiser, cond = flow(source, arguments, source.space.encode(rows(wanted, indices, arguments.device)))
        noise = SeededNoise(arguments.seed, indices, shape).draw(torch.device(arguments.device))
        paths = follow(denoiser.eval(), noise, cond, arguments.flow_steps)
        sums += torch.stack([paths.straightness.sum(), paths.cost.sum()]).cpu()
    straightness, cost = (sums / arguments.num).tolist()
    return {"straightness": straightness, "transport_cost": cost, "relative_straightness": straightness / cost}


def curve(kind: str, folder: str, options: argparse.Namespace, reference: ImageSet) -> dict[str, Any]:
    """All figures of one run or teacher."""
    source, arguments = load(kind, folder, options)
    features = make_extractor(options.features)
    real = measure_set(reference, features, Sampling(), with_rows=False).statistics
    wanted, distances = requests(source, arguments), {}
    for steps in options.steps:
        arguments.steps = steps
        images = to_uint8(draw_all(source, arguments, wanted)).permute(0, 2, 3, 1).numpy()
        if images.shape[1:] != reference.shape:
            sizes = f"draws images of {images.shape[1:]} (h, w, c), --reference has {reference.shape}"
            raise ValueError(f"{sizes}; give a reference of one size with them")
        distances[steps] = statistics(images, features).distance(real)
    return {"name": folder, "kind": kind, "distance": distances, **measure_flow(source, arguments, wanted), **source.record}


def draw_picture(curves: list[dict[str, Any]], options: argparse.Namespace, path: Path) -> None:
    """Distance against steps, both axes logarithmic, a line for each curve; dashed ones are the teachers'."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="sampler steps", ylabel=f"Fréchet distance of {options.features} to {options.reference}")
    for each in curves:
        label = f"{each['name']}  (S = {each['straightness']:.3g}, S / cost = {each['relative_straightness']:.2g})"
        style = "o--" if each["kind"] == "teacher" else "o-"
        axes.plot(list(each["distance"]), list(each["distance"].values()), style, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(options.steps, [str(steps) for steps in options.steps])
    axes.xaxis.set_minor_locator(NullLocator())
    # Distances often lie within one power of ten, which by itself would have no labels.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(title="S: straightness, 0 is straight", fontsize="small", handlelength=3.5)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, writes, and says where."""
    options = parse_arguments()
    curves = []
    try:
        reference = read_set("--reference", options.reference)
        sources = [("teacher", folder) for folder in options.teachers] + [("run", folder) for folder in options.runs]
        for kind, folder in sources:
            curves.append(curve(kind, folder, options, reference))
    except (Refusal, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {f'--{kind}s {folder}: ' if not isinstance(error, Refusal) else ''}{error}")
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "runs", "teachers")}
    settings["versions"] = {package: version(package) for package in ("distill", "torch")}
    record = {"settings": settings, "reference": reference.describe(), "curves": curves}
    (options.out / "curves.json").write_text(json.dumps(record, indent=2) + "\n")
    draw_picture(curves, options, options.out / "curves.png")
    print(f"{len(curves)} curves in {options.out / 'curves.json'}, picture in {options.out / 'curves.png'}")


if __name__ == "__main__":
    main()
