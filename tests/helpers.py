"""What the tests of the methods share: exact teachers, a small network, fixed streams of batches, a two-player method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from oracle import MLP, Gaussian, Mixture
from pytorch_lightning import Callback, LightningDataModule, Trainer
from torch import Tensor, nn

from distill.adapters import ScalarInput
from distill.denoiser import Denoiser, NetworkDenoiser
from distill.evaluation import Evaluation
from distill.frozen import Frozen
from distill.grids import UniformGrid
from distill.methods.base import Method
from distill.methods.denoising import DenoisingTraining
from distill.methods.two_player import TwoPlayerMethod
from distill.optimization import Optimization
from distill.pairs import TimePairs
from distill.samplers import OdeSampler, RenoiseSampler
from distill.schedules import NoiseSchedule, RectifiedFlow, VariancePreserving
from distill.solvers import Heun
from distill.times import TimeDistribution
from distill.types import Batch, Cond, DataSpec, Losses, Sample, Time, label_conditions

SHAPE = (2, 1, 1)


# ----------------------------------------------------------------------------------------------- teachers and students


def two_classes(schedule: NoiseSchedule | None = None) -> Mixture:
    """Exact denoiser of two classes of points in the plane, standard deviation 0.2."""
    return Mixture(schedule or RectifiedFlow(), torch.tensor([[0.9, 0.3], [-0.6, -0.5]]).reshape(2, *SHAPE), 0.2)


def gaussian(schedule: NoiseSchedule) -> Gaussian:
    """Exact denoiser of one Gaussian, of another variance in each element."""
    return Gaussian(schedule, torch.tensor([0.4, -0.2]).reshape(SHAPE), torch.tensor([0.25, 0.04]).reshape(SHAPE))


class PowerMap(Denoiser):
    """Towards the start of a Gaussian's trajectory: ``m + (k(t_min) / k(t))^power (x - alpha m)``, k the spread.

    ``power = 1`` is the exact flow map to ``t_min``; the boundary condition holds for any power.
    """

    def __init__(self, teacher: Gaussian, power: float = 1.0):
        super().__init__()
        self.schedule, self.shape, self.teacher = teacher.schedule, teacher.shape, Frozen(teacher)
        self.power = nn.Parameter(torch.tensor(power))

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        alpha, sigma, mean, variance = self.teacher.module.scales(x, t)
        alpha_0, sigma_0, *_ = self.teacher.module.scales(x, torch.full_like(t, self.schedule.t_min))
        ratio = ((alpha_0**2 * variance + sigma_0**2) / (alpha**2 * variance + sigma**2)).sqrt()
        return (alpha_0 * mean + ratio**self.power * (x - alpha * mean)).to(x.dtype)


class SmallNetwork(MLP):
    """The oracle's network with dropout and further scalar inputs."""

    def __init__(self, num_classes: int | None = None, dropout: float = 0.0, **settings: Any):
        super().__init__(SHAPE, num_classes, **settings)
        self.last.insert(0, nn.Dropout(dropout))
        self.scalars = nn.ModuleDict()

    def add_scalar_input(self, name: str) -> None:
        self.scalars[name] = ScalarInput(self.first, self.first.in_features, origin=1.0)

    def forward(self, x: Tensor, time: Tensor, cond: Cond, r: Tensor | None = None) -> Tensor:
        for name, scalar in self.scalars.items():
            scalar.value = cond[name]
        return super().forward(x, time, cond, r)


def small(schedule: NoiseSchedule | None = None, prediction: Any = "flow", seed: int = 0, **network: Any) -> NetworkDenoiser:
    """A denoiser with a small network whose weights depend on ``seed`` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        schedule = schedule or RectifiedFlow()
        scale = 1e-3 if isinstance(schedule, RectifiedFlow | VariancePreserving) else 1.0
        return NetworkDenoiser(SmallNetwork(time_scale=scale, **network), schedule, prediction)


# ---------------------------------------------------------------------------------------------------- times and batches


class FixedTimes(TimeDistribution):
    """One time for every sample."""

    def __init__(self, time: float = 0.5):
        self.time = time

    def sample(self, count: int, schedule: NoiseSchedule, device: torch.device | None = None) -> Time:
        return torch.full((count,), self.time)


class FixedPairs(TimePairs):
    """The given pairs."""

    def __init__(self, t: list[float], u: list[float]):
        self.t, self.u = torch.tensor(t), torch.tensor(u)

    def sample(
        self, count: int, step: int, schedule: NoiseSchedule, device: torch.device | None = None
    ) -> tuple[Time, Time]:
        return self.t[:count], self.u[:count]


def batch_of(number: int, size: int = 8, tied: bool = True) -> Batch:
    """Batch ``number`` of the two classes; if ``tied``, with its noise, and noise for the two-player method's noising again."""
    generator = torch.Generator().manual_seed(1000 + number)
    labels = torch.randint(2, (size,), generator=generator)
    cond, null = label_conditions(labels, 2)
    cond["again"] = null["again"] = torch.randn(size, *SHAPE, generator=generator)
    x0 = two_classes().data(labels, generator).float()
    return Batch(x0, cond, null, torch.randn(size, *SHAPE, generator=generator) if tied else None)


def joined(*batches: Batch) -> Batch:
    """One batch of all rows."""
    keys = batches[0].cond
    sides = [batch.cond for batch in batches], [batch.null for batch in batches]
    cond, null = ({key: torch.cat([each[key] for each in side]) for key in keys} for side in sides)
    return Batch(torch.cat([b.x0 for b in batches]), cond, null, torch.cat([b.noise for b in batches]))  # type: ignore[misc]


