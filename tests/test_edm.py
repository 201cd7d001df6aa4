"""EDM's networks: equal to the public code's on the same weights, read from its pickles and from converted folders."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from published_edm import CASES, fill, network, picture, shapes_of, write_network, write_pickle
from script import load_script

import distill.networks.edm2_modules
import distill.networks.edm_modules
from distill.denoiser import NetworkDenoiser
from distill.edm_checkpoints import PretrainedEDM, save_converted
from distill.edm_published import read_published
from distill.frozen import Frozen, trainable_copy
from distill.networks.edm import EDM
from distill.networks.edm_modules import Resample
from distill.schedules import VarianceExploding

convert_edm = load_script("convert_edm")

# F of NVlabs/edm (commit 008a4e5) and NVlabs/edm2 (4bf8162) at positions 0, 77, 191, 192, 250, 383 of `picture`, and its mean
# square, for networks with the weights of `published_edm.fill`.
GOLDEN = {
    "ddpmpp": ([0.336724, 0.222777, -0.858362, 0.157838, 0.348169, -0.244231], 0.484751798960414),
    "ncsnpp": ([0.236299, 0.052767, -0.784691, -0.06388, 0.341889, -0.150125], 0.45641892006853285),
    "adm": ([0.633989, 0.378435, 0.028356, 0.577612, 0.74446, -0.000932], 0.6251625576624152),
    "edm2": ([-0.215036, -1.159853, 0.337582, 0.045136, -0.644792, -0.006108], 0.43459402101351124),
}
SIZES = {"sample_size": 8, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "head_width": 16}
TINY = {**SIZES, "num_classes": 3}


def tiny(**settings) -> EDM:
    return EDM(**{**TINY, **settings})


def labels(case: str) -> dict[str, torch.Tensor]:
    return {} if picture(case)[2] is None else {"labels": picture(case)[2]}


@pytest.fixture(scope="module")
def pickles(tmp_path_factory) -> dict[str, str]:
    """A published network of each case, not to be changed."""
    folder = tmp_path_factory.mktemp("published")
    return {case: str(write_network(folder / f"{case}.pkl", case)) for case in CASES}


# ------------------------------------------------------------------------------------------------ the public code's values


@pytest.mark.parametrize("case", GOLDEN)
@torch.no_grad()
def test_forward_is_the_public_codes(case, pickles):
    x, time, _ = picture(case)
    own = PretrainedEDM(pickles[case]).network(x, time, labels(case)).flatten()
    values, square = GOLDEN[case]
    torch.testing.assert_close(own[[0, 77, 191, 192, 250, 383]], torch.tensor(values), rtol=0, atol=1e-5)
    assert float(own.double().square().mean()) == pytest.approx(square, rel=1e-5)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.7, 5.0, 80.0])
@pytest.mark.parametrize("case", ["adm", "edm2"])
@torch.no_grad()
def test_denoiser_is_preconditioned_as_published(case, sigma, pickles):
    denoiser, (x, _, _) = PretrainedEDM(pickles[case]), picture(case)
    root = (sigma**2 + 0.25) ** 0.5
    raw = denoiser.network(x / root, torch.tensor([sigma, sigma]).log() / 4, labels(case))
    expected = 0.25 / root**2 * x + sigma * 0.5 / root * raw
    torch.testing.assert_close(denoiser(x, torch.tensor([sigma, sigma]), labels(case)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", GOLDEN)
def test_every_tensor_is_accounted_for(case, pickles):
    published = read_published(pickles[case])
    unread = {key for key in shapes_of(case) if key == "map_augment.weight" or key.endswith("resample_filter")}
    unread |= {"logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight"} if case == "edm2" else set()
    assert set(published.unread) == unread
    assert len(published.state) == len(set(shapes_of(case)) - unread)
    for key, value in PretrainedEDM(pickles[case]).network.model.state_dict().items():
        assert torch.equal(value, published.state[key])


# ------------------------------------------------------------------------------------------------------------ the network


def parameters(network: torch.nn.Module) -> float:
    return sum(value.numel() for value in network.parameters()) / 1e6


def test_published_sizes():
    """Millions of parameters: 55.7 (DDPM++) and 295.9 (ADM) in 2206.00364's table of architectures."""
    with torch.device("meta"):
        assert parameters(EDM()) == pytest.approx(55.7, abs=0.05)
        adm = EDM(64, 3, 1000, "adm", 192, (1, 2, 3, 4), 3, (32, 16, 8))
        assert parameters(adm) == pytest.approx(295.9, abs=0.05)


