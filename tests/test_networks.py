"""Every family's denoiser against its own pipeline and scheduler, step by step; what a wrapper reads, adds and refuses."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, FLUX, LCM, PIXART, UNET, Tiny, no_conditions, texts

from distill.denoiser import NetworkDenoiser
from distill.networks.base import DiffusersNetwork
from distill.networks.families import FAMILIES as WRAPPERS
from distill.networks.unet2d import UNet2D
from distill.schedulers import read_scheduler
from distill.schedules import RectifiedFlow, TrigFlow
from distill.types import Cond, label_conditions

STEPS, BATCH = 5, 2
SPRINT = Tiny(
    "SanaTransformer2DModel",
    # The scale of times is read by the pipeline of Sana and not by that of Sana-Sprint.
    FAMILIES["sana"].config | dict(guidance_embeds=True, timestep_scale=0.5, qk_norm="rms_norm_across_heads"),
    "SCMScheduler",
    dict(prediction_type="trigflow", sigma_data=0.5),
    "SanaSprintPipeline",
    texts(12, masked=True),
)
CLASSES = Tiny(
    "UNet2DModel",
    FAMILIES["ddpm"].config | dict(num_class_embeds=11, out_channels=6),
    "DDPMScheduler",
    FAMILIES["ddpm"].scheduler_config | dict(clip_sample=False, variance_type="learned_range"),
    "DDPMPipeline",
    FAMILIES["dit"].conditions,
    channels=3,
)
"""Class-conditional and with a learned variance, as the networks of Nichol & Dhariwal 2102.09672 are."""

GUIDED = {"flux": FAMILIES["flux"], "lcm": LCM, "sana-sprint": SPRINT}
SCALED = dataclasses.replace(FAMILIES["sana"], config=FAMILIES["sana"].config | {"timestep_scale": 0.001})
ALL = FAMILIES | {"lcm": LCM, "sana-scaled": SCALED, "sana-sprint": SPRINT, "classes": CLASSES}


def wrap(tiny: Tiny, **changes: Any) -> DiffusersNetwork:
    return WRAPPERS[tiny.model_class].of(tiny.model(**changes))


def conditions(tiny: Tiny) -> tuple[Cond, Cond]:
    """With a guidance scale for those that read one."""
    cond, null = tiny.cond(BATCH)
    extra = {"guidance": torch.tensor([2.0, 7.5])} if tiny in GUIDED.values() else {}
    return cond | extra, null | extra


def denoiser(tiny: Tiny, network: Any = None, tokens: int | None = None) -> NetworkDenoiser:
    network = network or wrap(tiny)
    if tiny is SPRINT:
        return NetworkDenoiser(network, RectifiedFlow(), "flow")
    config = dict(tiny.scheduler().config) | {"_class_name": tiny.scheduler_class}
    return NetworkDenoiser(network, *read_scheduler(config, tokens or tiny.tokens))


def middle(schedule: Any) -> torch.Tensor:
    return torch.tensor([0.3, 0.7]) * schedule.t_max


def samples(tiny: Tiny) -> torch.Tensor:
    return torch.randn(BATCH, tiny.channels, tiny.size, tiny.size)


# ---------------------------------------------------------------------------------- against the family's own pipeline

HEIGHT, WIDTH = 8, 12
SIZES = dict(original_size=(80, 72), crops_coords_top_left=(3, 5), target_size=(64, 56))
TIME_IDS = torch.tensor([[80.0, 72.0, 3.0, 5.0, 64.0, 56.0]]).repeat(BATCH, 1)
PIXELS = {"SanaPipeline": 32, "SanaSprintPipeline": 32}
"""Pixels a latent, where it is not 8."""


def pipeline_arguments(tiny: Tiny, cond: Cond, latents: torch.Tensor) -> dict[str, Any]:
    """What the family's pipeline is called with to draw from these latents under these conditions, unguided."""
    name, guidance = tiny.pipeline_class, float(cond["guidance"][0]) if "guidance" in cond else 1.0
    if name == "DDPMPipeline":
        return dict(batch_size=BATCH, output_type="np")
    if name == "DiTPipeline":
        return dict(class_labels=cond["labels"].tolist(), guidance_scale=1.0, output_type="np")
    pixels = PIXELS.get(name, 8)
    arguments = dict(
        prompt_embeds=cond["prompt_embeds"],
        latents=latents,
        guidance_scale=guidance,
        height=pixels * latents.shape[-2],
        width=pixels * latents.shape[-1],
        output_type="latent",
    )
    if "pooled_prompt_embeds" in cond:
        arguments["pooled_prompt_embeds"] = cond["pooled_prompt_embeds"]
    if "prompt_mask" in cond:
        arguments |= dict(prompt_attention_mask=cond["prompt_mask"], use_resolution_binning=False)
    if name in ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline"):
        arguments["negative_prompt"] = None  # prompts' embeddings were given; an empty text would be encoded
    if name == "FluxPipeline":
        arguments["latents"] = pipeline_of("FluxPipeline")._pack_latents(latents, *latents.shape)
    if name == "StableDiffusionXLPipeline":
        arguments |= SIZES
    if name == "SanaSprintPipeline":
        arguments |= dict(max_timesteps=1.5, intermediate_timesteps=None)
    return arguments


