"""Features of images against the packages they come from, their gradients, and what is refused."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from unittest.mock import patch

import numpy
import pytest
import tiny_features
import torch
from tiny_features import images
from torch import Tensor, nn

from distill.classifier import ConvClassifier
from distill.distances import LPIPS
from distill.image_features import (
    ClassifierFeatures,
    ClipFeatures,
    DinoFeatures,
    ImageFeatures,
    InceptionFeatures,
    LpipsFeatures,
    Preprocessing,
)
from distill.metrics import FrechetDistance, GaussianStatistics, NetworkFeatures, to_uint8

pytestmark = pytest.mark.filterwarnings("ignore:.*weights:UserWarning", "ignore:`torch.jit:FutureWarning")


# --------------------------------------------------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Path:
    return tiny_features.classifier(folder)


@pytest.fixture(scope="module")
def inception(folder: Path) -> Path:
    """A state dict of torch-fidelity's network, random weights under which features keep their size from layer to layer."""
    from torch_fidelity import feature_extractor_inceptionv3 as package

    extractor = package.FeatureExtractorInceptionV3
    with patch.object(package, "load_state_dict_from_url"), patch.object(extractor, "load_state_dict"):
        state = extractor("inception", ["2048"]).state_dict()
    state = {name: value * 6**0.5 if name.endswith("conv.weight") else value for name, value in state.items()}
    torch.save(state, folder / "inception.pth")
    return folder / "inception.pth"


class Script(nn.Module):
    """What the TorchScript file looks like from outside: layers, and a ``forward`` around them with a resize of its own."""

    def __init__(self) -> None:
        super().__init__()
        convolution, normalisation = nn.Conv2d(3, 8, 5, stride=8), nn.BatchNorm2d(8)
        self.layers = nn.Sequential(convolution, normalisation, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        x -= 128
        return self.layers(x / 128).flatten(1)


@pytest.fixture(scope="module")
def script(folder: Path) -> tuple[Path, Script]:
    torch.manual_seed(2)
    network = Script().eval()
    torch.jit.script(network).save(str(folder / "script.pt"))
    return folder / "script.pt", network


@pytest.fixture(scope="module")
def clip(folder: Path) -> Path:
    return tiny_features.clip(folder)


@pytest.fixture(scope="module")
def dino(folder: Path) -> Path:
    return tiny_features.dino(folder)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Path:
    import torchvision

    torch.manual_seed(5)
    state = torchvision.models.squeezenet1_1().state_dict()
    torch.save({name: value for name, value in state.items() if name.startswith("features.")}, folder / "squeeze.pth")
    return folder / "squeeze.pth"


@pytest.fixture(scope="module")
def extractors(classifier: Path, script: tuple, clip: Path, dino: Path, backbone: Path) -> dict[str, ImageFeatures]:
    """One of each kind, tiny."""
    return {
        "classifier": ClassifierFeatures(str(classifier)),
        "inception": InceptionFeatures(str(script[0])),
        "clip": ClipFeatures(str(clip)),
        "dinov2": DinoFeatures(str(dino), size=42),
        "lpips": LpipsFeatures(str(backbone), "squeeze", size=32),
    }


KINDS = ["classifier", "inception", "clip", "dinov2", "lpips"]


# ---------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("sides", [(32, 32), (8, 13), (299, 40), (400, 299)])
def test_tensorflow_resize_is_torch_fidelitys(sides: tuple[int, int]) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    x = images(2, 3, *sides)
    expected = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    torch.testing.assert_close(Preprocessing(3, 299, "tensorflow")(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [20, 70])
def test_bicubic_resize_is_clean_fids(side: int) -> None:
    """Pillow's, on the bytes as floats, where images are enlarged and where they are reduced; clean-fid clips it afterwards."""
    from cleanfid.resize import make_resizer

    x = images(1, 3, side, side)
    resize = make_resizer("PIL", False, "bicubic", (41, 41))
    expected = resize(to_uint8(x)[0].permute(1, 2, 0).numpy())
    found = Preprocessing(3, 41, "bicubic", antialias=True)(x)[0].permute(1, 2, 0).numpy() * 127.5 + 127.5
    numpy.testing.assert_allclose(found.clip(0, 255), expected, atol=1e-3)


def test_images_are_normalised_and_not_clamped() -> None:
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0]).reshape(5, 1, 1, 1)
    found = Preprocessing(3, 1, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))(x)
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 2.0)]):
        expected = [((value + 1) / 2 - mean) / std for value in (-3.0, -1.0, 0.0, 1.0, 2.0)]
        assert found[:, channel].flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(Preprocessing(1, 1)(x), x)


