"""Reading a teacher: a diffusers folder (a network, its scheduler's config) becomes a `Denoiser`; writing one the same way.

The schedule and the prediction type come from the scheduler's config. A user who states them too is checked, not obeyed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from distill import hub
from distill.adapters import refuse_adapters
from distill.denoiser import Denoiser, NetworkDenoiser, Prediction
from distill.networks.base import DiffusersNetwork
from distill.networks.families import FAMILIES
from distill.networks.unet2d import UNet2D
from distill.schedulers import check_pair, make_scheduler, read_scheduler
from distill.schedules import NoiseSchedule, RectifiedFlow

SCALARS_FILE = "scalar_inputs.safetensors"
SCHEDULER_FILE = "scheduler_config.json"
COMPONENTS = ("unet", "transformer")


def check_exportable(denoiser: Denoiser) -> None:
    """Raises ValueError if `save_denoiser` could not write ``denoiser``."""
    network = denoiser.network if isinstance(denoiser, NetworkDenoiser) else None
    if not isinstance(denoiser, NetworkDenoiser) or not isinstance(network, DiffusersNetwork):
        what, known = type(network or denoiser).__name__, ", ".join(sorted(FAMILIES))
        raise ValueError(f"Only a NetworkDenoiser of a diffusers network ({known}) can be written as a folder, not {what}.")
    if getattr(network.model, "peft_config", None):
        raise ValueError("A network with LoRA layers is not written as a folder: export its LoRA file by tools/export.py.")
    refuse_adapters(network)
    make_scheduler(denoiser)
    check_pair(network.model_class, network.model.config, denoiser.schedule, denoiser.prediction)


def save_denoiser(denoiser: NetworkDenoiser, folder: str | Path) -> None:
    """Writes a folder (``unet/`` or ``transformer/``, ``scheduler/``, safetensors) for diffusers and `PretrainedDenoiser`.

    A ``UNet2DModel`` is the whole of a pipeline, and written as one. Extra scalar inputs, which diffusers does not know, are
    kept beside it in ``scalar_inputs.safetensors``.

    Raises:
        ValueError: see `check_exportable`.
    """
    from diffusers import DDPMPipeline

    check_exportable(denoiser)
    network, scheduler, folder = denoiser.network, make_scheduler(denoiser), Path(folder)
    assert isinstance(network, DiffusersNetwork)
    if network.model_class == "UNet2DModel":
        DDPMPipeline(network.model, scheduler).save_pretrained(folder, safe_serialization=True)
    else:
        network.model.save_pretrained(folder / network.component, safe_serialization=True)
        scheduler.save_pretrained(folder / "scheduler")
    save_scalars(network, folder)


def save_scalars(network: DiffusersNetwork, folder: Path) -> None:
    """Writes the extra scalar inputs, which diffusers does not know, beside a model's folder, if there are any."""
    from safetensors.torch import save_file

    if network.scalars:
        state = {key: value.contiguous() for key, value in network.scalars.state_dict().items()}
        save_file(state, folder / SCALARS_FILE)


