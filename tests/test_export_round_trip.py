"""Exported students draw our very samples, to 1e-5, in a process that has diffusers and not this package.

All folders are written first, then drawn from in one clean process: starting it takes longer than all else.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import torch
from exporting import (
    Case,
    conditions,
    draw_all,
    family_student,
    lora_of,
    own_denoiser,
    plan_of,
    student_of,
    written,
)
from families import FAMILIES
from safetensors.torch import load_file
from script import load_script

from distill.boundary import KarrasBoundary
from distill.command_line import Refusal
from distill.export.check import LIMIT, draw_ours
from distill.export.lora import compare_keys, lora_state
from distill.export.student import drawing_of, prompt_words
from distill.grids import KarrasGrid, UniformGrid
from distill.metrics.image_sets import read_set
from distill.networks.edm import EDM
from distill.networks.edm2 import EDM2
from distill.networks.unet2d import UNet2D
from distill.samplers import OdeSampler, RenoiseSampler
from distill.schedules import RectifiedFlow, VarianceExploding
from distill.solvers import Heun

SCHEDULERS = {
    "sd3": "FlowMatchLCMScheduler",
    "flux": "FlowMatchLCMScheduler",
    "flux-schnell": "FlowMatchLCMScheduler",
    "sana": "FlowMatchLCMScheduler",
}
LORA = ("sd15", "sdxl", "sd3", "flux", "sana")
MERGED = ("sd15", "flux")
EDM_SIZES = dict(sample_size=8, in_channels=3, num_classes=3, multipliers=(1, 2), blocks=1, attention=(4,), head_width=8)
LABELS = {"labels": torch.tensor([0, 2, 1])}


def unet(own, prediction, **settings):
    """A tiny UNet2DModel of three classes, under the package's own recipes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet2D(1, 8, 3, channels=(8, 16), layers_per_block=1)
    return student_of(own_denoiser(network, own, prediction), **settings)


