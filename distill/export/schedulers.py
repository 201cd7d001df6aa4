"""The diffusers scheduler that samples a student exactly, or the folder's own if there is none.

Candidates are proposed by the kind of schedule; one is taken only if, driven by the same network outputs and the same noises as
the student's own table, it shows the network the same inputs at the same times and ends at the same sample.

What is never taken, since its step is another one than any sampler's here: TCDScheduler (its last step ends at the first index
of the schedule, with noise, and networks of diffusers read no second time), CMStochasticIterativeScheduler (it adds noise of
``sqrt(sigma^2 - sigma_min^2)`` and tells the network 1000 times the time of an EDM network), EDMEulerScheduler and
EDMDPMSolverMultistepScheduler (they start from ``sqrt(sigma_max^2 + 1)``; our samplers, as EDM's, from ``sigma_max``),
FlowMatchHeunDiscreteScheduler (its times cannot be chosen).
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import NetworkDenoiser
from distill.export.table import Table
from distill.schedulers import BETAS, PREDICTIONS
from distill.schedules import RectifiedFlow, VariancePreserving

FILES = Path(__file__).parent / "files"
CUSTOM = "student_scheduler"
TOLERANCE = 1e-5
"""Of the largest value in a trajectory. Products of a thousand alphas in float32, as schedulers make them, are good to 1e-6."""

TIME_TOLERANCE = 2e-7
"""Of a time: one unit in the last place of float32."""


@dataclass
class Scheduling:
    """How a student's folder is sampled.

    Attributes:
        scheduler: of diffusers, or the folder's own.
        calls: by number of steps, what the pipeline is called with, ``num_inference_steps`` and perhaps ``timesteps`` or
            ``sigmas``.
        custom: whether it is the folder's own scheduler.
    """

    scheduler: Any
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    custom: bool = False


@cache
def custom_class() -> Any:
    """The class ``StudentScheduler`` of the file that is copied into folders."""
    spec = importlib.util.spec_from_file_location(CUSTOM, FILES / f"{CUSTOM}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.StudentScheduler


def custom_scheduling(tables: dict[int, Table]) -> Scheduling:
    """The folder's own scheduler, for the numbers of steps of ``tables``."""
    starts = {steps: table.start for steps, table in tables.items()}
    start = max(starts.values())
    if start - min(starts.values()) > 1e-6 * start:
        raise ValueError(f"the sampler starts from another noise level for each number of steps ({starts}): export one alone.")
    scheduler = custom_class()({str(steps): table.rows() for steps, table in tables.items()}, start)
    return Scheduling(scheduler, {steps: {"num_inference_steps": steps} for steps in tables}, custom=True)


def choose_scheduler(denoiser: NetworkDenoiser, tables: dict[int, Table], accepted: Sequence[str]) -> Scheduling:
    """The first scheduler of diffusers that is exact for every table, else the folder's own.

    Args:
        denoiser: the student's network with its schedule and prediction type.
        tables: by number of steps.
        accepted: which of ``timesteps`` and ``sigmas`` the pipeline's call takes.
    """
    own = custom_scheduling(tables)
    with _silent():
        for words in ([], accepted):
            for scheduler in candidates(denoiser):
                found = {n: _exact_call(scheduler, own.scheduler, table, n, words) for n, table in tables.items()}
                if all(found.values()):
                    return Scheduling(scheduler, {n: call for n, call in found.items() if call})
    return own