class PretrainedDenoiser(NetworkDenoiser):
    """A denoiser read from a diffusers folder or hub repository, in float32 and evaluation mode.

    Args:
        path: the folder, or ``owner/name``; in it the network's folder and ``scheduler/`` (or both files at its root, as in
            the first DDPM repositories).
        revision: branch, tag or commit of a hub repository.
        subfolder: the network's folder, "" for the root; None finds ``unet`` or ``transformer``.
        variant: of the weight files, ``fp16`` for ``diffusion_pytorch_model.fp16.safetensors``.
        dtype: precision of the network while it is a frozen teacher; students that start from it are float32.
        allow_pickle: whether ``.bin`` weights are read where there are no safetensors (``torch.load`` with ``weights_only``).
        schedule, prediction: what the user believes; must agree with the scheduler's config. Both may stand for one that is
            missing, and a `RectifiedFlow` for the shift of one whose shift depends on the image's size.
        network: name of the model's class that the recipe expects, ``UNet2DConditionModel``; must agree with its config.
        null_class: whether the last class embedding of a ``UNet2DModel`` is the null class; false for models that were trained
            without one (those of consistency models), which cannot be guided.

    Attributes:
        identity: ``path``, ``sha256`` of the weights and configs, and of a hub repository ``revision``, its commit: what a
            checkpoint keeps of a teacher.
        frozen_dtype: ``dtype`` as torch has it, or None: read by `distill.frozen.Frozen`.

    Raises:
        FileNotFoundError: if the folder or a part of it is missing, or a hub repository cannot be had (offline, for example).
        ValueError: weights that are only there as a pickle, or do not fit their config; a model of an unknown or unexpected
            class; a scheduler's config that is not understood, or contradicts the model, ``schedule`` or ``prediction``.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        subfolder: str | None = None,
        variant: str | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] | None = None,
        allow_pickle: bool = False,
        schedule: NoiseSchedule | None = None,
        prediction: Prediction | None = None,
        network: str | None = None,
        null_class: bool = True,
    ):
        root, component = self.locate(path, revision, subfolder, variant, allow_pickle, schedule, prediction)
        within, settings = f"{component}/config.json".lstrip("/"), _scheduler_file(root, component)
        config = hub.read_json(root / within)
        if network is not None and config.get("_class_name") != network:
            found = f"{path}/{within}, which says {config.get('_class_name')!r}"
            raise ValueError(f"network={network!r} contradicts {found}: give a teacher of that family.")
        if not null_class and config.get("_class_name") != "UNet2DModel":
            raise ValueError(f"null_class=false: {config.get('_class_name')!r} has its null class; leave it true.")
        with hub.naming(path):
            family = _family(within, config.get("_class_name"))
            stated = hub.read_json(root / settings) if (root / settings).is_file() else None
            model = _load(family.model_class, root / component, variant)
            wrapped = family.of(model) if null_class else UNet2D.of(model, null_class=False)
            read = None if stated is None else read_scheduler(stated, _tokens(wrapped))
        own = _agreed(f"{path}/{settings}", read, bool((stated or {}).get("use_dynamic_shifting")), schedule, prediction)
        with hub.naming(path):
            check_pair(family.model_class, config, own[0], own[1])
        super().__init__(wrapped, *own)
        _read_scalars(wrapped, root / SCALARS_FILE)
        if not hub.reads_weights() and (named := (root / SCALARS_FILE).with_suffix(".json")).is_file():
            for name in hub.read_json(named)["names"]:
                wrapped.add_scalar_input(name)
        self.frozen_dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        weights = hub.component_files(root, component, variant, allow_pickle)
        self.identity = hub.identity(path, root, [settings, SCALARS_FILE, *weights])

    @staticmethod
    def locate(
        path: str,
        revision: str | None = None,
        subfolder: str | None = None,
        variant: str | None = None,
        allow_pickle: bool = False,
        schedule: Any = None,
        prediction: Any = None,
    ) -> tuple[Path, str]:
        """The root and the network's folder in it, with all files that will be read; see `distill.hub`.

        Of ``schedule`` and ``prediction`` it only matters whether they are given: then no scheduler's config need be there.
        """
        components = (*COMPONENTS, "") if subfolder is None else (subfolder.strip("/"),)
        shared = [SCHEDULER_FILE, f"scheduler/{SCHEDULER_FILE}", SCALARS_FILE]
        root = hub.resolve(path, revision, [*shared, *(p for c in components for p in hub.component_patterns(c, variant))])
        component = _find_component(root, path) if subfolder is None else components[0]
        hub.component_folder(path, component, revision, variant, allow_pickle)
        settings = _scheduler_file(root, component)
        if not (root / settings).is_file() and (schedule is None or prediction is None):
            raise FileNotFoundError(
                f"path={path!r}: {settings} is missing there; {hub.ADVICE}, or state both schedule and prediction."
            )
        return root, component


def _find_component(root: Path, path: str) -> str:
    there = [name for name in COMPONENTS if (root / name).is_dir()]
    if len(there) > 1:
        raise ValueError(f"path={path!r}: there are {there[0]}/ and {there[1]}/ in it; say which by subfolder.")
    if there or (root / "config.json").is_file():
        return there[0] if there else ""
    inside = ", ".join(sorted(child.name for child in root.iterdir() if child.is_dir())) or "none"
    raise FileNotFoundError(
        f"path={path!r}: neither unet/config.json nor transformer/config.json is there (sub-folders: {inside}); {hub.ADVICE}."
    )


def _scheduler_file(root: Path, component: str) -> str:
    """Name of the scheduler's config: in ``scheduler/``, or beside the network where that lies at the root."""
    return SCHEDULER_FILE if not component and (root / SCHEDULER_FILE).is_file() else f"scheduler/{SCHEDULER_FILE}"