def pipeline_of(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def exact_scheduler(tiny: Tiny) -> Any:
    """A scheduler of the family whose steps tell x0, at the times that its network was trained on, without clipping."""
    import diffusers

    config = tiny.scheduler().config
    if tiny.scheduler_class in ("SCMScheduler", "LCMScheduler"):
        return tiny.scheduler()
    if config.get("use_flow_sigmas"):  # DPM-Solver rounds a flow's times down to whole numbers
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=config.flow_shift)
    if tiny.scheduler_class.startswith("FlowMatch"):
        return tiny.scheduler()
    return diffusers.DDIMScheduler.from_config(config, clip_sample=False, timestep_spacing="trailing")


def record(scheduler: Any) -> list[SimpleNamespace]:
    """The scheduler's steps from now on: time, noise level of a flow, sample and the x0 that the scheduler makes of them."""
    steps, original = [], scheduler.step

    def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **settings: Any) -> Any:
        whole = original(model_output, timestep, sample, *args, **(settings | {"return_dict": True}))
        sigma = None
        if type(scheduler).__name__.startswith("FlowMatch"):
            sigma = scheduler.sigmas[scheduler.step_index - 1]
            x0 = sample - sigma * model_output
        elif hasattr(whole, "pred_original_sample"):
            x0 = whole.pred_original_sample
        else:  # LCMScheduler tells x0 as the consistency function's boundary condition mixes it with the sample
            skip, out = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
            x0 = (whole.denoised - skip * sample) / out
        steps.append(SimpleNamespace(time=float(timestep.flatten()[0]), sigma=sigma, sample=sample.clone(), x0=x0))
        return whole if settings.get("return_dict", True) else (whole.prev_sample, x0)

    scheduler.step = step
    return steps


def tiny_codec() -> Any:
    """DiT's pipeline decodes whatever it is asked for."""
    import diffusers

    return diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)


def run_pipeline(tiny: Tiny, model: Any, cond: Cond, latents: torch.Tensor) -> list[SimpleNamespace]:
    scheduler = exact_scheduler(tiny)
    pipeline = tiny.pipeline(model, scheduler)
    if tiny.pipeline_class == "DiTPipeline":
        pipeline.register_modules(vae=tiny_codec())
    steps = record(scheduler)
    pipeline(num_inference_steps=STEPS, **pipeline_arguments(tiny, cond, latents))
    if tiny.pipeline_class == "FluxPipeline":
        for step in steps:
            step.sample, step.x0 = (
                pipeline._unpack_latents(packed, 8 * HEIGHT, 8 * WIDTH, 8) for packed in (step.sample, step.x0)
            )
    return steps


def own_time(schedule: Any, step: SimpleNamespace) -> torch.Tensor:
    """The time of our schedule at a recorded step."""
    if step.sigma is None:
        return torch.full((BATCH,), step.time)
    return schedule.time_of_angle(torch.atan2(step.sigma.double(), 1 - step.sigma.double())).float().repeat(BATCH)