class Stream:
    """Batches in order, whose position Lightning keeps in its checkpoints."""

    def __init__(self, batches: list[Batch]):
        self.batches, self.position = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Data(LightningDataModule):
    """The given batches, for training and validation."""

    def __init__(self, batches: list[Batch]):
        super().__init__()
        self.batches, self.spec, self.eval_batch_size = batches, DataSpec(SHAPE, 2), len(batches[0])

    def train_dataloader(self) -> Stream:
        return Stream(self.batches)

    val_dataloader = train_dataloader


# ------------------------------------------------------------------------------------------------------------- methods


class Trapped(DenoisingTraining):
    """Flow matching in which batches carry a trap: 1 makes the loss NaN and not its gradient, 2 only its gradient infinite."""

    def losses(self, batch: Batch) -> Losses:
        loss, trap = super().losses(batch)["loss"], int(batch.cond["trap"][0])
        bias = self.student.network.first.bias.sum()
        return {"loss": loss + (0.0, float("nan"), (bias - bias.detach()).sqrt())[trap]}


class Game(TwoPlayerMethod):
    """Distribution matching (Yin et al. 2311.18828): the critic denoises the student's one-step samples.

    The student follows ``fake x0 - teacher's x0`` at a noisy version of them. All draws but the times come from the batch.
    """

    def __init__(self, student: Denoiser, teacher: Denoiser, critic: Denoiser, times: TimeDistribution, **settings: Any):
        super().__init__(student, teacher, critic, None, evaluation=evaluation(), **settings)
        self.times = times

    def noisy_sample(self, batch: Batch) -> tuple[Sample, Sample, Time]:
        assert batch.noise is not None
        schedule, end = self.student.schedule, torch.full((len(batch),), self.student.schedule.t_max)
        sample = self.student(schedule.prior_scale * batch.noise, end, batch.cond)
        t = self.times.sample(len(batch), schedule)
        return sample, schedule.add_noise(sample, batch.cond["again"], t), t

    def losses(self, batch: Batch) -> Losses:
        sample, x_t, t = self.noisy_sample(batch)
        with torch.no_grad():
            direction = self.critic(x_t, t, batch.cond) - self.teacher(x_t, t, batch.cond)
        return {"loss": (sample - (sample - direction).detach()).square().sum((1, 2, 3)).mean() / 2}

    def critic_losses(self, batch: Batch) -> Losses:
        with torch.no_grad():
            sample, x_t, t = self.noisy_sample(batch)
        return {"loss": (self.critic(x_t, t, batch.cond) - sample).square().sum((1, 2, 3)).mean()}


def game(critic_steps: int = 1, times: TimeDistribution | None = None, **settings: Any) -> Game:
    """A `Game` of small networks against an exact mixture; ``settings`` of both players' optimisation."""
    return Game(
        small(seed=1, num_classes=2),
        two_classes(),
        small(seed=2, num_classes=2),
        times or FixedTimes(),
        optimization=Optimization(**settings),
        critic_optimization=Optimization(**settings),
        critic_steps=critic_steps,
    )


# ------------------------------------------------------------------------------------------------------------- running


def evaluation(**settings: Any) -> Evaluation:
    """Re-noising for students, 32 Heun steps for teachers, on uniform grids."""
    return Evaluation(RenoiseSampler(UniformGrid()), teacher_sampler=OdeSampler(Heun(), UniformGrid()), **settings)


def trainer(steps: int, *callbacks: Callback, **settings: Any) -> Trainer:
    """A bare trainer on one CPU process for ``steps`` optimiser steps."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1, "use_distributed_sampler": False}
    quiet |= {"limit_val_batches": 0}
    return Trainer(max_steps=steps, callbacks=list(callbacks), **{**quiet, **settings})


def fit(
    method: Method, batches: list[Batch], steps: int, *callbacks: Callback, ckpt_path: Any = None, **settings: Any
) -> Trainer:
    """Trains for ``steps`` optimiser steps over ``batches``, again and again."""
    ready = trainer(steps, *callbacks, **settings)
    ready.fit(method, datamodule=Data(batches), ckpt_path=ckpt_path)
    return ready


class Watch(Callback):
    """Everything a method and its optimisers hold, copied before the first batch and after each."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.states.append(everything(trainer, pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *others: Any) -> None:
        self.states.append(everything(trainer, pl_module))

    def moved(self, batch: int, part: str) -> bool:
        """Whether any tensor of a part (a prefix) changed in a 0-based batch."""
        before, after = (of_part(self.states[i], part) for i in (batch, batch + 1))
        return not same(before, after)


def everything(trainer: Trainer, method: Method) -> dict[str, Tensor]:
    """Copies of a method's state and of its optimisers' by name; ``optimizer.INDEX`` for the latter."""
    state = {key: value.detach().clone() for key, value in method.state_dict().items()}
    for index, optimizer in enumerate(trainer.optimizers):
        for number, values in optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{number}.{key}": torch.as_tensor(value).clone() for key, value in values.items()}
    return state


def of_part(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Entries below a prefix; there must be some."""
    return {key: value for key, value in state.items() if key.startswith(part + ".")}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether both hold the same names and bits."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def closest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference between two sets of tensors of the same names."""
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def energy_distance(first: Sample, second: Sample) -> float:
    """``2 E|a - b| - E|a - a'| - E|b - b'|`` (Székely & Rizzo 2013): 0 for equal laws alone."""
    a, b = first.flatten(1), second.flatten(1)

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))
