"""Extractors by name and path: features to the bit those of the packages, and what is said where weights are missing."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import tiny_features
import torch
from PIL import Image
from tiny_features import images
from torch import Tensor

from distill.classifier import ConvClassifier
from distill.image_features import ClipFeatures, DinoFeatures
from distill.metrics import NetworkFeatures, PixelFeatures, to_uint8
from distill.metrics.extractors import KINDS, find_extractor, make_extractor
from distill.metrics.inception import CleanFeatures

pytestmark = pytest.mark.filterwarnings("ignore:.*weights:UserWarning", "ignore:`torch.jit:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def script(folder: Path) -> Path:
    return tiny_features.inception_script(folder)


def save_pictures(folder: Path, batch: Tensor) -> list[str]:
    folder.mkdir()
    pixels = to_uint8(batch).permute(0, 2, 3, 1).numpy()
    for number, image in enumerate(pixels):
        Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).save(folder / f"{number:03d}.png")
    return sorted(str(file) for file in folder.iterdir())


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 40), (3, 350, 320)])
def test_resize_is_clean_fids_to_the_bit(channels: int, height: int, width: int, script: Path, tmp_path: Path) -> None:
    """Of files as clean-fid reads them: enlarged, reduced, grey."""
    from cleanfid.utils import ResizeDataset

    batch = images(3, channels, height, width)
    theirs = ResizeDataset(save_pictures(tmp_path / "pictures", batch), mode="clean")
    found = CleanFeatures(str(script)).resized(batch)
    assert found.shape == (3, 3, 299, 299) and found.dtype == torch.float32
    for mine, index in zip(found, range(3), strict=True):
        assert torch.equal(mine, theirs[index])
    assert float(found.min()) >= 0 and float(found.max()) <= 255


def test_clean_features_are_clean_fids(script: Path, tmp_path: Path) -> None:
    """From a folder of pictures, through its own reader, resizer and network, with the same weights."""
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    batch = images(4, 3, 40, 30)
    save_pictures(tmp_path / "pictures", batch)
    network = InceptionV3W(str(script.parent), download=False)
    cpu = torch.device("cpu")
    theirs = get_folder_features(str(tmp_path / "pictures"), network, 0, device=cpu, mode="clean", verbose=False)
    found = CleanFeatures(str(script))(batch)
    assert found.dtype == torch.float64 and found.shape == (4, 2048)
    numpy.testing.assert_allclose(found.numpy(), theirs, rtol=1e-5, atol=1e-6)
    assert theirs.std() > 0.01


def test_legacy_features_and_logits_are_torch_fidelitys(folder: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = str(tiny_features.inception_state(folder))
    package = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)
    batch = images(1, 1, 32, 32)
    with torch.no_grad():
        features, logits = package(to_uint8(batch).repeat(1, 3, 1, 1))
    assert torch.equal(make_extractor(f"legacy={path}")(batch), features.double())
    # the field's logits are without the last bias
    assert torch.equal(make_extractor(path, logits=True)(batch), logits.double())
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_folders_of_transformers_are_known_by_name_or_by_what_they_hold(name: str, folder: Path) -> None:
    path = str((tiny_features.dino if name == "dinov2" else tiny_features.clip)(folder))
    batch = images(2, 3, 30, 30)
    expected = NetworkFeatures((DinoFeatures if name == "dinov2" else ClipFeatures)(path))
    for wanted in (f"{name}={path}", path):
        found = make_extractor(wanted)
        assert find_extractor(wanted) == (name, path) and found.name == name and found.protocol == expected.protocol
        assert torch.equal(found(batch), expected(batch))


def test_classifier_and_pixels(folder: Path) -> None:
    path = str(tiny_features.classifier(folder))
    batch = images(3, 1, 8, 8)
    network = ConvClassifier.load(path)
    with torch.no_grad():
        assert torch.equal(make_extractor(path)(batch), network.hidden(batch).double())
        torch.testing.assert_close(make_extractor(f"classifier={path}", logits=True)(batch), network(batch).double())
    assert make_extractor(path, logits=True).hash != make_extractor(path).hash
    assert torch.equal(make_extractor("pixels")(batch), PixelFeatures()(batch))


def test_torchscript_and_state_dict_are_told_apart(script: Path, folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, folder / "other.pth")
    assert find_extractor(str(script))[0] == "clean" and find_extractor(str(folder / "other.pth"))[0] == "legacy"


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"pixels"}))
def test_missing_weights_are_named_with_what_to_fetch_and_where_to_put_it(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sources = {
        "classifier": "configs/digits/classifier.yaml",
        "clean": "save https://nvlabs-fi-cdn.nvidia.com/.*inception-2015-12-05.pt .TorchScript. .* there",
        "legacy": "save .*https://github.com/toshas/torch-fidelity/.*6726825d.pth .* there",
        "dinov2": "hf download facebook/dinov2-large --local-dir ",
        "clip": "hf download openai/clip-vit-large-patch14 --local-dir ",
    }
    with pytest.raises(FileNotFoundError, match=f"{KINDS[name].path}.*{sources[name]}"):
        make_extractor(name)
    with pytest.raises(FileNotFoundError, match=f"/nowhere/w.*{sources[name]}"):
        make_extractor(f"{name}=/nowhere/w")


def test_what_is_no_extractor_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="inception: unknown; give one of: pixels, classifier, clean"):
        make_extractor("inception")
    with pytest.raises(ValueError, match="pixels are of no weights"):
        make_extractor("pixels=a.pt")
    with pytest.raises(ValueError, match="pixels: has no logits .* features of: classifier, legacy"):
        make_extractor("pixels", logits=True)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="config.json there is of none of the extractors"):
        make_extractor(str(tmp_path))
