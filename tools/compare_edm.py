"""Our EDM and EDM2 networks beside NVIDIA's own code on the same random weights: the largest differences, as JSON.

    git clone https://github.com/NVlabs/edm && git clone https://github.com/NVlabs/edm2
    python tools/compare_edm.py --edm edm --edm2 edm2 [--full]

Theirs runs in a process of its own, which makes a network with random weights everywhere (those that begin at zero too), and
leaves a pickle as published ones are, inputs, and its outputs F and D at five noise levels. The pickle is then read and
converted here. ``--full`` compares the published sizes (16 GB of memory, minutes) instead of small ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from distill.command_line import Parser
from distill.edm_checkpoints import PretrainedEDM, save_converted
from distill.edm_published import read_published

SIGMAS = [0.002, 0.1, 0.7, 5.0, 80.0]

SONG = {"model_type": "SongUNet", "dropout": 0.13, "augment_dim": 9}
NCSNPP = {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}
SMALL_SONG = {"img_resolution": 16, "model_channels": 32, "channel_mult": [1, 2, 2], "num_blocks": 2, "attn_resolutions": [8]}
SMALL = {"img_resolution": 16, "model_channels": 64, "channel_mult": [1, 2, 3], "num_blocks": 2, "attn_resolutions": [8]}
CIFAR = {"img_resolution": 32, "model_channels": 128, "channel_mult": [2, 2, 2]}
IMAGENET = {"img_resolution": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpmpp": ("edm", {**SONG, "label_dim": 0}),
    "ddpmpp, classes": ("edm", {**SONG, "label_dim": 10}),
    "ncsnpp": ("edm", {**SONG, **NCSNPP, "label_dim": 0}),
    "ncsnpp, classes": ("edm", {**SONG, **NCSNPP, "label_dim": 10}),
    "adm": ("edm", {"model_type": "DhariwalUNet", "label_dim": 0}),
    "adm, classes": ("edm", {"model_type": "DhariwalUNet", "label_dim": 1000}),
    "edm2": ("edm2", {"label_dim": 0}),
    "edm2, classes": ("edm2", {"label_dim": 1000}),
}

THEIRS = '''
import json, pickle, sys
import torch
sys.path.insert(0, ".")
repository, settings, sigmas, out = json.loads(sys.argv[1])
if repository == "edm":
    from training.networks import EDMPrecond as Precond
else:
    from training.networks_edm2 import Precond
torch.manual_seed(0)
net = Precond(img_channels=3, use_fp16=False, **settings).eval().requires_grad_(False)
for value in net.parameters():
    noise = torch.randn_like(value)
    value.copy_(noise / value[0].numel() ** 0.5 if value.ndim > 1 else value + 0.2 * noise if value.ndim else 1 + 0.2 * noise)
with open(out + "/network.pkl", "wb") as stream:
    pickle.dump({"ema": net}, stream)
size, classes = settings["img_resolution"], settings["label_dim"]
x = torch.randn(4, 3, size, size)
labels = torch.arange(4) * 7 % classes if classes else None
rows = torch.eye(classes)[labels] if classes else None
if classes:
    labels[3], rows[3] = classes, 0
inner = net.model if repository == "edm" else net.unet
results = {"x": x, "labels": labels, "F": [], "D": []}
for sigma in sigmas:
    sigma = torch.full((4,), sigma)
    scaled = x / (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1)
    results["F"].append(inner(scaled, sigma.log() / 4, rows))
    results["D"].append(net(x * sigma.reshape(-1, 1, 1, 1), sigma, rows))
torch.save(results, out + "/results.pt")
'''


def sizes(repository: str, settings: dict[str, Any], full: bool) -> dict[str, Any]:
    """The published sizes of a case, or small ones."""
    song = settings.get("model_type") == "SongUNet"
    if full:
        return settings | (CIFAR if song else IMAGENET)
    return settings | (SMALL_SONG if song else SMALL) | ({"label_dim": 10} if settings["label_dim"] else {})


@torch.no_grad()
def compare(repository: str, checkout: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Largest differences of F and D, and the largest F and D themselves."""
    with tempfile.TemporaryDirectory() as folder:
        job = json.dumps([repository, settings, SIGMAS, folder])
        subprocess.run([sys.executable, "-W", "ignore", "-c", THEIRS, job], cwd=checkout, check=True)
        save_converted(read_published(f"{folder}/network.pkl"), f"{folder}/converted", {})
        theirs = torch.load(Path(folder, "results.pt"), weights_only=True)
        ours = PretrainedEDM(f"{folder}/converted")
    cond = {} if theirs["labels"] is None else {"labels": theirs["labels"]}
    result = {"F": 0.0, "D": 0.0, "largest F": 0.0, "largest D": 0.0}
    for index, level in enumerate(SIGMAS):
        sigma = torch.full((4,), level)
        scaled = theirs["x"] / (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1)
        noisy = theirs["x"] * sigma.reshape(-1, 1, 1, 1)
        pairs = {"F": ours.network(scaled, sigma.log() / 4, cond), "D": ours(noisy, sigma, cond)}
        for name, value in pairs.items():
            expected = theirs[name][index]
            result[name] = max(result[name], float((value - expected).abs().max()))
            result[f"largest {name}"] = max(result[f"largest {name}"], float(expected.abs().max()))
    return result


def main(arguments: list[str] | None = None) -> None:
    """Prints the differences of every case whose code is given."""
    parser = Parser(__doc__)
    parser.add_argument("--edm", type=Path, help="a checkout of NVlabs/edm")
    parser.add_argument("--edm2", type=Path, help="a checkout of NVlabs/edm2")
    parser.add_argument("--full", action="store_true", help="the published sizes")
    options = parser.parse_args(arguments)
    checkouts = {name: path for name, path in (("edm", options.edm), ("edm2", options.edm2)) if path is not None}
    for name, path in checkouts.items():
        if not (path / "torch_utils" / "persistence.py").is_file():
            parser.error(f"--{name} {path}: no checkout of NVlabs/{name} (torch_utils/persistence.py is missing there)")
    for case, (repository, settings) in CASES.items():
        if repository in checkouts:
            result = compare(repository, checkouts[repository], sizes(repository, settings, options.full))
            print(json.dumps({"case": case, **result}), flush=True)


if __name__ == "__main__":
    main()
