"""What samples are drawn from: the student of a run, or a teacher with a solver."""

from __future__ import annotations

import argparse
import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from distill import grids, samplers, solvers
from distill.adapter_files import load_adapters
from distill.cli import load_run
from distill.denoiser import Denoiser
from distill.guidance import guided
from distill.methods.sampled import SampledModule
from distill.negatives import Negatives, reads_negatives
from distill.noise import SeededNoise
from distill.pretrained import PretrainedDenoiser
from distill.schedules import VarianceExploding
from distill.space import space_of
from distill.types import Batch, label_conditions

SOLVERS = {"euler": "Euler", "ddim": "DDIM", "heun": "Heun", "dpm": "DPMSolver2M"}


class TeacherSource:
    """A teacher with a solver, on the grid that its schedule is usually sampled on.

    Attributes:
        network: the raw network, whose forwards are counted.
        num_classes, space, record: the labels that it takes, or None; its model space; how its samples came about.
        hashes: what tells its samples from another's, though everything else be equal.
    """

    def __init__(self, arguments: argparse.Namespace):
        denoiser = PretrainedDenoiser(arguments.teacher).to(arguments.device)
        if arguments.adapters:
            load_adapters(denoiser, arguments.adapters)
        denoiser.eval()
        solver = arguments.solver or "heun"
        grid = grids.KarrasGrid() if isinstance(denoiser.schedule, VarianceExploding) else grids.UniformGrid()
        self.denoiser: Denoiser = denoiser
        network: Any = denoiser.network
        self.network = network
        self.sampler = samplers.OdeSampler(getattr(solvers, SOLVERS[solver])(), grid)
        self.num_classes, self.space = denoiser.num_classes, space_of(arguments.teacher, denoiser.network)
        self.space.to(arguments.device)
        self.shape = network.native_shape
        if denoiser.widths and not arguments.prompts:
            raise ValueError(f"--prompts is missing: the teacher {arguments.teacher} draws what prompts say.")
        if arguments.guidance is None and "guidance" in set(denoiser.scalar_inputs) - set(network.own_scalars):
            raise ValueError("--guidance is missing: this teacher reads a guidance scale; give one, 1 is none.")
        self.record = {"teacher": denoiser.identity, "solver": solver, "grid": type(grid).__name__}
        self.record |= {"adapters": arguments.adapters} if arguments.adapters else {}

    @property
    def hashes(self) -> dict[str, Any]:
        return {"weights_sha256": hash_of_weights(self.network)}

    def examples(self, count: int) -> Batch:
        """The classes in turn."""
        if self.num_classes is None:
            return Batch(None, {}, {})
        return Batch(None, *label_conditions(torch.arange(count) % self.num_classes, self.num_classes))

    def draw(self, arguments: argparse.Namespace, indices: range, ready: Batch) -> Tensor:
        """Samples in model space, of conditions in model space."""
        noise = SeededNoise(arguments.seed, indices, self.shape)
        unit, denoiser, cond = noise.draw(torch.device(arguments.device)), self.denoiser, ready.cond
        if reads_negatives(denoiser):
            cond = Negatives().of_null(cond, ready.null)
        if arguments.guidance is not None:
            denoiser, cond = guided(denoiser, cond, ready.null, arguments.guidance)
        return self.sampler(denoiser, unit, cond, arguments.steps, noise)


class RunSource:
    """The student of a run folder, sampled as its config says. Attributes as those of `TeacherSource`."""

    def __init__(self, arguments: argparse.Namespace):
        config, method, data = load_run(arguments.run, arguments.checkpoint)
        examples: Any = data
        if not isinstance(method, SampledModule):
            raise ValueError(f"--run {arguments.run}: a {type(method).__name__} draws no samples; give the run of a method.")
        self.method: Any = method
        self.method.to(arguments.device)
        self.module = self.method.ema.module if arguments.weights == "ema" else self.method.student
        self.network = self.module.network
        self.num_classes, self.space, self.examples = method.student.num_classes, method.space, examples.examples
        self.record = {"run": str(arguments.run), "checkpoint": arguments.checkpoint, "weights": arguments.weights}
        self.record["batches_trained"] = self.method.batches_seen
        self.model_settings = json.dumps(config["model"], sort_keys=True, default=str)

    @property
    def hashes(self) -> dict[str, Any]:
        config = hashlib.sha256(self.model_settings.encode()).hexdigest()
        return {"weights_sha256": hash_of_weights(self.module), "model_sha256": config}

    def draw(self, arguments: argparse.Namespace, indices: range, ready: Batch) -> Tensor:
        """Samples in model space, of conditions in model space."""
        return self.method.draw(
            arguments.steps, indices, ready.cond, ready.null, arguments.seed, arguments.weights, arguments.guidance
        )


def hash_of_weights(module: nn.Module) -> str:
    """The sha256 of all that a module computes with: names, types, shapes and bytes of its parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # As bytes, because NumPy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
