"""Between data and networks: what is encoded, what is left alone, what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FixedTimes, evaluation, fit
from torch import Tensor

from distill.codecs import Codec
from distill.conditioners import Conditioner
from distill.denoiser import Denoiser, NetworkDenoiser
from distill.guidance import ClassifierFreeGuidance
from distill.methods.denoising import DenoisingTraining
from distill.networks.base import Network
from distill.optimization import Optimization
from distill.schedules import RectifiedFlow
from distill.space import ModelSpace, check_fit
from distill.types import Batch, Cond, DataSpec


class Halved(Codec):
    """Half the pixels plus a little noise, twice the channels; decoded exactly."""

    def __init__(self, noise: float = 0.0, sha256: str = "aa"):
        super().__init__()
        self.noise, self.identity = noise, {"path": "halved", "sha256": sha256}
        self.encoded = 0

    def encode(self, pixels: Tensor) -> Tensor:
        self.encoded += len(pixels)
        return torch.cat([pixels, pixels], 1) / 2 + self.noise * torch.randn(len(pixels), 1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        return 2 * latents[:, : latents.shape[1] // 2]

    def latent_shape(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        return (2 * pixels[0], *pixels[1:])


class Lengths(Conditioner):
    """A prompt's length; none for no prompt."""

    widths = {"prompt_embeds": 1}

    def __init__(self) -> None:
        super().__init__()
        self.identity = {"path": "lengths", "sha256": "bb"}

    def forward(self, prompts: list[str]) -> tuple[Cond, Cond]:
        lengths = torch.tensor([[[float(len(prompt))]] for prompt in prompts])
        return {"prompt_embeds": lengths}, {"prompt_embeds": torch.zeros(1, 1, 1).expand_as(lengths)}


class Reads(Network):
    """Shifts by its condition."""

    shape, native_shape, widths = (2, None, None), (2, 4, 4), {"prompt_embeds": 1}

    def __init__(self) -> None:
        super().__init__()
        self.scalars = torch.nn.ModuleDict()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Cond] = []

    def forward(self, x: Tensor, time: Tensor, cond: Cond, r: Tensor | None = None) -> Tensor:
        self.seen.append(cond)
        return x * self.weight + cond["prompt_embeds"][:, :, :, None]

    def time_embedding(self) -> tuple[torch.nn.Module, int]:
        raise NotImplementedError


