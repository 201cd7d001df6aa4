"""EDM and EDM2 networks as denoisers: from NVIDIA's published pickles, or from the folders that tools/convert_edm.py makes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch

from distill import hub
from distill.denoiser import Denoiser, NetworkDenoiser
from distill.edm_published import Published, read_published
from distill.hub import content_hash, read_json
from distill.networks.edm import EDM
from distill.networks.edm2 import EDM2
from distill.schedules import VarianceExploding

NETWORKS: dict[str, type[EDM] | type[EDM2]] = {"EDM": EDM, "EDM2": EDM2}
FILES = ("config.json", "model.safetensors")
ADVICE = (
    "give a published network (edm-*.pkl of https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/, edm2-*.pkl of "
    "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/), or the folder that "
    "`python tools/convert_edm.py --source FILE.pkl --out FOLDER` makes of it"
)


def save_converted(published: Published, folder: str | Path, source: dict[str, str]) -> None:
    """Writes ``config.json`` and ``model.safetensors``, in the published precision, once the network has taken the weights.

    Args:
        published: what was read.
        folder: made if need be.
        source: name and sha256 of the file that it was read from; kept in ``config.json``.
    """
    _build(published, {})
    _write(published, Path(folder), source)


def is_edm(denoiser: Denoiser) -> bool:
    """Whether `save_edm` can write it: EDM's preconditioning around an `EDM` or `EDM2` network without extra inputs."""
    if not isinstance(denoiser, NetworkDenoiser) or not isinstance(denoiser.network, tuple(NETWORKS.values())):
        return False
    return denoiser.prediction == "edm" and not denoiser.network.scalars


def save_edm(denoiser: NetworkDenoiser, folder: str | Path) -> None:
    """Writes a denoiser that `is_edm` as `PretrainedEDM` reads it, which must be told the ends of its schedule if not EDM's."""
    network: Any = denoiser.network
    state = {key: value.detach().cpu() for key, value in network.model.state_dict().items()}
    config = {key: value for key, value in network.config.items() if not key.startswith("dropout")}
    published = Published(type(network).__name__, config, denoiser.sigma_data, state, [])
    _write(published, Path(folder), {"name": "distill", "sha256": ""})


def _write(published: Published, folder: Path, source: dict[str, str]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in published.state.items()}, folder / FILES[1])
    config = {"network": published.network, "config": published.config, "sigma_data": published.sigma_data, "source": source}
    (folder / FILES[0]).write_text(json.dumps(config, indent=2) + "\n")


def _read_folder(folder: Path) -> Published:
    from safetensors.torch import load_file

    content = read_json(folder / FILES[0])
    if content.get("network") not in NETWORKS or not isinstance(content.get("config"), dict):
        raise ValueError(f"path={str(folder)!r}: config.json has network={content.get('network')!r}: {ADVICE}.")
    state = load_file(folder / FILES[1]) if hub.reads_weights() else {}
    return Published(content["network"], content["config"], content["sigma_data"], state, [])


def _build(published: Published, settings: dict[str, Any]) -> EDM | EDM2:
    """The network with the published weights. Raises ValueError unless they are exactly its own."""
    config: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in published.config.items()}
    try:
        network = NETWORKS[published.network](**config, **settings)
        if hub.reads_weights():
            network.model.load_state_dict(published.state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{published.network} does not take these settings and weights: {error}") from error
    return network


def file_hash(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class PretrainedEDM(NetworkDenoiser):
    """An EDM or EDM2 network, under EDM's schedule and preconditioning (Karras et al. 2206.00364, table 1).

    Args:
        path: a published ``.pkl``, of which nothing is executed, or a converted folder.
        dtype: precision of a frozen teacher; weights that are trained are float32.
        dropout: of a student made of it; the published rate belongs to the diffusion training.
        dropout_resolution: the largest resolution with dropout; None for all.
        sigma_min, sigma_max: ends of the schedule.

    Attributes:
        identity: ``path`` and ``sha256`` of what was read.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not such a network; see `read_published`.
    """

    def __init__(
        self,
        path: str,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        dropout: float = 0.0,
        dropout_resolution: int | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: give a rate in [0, 1).")
        place = self.locate(path)
        published = _read_folder(place) if place.is_dir() else read_published(place)
        network = _build(published, {"dropout": dropout, "dropout_resolution": dropout_resolution})
        super().__init__(network, VarianceExploding(sigma_min, sigma_max), "edm", published.sigma_data)
        self.frozen_dtype = None if dtype is None else getattr(torch, dtype)
        digest = content_hash(place, FILES) if place.is_dir() else file_hash(place)
        self.identity = {"path": path, "sha256": digest}
        self.eval()

    @staticmethod
    def locate(path: str) -> Path:
        """The file, or the folder with all that is read of it. Raises FileNotFoundError naming what is missing."""
        place = Path(path)
        if not hub.reads_weights():
            return hub.config_folder(path)
        if place.is_file():
            return place
        missing = [name for name in FILES if not (place / name).is_file()]
        if missing:
            what = f"{missing[0]} is missing there" if place.is_dir() else "there is no such file or folder"
            raise FileNotFoundError(f"path={path!r}: {what}; {ADVICE}.")
        return place