@pytest.mark.parametrize("name", [*FAMILIES, "lcm", "sana-scaled", "sana-sprint"])
@torch.no_grad()
def test_x0_is_what_the_own_pipeline_of_the_family_computes(name):
    """At every step of its pipeline, run from start to end; samples are not square where the family allows.

    Errors are relative to the size of x0: where alpha is small (0.006 at the end of DDPM's linear betas), 1 / alpha enlarges
    the rounding of what the scheduler sums in float32, its alphas_cumprod among it.
    """
    tiny = ALL[name]
    cond, _ = conditions(tiny)
    if "time_ids" in cond:
        cond["time_ids"] = TIME_IDS
    if "resolution" in cond:
        cond |= {"resolution": torch.tensor([[64.0, 96.0]] * 2), "aspect_ratio": torch.full((2, 1), 64 / 96)}
    if "guidance" in cond:
        cond["guidance"] = torch.full((BATCH,), 2.5)
    model = tiny.model()
    steps = run_pipeline(tiny, model, cond, torch.randn(BATCH, tiny.channels, HEIGHT, WIDTH))
    ours = denoiser(tiny, WRAPPERS[tiny.model_class].of(model), tokens=HEIGHT * WIDTH // 4)
    view = ours.under(TrigFlow(1.0)) if tiny is SPRINT else ours
    scale = 0.5 if tiny is SPRINT else 1.0  # the standard deviation that SCMScheduler gives to its samples
    assert len(steps) == STEPS and len({step.time for step in steps}) == STEPS
    for step in steps:
        x0 = view(step.sample / scale, own_time(view.schedule, step), cond)
        assert float((x0 - step.x0 / scale).abs().max() / (step.x0 / scale).abs().max()) < 1e-5


@torch.no_grad()
def test_learned_variance_and_classes_of_a_unet():
    """No pipeline of diffusers draws with such a network: its scheduler, which knows a learned variance, takes one step."""
    cond, _ = conditions(CLASSES)
    model, x, ours = CLASSES.model(), samples(CLASSES), denoiser(CLASSES)
    for time in (999, 700, 400, 100, 0):
        output = model(x, time, class_labels=cond["labels"]).sample
        theirs = CLASSES.scheduler().step(output, time, x).pred_original_sample
        x0 = ours(x, torch.full((BATCH,), float(time)), cond)
        assert float((x0 - theirs).abs().max() / theirs.abs().max()) < 1e-5


# ------------------------------------------------------------------------------------------------- what a wrapper says


@pytest.mark.parametrize(
    ("name", "shape", "native", "num_classes", "widths"),
    [
        ("ddpm", (3, 8, 8), (3, 8, 8), None, {}),
        ("classes", (3, 8, 8), (3, 8, 8), 10, {}),
        ("sd15", (4, None, None), (4, 8, 8), None, {"prompt_embeds": 12}),
        ("sdxl", (4, None, None), (4, 8, 8), None, {"prompt_embeds": 12, "pooled_prompt_embeds": 10, "time_ids": 6}),
        ("dit", (4, 8, 8), (4, 8, 8), 10, {}),
        ("pixart-alpha", (4, None, None), (4, 128, 128), None, {"prompt_embeds": 12, "resolution": 2, "aspect_ratio": 1}),
        ("pixart-sigma", (4, None, None), (4, 8, 8), None, {"prompt_embeds": 12}),
        ("sd3", (4, None, None), (4, 8, 8), None, {"prompt_embeds": 12, "pooled_prompt_embeds": 10}),
        ("flux", (4, None, None), (4, 128, 128), None, {"prompt_embeds": 12, "pooled_prompt_embeds": 10}),
        ("sana", (4, None, None), (4, 8, 8), None, {"prompt_embeds": 12}),
    ],
)
def test_what_a_wrapper_says_of_itself(name, shape, native, num_classes, widths):
    network = wrap(ALL[name])
    assert (network.shape, network.native_shape) == (shape, native)
    assert (network.num_classes, network.widths) == (num_classes, widths)
    assert network.component == ALL[name].component and type(network) is WRAPPERS[ALL[name].model_class]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_conditions_have_the_widths_and_are_all_read(name):
    """A condition that is missing is named, and one that changes is felt."""
    tiny = FAMILIES[name]
    network, (cond, null), x = wrap(tiny), tiny.cond(BATCH), samples(tiny)
    time = torch.tensor([100.0, 600.0])
    plain = network(x, time, cond)
    assert {key: cond[key].shape[-1] for key in network.widths} == network.widths
    for key in cond:
        with pytest.raises(KeyError, match=key):
            network(x, time, {other: cond[other] for other in cond if other != key} | {"unread": x})
        changed = cond[key] + 1 if torch.equal(cond[key], null[key]) else null[key]
        assert not torch.allclose(network(x, time, cond | {key: changed}), plain)


@torch.no_grad()
def test_open_sizes_are_open():
    """Where ``shape`` leaves height and width open, samples of 4 x 6 come out as they went in."""
    for name, tiny in ALL.items():
        network, (cond, _) = wrap(tiny), conditions(tiny)
        if network.shape[1] is None:
            assert network(torch.randn(2, 4, 4, 6), torch.tensor([10.0, 900.0]), cond).shape == (2, 4, 4, 6), name


@torch.no_grad()
def test_classes_without_a_null_class():
    """A network that was trained without one has a class more."""
    model, x, time = CLASSES.model(), samples(CLASSES), torch.tensor([10.0, 900.0])
    network = UNet2D.of(model, null_class=False)
    assert (network.num_classes, network.null_class) == (11, False)
    assert (UNet2D.of(model).num_classes, UNet2D.of(model).null_class) == (10, True)
    last = torch.tensor([10, 10])
    expected = model(x, time, class_labels=last).sample[:, :3]
    assert torch.equal(network(x, time, {"labels": last}), expected)
    assert torch.equal(UNet2D.of(model)(x, time, label_conditions(last, 10)[1]), expected)
    assert UNet2D.of(FAMILIES["ddpm"].model(), null_class=False).num_classes is None


@torch.no_grad()
def test_dit_reads_its_labels_in_training_mode_too():
    """Diffusers would replace some by the null class, in each block others."""
    network, (cond, _) = wrap(FAMILIES["dit"]), FAMILIES["dit"].cond(64)
    x, time = torch.randn(64, 4, 8, 8), torch.full((64,), 300.0)
    assert torch.equal(network.train()(x, time, cond), network.eval()(x, time, cond))


# ------------------------------------------------------------------------------------------------- precision, gradients


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_bf16_model_takes_and_gives_float32(name):
    tiny = ALL[name]
    cond, x = conditions(tiny)[0], samples(tiny)
    precise, coarse = denoiser(tiny), denoiser(tiny, WRAPPERS[tiny.model_class].of(tiny.model().to(torch.bfloat16)))
    x0, expected = (each(x, middle(each.schedule), cond) for each in (coarse, precise))
    assert coarse.network.dtype == torch.bfloat16 and x0.dtype == torch.float32
    error = float((x0 - expected).norm() / expected.norm())
    assert 0 < error < 0.02


@pytest.mark.parametrize("name", ALL)
def test_gradient_with_respect_to_the_sample(name):
    """Against a central difference along one direction, of a sum of squares: it is not linear.

    In float64 as far as the models go: normalisation and rotation of SD3, Flux and Sana are in float32 always.
    """
    tiny = ALL[name]
    ours, cond = denoiser(tiny, WRAPPERS[tiny.model_class].of(tiny.model().double())), conditions(tiny)[0]
    x, direction, time = samples(tiny).double(), samples(tiny).double(), middle(ours.schedule).double()

    def value(x: torch.Tensor) -> torch.Tensor:
        return ours(x, time, cond).square().sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(value(x), x)
    step = 1e-3
    with torch.no_grad():
        expected = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-3, atol=0)


