"""Plans: the bytes of weights, gradients and optimiser states, counted without weights, are those of the real method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from script import load_script
from standins import write_standins

from distill import hub
from distill.checkpoints import read_checkpoint
from distill.cli import import_parts, main
from distill.plan.plan import make_plan
from distill.plan.roles import tensors_by_role
from distill.plan.states import states_by_role

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TINY = {
    tiny.with_suffix("").with_suffix(".yaml"): tiny
    for tiny in sorted(CONFIGS.glob("*/*.tiny.yaml"))
    if not tiny.name.startswith(("pairs", "trajectories"))
}
plan = load_script("plan")

# The published numbers of parameters.
PARAMETERS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 859_520_964,
    "stabilityai/stable-diffusion-2-1": 865_910_724,
    "stabilityai/stable-diffusion-xl-base-1.0": 2_567_463_684,
}
DDPM_CIFAR10 = 35_746_307
AUTOENCODER = 83_653_863


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny overrides find their teachers."""
    root = tmp_path_factory.mktemp("plan")
    write_standins(root / "runs/tiny")
    import_parts()
    return root


def size(tensors: Any) -> int:
    """Bytes of tensors, each once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())


def step_once(method: Any) -> list[torch.optim.Optimizer]:
    """The method's own optimisers after a step on gradients of zero."""
    optimizers = method.configure_optimizers()
    for optimizer in optimizers:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return optimizers


def moments(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimiser's state."""
    return size(value for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("recipe", TINY, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_counts_without_weights_are_those_of_the_stepped_method(
    recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words = [plan.NO_DATA, "--config", str(recipe), "--config", str(TINY[recipe])]
    parsed = plan.Planned(words, run=False)
    planned, real = parsed.build(), parsed.build(weights=True)
    rows = states_by_role(planned, planned.players())
    optimizers = step_once(real)
    teacher = [] if real._teacher is None else [*real._teacher.module.parameters(), *real._teacher.module.buffers()]
    base = {id(tensor) for tensor in teacher}

    def own(module: Any) -> int:
        return size(value for value in [*module.parameters(), *module.buffers()] if id(value) not in base)

    expected = {"teacher": size(teacher), "student": own(real.student), "average": own(real.ema)}
    for name, module in (("codec", real.space.codec), ("text encoders", real.space.conditioner)):
        expected[name] = 0 if module is None else own(module)
    if hasattr(real, "critic"):
        expected |= {"fake score": own(real.critic["score"])}
        expected |= {"discriminator": own(real.critic["head"])} if "head" in real.critic else {}
    assert {name: rows[name].weights if name in rows else 0 for name in expected} == expected
    for player, optimizer in zip(real.players(), optimizers, strict=True):
        mine = [row for row in rows.values() if row.player == player.name]
        assert sum(row.gradients for row in mine) == size(parameter.grad for parameter in player.parameters) > 0
        assert sum(row.optimizer for row in mine) == moments(optimizer) > 0


@pytest.mark.parametrize("name", ["sdxl/dmd2_4step", "sd15/lcm_lora"])
def test_optimiser_and_average_are_those_of_the_checkpoint_of_a_run(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    recipe = CONFIGS / f"{name}.yaml"
    words = ["--config", str(recipe), "--config", str(TINY[recipe])]
    planned = plan.Planned([plan.NO_DATA, *words], run=False).build()
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_steps=2"]
    main(["fit", *words, *quiet, f"--trainer.default_root_dir={tmp_path}"])
    state = read_checkpoint(tmp_path / "checkpoints/last.ckpt")
    states = [moment for each in state["optimizer_states"] for own in each["state"].values() for moment in own.values()]
    rows = states_by_role(planned, planned.players())
    assert sum(row.optimizer for row in rows.values()) == size(states)
    # What checkpoints do not keep of it is the teacher's.
    assert rows["average"].weights == size(value for key, value in state["state_dict"].items() if key.startswith("ema."))


def test_features_without_weights_have_the_published_numbers_of_parameters() -> None:
    """Of CLIP's image tower with its projection, of DINOv2's large tower, and of Inception up to its pooling."""
    from distill.image_features.image_towers import ClipFeatures, DinoFeatures
    from distill.image_features.inception import InceptionFeatures

    with hub.configs_only():
        towers = [ClipFeatures("openai/clip-vit-base-patch32"), DinoFeatures("facebook/dinov2-large")]
        networks = [part.network.module for part in [*towers, InceptionFeatures("absent.pt")]]
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert counts == [87_849_216, 304_368_640, 21_785_568]


@pytest.mark.parametrize("path", PARAMETERS)
def test_published_configs_have_the_published_numbers_of_parameters(path: str) -> None:
    from distill.codecs import AutoencoderKLCodec
    from distill.pretrained import PretrainedDenoiser

    with hub.configs_only():
        teacher, codec = PretrainedDenoiser(path), AutoencoderKLCodec(path)
    assert sum(parameter.numel() for parameter in teacher.parameters()) == PARAMETERS[path]
    assert sum(parameter.numel() for parameter in codec.parameters()) == AUTOENCODER
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}


def test_the_published_config_of_ddpm_has_the_published_number_of_parameters() -> None:
    from distill.pretrained import PretrainedDenoiser

    with hub.configs_only():
        teacher = PretrainedDenoiser("google/ddpm-cifar10-32", allow_pickle=True)
    assert sum(parameter.numel() for parameter in teacher.parameters()) == DDPM_CIFAR10


def test_a_full_size_recipe_is_planned_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: student, average and fake score of SDXL in 32 bits, the teacher in 16, Adam's two moments and its count."""
    monkeypatch.chdir(tmp_path)
    import_parts()
    words = [plan.NO_DATA, "--config", str(CONFIGS / "sdxl/dmd2_4step.yaml")]
    method = plan.Planned(words, run=False).build()
    rows, count = states_by_role(method, method.players()), 2_567_463_684
    assert rows["teacher"].weights == 2 * count
    for name in ("student", "fake score", "average"):
        assert rows[name].weights == 4 * count
    tensors = len(list(method.student.parameters()))
    assert rows["student"].optimizer == 8 * count + 4 * tensors and rows["student"].gradients == 4 * count
    assert not any(tmp_path.iterdir())


def test_lora_layers_share_the_teacher_and_are_counted_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    recipe = CONFIGS / "sd15/lcm_lora.yaml"
    method = plan.Planned([plan.NO_DATA, "--config", str(recipe), "--config", str(TINY[recipe])], run=False).build()
    roles = tensors_by_role(method)
    everything = [tensor.untyped_storage()._cdata for tensors in roles.values() for tensor in tensors]
    assert len(everything) == len(set(everything))
    assert {id(tensor) for tensor in roles["student"]} >= {id(p) for p in method.student.parameters() if p.requires_grad}
    assert all("lora" in name or not p.requires_grad for name, p in method.student.named_parameters())
    assert not make_plan(method, None).shardable


def test_an_unknown_model_is_refused_and_says_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    option = "--model.init_args.teacher.init_args.path=owner/unknown"
    with pytest.raises(SystemExit) as exit_info:
        plan.main(["--config", str(CONFIGS / "sd15/lcm_lora.yaml"), "--memory=24", option])
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and "Traceback" not in said
    assert all(word in said for word in ("model.teacher", "'owner/unknown'", "config.json", "tools/fetch.py")), said