def _family(within: str, model_class: str | None) -> type[DiffusersNetwork]:
    if model_class not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{within}: _class_name={model_class!r} is not known here; known are {known}.")
    return FAMILIES[model_class]


def _load(model_class: str, folder: Path, variant: str | None) -> Any:
    """The model in float32, every weight of it read from its file and every weight of the file used."""
    import diffusers

    if not hub.reads_weights():
        with hub.built_on():
            return getattr(diffusers, model_class).from_config(hub.read_json(folder / "config.json")).to("meta").eval()
    safe = bool(hub.weight_files(folder, variant))
    try:
        model, report = getattr(diffusers, model_class).from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=safe, variant=variant, output_loading_info=True
        )
    except Exception as error:  # whatever a wrong config or a broken file makes of it, down in torch or safetensors
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"its weights and its config, a {model_class}'s, do not fit or are broken ({reason}).") from error
    wrong = [f"{kind.split('_')[0]}: {', '.join(map(str, keys[:2]))}" for kind, keys in report.items() if keys]
    if wrong:
        raise ValueError(f"its weights are not those of the {model_class} that its config describes ({'; '.join(wrong)}).")
    return model.eval()


def _agreed(
    file: str,
    read: tuple[NoiseSchedule, Prediction, float] | None,
    sized: bool,
    schedule: NoiseSchedule | None,
    prediction: Prediction | None,
) -> tuple[NoiseSchedule, Prediction, float]:
    """What the scheduler's config says, if there is one and the user does not contradict; ``sized``: its shift is by size."""
    if read is None:
        assert schedule is not None and prediction is not None
        return schedule, prediction, 0.5
    if sized and isinstance(schedule, RectifiedFlow):
        read = (schedule, read[1], read[2])
    if schedule is not None and not schedule.same_as(read[0]):
        raise ValueError(f"schedule={schedule!r} contradicts {file}, which says {read[0]!r}: leave schedule out.")
    if prediction is not None and prediction != read[1]:
        raise ValueError(f"prediction={prediction!r} contradicts {file}, which says {read[1]!r}: leave prediction out.")
    return read


def _tokens(network: DiffusersNetwork) -> int:
    """Image tokens of a sample of the size that the network was made for, in patches of 2x2 as flow transformers have them."""
    return network.native_shape[-2] * network.native_shape[-1] // 4


def _read_scalars(network: DiffusersNetwork, file: Path) -> None:
    if not file.is_file():
        return
    from safetensors.torch import load_file

    state = load_file(file)
    for key in state:
        network.add_scalar_input(key.split(".")[0])
    network.scalars.load_state_dict(state)


def identity_of(module: torch.nn.Module | None) -> dict[str, str] | None:
    """Path and hash of a pretrained module, or None for one that was not read from a folder."""
    return getattr(module, "identity", None)