@torch.no_grad()
def test_new_networks_begin_at_zero():
    """ADM's F exactly; the others' residual branches and last layer by weights of 1e-5."""
    x, time, label = picture("adm")
    assert bool((tiny(architecture="adm")(x, time, {"labels": label}) == 0).all())
    for architecture in ("ddpmpp", "ncsnpp"):
        value = tiny(architecture=architecture)(x, time, {"labels": label})
        assert 0 < float(value.abs().max()) < 1e-3


@pytest.mark.parametrize("architecture", ["ddpmpp", "adm"])
@torch.no_grad()
def test_no_class_is_a_row_of_zeros(architecture):
    network, (x, time, _) = random(tiny(architecture=architecture)), picture("adm")
    none = network(x, time, {"labels": torch.tensor([3, 3])})
    assert not torch.allclose(none, network(x, time, {"labels": torch.tensor([0, 1])}))
    network.model.label.weight.zero_()
    torch.testing.assert_close(network(x, time, {"labels": torch.tensor([0, 1])}), none)


def random(network: EDM) -> EDM:
    """The same network with no weight at zero."""
    with torch.no_grad():
        for name, value in network.model.named_parameters():
            value.copy_(fill(name, tuple(value.shape)))
    return network


@torch.no_grad()
def test_resampling():
    image = torch.arange(32.0).reshape(1, 2, 4, 4)
    means = image.reshape(1, 2, 2, 2, 2, 2).mean(dim=(3, 5))
    torch.testing.assert_close(Resample((1, 1), up=False)(image), means)
    torch.testing.assert_close(
        Resample((1, 1), up=True)(means), means.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    )
    # Away from the edges a ramp stays a ramp: half its slope when doubled, twice when halved.
    ramp, taps = torch.arange(8.0).repeat(8, 1)[None, None], (1, 3, 3, 1)
    settings = ((True, True), (False, True), (False, False))
    doubled, halved, cropped = (Resample(taps, up, padded)(ramp) for up, padded in settings)
    assert (doubled.shape[-1], halved.shape[-1], cropped.shape[-1]) == (16, 4, 3)
    torch.testing.assert_close(doubled[0, 0, 7, 2:-2].diff(), torch.full((11,), 0.5))
    torch.testing.assert_close(halved[0, 0, 1, 1:3].diff(), torch.tensor([2.0]))
    torch.testing.assert_close(cropped[0, 0, 1], torch.tensor([1.5, 3.5, 5.5]))


@torch.no_grad()
def test_image_path_goes_on_from_each_levels_sum():
    """NCSN++: what is brought down to a level is the sum at the level above, at the first of them the input."""
    network = random(tiny(architecture="ncsnpp", multipliers=(1, 1, 2), attention=()))
    seen, sums = [], []
    for level in network.model.encoder[1:]:
        level.image.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        level.blocks[0].register_forward_pre_hook(lambda module, inputs: sums.append(inputs[0]))
    x, time, label = picture("adm")
    network(x, time, {"labels": label})
    assert torch.equal(seen[0], x) and torch.equal(seen[1], sums[0])


def test_dropout_up_to_a_resolution():
    def rates(network: EDM) -> tuple[set[float], set[float]]:
        high = [*network.model.encoder[0].blocks, *network.model.decoder[1].entry, *network.model.decoder[1].blocks]
        low = [network.model.encoder[1].down, *network.model.encoder[1].blocks, *network.model.decoder[0].entry]
        return {block.dropout for block in high}, {block.dropout for block in low}

    assert rates(tiny(dropout=0.4, dropout_resolution=4)) == ({0.0}, {0.4})
    assert rates(tiny(dropout=0.4)) == ({0.4}, {0.4})
    network, (x, time, label) = random(tiny(dropout=0.4)).train(), picture("adm")
    values = [network(x, time, {"labels": label}) for _ in range(2)]
    assert not torch.equal(*values)
    network.eval()
    assert torch.equal(*(network(x, time, {"labels": label}) for _ in range(2)))


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_scalar_inputs_begin_without_effect(architecture):
    network, (x, time, label) = random(tiny(architecture=architecture)), picture("adm")
    plain = network(x, time, {"labels": label})
    network.add_scalar_input("guidance")
    cond = {"labels": label, "guidance": torch.tensor([3.0, 7.0])}
    assert torch.equal(network(x, time, cond), plain)
    torch.nn.init.normal_(network.scalars["guidance"].projection.weight)
    assert not torch.allclose(network(x, time, cond), plain)
    with pytest.raises(ValueError, match="guidance"):
        network(x, time, {"labels": label})


