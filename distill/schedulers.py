"""Between diffusers' scheduler configs and schedules: what a ``scheduler_config.json`` says, and the scheduler of a denoiser.

A scheduler is a solver and a description of what the network was trained on. Only the second is read here: noise levels and
prediction type. How times are spaced, thresholds, clipping and the solver's order are the sampler's business.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

from distill.denoiser import NetworkDenoiser, Prediction
from distill.schedules import NoiseSchedule, RectifiedFlow, VarianceExploding, VariancePreserving

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS: dict[str, Any] = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
WITH_BETAS = tuple("DDPM DDIM PNDM Euler Heun LMS KDPM2 DPMSolver DEIS UniPC SASolver LCM TCD".split())
"""First words of the schedulers of DDPM's kind; most of them know flow sigmas as well."""
REFUSED: dict[str, Any] = {"trained_betas": None, "rescale_betas_zero_snr": False, "timestep_type": "discrete"}
"""Settings that change what noise level a time means, and the value at which they do not."""
FLOWS = ("SD3Transformer2DModel", "FluxTransformer2DModel", "SanaTransformer2DModel")
"""Families that were only ever trained as flows."""
DIFFUSIONS = ("DiTTransformer2DModel", "PixArtTransformer2DModel")
"""Families that never were: they read DDPM's times, and many have a learned variance."""


def read_scheduler(config: dict[str, Any], tokens: int | None = None) -> tuple[NoiseSchedule, Prediction, float]:
    """Schedule, prediction type and sigma_data that a diffusers ``scheduler_config.json`` describes.

    Args:
        config: its content; a key that it lacks has the default of its scheduler's class.
        tokens: number of image tokens, for a shift that depends on it (``use_dynamic_shifting``).

    Raises:
        ValueError: for a scheduler that this package does not know, or that contradicts itself, naming it and the key.
    """
    config = _with_defaults(config)
    name, prediction = config["_class_name"], config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch"):
        return RectifiedFlow(_shift(config, config["shift"], tokens)), "flow", 0.5
    if name.startswith("EDM"):
        if prediction != "epsilon":
            raise ValueError(f"{name} with prediction_type={prediction!r}: only 'epsilon' (EDM's F) is known.")
        return VarianceExploding(config["sigma_min"], config["sigma_max"]), "edm", config["sigma_data"]
    if name == "SCMScheduler" and prediction == "trigflow":
        return RectifiedFlow(), "flow", 0.5  # Sana-Sprint: not its network but its pipeline knows TrigFlow
    if name.startswith(WITH_BETAS):
        flow = bool(config.get("use_flow_sigmas"))
        if flow != (prediction == "flow_prediction"):
            raise ValueError(f"{name} with prediction_type={prediction!r} contradicts its use_flow_sigmas={flow}.")
        if flow:
            return RectifiedFlow(_shift(config, config["flow_shift"], tokens)), "flow", 0.5
        if config.get("beta_schedule") in BETAS and prediction in PREDICTIONS:
            return _variance_preserving(config), PREDICTIONS[prediction], 0.5
    ddpm_like = ", ".join(f"{word}*" for word in WITH_BETAS)
    raise ValueError(
        f"scheduler {name!r} with beta_schedule={config.get('beta_schedule')!r} and prediction_type={prediction!r} is not "
        f"known; known are FlowMatch*, EDM*, SCMScheduler, and {ddpm_like} with flow sigmas, or with beta_schedule in "
        f"{sorted(BETAS)} and prediction_type in {sorted(PREDICTIONS)}."
    )


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with what it leaves to the defaults of its scheduler's class; saved by an older version, it lacks keys."""
    import diffusers

    name = config.get("_class_name")
    scheduler = getattr(diffusers, str(name), None)
    if scheduler is None:
        raise ValueError(f"scheduler _class_name={name!r} is none of diffusers {diffusers.__version__}.")
    parameters = inspect.signature(scheduler.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty} | config


