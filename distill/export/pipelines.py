"""Which pipeline of diffusers a network belongs to, and the pipeline's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.codecs import DiffusersCodec
from distill.export.calls import CUSTOM_PIPELINE
from distill.export.networks import is_own, write_network
from distill.export.schedulers import CUSTOM, FILES, Scheduling
from distill.export.sources import Sources, index_of

PIPELINES = {
    "UNet2DModel": "DDPMPipeline",
    "DiTTransformer2DModel": "DiTPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "SanaTransformer2DModel": "SanaPipeline",
}
"""By class of the network, where it alone decides."""

LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""Where the classes of a pipeline's parts may come from; ``stable_diffusion`` is diffusers' own safety checker."""

CODE = ["*.py", "*.pyc"]
"""A folder's own code is not taken over: it would run where the exported folder's own scheduler is trusted."""

OTHER_WEIGHTS = ["*.bin", "*.bin.index.json", "*.msgpack", "*.h5", "*.onnx"]


def pipeline_name(network: Any, teacher: str | None = None) -> str:
    """The pipeline's class for a network; ``teacher`` is that of the teacher's own folder, if it has one.

    Raises:
        ValueError: a network that no pipeline here samples.
    """
    if is_own(network):
        return CUSTOM_PIPELINE
    config = network.model.config
    if network.model_class == "UNet2DConditionModel":
        return "StableDiffusionXLPipeline" if config.addition_embed_type == "text_time" else "StableDiffusionPipeline"
    if network.model_class == "PixArtTransformer2DModel":
        # Alpha's pipeline gives sizes to a model of 128x128 latents, Sigma's to none.
        alpha = teacher == "PixArtAlphaPipeline" or network.model.use_additional_conditions
        return "PixArtAlphaPipeline" if alpha else "PixArtSigmaPipeline"
    if network.model_class == "UNet2DModel" and network.num_classes is not None:
        return CUSTOM_PIPELINE
    if network.model_class == "SanaTransformer2DModel" and config.guidance_embeds:
        raise ValueError("the student is a Sana-Sprint network, whose pipeline runs in TrigFlow's time: it is not exported.")
    return PIPELINES[network.model_class]


def library_entry(folder: Path) -> list[str]:
    """``[library, class]`` of a component's folder, as ``model_index.json`` has it.

    Raises:
        ValueError: a folder whose configs name no class.
    """
    for file, key, library in (
        ("config.json", "_class_name", "diffusers"),
        ("config.json", "architectures", "transformers"),
        ("tokenizer_config.json", "tokenizer_class", "transformers"),
        ("preprocessor_config.json", "image_processor_type", "transformers"),
    ):
        if (folder / file).is_file() and (found := json.loads((folder / file).read_text()).get(key)):
            return [library, found[0] if isinstance(found, list) else found]
    raise ValueError(f"{folder}: its configs do not say which class it is of; is it a component of a pipeline?")


def components_of(name: str) -> tuple[list[str], list[str]]:
    """Names of the modules that the pipeline's constructor takes, and of its other settings."""
    import diffusers

    if name == CUSTOM_PIPELINE:
        return ["unet", "scheduler"], []
    pipeline: Any = getattr(diffusers, name)
    modules, settings = pipeline._get_signature_keys(pipeline)
    return sorted(modules), sorted(settings)


def write_pipeline(
    folder: Path,
    name: str,
    network: Any,
    scheduling: Scheduling,
    sources: Sources,
    guidance: float | None = None,
    merge: bool = True,
) -> None:
    """Writes a pipeline's folder with its ``model_index.json``.

    Args:
        folder: exists, and is empty.
        name: class of the pipeline.
        network: the student's.
        scheduling: its scheduler.
        sources: of the other components; one that is in none of them is null.
        guidance, merge: see `distill.export.weights.plain_model`.
    """
    import diffusers

    modules, settings = components_of(name)
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": diffusers.__version__}
    if name == CUSTOM_PIPELINE:
        index["_class_name"] = ["pipeline", CUSTOM_PIPELINE]
        shutil.copyfile(FILES / "student_pipeline.py", folder / "pipeline.py")
    index[network.component] = write_network(folder / network.component, network, guidance, merge)
    index["scheduler"] = write_scheduler(folder / "scheduler", scheduling)
    if "vae" in modules and isinstance(sources.codec, DiffusersCodec):
        sources.codec.model.save_pretrained(folder / "vae", safe_serialization=True)
        index["vae"] = library_entry(folder / "vae")
    for part in modules:
        if part not in index:
            index[part] = copy_component(folder, part, [] if part in sources.absent else sources.folders)
    index |= own_settings(settings, sources.folders, index)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def copy_component(folder: Path, part: str, sources: Sequence[Path]) -> list[Any]:
    """Copies the first of ``sources`` that has the part into ``folder``, and returns its entry in ``model_index.json``.

    Where there are safetensors, pickles and other formats of the weights are left behind.
    """
    for root in sources:
        if (root / part).is_dir():
            entry = index_of(root).get(part) or [None, None]
            if entry[0] not in (None, *LIBRARIES):
                raise ValueError(f"{root}: its {part} is {entry}, code of that folder: it is not copied into an export.")
            safe = any((root / part).glob("*.safetensors"))
            left = [*CODE, *OTHER_WEIGHTS] if safe else CODE
            shutil.copytree(root / part, folder / part, ignore=shutil.ignore_patterns(*left))
            return entry if entry[0] is not None else library_entry(folder / part)
    return [None, None]


def write_scheduler(folder: Path, scheduling: Scheduling) -> list[str]:
    """Writes the scheduler, the folder's own with its file, and returns its entry in ``model_index.json``."""
    scheduling.scheduler.save_pretrained(folder)
    if scheduling.custom:
        shutil.copyfile(FILES / f"{CUSTOM}.py", folder / f"{CUSTOM}.py")
    return [CUSTOM if scheduling.custom else "diffusers", type(scheduling.scheduler).__name__]


def own_settings(settings: Sequence[str], sources: Sequence[Path], index: dict[str, Any]) -> dict[str, Any]:
    """The constructor's settings that are no modules, as the first source that states them has them."""
    found: dict[str, Any] = {}
    for root in sources:
        stated = index_of(root)
        found = {key: stated[key] for key in settings if key in stated} | found
    if "requires_safety_checker" in settings:
        found["requires_safety_checker"] = index["safety_checker"][0] is not None
    return found
