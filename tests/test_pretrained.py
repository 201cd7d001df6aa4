"""Teachers in a diffusers folder or the hub's cache: what is written is read, by this package and by diffusers alone."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from hub_cache import COMMIT, put, use_cache
from huggingface_hub import constants
from oracle import MLP

from distill import hub
from distill.cli import main
from distill.denoiser import NetworkDenoiser
from distill.networks.families import FAMILIES as WRAPPERS
from distill.networks.unet2d import UNet2D
from distill.pretrained import PretrainedDenoiser, check_exportable, identity_of, save_denoiser
from distill.schedulers import read_scheduler
from distill.schedules import RectifiedFlow, TrigFlow, VarianceExploding, VariancePreserving
from distill.types import label_conditions

KINDS = {
    "flow": (RectifiedFlow(), "flow"),
    "shifted-flow": (RectifiedFlow(3.0), "flow"),
    "edm": (VarianceExploding(0.01, 50.0), "edm"),
    "eps": (VariancePreserving(), "eps"),
    "v": (VariancePreserving("scaled_linear", 0.00085, 0.012), "v"),
    "x0": (VariancePreserving("cosine", num_steps=100), "x0"),
}
COND = label_conditions(torch.tensor([0, 2]), 3)[0]


def network(num_classes: int | None = 3) -> UNet2D:
    return UNet2D(1, 8, num_classes, (8, 16), layers_per_block=1, attention=(False, True), heads_width=8, groups=4).eval()


def batch(schedule) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.8]) * schedule.t_max


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved teacher, not to be changed."""
    path = tmp_path_factory.mktemp("teacher")
    save_denoiser(NetworkDenoiser(network(), *KINDS["flow"]), path)
    return path


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_round_trip_is_bit_identical(kind, tmp_path):
    schedule, prediction = KINDS[kind]
    denoiser = NetworkDenoiser(network(), schedule, prediction)
    save_denoiser(denoiser, tmp_path)
    again = PretrainedDenoiser(str(tmp_path))
    assert again.schedule.same_as(schedule) and again.prediction == prediction
    assert (again.shape, again.num_classes, again.network.model.training) == ((1, 8, 8), 3, False)
    x, t = batch(schedule)
    assert torch.equal(again(x, t, COND), denoiser(x, t, COND))


@torch.no_grad()
def test_round_trip_keeps_scalar_inputs(tmp_path):
    denoiser = NetworkDenoiser(network(), *KINDS["v"])
    denoiser.network.add_scalar_input("guidance")
    torch.nn.init.normal_(denoiser.network.scalars["guidance"].projection.weight)
    save_denoiser(denoiser, tmp_path)
    again, (x, t) = PretrainedDenoiser(str(tmp_path)), batch(denoiser.schedule)
    cond = {**COND, "guidance": torch.tensor([2.0, 7.0])}
    assert torch.equal(again(x, t, cond), denoiser(x, t, cond))
    assert not torch.equal(again(x, t, cond), again(x, t, {**COND, "guidance": torch.tensor([1.0, 1.0])}))