def test_only_smaller_images_are_enlarged_where_it_says_so() -> None:
    enlarge, x = Preprocessing(3, 8, "bilinear", smaller_only=True), images(1, 3, 9, 12)
    assert torch.equal(enlarge(x), x)
    assert enlarge(images(1, 3, 7, 12)).shape == (1, 3, 8, 8)
    assert Preprocessing(3, 8, "bilinear")(x).shape == (1, 3, 8, 8)


def test_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="images of 2 channels: the features read 3"):
        Preprocessing(3, 8, "bilinear")(images(1, 2, 8, 8))
    with pytest.raises(ValueError, match="images of 8x9 pixels: the features read 8x8"):
        Preprocessing(3, 8)(images(1, 3, 8, 9))


# -------------------------------------------------------------------------------------------- against the packages


def test_classifier_features_are_its_hidden_layer(classifier: Path) -> None:
    features, network, x = ClassifierFeatures(str(classifier)), ConvClassifier.load(str(classifier)), images(3, 1, 8, 8)
    found = features(x)
    assert found.shape == (3, 12) and torch.equal(found, network.hidden(x))
    torch.testing.assert_close(network.head(found), network(x))
    torch.testing.assert_close(found.mean(1), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.square().sum(1), torch.full((3,), 12.0), rtol=0.05, atol=0)


