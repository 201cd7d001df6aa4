"""Scheduler configs are read as the schedulers of diffusers themselves behave: noise levels, network times, x0, shifts."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from oracle import MLP

from distill.denoiser import NetworkDenoiser, coefficients
from distill.schedulers import check_pair, make_scheduler, read_scheduler
from distill.schedules import RectifiedFlow, TrigFlow, VarianceExploding, VariancePreserving

SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100}
WITH_BETAS = [
    ("DDPMScheduler", {}),
    ("DDPMScheduler", COSINE),
    ("DDIMScheduler", SD_BETAS | {"prediction_type": "v_prediction", "steps_offset": 1}),
    ("PNDMScheduler", SD_BETAS | {"skip_prk_steps": True}),
    ("EulerDiscreteScheduler", SD_BETAS | {"timestep_spacing": "leading"}),
    ("EulerAncestralDiscreteScheduler", SD_BETAS),
    ("HeunDiscreteScheduler", SD_BETAS),
    ("DPMSolverMultistepScheduler", SD_BETAS | {"use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", SD_BETAS | {"prediction_type": "sample"}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
]


def config_of(name: str, settings: dict) -> dict:
    """What diffusers saves of a scheduler."""
    return dict(getattr(diffusers, name)(**settings).config) | {"_class_name": name}


def ids(value: object) -> str | None:
    return value if isinstance(value, str) else None


# ------------------------------------------------------------------------------------------------------- DDPM's kind


@pytest.mark.parametrize(("name", "settings"), WITH_BETAS, ids=ids)
def test_noise_levels_are_the_schedulers_own(name, settings):
    scheduler = getattr(diffusers, name)(**settings)
    schedule, prediction, _ = read_scheduler(config_of(name, settings))
    steps = scheduler.config.num_train_timesteps
    index = torch.arange(steps, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - scheduler.betas.double(), 0)
    # The scheduler's betas are float32: their rounding is all that differs.
    torch.testing.assert_close(schedule.alpha(index) ** 2, alpha_bar, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(schedule.sigma(index) ** 2, 1 - alpha_bar, rtol=1e-5, atol=1e-7)
    assert torch.equal(schedule.network_time(index), index) and schedule.t_max == steps - 1
    expected = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[scheduler.config.get("prediction_type", "epsilon")]
    assert prediction == expected


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_x0_is_the_schedulers_own(prediction_type):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type=prediction_type, **SD_BETAS)
    scheduler.set_timesteps(10)
    schedule, prediction, sigma_data = read_scheduler(config_of("DDIMScheduler", dict(scheduler.config)))
    x, raw = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for time in scheduler.timesteps[::2]:
        wide = time.double()
        _, skip, out = coefficients(prediction, schedule.alpha(wide), schedule.sigma(wide), sigma_data)
        expected = scheduler.step(raw, time, x).pred_original_sample
        torch.testing.assert_close(skip * x + out * raw, expected, rtol=1e-4, atol=1e-5)


def test_a_key_that_a_config_lacks_has_its_class_default():
    """The schedulers of SD 1.x were saved before prediction_type was there; LCM's own betas are not DDPM's."""
    schedule, prediction, _ = read_scheduler({"_class_name": "PNDMScheduler", **SD_BETAS})
    assert schedule.same_as(VariancePreserving("scaled_linear", 0.00085, 0.012)) and prediction == "eps"
    assert read_scheduler({"_class_name": "LCMScheduler"})[0].same_as(schedule)
    assert read_scheduler({"_class_name": "DDIMScheduler"})[0].same_as(VariancePreserving())


# --------------------------------------------------------------------------------------------------------------- flows


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_flow_sigmas_are_the_schedulers_own(name, shift):
    scheduler = getattr(diffusers, name)(shift=shift)
    schedule, prediction, _ = read_scheduler(config_of(name, {"shift": shift}))
    t = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(schedule.sigma(t).float(), scheduler.sigmas.reshape(-1)[:1000], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(schedule.network_time(t).float(), scheduler.timesteps[:1000], rtol=1e-6, atol=1e-4)
    assert prediction == "flow"


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"])
def test_flow_sigmas_of_a_solver_for_diffusions(name):
    """Sana's: ``prediction_type: flow_prediction, use_flow_sigmas: true, flow_shift: 3``."""
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(20)
    schedule, prediction, _ = read_scheduler(config_of(name, settings))
    assert schedule.same_as(RectifiedFlow(3.0)) and prediction == "flow"
    sigma = scheduler.sigmas[:20].double()
    t = schedule.time_of_angle(torch.atan2(sigma, 1 - sigma))
    torch.testing.assert_close(schedule.sigma(t), sigma, rtol=1e-6, atol=1e-7)
    # Its own times are whole numbers: 1000 sigma, cut.
    assert (schedule.network_time(t) - scheduler.timesteps[:20]).abs().max() <= 1


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_a_shift_by_image_size_is_flux_pipelines(tokens):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    settings = {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.3}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    sigmas = torch.linspace(1, 0.05, 20, dtype=torch.float64)
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=calculate_shift(tokens, base_shift=0.4, max_shift=1.3))
    schedule, _, _ = read_scheduler(config_of("FlowMatchEulerDiscreteScheduler", settings), tokens)
    torch.testing.assert_close(schedule.sigma(sigmas).float(), scheduler.sigmas[:20], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(schedule.network_time(sigmas).float(), scheduler.timesteps, rtol=1e-5, atol=1e-3)


def test_a_shift_by_image_size_of_a_scheduler_without_the_bounds():
    """DPM-Solver has no keys for them; pipelines then take FLUX.1's, 0.5 at 256 tokens and 1.15 at 4096."""
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": True}
    config = config_of("DPMSolverMultistepScheduler", settings)
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        assert math.isclose(read_scheduler(config, tokens)[0].shift, math.exp(mu), rel_tol=1e-12)


def test_sana_sprints_network_is_a_flows():
    """Its pipeline's change between TrigFlow and the flow (Chen et al. 2503.09641), around its scheduler's step."""
    scheduler = diffusers.SCMScheduler()
    scheduler.set_timesteps(2, max_timesteps=1.5, intermediate_timesteps=0.7)
    schedule, prediction, sigma_data = read_scheduler(config_of("SCMScheduler", {}))
    x, raw = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for time in scheduler.timesteps[:2].double():
        s = time.sin() / (time.cos() + time.sin())
        length = (s**2 + (1 - s) ** 2).sqrt()
        trig = ((1 - 2 * s) * x + (1 - 2 * s + 2 * s**2) * raw) / length
        denoised = scheduler.step(0.5 * trig, time, 0.5 * x / length).pred_original_sample / 0.5
        _, skip, out = coefficients(prediction, schedule.alpha(s), schedule.sigma(s), sigma_data)
        torch.testing.assert_close(skip * x + out * raw, denoised, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- EDM


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_is_preconditioned_as_its_scheduler_does(name):
    scheduler = getattr(diffusers, name)(sigma_min=0.01, sigma_max=50.0, sigma_data=0.7)
    schedule, prediction, sigma_data = read_scheduler(config_of(name, dict(scheduler.config)))
    assert (schedule.t_min, schedule.t_max, prediction, sigma_data) == (0.01, 50.0, "edm", 0.7)
    x, raw = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for sigma in torch.tensor([0.01, 0.3, 2.0, 50.0], dtype=torch.float64):
        scale, skip, out = coefficients(prediction, torch.ones_like(sigma), sigma, sigma_data)
        torch.testing.assert_close(scale * x, scheduler.precondition_inputs(x, sigma))
        torch.testing.assert_close(skip * x + out * raw, scheduler.precondition_outputs(x, raw, sigma))
        torch.testing.assert_close(schedule.network_time(sigma), scheduler.precondition_noise(sigma))


# ------------------------------------------------------------------------------------------------------------- inverse


@pytest.mark.parametrize(
    ("schedule", "prediction", "sigma_data"),
    [
        (RectifiedFlow(2.5), "flow", 0.5),
        (VarianceExploding(0.01, 50.0), "edm", 0.7),
        (VariancePreserving("scaled_linear", 0.00085, 0.012), "v", 0.5),
        (VariancePreserving("cosine", num_steps=50), "x0", 0.5),
        (VariancePreserving(), "eps", 0.5),
    ],
    ids=str,
)
def test_what_is_written_is_read(schedule, prediction, sigma_data):
    scheduler = make_scheduler(NetworkDenoiser(MLP((1, 4, 4)), schedule, prediction, sigma_data))
    again = read_scheduler(dict(scheduler.config) | {"_class_name": type(scheduler).__name__})
    assert again[0].same_as(schedule) and again[1:] == (prediction, sigma_data)


def test_what_diffusers_cannot_say_is_refused():
    with pytest.raises(ValueError, match="prediction='flow' under TrigFlow has no diffusers scheduler"):
        make_scheduler(NetworkDenoiser(MLP((1, 4, 4)), TrigFlow(), "flow"))


# ------------------------------------------------------------------------------------------------------ what is refused

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
DDIM = {"_class_name": "DDIMScheduler"}
DPM = {"_class_name": "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "_class_name=None"),
        ({"_class_name": "SomeScheduler"}, "SomeScheduler"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "CMStochasticIterativeScheduler"),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "CogVideoXDDIMScheduler"),
        ({"_class_name": "SCMScheduler", "prediction_type": "epsilon"}, "SCMScheduler.*epsilon"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "DDPMScheduler.*sigmoid"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "EDMEulerScheduler.*v_prediction"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "EulerDiscrete.*timestep_type='cont"),
        ({**DDIM, "prediction_type": "flow"}, "DDIMScheduler.*'flow'"),
        ({**DDIM, "rescale_betas_zero_snr": True}, "DDIMScheduler.*rescale_betas_zero_snr=True"),
        ({**DDIM, "trained_betas": [0.1, 0.2, 0.3]}, "DDIMScheduler.*trained_betas"),
        ({**DPM, "prediction_type": "flow_prediction"}, "DPMSolver.*flow_prediction.*contradicts its use_flow_sigmas=False"),
        ({**DPM, "use_flow_sigmas": True}, "DPMSolver.*prediction_type='epsilon' contradicts its use_flow_sigmas=True"),
        ({**FLOW, "num_train_timesteps": 500}, "FlowMatch.*num_train_timesteps=500"),
        ({**FLOW, "invert_sigmas": True}, "FlowMatch.*invert_sigmas"),
        ({**FLOW, "use_dynamic_shifting": True}, "FlowMatch.*use_dynamic_shifting.*tokens must be given"),
        ({**FLOW, "use_dynamic_shifting": True, "time_shift_type": "linear"}, "FlowMatch.*time_shift_type='linear'"),
    ],
    ids=str,
)
def test_what_would_be_misread_is_refused_by_name(config, words):
    with pytest.raises(ValueError, match=words):
        read_scheduler(config)