@contextmanager
def _silent() -> Iterator[None]:
    """Without diffusers' advice on times that are only being tried."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _exact_call(scheduler: Any, own: Any, table: Table, steps: int, words: Sequence[str]) -> dict[str, Any] | None:
    calls = spacings(table, steps, words, scheduler)
    return next((call for call in calls if agree(scheduler, call, own, steps)), None)


def candidates(denoiser: NetworkDenoiser) -> Iterator[Any]:
    """Schedulers of the denoiser's schedule and prediction type, those that re-noise first."""
    import diffusers

    schedule, prediction = denoiser.schedule, denoiser.prediction
    if isinstance(schedule, RectifiedFlow) and prediction == "flow":
        yield diffusers.FlowMatchLCMScheduler()
        yield diffusers.FlowMatchEulerDiscreteScheduler()
        return
    types = {own: name for name, own in PREDICTIONS.items()}
    if not isinstance(schedule, VariancePreserving) or prediction not in types:
        return
    betas = dict(
        num_train_timesteps=schedule.num_steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule={own: name for name, own in BETAS.items()}[schedule.betas],
        prediction_type=types[prediction],
    )
    for scaling in (10.0, 1e9):  # latent consistency models' boundary, and none: skip vanishes, out is 1
        for spaced in (schedule.num_steps, min(50, schedule.num_steps)):  # equal steps; the published 999, 759, 499, 259
            yield diffusers.LCMScheduler(
                **betas, original_inference_steps=spaced, timestep_scaling=scaling, clip_sample=False
            )
    yield diffusers.DDIMScheduler(**betas, timestep_spacing="trailing", clip_sample=False, steps_offset=1)
    yield diffusers.EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1)
    yield diffusers.DPMSolverMultistepScheduler(**betas, euler_at_final=True, steps_offset=1)


def spacings(table: Table, steps: int, accepted: Sequence[str], scheduler: Any) -> Iterator[dict[str, Any]]:
    """What a pipeline could be called with so that the scheduler has the table's times; the fewest words first."""
    yield {"num_inference_steps": steps}
    times = [row.time for row in table.steps]
    flow, taken = type(scheduler).__name__.startswith("FlowMatch"), inspect.signature(scheduler.set_timesteps).parameters
    if flow and "sigmas" in accepted:
        yield {"num_inference_steps": steps, "sigmas": [_thousandth(time) for time in times]}
    if not flow and {"timesteps"} <= {*accepted} & {*taken} and all(time == round(time) for time in times):
        yield {"num_inference_steps": steps, "timesteps": [round(time) for time in times]}


def _thousandth(time: float) -> float:
    """The float32 that, times 1000 in float32, is ``time``; the nearest if there is none."""
    guess = torch.tensor(time / 1000, dtype=torch.float64).float()
    near = [guess, torch.nextafter(guess, torch.tensor(0.0)), torch.nextafter(guess, torch.tensor(2.0))]
    return float(min(near, key=lambda each: abs(float(each * 1000) - time)))


@torch.no_grad()
def agree(scheduler: Any, call: dict[str, Any], own: Any, steps: int) -> bool:
    """Whether both schedulers do the same with the same network outputs and noises."""
    try:
        first = drive(scheduler, call)
    except (ValueError, IndexError, TypeError):  # a number of steps or spacing that the scheduler refuses
        return False
    second = drive(own, {"num_inference_steps": steps})
    if len(first[0]) != len(second[0]):
        return False
    times = torch.stack([torch.tensor(each[0]) for each in (first, second)])
    if (times[0] - times[1]).abs().max() > TIME_TOLERANCE * times.abs().max():
        return False
    states = torch.stack([torch.stack(each[1]) for each in (first, second)])
    return bool((states[0] - states[1]).abs().max() <= TOLERANCE * states.abs().max())


def drive(scheduler: Any, call: dict[str, Any]) -> tuple[list[float], list[Tensor]]:
    """Runs a scheduler as pipelines do, with random numbers for a network: its times, and its inputs with the last sample."""
    spacing = {key: value for key, value in call.items() if key in ("timesteps", "sigmas")} or call
    scheduler.set_timesteps(**spacing)
    outputs = torch.Generator().manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    state = torch.randn(4, 16, generator=outputs) * getattr(scheduler, "init_noise_sigma", 1.0)
    times, inputs = [], []
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(state, time) if hasattr(scheduler, "scale_model_input") else state
        times.append(float(time))
        inputs.append(scaled)
        state = scheduler.step(torch.randn(4, 16, generator=outputs), time, state, return_dict=False, **draws)[0]
    return times, [*inputs, state]
