"""Exports: the table of a sampler, which scheduler is taken, what is refused before anything is written, the model card."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exporting import conditions, family_student, lora_of, own_denoiser, plan_of, student_of
from torch import nn

from distill.boundary import ConsistencyFunction, KarrasBoundary, NoBoundary, ScaledBoundary
from distill.denoiser import NetworkDenoiser
from distill.export.calls import settings_of_call
from distill.export.card import UNKNOWN, licence_of
from distill.export.check import LIMIT
from distill.export.lora import FILE, compare_keys, lora_state, write_lora
from distill.export.pipelines import copy_component
from distill.export.schedulers import FILES, choose_scheduler, custom_scheduling
from distill.export.sources import place_of
from distill.export.student import export_student
from distill.export.table import trace
from distill.grids import DiscreteGrid, KarrasGrid, UniformGrid
from distill.networks.unet2d import UNet2D
from distill.samplers import JumpSampler, OdeSampler, RenoiseSampler
from distill.schedules import RectifiedFlow, TrigFlow, VarianceExploding, VariancePreserving
from distill.solvers import DDIM, DPMSolver2M, Euler, Heun
from distill.types import Batch

SD = VariancePreserving("scaled_linear", 0.00085, 0.012)
WORDS = ("timesteps", "sigmas")


class Wave(nn.Module):
    """A network whose output depends on all it is given."""

    def forward(self, x, time, cond, r=None):
        return torch.tanh(x) * torch.cos(time.to(x.dtype) / 300)[:, None, None, None]


# ----------------------------------------------------------------------------------------------------------- the table

SAMPLERS = {
    "renoise": RenoiseSampler(UniformGrid()),
    "clipped": RenoiseSampler(UniformGrid(), clip=0.3),
    "euler": OdeSampler(Euler(), UniformGrid()),
    "ddim": OdeSampler(DDIM(), UniformGrid()),
    "heun": OdeSampler(Heun(), UniformGrid()),
    "2m": OdeSampler(DPMSolver2M(), UniformGrid()),
}


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("own", "prediction", "boundary", "view"),
    [
        (SD, "eps", ScaledBoundary(), None),
        (SD, "v", NoBoundary(), None),
        (RectifiedFlow(3.0), "flow", NoBoundary(), None),
        (RectifiedFlow(), "flow", NoBoundary(), VarianceExploding(0.02, 80.0)),
        (RectifiedFlow(3.0), "flow", NoBoundary(), TrigFlow()),
        (VarianceExploding(0.1, 10.0), "edm", KarrasBoundary(), None),
    ],
)
def test_the_scheduler_of_a_table_samples_as_the_sampler_does(own, prediction, boundary, view, sampler, steps):
    denoiser = NetworkDenoiser(Wave(), own, prediction)
    generator = ConsistencyFunction(denoiser.under(view or own), boundary)
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1)
    expected = SAMPLERS[sampler](generator, noise, {}, steps, lambda x: torch.randn(x.shape, generator=draws))
    scheduler = custom_scheduling({steps: trace(generator, SAMPLERS[sampler], steps)}).scheduler
    again = torch.Generator().manual_seed(1)
    for _ in range(2):  # a second call starts anew
        again.manual_seed(1)
        scheduler.set_timesteps(steps)
        x = noise * scheduler.init_noise_sigma
        for time in scheduler.timesteps:
            output = denoiser.network(scheduler.scale_model_input(x, time), time.repeat(2), {})
            x = scheduler.step(output, time, x, generator=again).prev_sample
        torch.testing.assert_close(x, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_a_table_of_one_step_solvers_remembers_nothing():
    generator = NetworkDenoiser(Wave(), RectifiedFlow(), "flow")
    for name in ("renoise", "euler", "ddim"):
        rows = trace(generator, SAMPLERS[name], 6).steps
        assert all(len(row.x0) == 1 and len(row.noise) == row.draws for row in rows), name
    assert max(len(row.x0) for row in trace(generator, SAMPLERS["2m"], 6).steps) == 2


def test_the_scheduler_of_a_table_knows_its_numbers_of_steps_alone():
    generator = NetworkDenoiser(Wave(), RectifiedFlow(), "flow")
    scheduler = custom_scheduling({n: trace(generator, SAMPLERS["renoise"], n) for n in (1, 4)}).scheduler
    with pytest.raises(ValueError, match="num_inference_steps=2: this student samples in 1, 4 steps"):
        scheduler.set_timesteps(2)


def test_a_sampler_with_a_second_time_has_no_table():
    with pytest.raises(ValueError, match="jumps to a second time"):
        trace(NetworkDenoiser(Wave(), RectifiedFlow(), "flow"), JumpSampler(UniformGrid()), 2)


# ------------------------------------------------------------------------------------------------------ the scheduler

PUBLISHED = RenoiseSampler(DiscreteGrid(), {4: [999.0, 759.0, 499.0, 259.0]})
UNEVEN = RenoiseSampler(DiscreteGrid(), {4: [999.0, 700.0, 333.0, 111.0]})
CHOICES = [
    (SD, "eps", ScaledBoundary(), RenoiseSampler(DiscreteGrid()), "LCMScheduler", {}),
    (SD, "v", ScaledBoundary(), PUBLISHED, "LCMScheduler", {}),
    (SD, "x0", NoBoundary(), RenoiseSampler(DiscreteGrid()), "LCMScheduler", {}),
    (SD, "eps", ScaledBoundary(), UNEVEN, "LCMScheduler", {"timesteps": [999, 700, 333, 111]}),
    (SD, "eps", NoBoundary(), RenoiseSampler(UniformGrid()), "StudentScheduler", {}),  # times between the indices
    (SD, "eps", ScaledBoundary(scaling=0.001), RenoiseSampler(DiscreteGrid()), "StudentScheduler", {}),
    (SD, "eps", KarrasBoundary(), RenoiseSampler(DiscreteGrid()), "StudentScheduler", {}),
    (SD, "eps", ScaledBoundary(), RenoiseSampler(DiscreteGrid(), clip=1.0), "StudentScheduler", {}),
    (SD, "eps", NoBoundary(), OdeSampler(DDIM(), DiscreteGrid()), "DDIMScheduler", {}),
    (SD, "v", NoBoundary(), OdeSampler(DPMSolver2M(), DiscreteGrid()), "DPMSolverMultistepScheduler", "timesteps"),
    (SD, "eps", NoBoundary(), OdeSampler(Euler(), DiscreteGrid()), "StudentScheduler", {}),  # not Euler in sigma
    (RectifiedFlow(3.0), "flow", NoBoundary(), RenoiseSampler(UniformGrid()), "FlowMatchLCMScheduler", "sigmas"),
    (RectifiedFlow(3.0), "flow", NoBoundary(), OdeSampler(DDIM(), UniformGrid()), "FlowMatchEulerDiscreteScheduler", "sigmas"),
    (RectifiedFlow(), "flow", NoBoundary(), OdeSampler(Euler(), UniformGrid()), "FlowMatchEulerDiscreteScheduler", "sigmas"),
    (RectifiedFlow(3.0), "flow", NoBoundary(), OdeSampler(Euler(), UniformGrid()), "StudentScheduler", {}),
    (RectifiedFlow(), "flow", NoBoundary(), OdeSampler(Heun(), UniformGrid()), "StudentScheduler", {}),
    (VarianceExploding(), "edm", KarrasBoundary(), RenoiseSampler(KarrasGrid()), "StudentScheduler", {}),
]


@pytest.mark.parametrize(("schedule", "prediction", "boundary", "sampler", "expected", "word"), CHOICES)
def test_a_scheduler_of_diffusers_is_taken_if_it_is_the_students_sampler(
    schedule, prediction, boundary, sampler, expected, word
):
    denoiser = NetworkDenoiser(Wave(), schedule, prediction)
    tables = {4: trace(ConsistencyFunction(denoiser, boundary), sampler, 4)}
    found = choose_scheduler(denoiser, tables, WORDS)
    assert type(found.scheduler).__name__ == expected and found.custom == (expected == "StudentScheduler")
    call = found.calls[4]
    assert call["num_inference_steps"] == 4
    if isinstance(word, dict):
        assert call == {"num_inference_steps": 4} | word
    else:
        assert set(call) == {"num_inference_steps", word} and len(call[word]) == 4


def test_a_pipeline_that_takes_no_times_gets_a_scheduler_that_has_them():
    denoiser = NetworkDenoiser(Wave(), SD, "eps")
    tables = {n: trace(ConsistencyFunction(denoiser, ScaledBoundary()), UNEVEN, n) for n in (1, 4)}
    assert choose_scheduler(denoiser, tables, []).custom
    assert choose_scheduler(denoiser, {1: tables[1]}, []).scheduler.timesteps.tolist() == [999]


# ------------------------------------------------------------------------------------------------- what is refused


def run(method, folder, cond=None, **settings):
    cond = {"labels": torch.tensor([0, 1])} if cond is None else cond
    return export_student(method, folder, settings.pop("steps", [1]), Batch(None, cond, cond), 2, **settings)


def unet(**settings):
    torch.manual_seed(0)
    network = UNet2D(1, 8, 3, channels=(8, 16), layers_per_block=1)
    return student_of(own_denoiser(network, RectifiedFlow(), "flow"), **settings)


class Foreign(Wave):
    """A network that is neither diffusers' nor one of ours."""

    shape, num_classes, scalars = (1, 8, 8), None, {}

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (unet, {"steps": []}, r"steps=\[\]"),
        (unet, {"steps": [0, 4]}, r"steps=\[0, 4\]"),
        (unet, {"weights": "raw"}, "weights='raw'"),
        (unet, {"guidance": 2.0}, "guidance=2.0: this student reads no guidance scale"),
        (unet, {"lora": True}, "lora: the student has no LoRA layers"),
        (unet, {"figures": [Path("nowhere.json")]}, "nowhere.json"),
        (lambda: unet(sampler=JumpSampler(UniformGrid())), {}, "second time"),
        (lambda: unet(lora=lora_of()), {"lora": True}, "loads no LoRA file into a UNet2DModel"),
        (lambda: student_of(NetworkDenoiser(Foreign(), RectifiedFlow())), {}, "network is a Foreign"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(make, settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(make(), tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        run(unet(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_lora_students_are_refused_where_a_lora_file_would_not_be_the_student(tmp_path):
    cond = conditions("sd15")
    heun = family_student("sd15", tmp_path / "a", lora=lora_of(), sampler=OdeSampler(Heun(), DiscreteGrid()))
    with pytest.raises(ValueError, match="no scheduler of diffusers samples this student"):
        plan_of(heun, cond, lora=True)
    guided = family_student("sd15", tmp_path / "b", lora=lora_of(), guidance_range=(1.0, 4.0))
    with pytest.raises(ValueError, match=r"also reads \['guidance'\]"):
        plan_of(guided, cond, lora=True)


def test_a_pipeline_that_decodes_needs_an_autoencoder(tmp_path):
    from families import FAMILIES

    from distill.pretrained import PretrainedDenoiser

    FAMILIES["dit"].save(tmp_path)
    method = student_of(PretrainedDenoiser(str(tmp_path)), boundary=ScaledBoundary())
    with pytest.raises(ValueError, match="set model.space.codec"):
        plan_of(method, conditions("dit"))


# ------------------------------------------------------------------------------------------------------------ LoRA


def test_every_lora_key_is_accounted_for(tmp_path):
    network = plan_of(family_student("sd15", tmp_path / "teacher", lora=lora_of()), conditions("sd15")).network
    written = write_lora(network, tmp_path)
    own = lora_state(network)
    assert {f"unet.{name}" for name in own} == set(written)
    # Every layer that has LoRA has both of its matrices in the file, of the rank asked for.
    layers = [name for name, part in network.model.named_modules() if hasattr(part, "lora_A")]
    assert {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"} == set(own) and layers
    assert {value.shape[0] for name, value in own.items() if "lora_A" in name} == {4}
    from safetensors import safe_open

    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.r"] == 4 and metadata["unet.lora_alpha"] == 6
    compare_keys(own, dict(own))


@pytest.mark.parametrize("kind", ["missing", "unexpected", "shape", "values"])
def test_a_lora_key_that_is_not_what_was_written_is_an_error(kind):
    own = {f"block.to_{side}.lora_A.weight": torch.ones(4, 8) for side in "qk"}
    loaded, name = {key: value.clone() for key, value in own.items()}, "block.to_k.lora_A.weight"
    if kind == "missing":
        del loaded[name]
    elif kind == "unexpected":
        loaded["block.to_v.lora_A.weight"], name = torch.ones(4, 8), "block.to_v.lora_A.weight"
    elif kind == "shape":
        loaded[name] = torch.ones(2, 8)
    else:
        loaded[name][0, 0] += 1e-6
    with pytest.raises(ValueError, match=f"{kind}.*{name}|{name}.*{kind}"):
        compare_keys(own, loaded)


# ----------------------------------------------------------------------------------------------- publishing, the card


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: openrail++\ntags:\n- x\n---\n# A\n", "openrail++"),
        ("---\ntags: [x]\nlicense: 'apache-2.0'\n---\n", "apache-2.0"),
        ("# A\nlicense: mit\n", UNKNOWN),
        ("# A\n---\nlicense: mit\n---\n", UNKNOWN),
        ("---\ntags: [x]\n---\nlicense: mit\n", UNKNOWN),
        (None, UNKNOWN),
    ],
)
def test_the_licence_is_the_teachers(text, expected, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == expected


def drawn_here(monkeypatch, change: float) -> None:
    """Stands for the clean process: gives our own samples, changed."""
    from safetensors.torch import save_file

    from distill.export import check

    drawings = {}
    write_job = check.write_job

    def write(drawing, exported, scratch):
        drawings[scratch] = drawing
        return write_job(drawing, exported, scratch)

    def run_clean(files):
        scratch = files[0].parent
        drawing = drawings[scratch]
        samples = {str(steps): check.draw_ours(drawing, steps).contiguous() for steps in drawing.calls}
        samples["1"][0, 0, 0, 0] += change
        save_file(samples, scratch / "samples.safetensors")

    monkeypatch.setattr(check, "write_job", write)
    monkeypatch.setattr(check, "run_clean", run_clean)


def test_a_folder_that_draws_something_else_is_not_published(tmp_path, monkeypatch):
    drawn_here(monkeypatch, 2 * LIMIT)
    with pytest.raises(ValueError, match="diffusers draws other samples than we do"):
        run(unet(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    drawn_here(monkeypatch, 0.5 * LIMIT)
    record = run(unet(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and 0 < record["max_difference"][1] <= LIMIT


def test_the_card_says_what_it_is_and_how_to_call_it(tmp_path, monkeypatch):
    drawn_here(monkeypatch, 0.0)
    method = family_student("sd15", tmp_path / "teacher")
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    (tmp_path / "fid.json").write_text('{"fid": 12.5}')
    record = run(
        method, tmp_path / "out", conditions("sd15"), steps=[4, 1], config={"a": 1}, figures=[tmp_path / "fid.json"]
    )
    assert record | {"calls": None} == json.loads((tmp_path / "out" / "student.json").read_text()) | {
        "calls": None,
        "max_difference": {1: 0.0, 4: 0.0},
    }
    assert record["teacher"] == method.teacher.identity and record["license"] == "creativeml-openrail-m"
    assert list(record["calls"]) == [1, 4] and record["calls"][4]["guidance_scale"] == 1.0
    assert record["missing"] == ["text_encoder", "tokenizer"] and not record["custom_code"]
    card = (tmp_path / "out" / "README.md").read_text()
    hashes = record["sha256"], method.teacher.identity["sha256"]
    for words in ("creativeml-openrail-m", "num_inference_steps=4", "12.5", *hashes):
        assert words in card, words
    assert "Not in this folder: text_encoder, tokenizer" in card and "Consistency" in card
    assert record["recipe"]["config_sha256"] != run(method, tmp_path / "b", conditions("sd15"))["recipe"]["config_sha256"]


def test_the_average_is_exported_unless_asked_otherwise():
    method = unet()
    cond = {"labels": torch.tensor([0])}
    average, present = (plan_of(method, cond, weights=weights).network.model.conv_in.weight for weights in ("ema", "student"))
    assert torch.equal(average, method.ema.module.network.model.conv_in.weight)
    assert torch.equal(present, method.student.network.model.conv_in.weight)
    assert not torch.equal(average, present)


def test_a_process_that_has_this_package_is_not_a_clean_one(monkeypatch):
    monkeypatch.setattr("sys.argv", ["clean_draw.py"])
    with pytest.raises(SystemExit, match="not a clean process: (distill|datamodules) was imported"):
        runpy.run_path(str(FILES / "clean_draw.py"), run_name="__main__")


def test_code_of_a_teachers_folder_is_never_taken_over(tmp_path):
    source = tmp_path / "teacher"
    (source / "feature_extractor").mkdir(parents=True)
    (source / "feature_extractor" / "evil.py").write_text("raise SystemExit('ran')")
    (source / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    index = source / "model_index.json"
    index.write_text(json.dumps({"feature_extractor": ["evil", "Evil"]}))
    with pytest.raises(ValueError, match=r"feature_extractor is \['evil', 'Evil'\], code of that folder"):
        copy_component(tmp_path, "feature_extractor", [source])
    index.write_text(json.dumps({"feature_extractor": ["transformers", "CLIPImageProcessor"]}))
    assert copy_component(tmp_path, "feature_extractor", [source]) == ["transformers", "CLIPImageProcessor"]
    assert [path.name for path in (tmp_path / "feature_extractor").iterdir()] == ["preprocessor_config.json"]


def test_weights_that_came_from_a_local_path_are_not_looked_up_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill.hub.resolve", lambda *words: pytest.fail(f"looked up {words}"))
    assert place_of({"path": "teachers/sd15", "sha256": "aa"}) is None


def test_calls_say_how_prompts_are_read_and_sizes_given():
    known = SimpleNamespace(max_length=256, instruction=False, clip_skip=1)
    network = SimpleNamespace(own_scalars=(), model_class="")
    sana = settings_of_call("SanaPipeline", network, (4, 8, 8), 32, {}, known)
    assert sana["max_sequence_length"] == 256 and sana["complex_human_instruction"] is None and sana["clean_caption"] is False
    cond = {"time_ids": torch.tensor([[64.0, 48.0, 1.0, 2.0, 32.0, 16.0]])}
    sdxl = settings_of_call("StableDiffusionXLPipeline", network, (4, 8, 8), 4, cond, known)
    assert (sdxl["original_size"], sdxl["crops_coords_top_left"], sdxl["target_size"]) == ([64, 48], [1, 2], [32, 16])
    assert sdxl["clip_skip"] == 1