# -------------------------------------------------------------------------------------------------------- scalar inputs


@pytest.mark.parametrize("name", ALL)
def test_a_new_scalar_input_is_without_effect_until_it_is_trained(name):
    tiny = ALL[name]
    network, cond, x = wrap(tiny), conditions(tiny)[0], samples(tiny)
    time, keys = torch.tensor([100.0, 600.0]), set(network.model.state_dict())
    with torch.no_grad():
        plain = network(x, time, cond)
    network.add_scalar_input("level")
    with pytest.raises(ValueError, match=r"cond\['level'\] is missing"):
        network(x, time, cond)
    low, high = ({**cond, "level": torch.tensor([0.25, value])} for value in (0.5, 0.75))
    output = network(x, time, low)
    assert torch.equal(output, plain) and set(network.model.state_dict()) == keys
    output.square().sum().backward()
    weight = network.scalars["level"].projection.weight
    assert float(weight.grad.abs().sum()) > 0
    torch.nn.init.normal_(weight)
    with torch.no_grad():
        first, second = network(x, time, low), network(x, time, high)
        assert not torch.isclose(first, plain).all()
        assert torch.equal(first[0], second[0]) and not torch.isclose(first[1], second[1]).all()
        assert torch.equal(copy.deepcopy(network)(x, time, high), second)