def _variance_preserving(config: dict[str, Any]) -> VariancePreserving:
    for key, harmless in REFUSED.items():
        if (value := config.get(key)) not in (harmless, None):
            raise ValueError(f"scheduler {config['_class_name']!r} with {key}={value!r}: such noise levels are not known.")
    betas = BETAS[config["beta_schedule"]]
    return VariancePreserving(betas, config["beta_start"], config["beta_end"], config["num_train_timesteps"])


def _shift(config: dict[str, Any], static: float, tokens: int | None) -> float:
    """The shift of a flow scheduler, static or by image size.

    By size it is ``exp(mu)``, ``mu`` linear in the number of tokens (FLUX.1's reference sampling; the shift is Esser et al.
    2403.03206, eq. 23): diffusers' ``exp(mu) / (exp(mu) + 1/sigma - 1)`` is ``RectifiedFlow``'s with ``shift = exp(mu)``.
    """
    name = config["_class_name"]
    if (steps := config["num_train_timesteps"]) != 1000:
        raise ValueError(f"{name} with num_train_timesteps={steps}: flow networks here read 1000 sigma.")
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} with invert_sigmas=True: a flow from noise at 0 to data at 1 is not known.")
    if not config.get("use_dynamic_shifting"):
        return static
    if (kind := config.get("time_shift_type", "exponential")) != "exponential":
        raise ValueError(f"{name} with time_shift_type={kind!r}: only 'exponential' is known.")
    if tokens is None:
        raise ValueError(f"{name} with use_dynamic_shifting: its shift depends on the image's size; tokens must be given.")
    # These are the pipelines' own defaults, for schedulers whose config has no such keys.
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return math.exp(first + (last - first) * (tokens - low) / (high - low))


def check_pair(model_class: str, config: Any, schedule: NoiseSchedule, prediction: Prediction) -> None:
    """Raises ValueError, naming both, if a model of this class and config cannot have been trained on this schedule."""
    said = f"{schedule!r} with prediction {prediction!r}"
    if model_class in FLOWS and not (isinstance(schedule, RectifiedFlow) and prediction == "flow"):
        raise ValueError(f"a scheduler of {said} contradicts the model: {model_class} is a flow's; give a FlowMatch* one.")
    if model_class in DIFFUSIONS and prediction in ("flow", "edm"):
        raise ValueError(f"a scheduler of {said} contradicts the model: {model_class} reads DDPM's times; give one with betas.")
    steps = config.get("num_train_timesteps")
    if steps is not None and isinstance(schedule, VariancePreserving) and steps != schedule.num_steps:
        raise ValueError(
            f"a scheduler with num_train_timesteps={schedule.num_steps} contradicts the model: {model_class} with "
            f"num_train_timesteps={steps}; give that model's own scheduler."
        )


def make_scheduler(denoiser: NetworkDenoiser) -> Any:
    """The diffusers scheduler that describes a denoiser's schedule and prediction type; inverse of `read_scheduler`.

    Raises:
        ValueError: if diffusers has none.
    """
    import diffusers

    schedule, prediction = denoiser.schedule, denoiser.prediction
    if isinstance(schedule, RectifiedFlow) and prediction == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=schedule.shift)
    if isinstance(schedule, VarianceExploding) and prediction == "edm":
        return diffusers.EDMEulerScheduler(schedule.t_min, schedule.t_max, denoiser.sigma_data)
    types = {own: name for name, own in PREDICTIONS.items()}
    if isinstance(schedule, VariancePreserving) and prediction in types:
        return diffusers.DDPMScheduler(
            num_train_timesteps=schedule.num_steps,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            beta_schedule={own: name for name, own in BETAS.items()}[schedule.betas],
            prediction_type=types[prediction],
            clip_sample=False,
        )
    raise ValueError(
        f"prediction={prediction!r} under {type(schedule).__name__} has no diffusers scheduler; use flow under RectifiedFlow, "
        "edm under VarianceExploding, or eps, v or x0 under VariancePreserving."
    )
