"""What an export decides before a file is written: network, pipeline, scheduler, calls and sources."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.export.calls import CUSTOM_PIPELINE, accepted_words, common, settings_of_call
from distill.export.lora import check_lora
from distill.export.networks import check_network
from distill.export.pipelines import pipeline_name
from distill.export.schedulers import Scheduling, choose_scheduler, custom_scheduling
from distill.export.sources import Sources, find_sources
from distill.export.table import Table, network_denoiser, trace
from distill.export.weights import GUIDANCE, check_scalars, reads_guidance
from distill.guidance import GuidedDenoiser
from distill.methods.sampled import SampledModule
from distill.samplers import Sampler
from distill.types import Batch, Cond

SCALING = (
    CUSTOM_PIPELINE,
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
)
"""Pipelines that multiply the initial noise by their scheduler's ``init_noise_sigma``."""

PROMPTED = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline", "StableDiffusionXLPipeline")
"""Pipelines that are checked from the prompts on. Others change prompts, or cut them, by settings of each call."""

UNIT = 1e-6
"""How far that number may be from 1 for the others."""


@dataclass
class Plan:
    """All that is decided before a file is written.

    Attributes:
        network: a float32 copy of the student's network.
        generator, sampler: what is sampled, of that copy.
        cond: conditions of the check, as the generator reads them.
        prompts: what they were made of, where the pipeline is to make them itself, or None.
        pipeline: name of the pipeline's class.
        scheduling: its scheduler and calls.
        sources: of the other components.
        fixed: the guidance scale that is fixed in the weights, or None.
        shape: of a sample in model space.
    """

    network: Any
    generator: Denoiser
    sampler: Sampler
    cond: Cond
    prompts: list[str] | None
    pipeline: str
    scheduling: Scheduling
    sources: Sources
    fixed: float | None
    shape: Sequence[int]


def make_plan(
    method: SampledModule, steps: Sequence[int], batch: Batch, weights: str, lora: bool, guidance: float | None
) -> Plan:
    """Decides everything. Raises ValueError for what cannot be exported."""
    if not steps or min(steps) < 1:
        raise ValueError(f"steps={list(steps)}: give numbers of steps of at least 1.")
    if weights not in ("ema", "student"):
        raise ValueError(f"weights={weights!r}: give 'ema' or 'student'.")
    student = copy.deepcopy(method.ema.module if weights == "ema" else method.student).requires_grad_(False)
    student = student.cpu().float().eval()
    generator = method.generator(student)
    denoiser = network_denoiser(generator)
    network: Any = denoiser.network
    check_network(network)
    check_scalars(network)
    if lora:
        check_lora(network)
    ready = method.prepare(replace(batch, x0=None))
    guided, cond = method.guided_generator(generator, ready.cond, ready.null, guidance)
    if isinstance(guided, GuidedDenoiser):
        raise ValueError(f"guidance={guidance}: this student reads no guidance scale; leave it out.")
    cond = {key: value for key, value in cond.items() if key != "labels" or network.num_classes is not None}
    sampler = method.student_sampler
    tables = {number: trace(generator, sampler, number) for number in sorted(set(steps))}
    sources = find_sources(method)
    pipeline, scheduling = choose(network, denoiser, tables, sources.pipeline)
    sources.check(pipeline, method.space.codec)
    if lora and scheduling.custom:
        raise ValueError("lora: no scheduler of diffusers samples this student as it was trained; export it as a folder.")
    fixed = common(cond, GUIDANCE) if GUIDANCE in network.scalars and not reads_guidance(network) else None
    told = {key: value for key, value in cond.items() if key != GUIDANCE or fixed is None}
    shape = method.sample_shape or network.native_shape
    settings = settings_of_call(pipeline, network, shape, sources.factor(pipeline), told, method.space.conditioner)
    scheduling.calls = {number: call | settings for number, call in scheduling.calls.items()}
    prompts = batch.prompts if pipeline in PROMPTED else None
    return Plan(network, generator, sampler, cond, prompts, pipeline, scheduling, sources, fixed, shape)


def choose(network: Any, denoiser: NetworkDenoiser, tables: dict[int, Table], teacher: str | None) -> tuple[str, Scheduling]:
    """Name of the pipeline, and its scheduler. Raises ValueError if no pipeline can sample the student."""
    name = pipeline_name(network, teacher)
    scheduling = custom_scheduling(tables)
    if name != CUSTOM_PIPELINE:
        scheduling = choose_scheduler(denoiser, tables, accepted_words(name))
    if name == "DDPMPipeline" and scheduling.custom:
        name = CUSTOM_PIPELINE
    start = scheduling.scheduler.init_noise_sigma if scheduling.custom else 1.0
    if abs(start - 1) > UNIT and name not in SCALING:
        raise ValueError(
            f"the student's first time is not pure noise (it starts from {start}), which {name} cannot do: "
            "train it with sampler.start=prior."
        )
    lcm = type(scheduling.scheduler).__name__ == "LCMScheduler" and reads_guidance(network)
    return "LatentConsistencyModelPipeline" if lcm and name == "StableDiffusionPipeline" else name, scheduling