@torch.no_grad()
def test_a_scalar_input_reaches_every_block_of_dit():
    """Each has an embedding of its own."""
    network, cond, seen = wrap(FAMILIES["dit"]), conditions(FAMILIES["dit"])[0], []
    network.add_scalar_input("level")
    torch.nn.init.normal_(network.scalars["level"].projection.weight)
    for block in network.model.transformer_blocks:
        block.norm1.emb.register_forward_hook(lambda module, inputs, output: seen[-1].append(output))
    for value in (0.0, 1.0):
        seen.append([])
        network(samples(FAMILIES["dit"]), torch.tensor([100.0, 600.0]), {**cond, "level": torch.full((2,), value)})
    assert len(seen[0]) == 3  # two blocks, and the first one's again for the output layer
    assert all(not torch.isclose(low, high).all() for low, high in zip(*seen, strict=True))


@torch.no_grad()
def test_a_scalar_input_in_a_bf16_model():
    tiny = FAMILIES["sd15"]
    network, cond = WRAPPERS[tiny.model_class].of(tiny.model().to(torch.bfloat16)), conditions(tiny)[0]
    network.add_scalar_input("guidance")
    torch.nn.init.normal_(network.scalars["guidance"].projection.weight)
    x, time = samples(tiny), torch.tensor([100.0, 600.0])
    first, second = (network(x, time, {**cond, "guidance": torch.full((2,), value)}) for value in (1.0, 4.0))
    assert first.dtype == torch.bfloat16 and not torch.equal(first, second)


@pytest.mark.parametrize("name", GUIDED)
@torch.no_grad()
def test_guidance_that_the_model_embeds_itself_needs_no_new_input(name):
    network, (cond, _), x = wrap(GUIDED[name]), conditions(GUIDED[name]), samples(GUIDED[name])
    time = torch.tensor([100.0, 600.0])
    before = network(x, time, cond)
    network.add_scalar_input("guidance")
    assert not network.scalars and torch.equal(network(x, time, cond), before)
    other = network(x, time, {**cond, "guidance": cond["guidance"] + torch.tensor([0.0, 1.0])})
    assert torch.equal(other[0], before[0]) and not torch.isclose(other[1], before[1]).all()


@torch.no_grad()
def test_guidance_that_is_not_named():
    """Flux and Sana-Sprint have the default of their pipelines; a latent consistency model cannot do without."""
    import diffusers

    time = torch.tensor([100.0, 600.0])
    for tiny in (FAMILIES["flux"], SPRINT):
        pipeline_class = getattr(diffusers, tiny.pipeline_class)
        default = inspect.signature(pipeline_class.__call__).parameters["guidance_scale"].default
        network, x, cond = wrap(tiny), samples(tiny), tiny.cond(BATCH)[0]
        assert torch.equal(network(x, time, cond), network(x, time, {**cond, "guidance": torch.full((2,), default)}))
    with pytest.raises(ValueError, match=r"cond\['guidance'\] is missing"):
        wrap(LCM)(samples(LCM), time, LCM.cond(BATCH)[0])