def test_inception_features_of_bytes_are_torch_fidelitys(inception: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    package = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(inception))
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        (expected,) = package(to_uint8(x))
        found = InceptionFeatures(str(inception))(x)
        other = InceptionFeatures(str(inception), "bicubic")(x)
    assert found.shape == (2, 2048) and float(found.std()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert float((other - expected).abs().max()) > 0.01 * float(expected.abs().max())


def test_inception_script_gives_the_values_and_gradients_of_its_layers(script: tuple[Path, Script]) -> None:
    """clean-fid's normalisation, ``(v - 128) / 128`` of bytes v; gradients as through the same layers outside TorchScript."""
    path, network = script
    x = images(2, 3, 299, 299).requires_grad_()
    direction = torch.randn(2, 8)
    for _ in range(3):  # TorchScript's optimisations begin with the second call
        found = InceptionFeatures(str(path))(x)
        expected = network.layers(((127.5 * x + 127.5) - 128) / 128).flatten(1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        mine, theirs = (torch.autograd.grad((value * direction).sum(), x)[0] for value in (found, expected))
        assert float(theirs.abs().max()) > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-8)


def test_clip_features_are_transformers_embeddings_of_processed_bytes(clip: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel

    x = images(2, 3, 16, 16)
    pixels = CLIPImageProcessor(do_resize=False, do_center_crop=False)(list(to_uint8(x)), return_tensors="pt").pixel_values
    with torch.no_grad():
        model = CLIPModel.from_pretrained(clip).eval()
        expected = model.visual_projection(model.vision_model(pixels).pooler_output)
        torch.testing.assert_close(ClipFeatures(str(clip))(x), expected, rtol=1e-4, atol=1e-6)


def test_dino_features_are_the_class_token(dino: Path) -> None:
    from transformers import Dinov2Model

    x = images(2, 3, 28, 28)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dino).eval()(((x + 1) / 2 - mean) / std).pooler_output
        torch.testing.assert_close(DinoFeatures(str(dino), size=28)(x), expected, rtol=1e-4, atol=1e-6)


def test_squared_distance_of_lpips_features_is_lpips(backbone: Path) -> None:
    a, b = images(2, 2, 3, 32, 32).unbind()
    whole = LpipsFeatures(str(backbone), "squeeze", size=32, pooled=False)
    pooled = LpipsFeatures(str(backbone), "squeeze", size=32)
    with torch.no_grad():
        expected = LPIPS(str(backbone), "squeeze", size=32)(a, b)
        torch.testing.assert_close((whole(a) - whole(b)).square().sum(1), expected, rtol=1e-4, atol=1e-7)
        near = (pooled(a) - pooled(b)).square().sum(1)
    assert pooled(a).shape == (2, 64 + 128 + 256 + 384 + 384 + 512 + 512)
    assert bool((near > 0).all()) and bool((near < expected).all())


def test_lpips_gradients_are_finite_where_a_layer_is_zero(backbone: Path) -> None:
    features = LpipsFeatures(str(backbone), "squeeze", size=32)
    with torch.no_grad():
        for parameter in features.network.module.net.slice1.parameters():
            parameter.zero_()
    x = images(1, 3, 32, 32).requires_grad_()
    value = features(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value[:, :64].abs().max() == 0 and bool(torch.isfinite(gradient).all())


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_derivative_in_the_images(kind: str, extractors: dict[str, ImageFeatures]) -> None:
    """Central differences in float64 along a direction, through the resize and outside [-1, 1]."""
    features = copy.deepcopy(extractors[kind])
    features.network.module = copy.deepcopy(features.network.module)
    features.double()
    x = (1.3 * images(2, 1, 8, 8, seed=1)).double().requires_grad_()
    features_there = features(x)
    assert features_there.dtype == torch.float64
    towards, direction = torch.randn_like(features_there), torch.randn_like(x)
    (gradient,) = torch.autograd.grad((features_there * towards).sum(), x)
    step = 1e-6
    with torch.no_grad():
        ends = [(features(x + sign * step * direction) * towards).sum() for sign in (1, -1)]
    slope = float(ends[0] - ends[1]) / (2 * step)
    assert abs(slope) > 1e-6
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_are_frozen_and_features_float32_under_autocast(kind: str, extractors: dict[str, ImageFeatures]) -> None:
    features, x = extractors[kind], images(2, 1, 8, 8)
    assert list(features.parameters()) == [] and features.state_dict() == {} and features.name == kind
    assert not any(p.requires_grad for p in features.network.module.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside = features.train()(x.bfloat16())
    with torch.no_grad():
        outside = features(x.bfloat16().float())
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside)
    assert not features.network.module.training


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_has_features_of_its_own(kind: str, extractors: dict[str, ImageFeatures]) -> None:
    x = images(3, 1, 8, 8)
    with torch.no_grad():
        together, alone = extractors[kind](x), extractors[kind](x[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-6)
    assert float((together[0] - together[1]).abs().max()) > 1e-5


# -------------------------------------------------------------------------------------------- protocols and metrics


def test_protocols_say_weights_range_and_size(extractors: dict[str, ImageFeatures], classifier: Path, folder: Path) -> None:
    for features in extractors.values():
        assert features.identity["sha256"] in features.protocol and "images in [-1, 1], not clamped" in features.protocol
    assert extractors["inception"].protocol.endswith("of x in [0, 1] (x - 0.501961) / 0.501961")
    assert "resized to 16x16 (bicubic, antialiased)" in extractors["clip"].protocol
    assert "those below it enlarged to 32x32 (bilinear)" in extractors["lpips"].protocol
    torch.manual_seed(6)
    ConvClassifier(channels=(4, 8), hidden=12).save(folder / "other")
    assert ClassifierFeatures(str(folder / "other")).identity["sha256"] != extractors["classifier"].identity["sha256"]
    (folder / "copy").mkdir()
    for file in classifier.iterdir():
        (folder / "copy" / file.name).write_bytes(file.read_bytes())
    moved = ClassifierFeatures(str(folder / "copy"))
    assert moved.identity == {"path": str(folder / "copy"), "sha256": extractors["classifier"].identity["sha256"]}


def test_metrics_read_features_of_bytes(extractors: dict[str, ImageFeatures]) -> None:
    """The distance of the features of saved images in float64, without gradients, the same of unsaved ones."""
    features = extractors["classifier"]
    metric = FrechetDistance(features)
    samples, real = 2.2 * torch.rand(40, 1, 8, 8) - 1.1, images(50, 1, 8, 8)
    assert metric.name == "frechet_classifier"
    metric.update(samples.clone().requires_grad_(), real, {})
    assert not metric.fake_total.requires_grad and metric.fake_outer.dtype == torch.float64
    statistics = [GaussianStatistics(), GaussianStatistics()]
    with torch.no_grad():
        statistics[0].update(features(to_uint8(samples) / 127.5 - 1))
        statistics[1].update(features(real))
    assert float(metric.compute()) == pytest.approx(statistics[0].distance(statistics[1]), rel=1e-5)
    found = metric.features.hash
    assert found == hashlib.sha256(metric.features.protocol.encode()).hexdigest()
    assert "rounded to bytes" in metric.features.protocol and features.protocol in metric.features.protocol


def test_copies_of_metrics_share_the_network_and_move_with_their_owner(classifier: Path) -> None:
    metric = FrechetDistance(ClassifierFeatures(str(classifier)))
    copied = metric.clone()
    assert isinstance(copied.features, NetworkFeatures)
    assert copied.features.features.network.module is metric.features.features.network.module
    assert list(metric.parameters()) == [] and metric.state_dict() == {}
    copied.to("meta")
    assert {parameter.device.type for parameter in copied.features.features.network.module.parameters()} == {"meta"}


def test_features_of_images_that_are_not_finite_are_not_a_number(extractors: dict[str, ImageFeatures]) -> None:
    x = images(2, 1, 8, 8)
    x[1, 0, 3, 3] = float("nan")
    found = NetworkFeatures(extractors["clip"])(x)
    assert bool(torch.isfinite(found[0]).all()) and bool(torch.isnan(found[1]).any())


# --------------------------------------------------------------------------------------------------------- refusals


def test_missing_weights_are_named_with_what_to_fetch(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"path=.*absent.*save https://nvlabs.*\.pt .*https://github.com/toshas.*\.pth"):
        InceptionFeatures(absent)
    with pytest.raises(FileNotFoundError, match="path=.*absent.*Dinov2Model, such as facebook/dinov2-large"):
        DinoFeatures(absent)
    with pytest.raises(FileNotFoundError, match="path=.*absent.*CLIPModel, such as openai"):
        ClipFeatures(absent)
    with pytest.raises(FileNotFoundError, match="weights=.*absent.*backbone there"):
        LpipsFeatures(absent)
    with pytest.raises(FileNotFoundError, match="path=.*absent.*configs/digits/classifier.yaml"):
        ClassifierFeatures(absent)


class Torn(Script):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Detached()  # type: ignore[assignment]


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def test_foreign_weights_are_named(clip: Path, dino: Path, classifier: Path, tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "linear.pt"))
    torch.jit.script(Torn()).save(str(tmp_path / "torn.pt"))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pth")
    for name, words in [
        ("linear.pt", "without `layers`"),
        ("torn.pt", "no gradients pass"),
        ("resnet.pth", "no state dict of the FID's Inception"),
        ("pickle.pth", "no state dict of the FID's Inception .*[Ww]eights.only"),
    ]:
        with pytest.raises(ValueError, match=words):
            InceptionFeatures(str(tmp_path / name))
    with pytest.raises(ValueError, match="of a model of type 'clip'; give a folder of transformers' Dinov2Model"):
        DinoFeatures(str(clip))
    with pytest.raises(ValueError, match="of a model of type 'dinov2'; give a folder of transformers' CLIPModel"):
        ClipFeatures(str(dino))
    with pytest.raises(ValueError, match="size=40: give a positive multiple of the patch, 14"):
        DinoFeatures(str(dino), size=40)
    with pytest.raises(ValueError, match="config.json there describes no ConvClassifier"):
        (tmp_path / "model.safetensors").write_bytes((classifier / "model.safetensors").read_bytes())
        (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
        ClassifierFeatures(str(tmp_path))


def test_weights_that_lack_a_layer_are_refused(clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(clip / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((clip / "config.json").read_bytes())
    with pytest.raises(ValueError, match="not those of a CLIPModel .missing: visual_projection.weight"):
        ClipFeatures(str(tmp_path))
