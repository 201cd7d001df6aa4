"""MMD finetuning: the fixed point, what it learns, checkpointed chains (gradients, memory), two processes, refusals."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import (
    SHAPE,
    batch_of,
    closest,
    energy_distance,
    everything,
    fit,
    gaussian,
    joined,
    of_part,
    same,
    small,
    two_classes,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from two_ranks import found_by_two_ranks

from distill.chain import CheckpointedDenoiser
from distill.codecs import Codec
from distill.denoiser import Denoiser, NetworkDenoiser
from distill.evaluation import Evaluation
from distill.few_step import FewStepSampler
from distill.grids import UniformGrid
from distill.guidance import AdaptiveProjectedGuidance, ClassifierFreeGuidance, TimeStepGuidance
from distill.image_features import ImageFeatures
from distill.jump_times import CutGrid
from distill.kernels import Kernel, PolynomialKernel, RadialKernel, squared_mmd
from distill.methods.mmd import MMDFinetuning
from distill.metrics import DigitsAccuracy, FrechetDistance
from distill.networks.dit import DiT
from distill.noise import SeededNoise
from distill.optimization import Optimization
from distill.samplers import JumpSampler, OdeSampler
from distill.schedules import RectifiedFlow
from distill.solvers import DDIM, DPMSolver2M, Euler
from distill.space import ModelSpace
from distill.types import Batch, Cond, DataSpec, Sample, Time

EULER = OdeSampler(Euler(), UniformGrid())


class Flat(ImageFeatures):
    """The pixels times a factor, as vectors."""

    protocol = "the pixels, flat"

    def __init__(self, name: str = "flat", factor: float = 1.0):
        super().__init__()
        self.name, self.factor, self.identity = name, factor, {"path": name, "sha256": name}

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * images.flatten(1)


class Shifted(Denoiser):
    """The exact jumps of a Gaussian's flow, ending at a wrong mean."""

    def __init__(self, shift: float = 0.0):
        super().__init__()
        self.schedule, self.shape = RectifiedFlow(), SHAPE
        self.exact, self.shift = gaussian(self.schedule), nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        return self.exact(x, t, cond, r) + self.shift


def mmd(student: Denoiser, steps: int = 2, features: list[ImageFeatures] | None = None, **settings: Any) -> MMDFinetuning:
    settings = {"sampler": EULER, "optimization": Optimization(), **settings}
    return MMDFinetuning(features or [Flat()], evaluation=Evaluation(steps=[steps]), student=student, **settings)


def gradients(method: MMDFinetuning, batch: Batch) -> list[Tensor]:
    """Of the student's parameters, with the draws of its next batch."""
    method.seed_draws()
    loss = method.losses(batch)["loss"]
    return list(torch.autograd.grad(loss, list(method.student.parameters())))


# ------------------------------------------------------------------------------------------------------ the fixed point


def test_the_expected_loss_and_gradient_vanish_at_the_exact_sampler_and_not_at_a_wrong_one():
    """Two exact jumps: the unbiased estimate's mean over draws is within 4 of its standard errors of 0."""

    def drawn(shift: float) -> tuple[Tensor, Tensor]:
        method = mmd(Shifted(shift), 2, sampler=JumpSampler(UniformGrid())).double()
        found = []
        for number in range(50):
            torch.manual_seed(number)
            loss = method.losses(Batch(method.student.exact.data(32), {}, {}))["loss"]
            found.append(torch.stack([loss.detach(), *torch.autograd.grad(loss, method.student.parameters())]))
        values = torch.stack(found)
        return values.mean(0), values.std(0) / len(values) ** 0.5

    with torch_default(torch.float64):
        exact, error = drawn(0.0)
        assert bool((exact.abs() < 4 * error).all()) and float(error[0]) < 0.01, (exact, error)
        for shift in (-0.3, 0.3):
            wrong, error = drawn(shift)
            assert bool((wrong.abs() > 10 * error).all()) and float(wrong[1]) * shift > 0