@torch.no_grad()
def test_diffusers_alone_reads_the_network(folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel

    ours, theirs = PretrainedDenoiser(str(folder)), UNet2DModel.from_pretrained(folder / "unet")
    x, t = batch(ours.schedule)
    assert torch.equal(ours.raw(x, t, COND), theirs(x, 1000 * t, class_labels=COND["labels"]).sample)
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler").config.shift == 1.0
    assert not list(folder.rglob("*.bin")) and list(folder.rglob("*.safetensors"))


@torch.no_grad()
def test_diffusers_alone_reads_the_pipeline(tmp_path):
    """And draws with it: a model without classes, the DDPM pipeline as it comes."""
    from diffusers import DiffusionPipeline

    denoiser = NetworkDenoiser(network(None), *KINDS["eps"])
    save_denoiser(denoiser, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    x, t = batch(denoiser.schedule)
    assert torch.equal(pipeline.unet(x, t).sample, denoiser.raw(x, t, {}))
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod[500].sqrt(), denoiser.schedule.alpha(torch.tensor(500.0)))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


# ------------------------------------------------------------------------------------------------------- every family


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A folder of each family, as diffusers' own pipeline writes it; not to be changed."""
    root = tmp_path_factory.mktemp("families")
    for name, tiny in FAMILIES.items():
        tiny.save(root / name)
    return root


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_each_family_is_read_from_its_pipelines_folder_and_written_again(name, families, tmp_path):
    tiny, path = FAMILIES[name], str(families / name)
    denoiser = PretrainedDenoiser(path, network=tiny.model_class)
    wrapped, stated = WRAPPERS[tiny.model_class].of(tiny.model()), json.loads(scheduler_file(families / name).read_text())
    tokens = math.prod(wrapped.native_shape[1:]) // 4
    expected = NetworkDenoiser(wrapped, *read_scheduler(stated, tokens))
    x, t = torch.randn(2, tiny.channels, tiny.size, tiny.size), torch.tensor([0.3, 0.8]) * expected.schedule.t_max
    value, cond = expected(x, t, tiny.cond(2)[0]), tiny.cond(2)[0]
    assert torch.equal(denoiser(x, t, cond), value) and denoiser.schedule.same_as(expected.schedule)
    assert not denoiser.network.model.training and denoiser.widths == wrapped.widths and denoiser.shape == wrapped.shape
    save_denoiser(denoiser, tmp_path)
    again = PretrainedDenoiser(str(tmp_path))
    assert torch.equal(again(x, t, cond), value) and again.prediction == denoiser.prediction
    assert sorted(part.name for part in tmp_path.iterdir() if part.is_dir()) == ["scheduler", tiny.component]


def scheduler_file(folder: Path) -> Path:
    return folder / "scheduler/scheduler_config.json"


def test_a_shift_by_image_size_is_that_of_the_models_own_size_unless_stated(families):
    """FLUX.1's 1024 pixels are 4096 tokens, where its mu is 1.15."""
    assert math.isclose(PretrainedDenoiser(str(families / "flux")).schedule.shift, math.exp(1.15), rel_tol=1e-12)
    stated = PretrainedDenoiser(str(families / "flux"), schedule=RectifiedFlow(2.0))
    assert stated.schedule.same_as(RectifiedFlow(2.0)) and stated.prediction == "flow"
    with pytest.raises(ValueError, match="schedule=VariancePreserving.* contradicts"):
        PretrainedDenoiser(str(families / "flux"), schedule=VariancePreserving())


@torch.no_grad()
def test_what_is_written_is_read_whatever_the_scalars(families, tmp_path):
    denoiser = PretrainedDenoiser(str(families / "dit"))
    denoiser.network.add_scalar_input("guidance")
    torch.nn.init.normal_(denoiser.network.scalars["guidance"].projection.weight)
    save_denoiser(denoiser, tmp_path)
    tiny = FAMILIES["dit"]
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 700.0]), tiny.cond(2)[0]
    given = {**cond, "guidance": torch.tensor([2.0, 7.0])}
    assert torch.equal(PretrainedDenoiser(str(tmp_path))(x, t, given), denoiser(x, t, given))


@torch.no_grad()
def test_the_root_may_hold_both_files(families, tmp_path):
    """As in the first DDPM repositories, google/ddpm-cifar10-32 among them."""
    for part in ("unet", "scheduler"):
        shutil.copytree(families / "ddpm" / part, tmp_path, dirs_exist_ok=True)
    denoiser, same = PretrainedDenoiser(str(tmp_path)), PretrainedDenoiser(str(families / "ddpm"))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 700.0])
    assert torch.equal(denoiser(x, t, {}), same(x, t, {})) and denoiser.schedule.same_as(same.schedule)


def test_a_variant_is_read_in_float32(families, tmp_path):
    model = FAMILIES["sd15"].model()
    model.half().save_pretrained(tmp_path / "unet", variant="fp16")
    shutil.copytree(families / "sd15/scheduler", tmp_path / "scheduler")
    half = PretrainedDenoiser(str(tmp_path), variant="fp16", dtype="bfloat16")
    assert half.frozen_dtype is torch.bfloat16 and {value.dtype for value in half.parameters()} == {torch.float32}
    expected = dict(model.float().named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in half.network.model.named_parameters())
    with pytest.raises(FileNotFoundError, match="unet/ has no weights there.*fp16.safetensors"):
        PretrainedDenoiser(str(tmp_path))
    assert PretrainedDenoiser(str(families / "sd15")).frozen_dtype is None


def test_shards_are_read(families, tmp_path):
    FAMILIES["dit"].model().save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    shutil.copytree(families / "dit/scheduler", tmp_path / "scheduler")
    assert len(shards := sorted((tmp_path / "transformer").glob("*.safetensors"))) > 1
    whole, sharded = PretrainedDenoiser(str(families / "dit")), PretrainedDenoiser(str(tmp_path))
    assert all(torch.equal(value, sharded.state_dict()[name]) for name, value in whole.state_dict().items())
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[-1].name}, a shard of the weights, is missing"):
        PretrainedDenoiser(str(tmp_path))