@torch.no_grad()
def test_a_frozen_network_in_bfloat16_keeps_its_frequencies(pickles):
    teacher = PretrainedEDM(pickles["ncsnpp"], dtype="bfloat16")
    student = trainable_copy(teacher)
    expected = teacher.network.model.time.frequencies.clone()
    frozen = Frozen(teacher).module
    assert frozen.network.model.stem.weight.dtype == torch.bfloat16 and student.network.model.stem.weight.dtype == torch.float32
    assert torch.equal(frozen.network.model.time.frequencies, expected) and expected.dtype == torch.float32
    x, t = picture("ncsnpp")[0], torch.tensor([0.4, 3.0])
    assert frozen(x, t, {}).dtype == torch.float32
    torch.testing.assert_close(frozen(x, t, {}), student.eval()(x, t, {}), rtol=0.05, atol=0.05)


def test_modules_import_nothing_but_torch():
    """An exported student carries the file along."""
    for module in (distill.networks.edm_modules, distill.networks.edm2_modules):
        tree = ast.walk(ast.parse(Path(module.__file__).read_text()))
        names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in tree if is_import(node)]
        assert {name.split(".")[0] for name in names} <= {"__future__", "math", "typing", "torch"}


def is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tiny(sample_size=9), "sample_size=9"),
        (lambda: tiny(blocks=0), "blocks=0"),
        (lambda: tiny(architecture="adm", head_width=64), "head_width=64: 32 channels at resolution 4"),
        (lambda: tiny()(*picture("adm")[:2], {}, torch.ones(2)), "no second time"),
        (lambda: tiny().model(*picture("adm")[:2]), "labels=None"),
    ],
)
def test_misuse_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ------------------------------------------------------------------------------------------------------ reading weights


@pytest.mark.parametrize("case", GOLDEN)
@torch.no_grad()
def test_converted_folder_is_bit_identical(case, pickles, tmp_path, capsys):
    convert_edm.main(["--source", pickles[case], "--out", str(tmp_path / "out")])
    said = json.loads(capsys.readouterr().out)
    assert said["unread"] == read_published(pickles[case]).unread
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    first, second = PretrainedEDM(pickles[case]), PretrainedEDM(str(tmp_path / "out"))
    assert second.shape == first.shape == (3, 8, 8) and second.num_classes == first.num_classes
    assert second.schedule.same_as(VarianceExploding(0.002, 80.0)) and second.prediction == "edm"
    x, t = picture(case)[0], torch.tensor([0.4, 3.0])
    assert torch.equal(first(x, t, labels(case)), second(x, t, labels(case)))
    assert not first.training and {value.dtype for value in second.parameters()} == {torch.float32}


def test_identity_follows_content(pickles, tmp_path):
    for name in ("a", "b"):
        save_converted(read_published(pickles["adm"]), tmp_path / name, {})
    a, b = (PretrainedEDM(str(tmp_path / name)).identity for name in ("a", "b"))
    assert a["sha256"] == b["sha256"] and a["path"] == str(tmp_path / "a")
    config = tmp_path / "b/config.json"
    config.write_text(config.read_text().replace('"sigma_data": 0.5', '"sigma_data": 0.6'))
    again = PretrainedEDM(str(tmp_path / "b"))
    assert again.sigma_data == 0.6 and again.identity["sha256"] != a["sha256"]
    assert PretrainedEDM(pickles["adm"]).identity["sha256"] != PretrainedEDM(pickles["ddpmpp"]).identity["sha256"]