class torch_default:
    """The default precision within a block."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.before = dtype, torch.get_default_dtype()

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *exception: Any) -> None:
        torch.set_default_dtype(self.before)


def test_the_loss_is_the_weighted_sum_over_features_of_decoded_samples():
    """By hand, with a codec that has a gradient: samples are decoded, images are not encoded, latents are decoded.

    Samples made for the images' labels are paired with them; of a batch without conditions they are not.
    """
    features, kernel = [Flat(), Flat("large", 3.0)], RadialKernel([1.0])
    settings = dict(kernel=kernel, feature_weights=[1.0, 0.25], space=ModelSpace(Doubling()))
    method = mmd(small(num_classes=2), 2, features, **settings)
    raw, noise = batch_of(0), batch_of(1).noise
    method.unit_noise = lambda batch: noise  # type: ignore[method-assign]
    found = method.losses(method.prepare(raw))
    pixels = 2 * EULER(method.student, noise, raw.cond, 2)
    rows = [(k * pixels.flatten(1), k * raw.x0.flatten(1)) for k in (1.0, 3.0)]
    parts = [squared_mmd(fake, real, kernel, paired=True) for fake, real in rows]
    torch.testing.assert_close([found["mmd_flat"], found["mmd_large"]], parts)
    torch.testing.assert_close(found["loss"], parts[0] + 0.25 * parts[1])
    for one, other in zip(torch.autograd.grad(found["loss"], method.student.parameters()), gradients_of(parts, method)):
        torch.testing.assert_close(one, other)
    encoded = Batch(raw.x0 / 2, raw.cond, raw.null, encoded=True)
    torch.testing.assert_close(method.losses(method.prepare(encoded))["loss"], found["loss"])
    free = method.discrepancy(features[0], pixels, Batch(raw.x0, {}, {}))
    torch.testing.assert_close(free, squared_mmd(*rows[0], kernel))
    assert abs(float(free - parts[0])) > 1e-6


def gradients_of(parts: list[Tensor], method: MMDFinetuning) -> tuple[Tensor, ...]:
    return torch.autograd.grad(parts[0] + 0.25 * parts[1], list(method.student.parameters()))


class Doubling(Codec):
    """Latents are half the pixels."""

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels / 2

    def decode(self, latents: Tensor) -> Tensor:
        return 2 * latents

    def latent_shape(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        return pixels


# -------------------------------------------------------------------------------------------------------- what it learns


@pytest.mark.parametrize("matching", ["joint", "class"])
def test_two_step_samples_of_each_class_move_to_its_law(matching):
    """From an untrained network, in seconds, once through checkpointed calls."""
    optimization = Optimization(lambda parameters: torch.optim.Adam(parameters, lr=5e-3, fused=True))
    kernel, checkpointing = RadialKernel([0.5, 2.0]), matching == "joint"
    settings = dict(optimization=optimization, checkpointing=checkpointing)
    method = mmd(small(num_classes=2), 2, kernel=kernel, matching=matching, **settings)
    before = class_distances(method)
    fit(method, [batch_of(number, 64) for number in range(16)], 100)
    after = class_distances(method)
    assert all(late < early / 15 for early, late in zip(before, after)), (before, after)


def class_distances(method: MMDFinetuning) -> list[float]:
    """Energy distance of the student's samples of each class to it."""
    found = []
    for label in (0, 1):
        labels = torch.full((500,), label)
        samples = method.draw(2, range(500), {"labels": labels}, {"labels": torch.full((500,), 2)}, source="student")
        found.append(energy_distance(samples, two_classes().data(labels, torch.Generator().manual_seed(5)).float()))
    return found


def test_a_student_of_another_method_is_finetuned_in_its_own_one_step():
    """SiD's: one evaluation at a given noise level."""
    student = small(num_classes=2)
    start = {key: value.clone() for key, value in student.state_dict().items()}
    method = mmd(student, 1, sampler=FewStepSampler(sigmas=[2.5]))
    assert method.student is student and not method.has_teacher
    fit(method, [batch_of(0)], 1)
    assert not same(start, dict(method.student.state_dict()))


def test_a_guided_student_is_trained_as_it_is_sampled():
    rule = ClassifierFreeGuidance(2.0)
    method, batch = mmd(small(num_classes=2), 2, guidance=rule), batch_of(0)
    noise = SeededNoise(0, range(8), SHAPE).draw(torch.device("cpu"))
    trained = method.rollout(noise, batch)
    drawn = method.draw(2, range(8), batch.cond, batch.null, source="student")
    torch.testing.assert_close(trained, drawn)
    torch.testing.assert_close(drawn, EULER(rule(method.student, batch.null), noise, batch.cond, 2))
    assert (mmd(method.student, 2).rollout(noise, batch) - trained).abs().max() > 1e-3
    other = method.draw(2, range(8), batch.cond, batch.null, source="student", guidance=1.0)
    torch.testing.assert_close(other, mmd(method.student, 2).rollout(noise, batch))