def test_settings_that_say_nothing_are_not_refused():
    quiet = {"trained_betas": None, "rescale_betas_zero_snr": False, "thresholding": True, "clip_sample": True}
    assert read_scheduler({**DDIM, **quiet})[0].same_as(VariancePreserving())


FLOW_MODELS = ["SD3Transformer2DModel", "FluxTransformer2DModel", "SanaTransformer2DModel"]
DIFFUSION_MODELS = ["DiTTransformer2DModel", "PixArtTransformer2DModel"]


@pytest.mark.parametrize("model", FLOW_MODELS + DIFFUSION_MODELS)
def test_a_scheduler_that_contradicts_the_model_is_refused_with_both_names(model):
    flow, diffusion = (RectifiedFlow(3.0), "flow"), (VariancePreserving(), "eps")
    good, bad = (flow, diffusion) if model in FLOW_MODELS else (diffusion, flow)
    check_pair(model, {}, *good)
    with pytest.raises(ValueError, match=f"{type(bad[0]).__name__}.*contradicts the model: {model}"):
        check_pair(model, {}, *bad)
    with pytest.raises(ValueError, match=f"VarianceExploding.*{model}"):
        check_pair(model, {}, VarianceExploding(), "edm")


@pytest.mark.parametrize("model", ["UNet2DModel", "UNet2DConditionModel"])
def test_u_nets_are_of_any_kind(model):
    for schedule, prediction in ((RectifiedFlow(), "flow"), (VariancePreserving(), "v"), (VarianceExploding(), "edm")):
        check_pair(model, {"num_train_timesteps": None}, schedule, prediction)


def test_a_model_with_embedded_times_has_as_many_as_its_scheduler():
    config = {"num_train_timesteps": 1000}
    check_pair("UNet2DModel", config, VariancePreserving(), "eps")
    with pytest.raises(ValueError, match="num_train_timesteps=500 contradicts the model: UNet2DModel.*=1000"):
        check_pair("UNet2DModel", config, VariancePreserving(num_steps=500), "eps")