# ------------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def cached(families, tmp_path, monkeypatch):
    """The DiT as ``owner/name`` in the hub's cache, offline."""
    cache = use_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return put(cache, "owner/name", families / "dit", listed=True)


@torch.no_grad()
def test_an_id_is_read_from_the_cache_while_offline(families, cached):
    denoiser, same = PretrainedDenoiser("owner/name"), PretrainedDenoiser(str(families / "dit"))
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in denoiser.state_dict().items())
    assert denoiser.identity == {"path": "owner/name", "revision": COMMIT, "sha256": same.identity["sha256"]}
    assert set(same.identity) == {"path", "sha256"}


def test_an_id_while_offline_is_an_error_that_says_what_to_do(cached):
    with pytest.raises(FileNotFoundError, match=r"path='owner/another'.*HF_HUB_OFFLINE.*tools/fetch.py --config"):
        PretrainedDenoiser("owner/another")
    (cached / "transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"path='owner/name'.*HF_HUB_OFFLINE.*diffusion_pytorch_model.safetensors"):
        PretrainedDenoiser("owner/name")


def test_locate_reads_no_weights(cached, monkeypatch):
    from diffusers import ModelMixin

    monkeypatch.setattr(ModelMixin, "from_pretrained", None)
    assert PretrainedDenoiser.locate("owner/name") == (cached, "transformer")


# ------------------------------------------------------------------------------------------------------ what is refused


def test_agreement_is_checked_not_obeyed(folder):
    PretrainedDenoiser(str(folder), schedule=RectifiedFlow(), prediction="flow", network="UNet2DModel")
    with pytest.raises(ValueError, match=r"schedule=RectifiedFlow\(shift=3.0\) contradicts"):
        PretrainedDenoiser(str(folder), schedule=RectifiedFlow(3.0))
    with pytest.raises(ValueError, match="schedule=VariancePreserving.* contradicts"):
        PretrainedDenoiser(str(folder), schedule=VariancePreserving())
    with pytest.raises(ValueError, match="prediction='eps' contradicts"):
        PretrainedDenoiser(str(folder), prediction="eps")
    with pytest.raises(ValueError, match="network='SD3Transformer2DModel' contradicts .*/unet/config.json.*'UNet2DModel'"):
        PretrainedDenoiser(str(folder), network="SD3Transformer2DModel")


def changed(folder: Path, place: Path, file: str, **changes: object) -> Path:
    """A copy of a folder in which one JSON file has other values."""
    copy = Path(shutil.copytree(folder, place))
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **changes}))
    return copy


def test_missing_parts_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="path=.*nowhere.*no such folder; give a diffusers folder"):
        PretrainedDenoiser(str(tmp_path / "nowhere"))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    with pytest.raises(FileNotFoundError, match=r"prior/ is missing there \(sub-folders: scheduler, unet\)"):
        PretrainedDenoiser(str(copy), subfolder="prior")
    (copy / "unet/config.json").unlink()
    with pytest.raises(FileNotFoundError, match="unet/config.json is missing"):
        PretrainedDenoiser(str(copy))
    shutil.rmtree(copy / "unet")
    with pytest.raises(FileNotFoundError, match=r"neither unet/config.json nor transformer/config.json.*sub-folders: sch"):
        PretrainedDenoiser(str(copy))