def edm(kind, **settings):
    """A student of EDM's networks: consistency models' boundary, clipped re-noising."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = EDM2(size=16, **EDM_SIZES) if kind == "edm2" else EDM(architecture=kind, width=16, **EDM_SIZES)
        if kind == "edm2":
            network.model.out_gain.data.fill_(0.5)
    denoiser = own_denoiser(network, VarianceExploding(), "edm")
    return student_of(denoiser, sampler=RenoiseSampler(KarrasGrid(), clip=1.0), boundary=KarrasBoundary(), **settings)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("exported")
    found = {}

    def add(name: str, method, cond, count: int = 2, lora: bool = False, guidance: float | None = None) -> None:
        plan = plan_of(method, cond, lora=lora, guidance=guidance)
        found[name] = written(name, root, plan, count, lora)

    for name in FAMILIES:
        add(name, family_student(name, root / name / "teacher"), conditions(name))
    for name in LORA:
        method = family_student(name, root / f"{name} lora" / "teacher", lora=lora_of())
        add(f"{name} lora", method, conditions(name), lora=True)
        if name in MERGED:
            add(f"{name} merged", method, conditions(name))
    for name in ("sd15", "flux"):
        heun = OdeSampler(Heun(), UniformGrid())
        add(f"{name} heun", family_student(name, root / f"{name} heun" / "teacher", sampler=heun), conditions(name))
    for name in ("sd15", "sdxl", "dit"):
        method = family_student(name, root / f"{name} guided" / "teacher", guidance_range=(1.0, 5.0))
        add(f"{name} guided", method, conditions(name), guidance=2.5)
    view = {"schedule": VarianceExploding(0.02, 80.0), "sampler": RenoiseSampler(KarrasGrid(), clip=1.0)}
    add("unet flow", unet(RectifiedFlow(), "flow"), LABELS, 3)
    add("unet flow seen as edm", unet(RectifiedFlow(), "flow", **view), LABELS, 3)
    add("unet guided", unet(RectifiedFlow(), "flow", guidance_range=(1.0, 4.0)), LABELS, 3)
    add("unet edm", unet(VarianceExploding(), "edm", boundary=KarrasBoundary()), LABELS, 3)
    for kind in ("ddpmpp", "ncsnpp", "adm", "edm2"):
        add(kind, edm(kind), LABELS, 3)
    add("ddpmpp guided", edm("ddpmpp", guidance_range=(1.0, 4.0)), LABELS, 3)
    return draw_all(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_draws_our_samples(name, cases):
    case = cases[name]
    differences = case.differences()
    print(name, differences)
    assert set(differences) == {1, 4} and max(differences.values()) <= LIMIT
    assert type(case.plan.scheduling.scheduler).__name__ == SCHEDULERS.get(name, "LCMScheduler")
    assert case.plan.pipeline == FAMILIES[name].pipeline_class
    pixels = case.samples()["4"]
    # Pictures, not what clipping made all alike; and of each sample its own.
    assert ((pixels > 0) & (pixels < 1)).float().mean() > 0.7 and pixels.std() > 0.05
    assert (pixels[0] - pixels[1]).abs().mean() > 0.01
    assert (pixels - case.samples()["1"]).abs().mean() > 1e-3


@pytest.mark.parametrize("name", LORA)
def test_lora_files_load_into_the_base_with_every_key(name, cases):
    case = cases[f"{name} lora"]
    assert max(case.differences().values()) <= LIMIT
    loaded = load_file(case.job.parent / "lora_state.safetensors")
    compare_keys(lora_state(case.plan.network), loaded)
    files = sorted(path.name for path in case.folder.rglob("*") if path.is_file())
    assert files == ["pytorch_lora_weights.safetensors", "scheduler_config.json"]


@pytest.mark.parametrize("name", MERGED)
def test_lora_layers_merge_into_a_whole_pipeline(name, cases):
    merged, base = cases[f"{name} merged"], cases[f"{name} lora"]
    assert max(merged.differences().values()) <= LIMIT
    # What the layers add is far more than the limit: leaving them out, or alpha, would be seen.
    plain = load_file(base.folder.parent / "base" / base.plan.network.component / "diffusion_pytorch_model.safetensors")
    own = load_file(merged.folder / merged.plan.network.component / "diffusion_pytorch_model.safetensors")
    assert plain.keys() == own.keys() and max(float((plain[key] - own[key]).abs().max()) for key in plain) > 1e-3


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_what_no_scheduler_samples_has_one_of_its_own_in_the_familys_pipeline(name, cases):
    case = cases[f"{name} heun"]
    assert max(case.differences().values()) <= LIMIT
    index = json.loads((case.folder / "model_index.json").read_text())
    assert index["scheduler"] == ["student_scheduler", "StudentScheduler"]
    assert index["_class_name"] == FAMILIES[name].pipeline_class
    assert (case.folder / "scheduler" / "student_scheduler.py").is_file()


def test_guidance_becomes_the_latent_consistency_models_input(cases):
    for name, pipeline in (("sd15", "LatentConsistencyModelPipeline"), ("sdxl", "StableDiffusionXLPipeline")):
        case = cases[f"{name} guided"]
        assert max(case.differences().values()) <= LIMIT
        assert case.plan.pipeline == pipeline and case.plan.fixed is None
        assert case.plan.scheduling.calls[4]["guidance_scale"] == 2.5
        assert json.loads((case.folder / "unet" / "config.json").read_text())["time_cond_proj_dim"] == 256


@pytest.mark.parametrize("name", ["dit guided", "unet guided", "ddpmpp guided"])
def test_guidance_is_fixed_where_the_model_has_no_input_for_it(name, cases):
    case = cases[name]
    assert max(case.differences().values()) <= LIMIT
    assert case.plan.fixed == 2.5 and case.plan.scheduling.calls[4].get("guidance_scale", 1.0) == 1.0
    drawing, fixed = drawing_of(case.plan, case.count), draw_ours(drawing_of(case.plan, case.count), 1)
    drawing.cond = drawing.cond | {"guidance": torch.full((case.count,), 1.0)}
    assert float((draw_ours(drawing, 1) - fixed).abs().max()) > 100 * LIMIT


@pytest.mark.parametrize("name", ["unet flow", "unet flow seen as edm", "unet edm", "ddpmpp", "ncsnpp", "adm", "edm2"])
def test_networks_of_classes_have_a_pipeline_of_their_own(name, cases):
    case = cases[name]
    assert max(case.differences().values()) <= LIMIT
    index = json.loads((case.folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "StudentPipeline"]
    pixels = case.samples()["4"]
    assert ((pixels > 0) & (pixels < 1)).float().mean() > 0.5 and pixels.std() > 0.05


def test_classes_run_in_turn_through_an_exported_pipeline(cases, tmp_path, monkeypatch):
    case, tool = cases["unet flow"], load_script("sample_pipeline")
    folder = Path(shutil.copytree(case.folder, tmp_path / "exported"))
    record = {"lora": False, "prompt": prompt_words(case.plan), "pipeline": "StudentPipeline", "custom_code": True}
    (folder / "student.json").write_text(json.dumps(record | {"calls": case.plan.scheduling.calls}))

    def draw(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["sample_pipeline.py", "--pipeline", str(folder), "--num", "4", *map(str, words)])
        tool.main()

    draw("--labels", 1, 0, 1, "--steps", 4, "--out", tmp_path / "drawn")
    drawn = numpy.load(tmp_path / "drawn" / "samples.npz")
    pipeline, call = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True), case.plan.scheduling.calls[4]
    settings: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
    expected = pipeline(class_labels=[1, 0, 1, 1], **settings, **call).images
    assert numpy.array_equal(drawn["arr_0"], (expected * 255).round()) and drawn["arr_1"].tolist() == [1, 0, 1, 1]
    with pytest.raises(SystemExit, match="a StudentPipeline is given --labels"):
        draw("--prompts", "one", "--out", tmp_path / "none")
    with pytest.raises(Refusal, match="it is a pipeline: draw by tools/sample_pipeline.py"):
        read_set("--samples", str(folder))


def test_folders_of_our_networks_carry_their_file(cases):
    for kind, file in (("adm", "edm_modules.py"), ("edm2", "edm2_modules.py")):
        unet_folder = cases[kind].folder / "unet"
        assert sorted(path.name for path in unet_folder.iterdir()) == [
            "config.json",
            "diffusion_pytorch_model.safetensors",
            file,
            "student_network.py",
        ]
        original = Path(__file__).resolve().parent.parent / "distill" / "networks" / file
        assert (unet_folder / file).read_text() == original.read_text()
