"""Reading a teacher: a diffusers folder (a network, its scheduler's config) becomes a `Denoiser`; writing one the same way.

The schedule and the prediction type come from the scheduler's config. A user who states them too is checked, not obeyed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from distill.denoiser import Denoiser, NetworkDenoiser, Prediction
from distill.networks.unet2d import UNet2D
from distill.schedules import NoiseSchedule, RectifiedFlow, VarianceExploding, VariancePreserving

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS: dict[str, Any] = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
SCALARS_FILE = "scalar_inputs.safetensors"


def read_scheduler(config: dict[str, Any]) -> tuple[NoiseSchedule, Prediction, float]:
    """Schedule, prediction type and sigma_data that a diffusers ``scheduler_config.json`` describes.

    Raises:
        ValueError: for a scheduler that this package does not know, naming it.
    """
    name = config.get("_class_name", "")
    if config.get("use_dynamic_shifting"):
        raise ValueError(f"{name} with use_dynamic_shifting: a shift that depends on the image's size is not known here.")
    if name.startswith("FlowMatch"):
        return RectifiedFlow(config.get("shift", 1.0)), "flow", 0.5
    if name.startswith("EDM"):
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise ValueError(f"{name} with prediction_type={config['prediction_type']!r}: only 'epsilon' (EDM's F) is known.")
        return VarianceExploding(config["sigma_min"], config["sigma_max"]), "edm", config.get("sigma_data", 0.5)
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(key):
            raise ValueError(f"scheduler {name!r} with {key}={config[key]!r}: such betas are not known.")
    if config.get("beta_schedule") in BETAS and config.get("prediction_type", "epsilon") in PREDICTIONS:
        schedule = VariancePreserving(
            BETAS[config["beta_schedule"]], config["beta_start"], config["beta_end"], config["num_train_timesteps"]
        )
        return schedule, PREDICTIONS[config.get("prediction_type", "epsilon")], 0.5
    raise ValueError(
        f"scheduler {name!r} with beta_schedule={config.get('beta_schedule')!r} and "
        f"prediction_type={config.get('prediction_type')!r} is not known; known are DDPM-like schedulers with beta_schedule in "
        f"{sorted(BETAS)} and prediction_type in {sorted(PREDICTIONS)}, FlowMatch* and EDM*."
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


def check_exportable(denoiser: Denoiser) -> None:
    """Raises ValueError if `save_denoiser` could not write ``denoiser``."""
    if not isinstance(denoiser, NetworkDenoiser) or not isinstance(denoiser.network, UNet2D):
        raise ValueError("Only a NetworkDenoiser of a UNet2D can be written as a diffusers folder.")
    make_scheduler(denoiser)


def save_denoiser(denoiser: NetworkDenoiser, folder: str | Path) -> None:
    """Writes a diffusers pipeline folder (``unet/``, ``scheduler/``, safetensors) that diffusers alone can load.

    Extra scalar inputs, which diffusers does not know, are kept beside it in ``scalar_inputs.safetensors``.
    """
    from diffusers import DDPMPipeline
    from safetensors.torch import save_file

    check_exportable(denoiser)
    network = denoiser.network
    assert isinstance(network, UNet2D)
    DDPMPipeline(network.unet, make_scheduler(denoiser)).save_pretrained(folder, safe_serialization=True)
    if network.scalars:
        state = {key: value.contiguous() for key, value in network.scalars.state_dict().items()}
        save_file(state, Path(folder) / SCALARS_FILE)


class PretrainedDenoiser(NetworkDenoiser):
    """A denoiser read from a diffusers folder.

    Args:
        path: the folder: ``unet/`` and ``scheduler/`` in it.
        schedule, prediction: what the user believes; must agree with the scheduler's config.

    Attributes:
        identity: ``path`` and ``sha256`` of the weights and configs, what a checkpoint keeps of a teacher.

    Raises:
        FileNotFoundError: if the folder or a part of it is missing.
        ValueError: if the scheduler's config is not understood or contradicts ``schedule`` or ``prediction``.
    """

    def __init__(self, path: str, schedule: NoiseSchedule | None = None, prediction: Prediction | None = None):
        folder = Path(path)
        for part in ("scheduler/scheduler_config.json", "unet/config.json"):
            if not (folder / part).is_file():
                raise FileNotFoundError(
                    f"path={path!r}: {part} is missing there; give a diffusers folder, for example one that "
                    "'python -m distill fit --config configs/digits/teacher.yaml' leaves in runs/digits/teacher/export."
                )
        if not list((folder / "unet").glob("*.safetensors")):
            raise FileNotFoundError(f"path={path!r}: unet/ has no weights there (*.safetensors).")
        own = read_scheduler(json.loads((folder / "scheduler/scheduler_config.json").read_text()))
        self._refuse_contradiction(path, own, schedule, prediction)
        from diffusers import UNet2DModel

        unet = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True, low_cpu_mem_usage=False)
        network = UNet2D.of(unet)
        super().__init__(network, *own)
        self._read_scalars(network, folder / SCALARS_FILE)
        self.identity = {"path": str(path), "sha256": _hash(folder)}

    @staticmethod
    def _refuse_contradiction(
        path: str, own: tuple[NoiseSchedule, Prediction, float], schedule: NoiseSchedule | None, prediction: Prediction | None
    ) -> None:
        if schedule is not None and not schedule.same_as(own[0]):
            raise ValueError(
                f"schedule={schedule!r} contradicts {path}/scheduler/scheduler_config.json, which says {own[0]!r}: "
                "leave schedule out."
            )
        if prediction is not None and prediction != own[1]:
            raise ValueError(
                f"prediction={prediction!r} contradicts {path}/scheduler/scheduler_config.json, which says {own[1]!r}: "
                "leave prediction out."
            )

    @staticmethod
    def _read_scalars(network: UNet2D, file: Path) -> None:
        if not file.is_file():
            return
        from safetensors.torch import load_file

        state = load_file(file)
        for key in state:
            network.add_scalar_input(key.split(".")[0])
        network.scalars.load_state_dict(state)


def _hash(folder: Path) -> str:
    """sha256 over the configs and weights of the network and its scheduler, in the order of their names."""
    digest = hashlib.sha256()
    parts = [folder / SCALARS_FILE, *sorted((folder / "scheduler").iterdir()), *sorted((folder / "unet").iterdir())]
    for file in parts:
        if file.is_file() and file.suffix in (".json", ".safetensors"):
            digest.update(file.relative_to(folder).as_posix().encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def identity_of(module: torch.nn.Module | None) -> dict[str, str] | None:
    """Path and hash of a pretrained module, or None for one that was not read from a folder."""
    return getattr(module, "identity", None)