@torch.no_grad()
def test_guidance_of_each_sample_is_embedded_as_by_the_pipeline_of_latent_consistency_models():
    model, cond, x = LCM.model(), conditions(LCM)[0], samples(LCM)
    embedded = LCM.pipeline(model).get_guidance_scale_embedding(cond["guidance"] - 1, embedding_dim=32)
    expected = model(x, 259, cond["prompt_embeds"], timestep_cond=embedded).sample
    network = WRAPPERS[LCM.model_class].of(model)
    torch.testing.assert_close(network(x, torch.full((2,), 259.0), cond), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("model_class", "config", "key"),
    [
        ("UNet2DModel", FAMILIES["ddpm"].config | {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ("UNet2DModel", FAMILIES["ddpm"].config | {"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ("UNet2DModel", FAMILIES["ddpm"].config | {"sample_size": None}, "sample_size=None"),
        ("UNet2DModel", FAMILIES["ddpm"].config | {"out_channels": 4}, "in_channels=3 and out_channels=4"),
        ("UNet2DConditionModel", UNET | {"in_channels": 9}, "in_channels=9 and out_channels=4"),
        ("UNet2DConditionModel", UNET | {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ("UNet2DConditionModel", UNET | {"num_class_embeds": 3}, "num_class_embeds=3"),
        ("UNet2DConditionModel", UNET | {"encoder_hid_dim": 7}, "encoder_hid_dim_type='text_proj'"),
        ("UNet2DConditionModel", UNET | {"cross_attention_dim": (12, 12)}, r"cross_attention_dim=\(12, 12\)"),
        ("UNet2DConditionModel", UNET | {"addition_embed_type": "text"}, "addition_embed_type='text'"),
        ("UNet2DConditionModel", UNET | {"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ("UNet2DConditionModel", UNET | {"attention_type": "gated"}, "attention_type='gated'"),
        ("UNet2DConditionModel", UNET | {"sample_size": None}, "sample_size=None"),
        ("PixArtTransformer2DModel", PIXART | {"out_channels": 12}, "in_channels=4 and out_channels=12"),
        ("FluxTransformer2DModel", FLUX | {"in_channels": 96, "out_channels": 16}, "in_channels=96 and out_channels=16"),
        ("FluxTransformer2DModel", FLUX | {"patch_size": 2}, "patch_size=2"),
    ],
)
def test_unknown_variants_are_named(model_class, config, key):
    with pytest.raises(ValueError, match=f"{model_class}.*{key}"):
        WRAPPERS[model_class].of(Tiny(model_class, config, "", {}, "", no_conditions).model())


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("flux", (8, 7), "8x7.*multiples of 2"),
        ("sd3", (7, 8), "7x8.*multiples of 2"),
        ("sd3", (8, 14), "pos_embed_max_size"),
        ("pixart-sigma", (9, 8), "9x8.*multiples of 2"),
        ("dit", (4, 16), r"\(4, 4, 16\).*\(4, 8, 8\)"),
    ],
)
def test_sizes_that_a_network_cannot_take_are_named(name, size, message):
    cond, _ = conditions(FAMILIES[name])
    with pytest.raises(ValueError, match=message):
        wrap(FAMILIES[name])(torch.randn(2, 4, *size), torch.tensor([100.0, 600.0]), cond)


def test_a_second_time_is_refused():
    network, (cond, _), time = wrap(FAMILIES["sd3"]), conditions(FAMILIES["sd3"]), torch.tensor([100.0, 600.0])
    with pytest.raises(ValueError, match="SD3Transformer2DModel has no second time"):
        network(samples(FAMILIES["sd3"]), time, cond, time)


def test_a_new_model_of_keywords_that_its_class_does_not_know_is_refused():
    with pytest.raises(ValueError, match="SD3Transformer2DModel does not take it.*head_size"):
        WRAPPERS["SD3Transformer2DModel"]({"head_size": 3})


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_folders_are_those_of_diffusers(name, tmp_path):
    """The tiny family that other tests load: the pipeline's class, its network with the same weights, its scheduler."""
    import diffusers

    tiny = FAMILIES[name]
    tiny.save(tmp_path)
    model = getattr(diffusers, tiny.model_class).from_pretrained(tmp_path / tiny.component)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in tiny.model().state_dict().items())
    assert diffusers.DiffusionPipeline.load_config(tmp_path)["_class_name"] == tiny.pipeline_class
    config = getattr(diffusers, tiny.scheduler_class).load_config(tmp_path / "scheduler")
    assert {key: config[key] for key in tiny.scheduler_config} == tiny.scheduler_config
