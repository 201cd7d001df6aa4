"""A small convolutional classifier of images, whose last hidden layer serves as features; its folder and back."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from distill import hub

Images = Float[Tensor, "b c h w"]
ADVICE = (
    "give a folder that `python -m distill fit --config configs/digits/classifier.yaml` leaves, runs/digits/classifier/export"
)


class ConvClassifier(nn.Module):
    """Logits ``(b, num_classes)`` of images ``(b, in_channels, sample_size, sample_size)`` in [-1, 1].

    A 3x3 convolution at full size; for each further width one that halves the sides and one that does not; a hidden layer of
    everything that is left, so that places are kept. All are followed by SiLU, whose gradient has no jumps, and the hidden
    layer by a normalisation to mean 0 and variance 1 over its units without parameters: inner products of hidden vectors are
    then at most their length, which is what polynomial kernels ``(x.y / d + 1)^n`` expect.

    Args:
        in_channels: of the images.
        sample_size: height and width; ``2^(len(channels) - 1)`` must divide it.
        num_classes: number of classes.
        channels: widths of the convolutions.
        hidden: units of the hidden layer.

    Attributes:
        config: these, as they are saved.

    Raises:
        ValueError: numbers that are not positive, or a size that cannot be halved so often.
    """

    def __init__(
        self,
        in_channels: int = 1,
        sample_size: int = 8,
        num_classes: int = 10,
        channels: tuple[int, ...] = (32, 64),
        hidden: int = 256,
    ):
        super().__init__()
        numbers = {"in_channels": in_channels, "sample_size": sample_size, "num_classes": num_classes, "hidden": hidden}
        for key, value in numbers.items():
            if value < 1:
                raise ValueError(f"{key}={value}: give a positive number.")
        factor = 2 ** (len(channels) - 1) if channels else 0
        if not channels or min(channels) < 1 or sample_size % factor:
            raise ValueError(
                f"channels={list(channels)}, sample_size={sample_size}: give at least one positive width, and at most as many "
                "as let the size be halved for each after the first."
            )
        self.config: dict[str, Any] = {**numbers, "channels": list(channels)}
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels[0], 3, padding=1), nn.SiLU()]
        for before, width in zip(channels, channels[1:]):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        units = channels[-1] * (sample_size // factor) ** 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(units, hidden), nn.SiLU())
        self.normalisation = nn.LayerNorm(hidden, elementwise_affine=False)
        self.head = nn.Linear(hidden, num_classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, ``(c, h, w)``."""
        return self.config["in_channels"], self.config["sample_size"], self.config["sample_size"]

    def hidden(self, images: Images) -> Float[Tensor, "b d"]:
        """The normalised hidden layer, ``d = hidden``."""
        return self.normalisation(self.body(images))

    def forward(self, images: Images) -> Float[Tensor, "b k"]:
        return self.head(self.hidden(images))

    def save(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into a folder."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"_class_name": type(self).__name__, **self.config}, indent=2) + "\n")
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, path: str) -> ConvClassifier:
        """The classifier of a folder that `save` wrote.

        Raises:
            FileNotFoundError: see `locate_classifier`.
            ValueError: a folder of something else, or weights that do not fit its config.
        """
        from safetensors.torch import load_file

        folder = locate_classifier(path)
        config = hub.read_json(folder / "config.json")
        known = inspect.signature(cls).parameters
        if config.pop("_class_name", None) != cls.__name__ or set(config) != set(known):
            raise ValueError(f"path={path!r}: config.json there describes no {cls.__name__}; {ADVICE}.")
        classifier = cls(**{**config, "channels": tuple(config["channels"])})
        try:
            classifier.load_state_dict(load_file(folder / "model.safetensors"))
        except RuntimeError as error:
            raise ValueError(f"path={path!r}: model.safetensors there does not fit config.json; {ADVICE}.") from error
        return classifier


def locate_classifier(path: str) -> Path:
    """The folder, with all that `ConvClassifier.load` reads. Raises FileNotFoundError if a file is not there."""
    folder = Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"path={path!r}: {name} is missing there; {ADVICE}.")
    return folder
