"""Tiny trained-looking students of every family, and one clean process that draws from all of their exported folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, Tiny
from tiny_codecs import deep_compression, kl
from torch import Tensor, nn

from distill.boundary import Boundary, ScaledBoundary
from distill.codecs import AutoencoderKLCodec, DeepCompressionCodec
from distill.denoiser import Denoiser, NetworkDenoiser
from distill.distances import PseudoHuber
from distill.evaluation import Evaluation
from distill.export.check import Exported, compare, run_clean, write_job
from distill.export.lora import write_lora
from distill.export.pipelines import write_scheduler
from distill.export.plan import Plan, make_plan
from distill.export.student import drawing_of, needs_trust, write_whole
from distill.grids import ConstantPoints, DiscreteGrid, KarrasGrid, UniformGrid
from distill.lora import LoRA
from distill.methods.consistency import Consistency
from distill.optimization import Optimization
from distill.pairs import GridPairs
from distill.pretrained import PretrainedDenoiser
from distill.samplers import RenoiseSampler, Sampler
from distill.schedules import VarianceExploding, VariancePreserving
from distill.solvers import DDIM
from distill.space import ModelSpace
from distill.types import Batch, Cond

# Pixels of an untrained network that predicts noise are x / alpha, a hundred times too large and clipped: v has them in range.
CHANGES: dict[str, dict[str, Any]] = {
    "ddpm": {"scheduler_config": FAMILIES["ddpm"].scheduler_config | {"prediction_type": "v_prediction"}},
    "sana": {"config": FAMILIES["sana"].config | {"in_channels": 2, "out_channels": 2}, "channels": 2},
}

OPTIMIZATION = Optimization()


def family(name: str) -> Tiny:
    """The family, with what its autoencoder here asks for."""
    return replace(FAMILIES[name], **CHANGES.get(name, {}))


def conditions(name: str) -> Cond:
    """Two rows; PixArt-alpha's pipeline makes its sizes of the picture's own."""
    cond = family(name).cond(2)[0]
    return cond | {"resolution": torch.full((2, 2), 32.0)} if "resolution" in cond else cond


def teacher_of(name: str, folder: Path) -> tuple[PretrainedDenoiser, ModelSpace]:
    """A tiny teacher with its autoencoder, in a folder like a published one."""
    family(name).save(folder)
    if name == "ddpm":
        return PretrainedDenoiser(str(folder)), ModelSpace()
    if name == "sana":
        deep_compression(folder)
        return PretrainedDenoiser(str(folder)), ModelSpace(DeepCompressionCodec(str(folder)))
    kl(folder, **({"shift_factor": 0.06} if name in ("sd3", "flux", "flux-schnell") else {}))
    return PretrainedDenoiser(str(folder)), ModelSpace(AutoencoderKLCodec(str(folder)))


def student_of(
    teacher: Denoiser,
    space: ModelSpace | None = None,
    sampler: Sampler | None = None,
    boundary: Boundary | None = None,
    shape: tuple[int, ...] | None = None,
    **settings: Any,
) -> Consistency:
    """A consistency student whose average differs from its teacher, as after training."""
    grids = {VariancePreserving: DiscreteGrid, VarianceExploding: KarrasGrid}
    grid = grids.get(type(settings.get("schedule") or teacher.schedule), UniformGrid)()
    method = Consistency(
        GridPairs(grid, ConstantPoints(8)),
        PseudoHuber(),
        OPTIMIZATION,
        Evaluation(sampler or RenoiseSampler(grid)),
        teacher=teacher,
        solver=DDIM(),
        boundary=boundary,
        space=space,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in method.ema.module.named_parameters():
            if "lora" in name or "scalars" in name or settings.get("lora") is None:
                parameter.data += 0.02 * torch.randn_like(parameter)
    method.sample_shape = shape or teacher.shape  # type: ignore[assignment]
    return method


def family_student(name: str, folder: Path, **settings: Any) -> Consistency:
    """A student of `teacher_of`, with the boundary condition and sampler that its kind has."""
    teacher, space = teacher_of(name, folder)
    if isinstance(teacher.schedule, VariancePreserving):
        settings = {"boundary": ScaledBoundary()} | settings
    tiny = family(name)
    return student_of(teacher, space, shape=(tiny.channels, tiny.size, tiny.size), **settings)


def plan_of(method: Consistency, cond: Cond, steps: tuple[int, ...] = (1, 4), **settings: Any) -> Plan:
    """The plan for a method whose null conditions are of no matter."""
    arguments: dict[str, Any] = {"weights": "ema", "lora": False, "guidance": None} | settings
    return make_plan(method, steps, Batch(None, cond, cond), **arguments)


@dataclass
class Case:
    """A student that was written, and where."""

    plan: Plan
    folder: Path
    job: Path
    count: int

    def differences(self) -> dict[int, float]:
        return compare(drawing_of(self.plan, self.count), self.job.parent)

    def samples(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.job.parent / "samples.safetensors")


def written(name: str, root: Path, plan: Plan, count: int, lora: bool = False) -> Case:
    """Writes a student, and the clean process' job beside it."""
    folder, scratch, base = root / name / "student", root / name / "scratch", root / name / "base"
    for place in (folder, scratch, base):
        place.mkdir(parents=True)
    if lora:
        write_lora(plan.network, folder)
        write_scheduler(folder / "scheduler", plan.scheduling)
    write_whole(plan, base if lora else folder, merge=not lora)
    exported = Exported(base if lora else folder, needs_trust(plan), plan.network.component, folder if lora else None)
    return Case(plan, folder, write_job(drawing_of(plan, count), exported, scratch), count)


def draw_all(cases: dict[str, Case]) -> dict[str, Case]:
    """Draws from all folders in one clean process."""
    run_clean([case.job for case in cases.values()])
    return cases


def lora_of(rank: int = 4, alpha: int = 6) -> LoRA:
    """LoRA whose alpha is not its rank."""
    return LoRA(rank, alpha)


def own_denoiser(network: nn.Module, schedule: Any, prediction: Any) -> NetworkDenoiser:
    """A network of ours with weights that do something everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return NetworkDenoiser(network, schedule, prediction)
