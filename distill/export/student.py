"""From a trained method to a folder that diffusers loads: written beside its place, checked, then renamed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.export.calls import CUSTOM_PIPELINE, call_parameters
from distill.export.card import licence_of, recipe_record, weights_hash, write_card
from distill.export.check import Drawing, Exported, check_export
from distill.export.lora import compare_keys, lora_state, write_lora
from distill.export.networks import is_own
from distill.export.pipelines import write_pipeline, write_scheduler
from distill.export.plan import Plan, make_plan
from distill.methods.sampled import SampledModule
from distill.types import Batch


def export_student(
    method: SampledModule,
    folder: str | Path,
    steps: Sequence[int],
    batch: Batch,
    count: int,
    weights: str = "ema",
    lora: bool = False,
    guidance: float | None = None,
    config: dict[str, Any] | None = None,
    figures: Sequence[Path] = (),
) -> dict[str, Any]:
    """Writes a folder that diffusers loads, and reloads it in a clean process to compare samples.

    Args:
        method: trained, on the CPU; `SampledModule.check_data` was called.
        folder: must not exist, or be empty.
        steps: numbers of sampler steps that the folder is for, each checked.
        batch: conditions or prompts to check with, ``count`` rows.
        count: samples of the check.
        weights: ``ema`` or ``student``.
        lora: whether to write the LoRA layers alone; otherwise they are merged into a whole pipeline.
        guidance: the scale (1 is none) that a student which reads one is called with; None for the middle of its range.
        config: the resolved config, for its hash.
        figures: files whose content goes into the model card.

    Returns:
        What ``student.json`` holds.

    Raises:
        ValueError: the student, its sampler or the folder will not do (before anything is written), or the check failed: the
            folder is then not there, and what was written lies beside it, named ``.partial``.
        RuntimeError: diffusers cannot load or sample the folder.
    """
    folder = Path(folder)
    check_files(folder, figures)
    plan = make_plan(method, steps, batch, weights, lora, guidance)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    differences = (write_and_check_lora if lora else write_and_check_pipeline)(plan, partial, count)
    recipe = recipe_record(type(method).__name__, config)
    record = make_record(plan, partial, recipe, weights, lora, differences)
    write_card(partial, record, figures)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return record


def check_files(folder: Path, figures: Sequence[Path]) -> None:
    """Raises ValueError if the place is taken or a file of figures is not there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: remove it, or give another place.")
    if missing := [str(file) for file in figures if not file.is_file()]:
        raise ValueError(f"figures={missing}: there is no such file.")


def make_record(
    plan: Plan, folder: Path, recipe: dict[str, Any], weights: str, lora: bool, differences: dict[int, float]
) -> dict[str, Any]:
    """What ``student.json`` holds, of what was written in ``folder``; ``differences`` by number of steps."""
    return {
        "recipe": recipe,
        "weights": weights,
        "lora": lora,
        "teacher": plan.sources.teacher,
        "license": licence_of(plan.sources.teacher_folder),
        "pipeline": plan.pipeline,
        "scheduler": type(plan.scheduling.scheduler).__name__,
        "custom_code": needs_trust(plan),
        "fixed_guidance": plan.fixed,
        "prompt": prompt_words(plan),
        "calls": plan.scheduling.calls,
        "missing": [] if lora else plan.sources.missing(folder),
        "max_difference": differences,
        "sha256": weights_hash(folder),
    }


def needs_trust(plan: Plan) -> bool:
    """Whether the folder holds code of its own."""
    return plan.scheduling.custom or plan.pipeline == CUSTOM_PIPELINE or is_own(plan.network)


def prompt_words(plan: Plan) -> str:
    """How a call of the pipeline begins, in the model card."""
    if "labels" in plan.cond and "class_labels" in call_parameters(plan.pipeline):
        return "class_labels=[0], "
    return 'prompt="...", ' if "prompt_embeds" in plan.cond else ""


def drawing_of(plan: Plan, count: int) -> Drawing:
    """What the check draws."""
    codec = plan.sources.float_codec(plan.pipeline)
    side = (plan.generator, plan.sampler, codec, plan.cond, plan.prompts)
    return Drawing(plan.pipeline, plan.scheduling.calls, *side, plan.shape, count)


def write_and_check_pipeline(plan: Plan, folder: Path, count: int) -> dict[int, float]:
    """A whole pipeline; the largest differences by number of steps."""
    write_whole(plan, folder)
    exported = Exported(folder, needs_trust(plan), plan.network.component)
    return check_export(drawing_of(plan, count), exported)[0]


def write_whole(plan: Plan, folder: Path, merge: bool = True) -> None:
    """The pipeline's folder, LoRA layers merged into the weights or left out."""
    write_pipeline(folder, plan.pipeline, plan.network, plan.scheduling, plan.sources, plan.fixed, merge)


def write_and_check_lora(plan: Plan, folder: Path, count: int) -> dict[int, float]:
    """The LoRA file and its scheduler, checked on a pipeline around the base; the largest differences by number of steps."""
    write_lora(plan.network, folder)
    write_scheduler(folder / "scheduler", plan.scheduling)
    with tempfile.TemporaryDirectory() as scratch:
        write_whole(plan, Path(scratch), merge=False)
        exported = Exported(Path(scratch), False, plan.network.component, folder)
        differences, loaded = check_export(drawing_of(plan, count), exported)
    compare_keys(lora_state(plan.network), loaded)
    return differences