def test_two_networks_are_not_chosen_between(families, folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.copytree(families / "dit/transformer", copy / "transformer")
    with pytest.raises(ValueError, match="unet/ and transformer/.*subfolder"):
        PretrainedDenoiser(str(copy))
    assert PretrainedDenoiser(str(copy), subfolder="unet").network.model_class == "UNet2DModel"


def test_missing_weights_are_an_error(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    next((copy / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="path=.*safetensors"):
        PretrainedDenoiser(str(copy))


def test_a_missing_scheduler_may_be_stated(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.rmtree(copy / "scheduler")
    for stated in ({}, {"schedule": RectifiedFlow()}, {"prediction": "flow"}):
        with pytest.raises(FileNotFoundError, match="scheduler/scheduler_config.json is missing.*both schedule and prediction"):
            PretrainedDenoiser(str(copy), **stated)
    denoiser = PretrainedDenoiser(str(copy), schedule=RectifiedFlow(2.0), prediction="flow")
    assert denoiser.schedule.same_as(RectifiedFlow(2.0)) and denoiser.prediction == "flow"


class Touch:
    """Unpickled without care, it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_pickle_is_refused_unless_allowed_and_then_runs_nothing(families, tmp_path):
    copy = Path(shutil.copytree(families / "dit", tmp_path / "copy"))
    (copy / "transformer/diffusion_pytorch_model.safetensors").unlink()
    weights = copy / "transformer/diffusion_pytorch_model.bin"
    torch.save(FAMILIES["dit"].model().state_dict(), weights)
    with pytest.raises(ValueError, match="path=.*transformer/ has its weights only as a pickle.*allow_pickle: true"):
        PretrainedDenoiser(str(copy))
    allowed = PretrainedDenoiser(str(copy), allow_pickle=True)
    same = PretrainedDenoiser(str(families / "dit"))
    assert all(torch.equal(value, allowed.state_dict()[name]) for name, value in same.state_dict().items())
    assert allowed.identity["sha256"] != same.identity["sha256"]
    for write in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))):
        write({"pos_embed.proj.weight": Touch(tmp_path / "ran")}, weights)
        with pytest.raises(ValueError, match="path=.*its weights and its config, a DiT.* do not fit or are broken"):
            PretrainedDenoiser(str(copy), allow_pickle=True)
        assert not (tmp_path / "ran").exists()
    pickle.loads(weights.read_bytes())
    assert (tmp_path / "ran").is_dir()  # it would have run


@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "dit", "pixart-sigma"])
def test_a_scheduler_that_contradicts_the_model_is_named_with_it(name, families, tmp_path):
    copy = Path(shutil.copytree(families / name, tmp_path / "copy"))
    other = families / ("dit" if name in ("sd3", "flux", "sana") else "sd3")
    shutil.copyfile(scheduler_file(other), scheduler_file(copy))
    schedule = "VariancePreserving" if other.name == "dit" else "RectifiedFlow"
    with pytest.raises(ValueError, match=f"path='{copy}'.*{schedule}.*contradicts the model: {FAMILIES[name].model_class}"):
        PretrainedDenoiser(str(copy))


def test_a_scheduler_that_is_not_known_is_named_with_its_folder(folder, tmp_path):
    copy = changed(folder, tmp_path / "copy", "scheduler/scheduler_config.json", _class_name="CMStochasticIterativeScheduler")
    with pytest.raises(ValueError, match=f"path='{copy}'.*CMStochasticIterativeScheduler"):
        PretrainedDenoiser(str(copy))


def test_a_config_of_another_family_does_not_fit_the_weights(families, tmp_path):
    copy = Path(shutil.copytree(families / "sd3", tmp_path / "copy"))
    shutil.copyfile(families / "dit/transformer/config.json", copy / "transformer/config.json")
    with pytest.raises(ValueError, match=f"path='{copy}': its weights.*DiTTransformer2DModel"):
        PretrainedDenoiser(str(copy))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 3}, "missing: transformer_blocks.2"),
        ({"num_layers": 1}, "unexpected: transformer_blocks.1"),
        ({"attention_head_dim": 16}, "a DiTTransformer2DModel's, do not fit"),
        ({"_class_name": "Transformer2DModel"}, "_class_name='Transformer2DModel' is not known here; known are.*SD3"),
    ],
)
def test_every_weight_is_accounted_for(change, words, families, tmp_path):
    copy = changed(families / "dit", tmp_path / "copy", "transformer/config.json", **change)
    with pytest.raises(ValueError, match=f"path='{copy}': .*{words}"):
        PretrainedDenoiser(str(copy))


def test_broken_weights_are_named(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=f"path='{copy}': its weights .* broken"):
        PretrainedDenoiser(str(copy))


def test_what_diffusers_cannot_say_is_not_written(families, tmp_path):
    with pytest.raises(ValueError, match="TrigFlow"):
        save_denoiser(NetworkDenoiser(network(), TrigFlow(), "flow"), tmp_path)
    with pytest.raises(ValueError, match="diffusers network .*UNet2DModel.* not MLP"):
        save_denoiser(NetworkDenoiser(MLP((1, 8, 8)), RectifiedFlow(), "flow"), tmp_path)
    read = PretrainedDenoiser(str(families / "sd3"))
    with pytest.raises(ValueError, match="VariancePreserving.*contradicts the model: SD3Transformer2DModel"):
        save_denoiser(NetworkDenoiser(read.network, VariancePreserving(), "eps"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_low_rank_layers_are_not_written_as_a_folder():
    from peft import LoraConfig

    denoiser = NetworkDenoiser(WRAPPERS["UNet2DConditionModel"].of(FAMILIES["sd15"].model()), *KINDS["eps"])
    check_exportable(denoiser)
    denoiser.network.model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="LoRA.*tools/export.py"):
        check_exportable(denoiser)


# ------------------------------------------------------------------------------------------------ on the command line

TEACHER = "--model.init_args.teacher.init_args"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["path=whole", "subfolder=transformer"], ["model.teacher.path='whole': transformer/ is missing", "sub-folders: sch"]),
        (["path=pickled"], ["model.teacher.path='pickled': unet/ has its weights only as a pickle", "allow_pickle: true"]),
        (["path=contradicting"], ["model.teacher.path='contradicting'", "RectifiedFlow", "contradicts the model: DiT"]),
        (["path=owner/name"], ["model.teacher.path='owner/name'", "HF_HUB_OFFLINE", "tools/fetch.py --config"]),
        (["path=whole", "network=DiTTransformer2DModel"], ["model.teacher.network='DiT", "says 'UNet2DModel'"]),
        (["path=disguised"], ["model.teacher.path='disguised': its weights", "UNet2DModel", "do not fit"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("path") else "",
)
def test_what_is_wrong_with_a_teacher_is_said_in_one_line(settings, words, folder, families, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    use_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("whole", "pickled"):
        shutil.copytree(folder, name)
    weights = Path("pickled/unet/diffusion_pytorch_model.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    shutil.copytree(families / "dit", "contradicting")
    shutil.copyfile(scheduler_file(folder), scheduler_file(Path("contradicting")))
    shutil.copytree(families / "sd15", "disguised")
    shutil.copyfile(folder / "unet/config.json", "disguised/unet/config.json")
    recipe = Path(__file__).parents[1] / "configs/digits/cd.yaml"
    options = [f"{TEACHER}.{setting}" for setting in settings]
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", str(recipe), "--trainer.default_root_dir=run", *options])
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and all(word in said for word in words), said
    assert said.count("error: ") == 1 and "Traceback" not in said and not Path("run").exists()


def test_a_model_without_a_null_class_has_all_its_classes_and_no_guidance(folder, tmp_path):
    whole = PretrainedDenoiser(str(folder))
    bare = PretrainedDenoiser(str(folder), null_class=False)
    assert (whole.num_classes, whole.null_class) == (3, True) and (bare.num_classes, bare.null_class) == (4, False)
    FAMILIES["dit"].save(tmp_path)
    with pytest.raises(ValueError, match="null_class=false: 'DiTTransformer2DModel'"):
        PretrainedDenoiser(str(tmp_path), null_class=False)


# ------------------------------------------------------------------------------------------------------------- identity


def test_identity_follows_content_not_place(folder, tmp_path):
    first = PretrainedDenoiser(str(folder)).identity
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    (copy / "notes.txt").write_text("not part of it")
    second = PretrainedDenoiser(str(copy)).identity
    assert second["sha256"] == first["sha256"] and second["path"] == str(copy)


def test_identity_changes_with_a_weight_and_with_a_config(folder, tmp_path):
    denoiser = PretrainedDenoiser(str(folder))
    with torch.no_grad():
        next(denoiser.parameters()).view(-1)[0] += 1e-3
    save_denoiser(denoiser, tmp_path / "weight")
    copy = shutil.copytree(folder, tmp_path / "config")
    config = copy / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift": 2.0}))
    hashes = {PretrainedDenoiser(str(path)).identity["sha256"] for path in (folder, tmp_path / "weight", copy)}
    assert len(hashes) == 3


def test_identity_is_of_what_was_read(folder, tmp_path):
    """Another variant of the weights in the same folder, or another component, is not."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.copyfile(copy / "unet/diffusion_pytorch_model.safetensors", copy / "unet/diffusion_pytorch_model.fp16.safetensors")
    shutil.copytree(copy / "unet", copy / "vae")
    before = PretrainedDenoiser(str(folder)).identity["sha256"]
    assert PretrainedDenoiser(str(copy)).identity["sha256"] == before
    parts = ["scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert hub.content_hash(folder, parts) == before


def test_only_what_was_read_has_an_identity(folder):
    assert identity_of(PretrainedDenoiser(str(folder)))["path"] == str(folder)
    assert identity_of(None) is None and identity_of(NetworkDenoiser(network(), *KINDS["flow"])) is None