class Scaled(Codec):
    """Times a weight that is in two places, plus a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), 2.0))
        self.same, self.identity = self.weight, {"path": "scaled", "sha256": "dd"}
        self.register_buffer("shift", torch.ones(4))

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels * self.weight + self.shift

    def decode(self, latents: Tensor) -> Tensor:
        return (latents - self.shift) / self.same

    def latent_shape(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        return pixels


def prompts() -> Batch:
    x0 = torch.linspace(-1, 1, 3 * 16).reshape(3, 1, 4, 4)
    return Batch(x0, {}, {}, prompts=["a", "bbb", "cc"])


def test_pixels_and_prompts_are_encoded_once():
    space, batch = ModelSpace(Halved(), Lengths()), prompts()
    ready = space.encode(batch)
    assert ready.encoded and ready.prompts is None and ready.x0.shape == (3, 2, 4, 4)
    assert ready.cond["prompt_embeds"].flatten().tolist() == [1, 3, 2] and not ready.null["prompt_embeds"].any()
    again = space.encode(ready)
    assert again.x0 is ready.x0 and space.codec.encoded == 3
    assert torch.equal(space.decode(ready.x0), batch.x0) and not batch.encoded


def test_a_prompt_that_comes_twice_is_encoded_once():
    space, asked = ModelSpace(None, Lengths()), []
    encode = space.conditioner.forward
    space.conditioner.forward = lambda prompts: asked.extend(prompts) or encode(prompts)  # type: ignore[method-assign]
    batch = Batch(None, {}, {}, prompts=["cc", "a", "cc", "bbb", "a"])
    ready = space.encode(batch)
    assert asked == ["cc", "a", "bbb"] and ready.cond["prompt_embeds"].flatten().tolist() == [2, 1, 2, 3, 1]
    assert ready.null["prompt_embeds"].shape == (5, 1, 1)


def test_other_conditions_stay():
    batch = prompts()
    batch.cond, batch.null = {"labels": torch.arange(3)}, {"labels": torch.full((3,), 9)}
    ready = ModelSpace(None, Lengths()).encode(batch)
    assert set(ready.cond) == set(ready.null) == {"labels", "prompt_embeds"}
    assert torch.equal(ready.x0, batch.x0)


def test_networks_are_given_the_shapes_and_widths_of_model_space():
    spec = ModelSpace(Halved(), Lengths()).spec(DataSpec((1, 4, 4), None, prompts=True))
    assert spec.shape == (2, 4, 4) and spec.widths == {"prompt_embeds": 1}
    ready = DataSpec((2, 4, 4), widths={"prompt_embeds": 7}, codec="aa", conditioner="bb")
    assert ModelSpace(Halved(), Lengths()).spec(ready) == ready
    assert ModelSpace().spec(ready) == ready


def test_data_encoded_by_other_weights_is_refused():
    with pytest.raises(ValueError, match="encoded by a codec with sha256 cc.*model.space.codec is .*halved"):
        ModelSpace(Halved()).spec(DataSpec((2, 4, 4), codec="cc"))
    with pytest.raises(ValueError, match="encoded by a conditioner with sha256 cc"):
        ModelSpace(Halved(), Lengths()).spec(DataSpec((2, 4, 4), codec="aa", conditioner="cc"))
    with pytest.raises(ValueError, match="model.space.conditioner is null"):
        ModelSpace().spec(DataSpec((2, 4, 4), prompts=True))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (DataSpec((2, 8, 6), widths={"prompt_embeds": 1}), None),
        (DataSpec((3, 4, 4), widths={"prompt_embeds": 1}), r"model.teacher works on samples of shape \(2, None, None\)"),
        (DataSpec((2, 4), widths={"prompt_embeds": 1}), r"delivers \(2, 4\)"),
        (DataSpec((2, 4, 4)), "model.teacher must be given 'prompt_embeds', which neither"),
        (DataSpec((2, 4, 4), widths={"prompt_embeds": 4}), "'prompt_embeds' of width 1, but .*makes width 4"),
    ],
)
def test_what_does_not_fit_is_named(spec: DataSpec, words: str | None):
    denoiser = NetworkDenoiser(Reads(), RectifiedFlow())
    if words is None:
        check_fit("model.teacher", denoiser, spec)
        return
    with pytest.raises(ValueError, match=words):
        check_fit("model.teacher", denoiser, spec)


def test_wrapped_denoisers_ask_for_what_the_inner_one_asks_for():
    base = NetworkDenoiser(Reads(), RectifiedFlow())
    guided = ClassifierFreeGuidance(2.0)(base, {"prompt_embeds": torch.ones(1)})
    wrapped: list[Denoiser] = [base.under(RectifiedFlow(3.0)), guided]
    assert all((each.shape, each.widths) == (base.shape, base.widths) for each in wrapped)


def test_one_null_row_does_for_all():
    base, x, t = NetworkDenoiser(Reads(), RectifiedFlow()), torch.randn(3, 2, 4, 4), torch.full((3,), 0.5)
    cond, null = Lengths()(["a", "bbb", "cc"])
    full = ClassifierFreeGuidance(3.0)(base, {"prompt_embeds": torch.zeros(3, 1, 1)})(x, t, cond)
    assert torch.equal(ClassifierFreeGuidance(3.0)(base, {"prompt_embeds": torch.zeros(1, 1, 1)})(x, t, cond), full)
    assert torch.equal(ClassifierFreeGuidance(3.0)(base, null)(x, t, cond), full)


def training(codec: Codec) -> DenoisingTraining:
    space = ModelSpace(codec, Lengths())
    student = NetworkDenoiser(Reads(), RectifiedFlow(), "x0")
    return DenoisingTraining(student, FixedTimes(), Optimization(), evaluation(steps=[1]), null_probability=0.0, space=space)


def test_losses_see_latents_and_samples_are_pixels():
    method = training(Halved())
    method.check_data(DataSpec((1, 4, 4), prompts=True))
    assert method.sample_shape == (2, 4, 4)
    fit(method, [prompts()], 1)
    assert method.student.network.seen[0]["prompt_embeds"].flatten().tolist() == [1, 3, 2]
    pixels = method.draw_pixels(1, range(3), method.prepare(prompts()))
    assert pixels.shape == (3, 1, 4, 4)


def test_the_codec_is_neither_trained_nor_saved_and_another_one_is_refused(tmp_path):
    first = training(Halved())
    assert not any("space" in key or "codec" in key for key in first.state_dict())
    checkpoint: dict[str, Any] = {}
    first.on_save_checkpoint(checkpoint)
    assert checkpoint["distill"]["space"]["codec"]["sha256"] == "aa"
    training(Halved()).on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="trained with the space.codec .*'aa'.*model.space.codec is .*'cc'"):
        training(Halved(sha256="cc")).on_load_checkpoint(checkpoint)


def test_draws_of_the_codec_are_those_of_the_step():
    """The posterior's draw is seeded by (seed, step, rank), as all draws of a step are."""
    method = training(Halved(noise=1.0))
    latents = []
    for _ in range(2):
        method.batches_seen = 3
        method.seed_draws()
        latents.append(method.prepare(prompts()).x0)
    method.batches_seen = 4
    method.seed_draws()
    assert torch.equal(*latents) and not torch.equal(method.prepare(prompts()).x0, latents[0])


def test_offloaded_weights_are_on_the_device_in_their_calls_alone():
    """A device without memory stands for an accelerator."""
    space = ModelSpace(Scaled(), Lengths(), offload=True).to("meta").double()
    codec, weight, shift = space.codec, space.codec.weight, space.codec.shift
    assert {tensor.device.type for tensor in codec.state_dict().values()} == {"cpu"} and weight.dtype == torch.float64
    pixels = torch.zeros(2, 1, 4, 4, device="meta", dtype=torch.float64)
    assert space.encode(Batch(pixels, {}, {})).x0.device.type == "meta"
    assert space.decode(pixels).device.type == "meta"
    with space.at_work(codec):
        assert codec.shift.device.type == codec.weight.device.type == "meta" and codec.weight is codec.same
    with pytest.raises(RuntimeError, match="broadcast"):
        space.decode(torch.zeros(2, 3, device="meta"))
    assert codec.weight is weight is codec.same and codec.shift is shift and weight.tolist() == [2.0] * 4


def test_where_there_is_one_device_offloading_changes_nothing():
    x0 = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)
    space = ModelSpace(Scaled(), offload=True)
    assert torch.equal(space.encode(Batch(x0, {}, {})).x0, 2 * x0 + 1)
    samples = x0.clone().requires_grad_()
    space.decode_with_gradient(samples).sum().backward()
    assert samples.grad is not None and torch.equal(samples.grad, torch.full_like(x0, 0.5))