def test_dropout_is_the_users_not_the_published(pickles):
    def rates(denoiser: NetworkDenoiser) -> set[float]:
        return {part.dropout for part in denoiser.network.model.modules() if hasattr(part, "dropout") and part is not None}

    assert CASES["ddpmpp"]["dropout"] == 0.13 and rates(PretrainedEDM(pickles["ddpmpp"])) == {0.0}
    assert rates(PretrainedEDM(pickles["edm2"], dropout=0.4, dropout_resolution=4)) == {0.0, 0.4}


def tensors(case: str) -> dict[str, torch.Tensor]:
    return {key: fill(key, shape) for key, shape in shapes_of(case).items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensors": {k: v for k, v in tensors("adm").items() if k != "enc.4x4_block0.qkv.bias"}}, "attention.qkv.bias"),
        ({"tensors": tensors("adm") | {"enc.4x4_block0.extra.weight": torch.ones(1)}}, "extra.weight"),
        ({"tensors": tensors("adm") | {"other.weight": torch.ones(1)}}, "tensor 'other.weight'"),
        ({"tensors": tensors("adm") | {"map_layer0.bias": torch.ones(2)}}, "embed.0.bias"),
        ({"precondition": "VPPrecond"}, "VPPrecond; only EDM's own"),
        ({"precondition": "VEPrecond"}, "VEPrecond; only EDM's own"),
        ({"precondition": "iDDPMPrecond"}, "iDDPMPrecond; only EDM's own"),
        ({"model_type": "OtherUNet"}, "class OtherUNet"),
        ({"depth": 3}, "DhariwalUNet with {'depth': 3}"),
        ({"channel_mult_emb": 2}, "channel_mult_emb"),
        ({"out_channels": 6}, "out_channels=6: only in_channels=3"),
        ({"outer": {"u": torch.ones(3)}}, r"tensors \['u'\] are not known"),
    ],
)
def test_what_does_not_fit_is_named(change, words, tmp_path):
    path = write_pickle(tmp_path / "network.pkl", {"ema": network("adm", **change)})
    with pytest.raises(ValueError, match=words):
        PretrainedEDM(str(path))


@pytest.mark.parametrize(
    ("case", "setting"),
    [
        ("ncsnpp", {"encoder_type": "skip"}),
        ("ncsnpp", {"resample_filter": [1, 1]}),
        ("ddpmpp", {"decoder_type": "skip"}),
        ("edm2", {"concat_balance": 0.3}),
    ],
)
def test_mixtures_of_architectures_are_refused(case, setting, tmp_path):
    path = write_pickle(tmp_path / "network.pkl", {"ema": network(case, **setting)})
    with pytest.raises(ValueError, match=next(iter(setting))):
        PretrainedEDM(str(path))


@pytest.mark.parametrize("case", ["adm", "edm2"])
def test_sigma_data_is_the_files(case, tmp_path):
    path = write_pickle(tmp_path / "network.pkl", {"ema": network(case, outer={"sigma_data": 0.7})})
    assert PretrainedEDM(str(path)).sigma_data == 0.7


def test_files_that_are_not_there_are_named(tmp_path, pickles):
    with pytest.raises(FileNotFoundError, match="path='.*nowhere'.*no such file or folder.*tools/convert_edm.py"):
        PretrainedEDM(str(tmp_path / "nowhere"))
    save_converted(read_published(pickles["adm"]), tmp_path / "folder", {})
    assert PretrainedEDM.locate(str(tmp_path / "folder")) == tmp_path / "folder"
    (tmp_path / "folder/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing there"):
        PretrainedEDM.locate(str(tmp_path / "folder"))
    (tmp_path / "list.pkl").write_bytes(write_pickle(tmp_path / "x.pkl", {"G": 1}).read_bytes())
    with pytest.raises(ValueError, match="no network under 'ema'"):
        PretrainedEDM(str(tmp_path / "list.pkl"))


def test_tool_says_what_is_wrong_in_one_line(tmp_path, pickles, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for source, out, words in (
        (pickles["adm"], tmp_path / "full", "is not empty"),
        (str(tmp_path / "none.pkl"), tmp_path / "new", "there is no such file"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            convert_edm.main(["--source", source, "--out", str(out)])
        said = capsys.readouterr().err
        assert exit_info.value.code == 2 and words in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists()