# ------------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("guidance", [None, AdaptiveProjectedGuidance(3.0)], ids=["plain", "guided with memory"])
@pytest.mark.parametrize("solver", [Euler(), DDIM(), DPMSolver2M()], ids=lambda solver: type(solver).__name__)
def test_checkpointed_gradients_equal_plain_ones_with_dropout_active(solver, guidance):
    plain, again = (
        mmd(small(num_classes=2, dropout=0.4), 4, sampler=OdeSampler(solver, UniformGrid()), guidance=guidance, checkpointing=c)
        for c in (False, True)
    )
    found = [gradients(method, batch_of(0)) for method in (plain, again)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    plain.student.eval()
    without = gradients(plain, batch_of(0))
    assert max(float((one - other).abs().max()) for one, other in zip(found[0], without, strict=True)) > 1e-3


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that still live; ``peak`` is the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and id(storage := value.untyped_storage()) not in self.known:
                self.known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self.gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def gone(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.live -= size


def peak_bytes(steps: int, checkpointing: bool) -> int:
    """Of one loss and its backward pass."""
    method = mmd(small(num_classes=2, width=256, depth=4, dropout=0.1), steps, checkpointing=checkpointing, chunk=16)
    batch, live = batch_of(0, 128), LiveBytes()
    with live:
        method.losses(batch)["loss"].backward()
    return live.peak


def test_memory_of_a_checkpointed_chain_hardly_grows_with_its_steps():
    """From 2 to 10 steps; the plain chain keeps the activations of every call."""
    assert peak_bytes(10, True) < 1.3 * peak_bytes(2, True)
    plain = peak_bytes(10, False)
    assert plain > 3 * peak_bytes(2, False) and plain > 3 * peak_bytes(10, True)


def test_rules_that_hook_the_network_during_a_call_are_refused_around_a_checkpointed_one():
    """The second forward would run without the hook, and give another gradient without a word."""
    method = mmd(small(num_classes=2), guidance=TimeStepGuidance(2.0, 1.0), checkpointing=True)
    with pytest.raises(ValueError, match="CheckpointedDenoiser has no time embedding"):
        method.losses(batch_of(0))


def test_blocks_alone_are_not_checkpointed_where_the_network_keeps_what_a_call_was_given():
    """DiT embeds times in each block: made again after the last call, the blocks of the first would read its second time."""

    def student() -> NetworkDenoiser:
        wrapped = NetworkDenoiser(DiT.of(FAMILIES["dit"].model()), RectifiedFlow())
        wrapped.add_second_time()
        torch.manual_seed(0)
        nn.init.normal_(wrapped.network.scalars["r"].projection.weight, std=0.3)
        return wrapped

    settings: dict[str, Any] = dict(sampler=JumpSampler(CutGrid(0.994)), kernel=RadialKernel([20.0]))
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch(noise, {"labels": torch.arange(4)}, {"labels": torch.full((4,), 10)})
    plain = gradients(mmd(student(), **settings), batch)
    settings["optimization"] = Optimization(gradient_checkpointing=True)
    with pytest.raises(ValueError, match="set model.checkpointing=true"):
        mmd(student(), **settings)
    both = gradients(mmd(student(), checkpointing=True, **settings), batch)
    assert closest(dict(enumerate(plain)), dict(enumerate(both))) < 1e-5 < max(float(each.abs().max()) for each in plain)


def test_a_checkpointed_denoiser_describes_itself_as_the_one_inside():
    inner = two_classes()
    wrapped = CheckpointedDenoiser(inner)
    assert wrapped.schedule is inner.schedule and (wrapped.shape, wrapped.num_classes) == (SHAPE, 2)
    assert wrapped.trajectory(torch.randn_like) is wrapped


# -------------------------------------------------------------------------------------------------------- two processes


class Told(MMDFinetuning):
    """Starts from the batch's noise."""

    def unit_noise(self, batch: Batch) -> Sample:
        assert batch.noise is not None
        return batch.noise


def trained(batches: list[Batch], matching: Any, **settings: Any) -> dict[str, Tensor]:
    """One step of plain gradient descent in double precision, and its loss."""
    optimization = Optimization(lambda parameters: torch.optim.SGD(parameters, lr=1.0), gradient_clip_norm=None)
    chain = dict(sampler=EULER, checkpointing=True, matching=matching, kernel=RadialKernel([0.5]))
    method = Told([Flat()], optimization, Evaluation(steps=[2]), student=small(num_classes=2), **chain)
    for batch in batches:
        batch.x0, batch.noise = batch.x0.double(), batch.noise.double()  # type: ignore[union-attr]
    ready = fit(method, batches, 1, precision="64-true", log_every_n_steps=1, **settings)
    return everything(ready, method) | {"loss": ready.callback_metrics["train/student/loss"]}


MATCHINGS = ("all", "joint", "class")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found."""
    return found_by_two_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("matching", MATCHINGS)
def test_two_ranks_equal_one_process_on_the_joined_batch(ranks, matching):
    """Value and gradient: one step at rate 1 moves each weight by minus its gradient."""
    first, second = (found[matching] for found in ranks)
    assert same(first, second)
    alone = trained([joined(batch_of(0, 12), batch_of(1, 12))], matching)
    assert float(first["loss"]) == pytest.approx(float(alone["loss"]), abs=1e-9)
    untrained = {f"student.{key}": value for key, value in small(num_classes=2).double().state_dict().items()}
    moved = [
        {key: value - untrained[key] for key, value in of_part(found, "student").items()} for found in (first, alone)
    ]
    for key, value in moved[1].items():
        torch.testing.assert_close(moved[0][key], value, rtol=1e-6, atol=1e-9)
    assert max(float(value.abs().max()) for value in moved[1].values()) > 1e-3
    # The mean of the ranks' own discrepancies is another figure.
    own = [float(trained([batch_of(rank, 12)], matching)["loss"]) for rank in (0, 1)]
    assert abs(sum(own) / 2 - float(alone["loss"])) > 1e-3


# ------------------------------------------------------------------------------------------------------------- refusals


def evaluation_of(steps: list[int], *metrics: Any, **settings: Any) -> Evaluation:
    return Evaluation(steps=steps, metrics=list(metrics), **settings)


class PixelTwin(Flat):
    """Trained on what `FrechetDistance` measures by default."""

    def __init__(self) -> None:
        super().__init__("pixels")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(features=[]), ["features=[]", "at least one"]),
        (dict(features=[Flat(), Flat()]), ["features=['flat', 'flat']", "one network of each kind"]),
        (dict(feature_weights=[1.0, 2.0]), ["feature_weights=[1.0, 2.0]", "['flat']"]),
        (dict(feature_weights=[0.0]), ["feature_weights=[0.0]", "positive"]),
        (dict(student=None), ["model.teacher and model.student"]),
        (dict(evaluation=evaluation_of([1, 2])), ["steps=null", "[1, 2]"]),
        (dict(evaluation=evaluation_of([1, 2]), steps=3), ["steps=3", "evaluation.steps=[1, 2]"]),
        (dict(evaluation=evaluation_of([1], sampler=EULER)), ["evaluation.sampler", "model.sampler"]),
        (dict(evaluation=evaluation_of([2]), sampler=FewStepSampler(sigmas=[2.5])), ["evaluation.steps=[2]", "1 times"]),
        (dict(evaluation=evaluation_of([1], FrechetDistance()), features=[PixelTwin()]), ["pixels"]),
        (dict(evaluation=evaluation_of([1], DigitsAccuracy()), features=[PixelTwin()]), ["pixels"]),
    ],
)
def test_settings_that_contradict_each_other_are_named(settings, words):
    defaults = dict(features=[Flat()], optimization=Optimization(), evaluation=evaluation_of([1]), student=small())
    with pytest.raises(ValueError) as error:
        MMDFinetuning(**{**defaults, "sampler": EULER, **settings})  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in words), error.value


def test_another_metric_than_those_trained_on_is_enough():
    metrics = [FrechetDistance()]
    method = mmd(small(), 2)
    evaluation = Evaluation(sampler=EULER, steps=[2], metrics=metrics)
    assert MMDFinetuning([Flat()], Optimization(), evaluation, student=method.student).evaluation.metrics == metrics


def test_data_that_cannot_be_matched_is_refused():
    with pytest.raises(ValueError, match="matching='joint'.*no labels"):
        mmd(small(), matching="joint").check_data(DataSpec(SHAPE))
    mmd(small()).check_data(DataSpec(SHAPE))
    method = mmd(small(num_classes=2))
    with pytest.raises(ValueError, match="without images"):
        method.losses(method.prepare(Batch(None, batch_of(0).cond, batch_of(0).null)))


def test_feature_networks_are_neither_trained_nor_saved_nor_is_there_a_gradient_to_the_images():
    extract = Flat()
    extract.weight = nn.Parameter(torch.ones(()))
    method, batch = mmd(small(num_classes=2), features=[extract]), batch_of(0)
    assert not extract.weight.requires_grad and not any("weight" in key for key in method.state_dict() if "feature" in key)
    batch.x0.requires_grad_()  # type: ignore[union-attr]
    method.losses(batch)["loss"].backward()
    assert batch.x0.grad is None  # type: ignore[union-attr]
    kernel: Kernel = method.kernel
    assert isinstance(kernel, PolynomialKernel) and kernel.degree == 3 and method.trained_sampling == {"steps": 2}


if __name__ == "__main__":
    own = int(sys.argv[1])
    found = {
        matching: trained([batch_of(own, 12)], matching, strategy="ddp", devices=2) for matching in MATCHINGS
    }
    torch.save(found, Path(sys.argv[2]) / f"{own}.pt")
