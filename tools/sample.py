"""Draws samples of a run's student, or of a teacher: ``samples.npz``, ``samples.json`` and ``grid.png`` in a folder.

    python tools/sample.py --run runs/digits/cd --steps 1 --num 1800 --out samples/cd
    python tools/sample.py --run runs/captions/lcm_lora --steps 4 --prompts "a photo of the digit seven" --out samples/seven
    python tools/sample.py --teacher runs/digits/teacher/export --steps 32 --solver heun --out samples/teacher

Sample i depends on the seed and on i alone, not on the batch size. Labels or prompts run in turn through those given; if none
are, labels through all classes, and a run's prompts through the examples of its data.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import Denoiser
from distill.space import ModelSpace
from distill.types import Batch, Cond, label_conditions

SOLVERS = {"euler": "Euler", "ddim": "DDIM", "heun": "Heun", "dpm": "DPMSolver2M"}


def parse_arguments() -> argparse.Namespace:
    """The command line; exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder of a student")
    source.add_argument("--teacher", help="diffusers folder of a teacher")
    parser.add_argument("--checkpoint", default="last", help="of the run: last, best, or a file")
    parser.add_argument("--weights", default="ema", choices=["ema", "student"], help="of the run: averaged or present")
    parser.add_argument("--steps", type=int, default=1, help="sampler steps")
    parser.add_argument("--num", type=int, default=1000, help="number of samples")
    parser.add_argument("--seed", type=int, default=0, help="seed of the set")
    parser.add_argument("--labels", type=int, nargs="+", help="labels to run through instead of all classes")
    parser.add_argument("--prompts", nargs="+", help="prompts to run through")
    parser.add_argument("--negative-prompt", help="what to be guided away from instead of the empty prompt")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 is none")
    parser.add_argument("--solver", choices=sorted(SOLVERS), help="of a teacher (default heun)")
    parser.add_argument("--adapters", help="file of tools/adapters.py that is attached to the teacher")
    parser.add_argument("--batch-size", type=int, default=300, help="samples at once; does not change them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    parser.add_argument("--out", required=True, help="folder to write")
    arguments = parser.parse_args()
    for name, least in (("steps", 1), ("num", 1), ("seed", 0), ("batch_size", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')}={getattr(arguments, name)}: give at least {least}.")
    if arguments.run and arguments.solver:
        parser.error("--solver is for --teacher: a run's student is sampled by the sampler of its config.")
    if arguments.run and arguments.adapters:
        parser.error("--adapters is for --teacher: a run's student has its own.")
    return arguments


class TeacherSource:
    """A teacher with a solver, on the grid that its schedule is usually sampled on."""

    def __init__(self, arguments: argparse.Namespace):
        from distill import grids, samplers, solvers
        from distill.adapter_files import load_adapters
        from distill.pretrained import PretrainedDenoiser
        from distill.schedules import VarianceExploding
        from distill.space import space_of

        denoiser = PretrainedDenoiser(arguments.teacher).to(arguments.device)
        if arguments.adapters:
            load_adapters(denoiser, arguments.adapters)
        denoiser.eval()
        solver = arguments.solver or "heun"
        grid = grids.KarrasGrid() if isinstance(denoiser.schedule, VarianceExploding) else grids.UniformGrid()
        self.denoiser: Denoiser = denoiser
        self.network = denoiser.network
        self.sampler = samplers.OdeSampler(getattr(solvers, SOLVERS[solver])(), grid)
        self.num_classes, self.space = denoiser.num_classes, space_of(arguments.teacher, denoiser.network)
        self.space.to(arguments.device)
        self.shape = denoiser.network.native_shape
        if denoiser.widths and not arguments.prompts:
            raise ValueError(f"--prompts is missing: the teacher {arguments.teacher} draws what prompts say.")
        if arguments.guidance is None and "guidance" in set(denoiser.scalar_inputs) - set(self.network.own_scalars):
            raise ValueError("--guidance is missing: this teacher reads a guidance scale; give one, 1 is none.")
        self.record = {"teacher": denoiser.identity, "solver": solver, "grid": type(grid).__name__}
        self.record |= {"adapters": arguments.adapters} if arguments.adapters else {}

    def examples(self, count: int) -> Batch:
        """The classes in turn."""
        if self.num_classes is None:
            return Batch(None, {}, {})
        return Batch(None, *label_conditions(torch.arange(count) % self.num_classes, self.num_classes))

    def draw(self, arguments: argparse.Namespace, indices: range, ready: Batch) -> Tensor:
        from distill.guidance import guided
        from distill.negatives import Negatives, reads_negatives
        from distill.noise import SeededNoise

        noise = SeededNoise(arguments.seed, indices, self.shape)
        unit, denoiser, cond = noise.draw(torch.device(arguments.device)), self.denoiser, ready.cond
        if reads_negatives(denoiser):
            cond = Negatives().of_null(cond, ready.null)
        if arguments.guidance is not None:
            denoiser, cond = guided(denoiser, cond, ready.null, arguments.guidance)
        return self.sampler(denoiser, unit, cond, arguments.steps, noise)


class RunSource:
    """The student of a run folder, sampled as its config says."""

    def __init__(self, arguments: argparse.Namespace):
        from distill.cli import load_run
        from distill.methods.sampled import SampledModule

        _, method, data = load_run(arguments.run, arguments.checkpoint)
        if not isinstance(method, SampledModule):
            raise ValueError(f"--run {arguments.run}: a {type(method).__name__} draws no samples; give the run of a method.")
        self.method: Any = method
        self.method.to(arguments.device)
        self.network = (self.method.ema.module if arguments.weights == "ema" else self.method.student).network
        self.num_classes, self.space, self.examples = method.student.num_classes, method.space, data.examples
        self.record = {"run": str(arguments.run), "checkpoint": arguments.checkpoint, "weights": arguments.weights}
        self.record["batches_trained"] = self.method.batches_seen

    def draw(self, arguments: argparse.Namespace, indices: range, ready: Batch) -> Tensor:
        return self.method.draw(
            arguments.steps, indices, ready.cond, ready.null, arguments.seed, arguments.weights, arguments.guidance
        )


def requests(source: Any, arguments: argparse.Namespace) -> Batch:
    """What each of the samples is to show: a batch of ``num`` conditions and prompts, without images.

    Raises:
        ValueError: labels or prompts that the source cannot take.
    """
    examples: Batch = source.examples(arguments.num)
    cycle = torch.arange(arguments.num)
    if arguments.labels:
        if source.num_classes is None or arguments.prompts:
            raise ValueError("--labels: this network has no classes, or is given prompts; leave the option out.")
        if wrong := [label for label in arguments.labels if not 0 <= label < source.num_classes]:
            raise ValueError(f"--labels={wrong}: give labels from 0 to {source.num_classes - 1}.")
        labels = torch.tensor(arguments.labels)[cycle % len(arguments.labels)]
        return Batch(None, *label_conditions(labels, source.num_classes))
    if arguments.prompts:
        if source.space.conditioner is None:
            raise ValueError("--prompts: this network reads none; leave the option out.")
        return Batch(None, {}, {}, prompts=[arguments.prompts[i % len(arguments.prompts)] for i in cycle.tolist()])
    return examples


def rows(batch: Batch, indices: range, device: str) -> Batch:
    """Some rows of a batch of conditions and prompts, on a device."""
    part = slice(indices.start, indices.stop)
    cond, null = ({key: value[part].to(device) for key, value in side.items()} for side in (batch.cond, batch.null))
    return Batch(None, cond, null, prompts=None if batch.prompts is None else batch.prompts[part])


@torch.no_grad()
def draw_all(source: Any, arguments: argparse.Namespace, wanted: Batch) -> Tensor:
    """All samples ``(num, c, h, w)`` as pixels in [-1, 1], on the CPU, batch by batch under a progress bar.

    ``source.evaluations`` is then how many evaluations of the network each has cost, as counted.
    """
    from tqdm import tqdm

    space: ModelSpace = source.space
    batches, evaluated = [], 0

    def count(module: torch.nn.Module, args: Any, output: Tensor) -> None:
        nonlocal evaluated
        evaluated += len(output)  # a row is one evaluation of one sample

    counting = source.network.register_forward_hook(count)
    for first in tqdm(range(0, arguments.num, arguments.batch_size), desc="sampling", unit="batch"):
        indices = range(first, min(first + arguments.batch_size, arguments.num))
        ready = space.encode(rows(wanted, indices, arguments.device))
        if arguments.negative_prompt is not None:
            ready.null = ready.null | negative(space, arguments.negative_prompt, len(indices))
        batches.append(space.decode(source.draw(arguments, indices, ready)).cpu())
    counting.remove()
    source.evaluations = evaluated / arguments.num
    return torch.cat(batches)


def negative(space: ModelSpace, prompt: str, count: int) -> Cond:
    """The conditions of a prompt, ``count`` rows. Raises ValueError if the network reads none."""
    if space.conditioner is None:
        raise ValueError("--negative-prompt: this network reads no prompts; leave the option out.")
    return space.encode(Batch(None, {}, {}, prompts=[prompt] * count)).cond


def main() -> None:
    """Draws, writes, and says where."""
    arguments = parse_arguments()
    try:
        source: Any = RunSource(arguments) if arguments.run else TeacherSource(arguments)
        wanted = requests(source, arguments)
        samples = draw_all(source, arguments, wanted)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    write(Path(arguments.out), samples, wanted.cond.get("labels"), source, arguments)


def write(out: Path, samples: Tensor, labels: Tensor | None, source: Any, arguments: argparse.Namespace) -> None:
    """``samples.npz`` (``arr_0`` uint8 n,h,w,c; ``arr_1`` labels), ``samples.json`` (how they were drawn), ``grid.png``."""
    from importlib.metadata import version

    import numpy

    from distill.callbacks.sample_grid import save_grid
    from distill.metrics.features import to_uint8
    from distill.metrics.image_sets import hash_of_images

    out.mkdir(parents=True, exist_ok=True)
    arrays = [to_uint8(samples).permute(0, 2, 3, 1).numpy()] + ([] if labels is None else [labels.numpy()])
    numpy.savez_compressed(out / "samples.npz", *arrays)
    keys = ("seed", "steps", "guidance", "num", "prompts", "negative_prompt", "device")
    record = source.record | {key: getattr(arguments, key) for key in keys}
    record["evaluations"] = source.evaluations
    record["sha256"] = hash_of_images(arrays[0])
    record["versions"] = {"distill": version("distill"), "torch": torch.__version__}
    (out / "samples.json").write_text(json.dumps(record, indent=2) + "\n")
    save_grid({f"{arguments.run or arguments.teacher}, steps: {arguments.steps}": samples[:100]}, out / "grid.png")
    print(f"{len(samples)} samples in {out / 'samples.npz'}, picture in {out / 'grid.png'}")


if __name__ == "__main__":
    main()
