"""How far a set of images is from another, as JSON with everything that is needed to compare it with other figures.

    python tools/fid.py --samples samples/cd --reference digits --features pixels --out samples/cd/fid.json
    python tools/fid.py --samples samples/lcm --reference data/coco --metrics clip_score --clip weights/clip-vit-base-patch16
    python tools/fid.py --samples samples/sd15 --reference data/coco --features clean=weights/inception-2015-12-05.pt \\
        --metrics frechet kid precision recall --num 30000
    torchrun --nproc-per-node 8 -- tools/fid.py ...       # or srun: the same figures

A set is an .npz file (``arr_0`` uint8 images n,h,w,c; optional ``arr_1`` labels), a folder with ``samples.npz``, pictures or
shards, a run or its samples folder (whose ``samples.json`` is checked and copied into the result), shards
(``'data/{00..09}.tar'``), or the word ``digits``: scikit-learn's 1,797 real ones. A reference may also be statistics: an .npz
file with ``mu`` and ``sigma``, or clean-fid's own (``clean-fid:cifar10,32,train``). Statistics of references are kept by
content hash, in ``--cache``.

Features: ``pixels``; ``classifier`` (configs/digits/classifier.yaml); ``clean``, clean-fid's protocol; ``legacy``, that of
torch-fidelity; ``dinov2``; ``clip``. ``NAME=PATH`` or ``PATH`` alone name other weights. Nothing is downloaded. Labelled 8x8x1
samples are also read by a classifier of digits, which gives ``accuracy``. ``--bootstrap 1000`` adds a 95 % interval of the
Fréchet distance: what other samples of the same network would give (distill/metrics/bootstrap.py).

``clip_score`` is 100 max(cos, 0) of each image and its prompt: those of ``samples.json`` in turn, or the ``.txt`` beside each
picture. Alone, it takes images of any size, and the reference is only recorded.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch

from distill.command_line import Parser, Refusal, writable
from distill.metrics.bootstrap import FEWEST
from distill.metrics.clip_score import ClipScorer, clip_score, read_prompts
from distill.metrics.digits import read_digits
from distill.metrics.extractors import KINDS, find_extractor, make_extractor
from distill.metrics.features import FeatureExtractor, from_uint8
from distill.metrics.frechet import GaussianStatistics
from distill.metrics.image_sets import ImageSet, read_set
from distill.metrics.measuring import (
    METRICS,
    OF_ROWS,
    WITHOUT_REFERENCE,
    Measured,
    Sampling,
    compute,
    measure_set,
    measured_protocol,
    unequal,
)
from distill.metrics.processes import ALONE, Processes, joined, own_device
from distill.metrics.statistics_files import (
    cache_file,
    clean_fid_file,
    default_cache,
    is_statistics,
    keep,
    kept,
    read_statistics,
)

PACKAGES = ("distill", "torch", "numpy", "scikit-learn")
BATCH = 512


def statistics(images: numpy.ndarray, features: FeatureExtractor) -> GaussianStatistics:
    """Mean and covariance of the features of uint8 images ``(n, h, w, c)``."""
    result = GaussianStatistics()
    for start in range(0, len(images), BATCH):
        result.update(features(from_uint8(torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2))))
    return result


def check(options: argparse.Namespace) -> tuple[str, dict[str, Any] | None]:
    """The name of the features and what ``--compare-to`` holds. Raises Refusal for options that cannot be followed."""
    if wrong := [metric for metric in options.metrics if metric not in METRICS]:
        raise Refusal(f"--metrics {' '.join(wrong)}: unknown; give some of: {', '.join(METRICS)}")
    bounds = {"num": 2, "batch_size": 1, "kid_subsets": 1, "kid_subset_size": 2, "seed": 0, "bootstrap": 0}
    for name, least in bounds.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise Refusal(f"--{name.replace('_', '-')} {value}: give at least {least}")
    if options.bootstrap and options.bootstrap < FEWEST:
        raise Refusal(f"--bootstrap {options.bootstrap}: give at least {FEWEST} resamples, better 1000, or 0 for no interval")
    if options.bootstrap and "frechet" not in options.metrics:
        raise Refusal(f"--bootstrap {options.bootstrap}: is the interval of frechet; name it in --metrics, or leave it out")
    if options.out is not None and options.out.is_dir():
        raise Refusal(f"--out {options.out}: is a folder; give the name of a file, e.g. {options.out / 'fid.json'}")
    if options.out is not None:
        with writable(f"--out {options.out}", "file"):
            options.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        features = find_extractor(options.features)[0]
    except (ValueError, FileNotFoundError) as error:
        raise Refusal(f"--features {error}") from error
    if options.compare_to is None:
        return features, None
    try:
        other = json.loads(options.compare_to.read_text())
        if not {"protocol", "metrics"} <= other.keys():
            raise ValueError("no protocol and metrics in it")
        return features, other
    except (OSError, ValueError, AttributeError) as error:
        raise Refusal(f"--compare-to {options.compare_to}: is no result of this tool ({error}); measure again") from error


def make(options: argparse.Namespace, logits: bool = False) -> FeatureExtractor:
    """The extractor. Raises Refusal."""
    try:
        return make_extractor(options.features, logits)
    except (ValueError, FileNotFoundError) as error:
        raise Refusal(f"--features {error}") from error


def make_scorer(options: argparse.Namespace) -> ClipScorer | None:
    """What a CLIP score is computed by, if one is asked for. Raises Refusal."""
    if "clip_score" not in options.metrics:
        return None
    wanted = "clip" if options.clip == "clip" else f"clip={options.clip.removeprefix('clip=')}"
    try:
        return ClipScorer(find_extractor(wanted)[1])
    except (ValueError, FileNotFoundError) as error:
        raise Refusal(f"--clip {error}") from error


def statistics_of_reference(options: argparse.Namespace, features: FeatureExtractor) -> tuple[Measured, dict[str, Any]] | None:
    """Statistics that ``--reference`` names, and what a result says of them; None if it names images. Raises Refusal."""
    value = options.reference
    try:
        file = clean_fid_file(value) if value.startswith("clean-fid:") else Path(value)
        if not (file.is_file() and is_statistics(file)):
            return None
        found, record = read_statistics(file)
    except (ValueError, FileNotFoundError) as error:
        raise Refusal(f"--reference {error}") from error
    if value.startswith("clean-fid:") and features.name != "clean":
        raise Refusal(f"--reference {value}: are statistics of another protocol; give --features clean, or images")
    if record["features"] not in (None, features.protocol):
        own = "statistics of another protocol than --features"
        raise Refusal(f"--reference {value}: holds {own}: {record['features']}; give images, or those features")
    if wanted := [metric for metric in options.metrics if metric in OF_ROWS]:
        need = f"need each image of --reference {value}, which holds statistics"
        raise Refusal(f"--metrics {' '.join(wanted)}: {need}; give images")
    return Measured(found), record["reference"]


def measure_reference(
    options: argparse.Namespace, images: ImageSet, features: FeatureExtractor, sampling: Sampling
) -> tuple[Measured, bool]:
    """The reference, and whether its statistics were kept from an earlier call; nothing of it where no metric reads it."""
    if not set(options.metrics) - WITHOUT_REFERENCE:
        return Measured(GaussianStatistics()), False
    rows, processes = bool(set(options.metrics) & OF_ROWS), sampling.processes
    file = cache_file(options.cache or default_cache(), images.sha256, features.hash)
    with writable(f"--cache {file.parent}", "folder"):
        file.parent.mkdir(parents=True, exist_ok=True)
    found = None if rows or processes.rank else kept(file)
    if processes.gather(found is not None)[0]:
        return Measured(found[0] if found else GaussianStatistics()), True
    measured = measure_set(images, features, sampling, rows)
    if processes.rank == 0:
        with writable(f"--cache {file.parent}", "folder"):
            keep(file, measured.statistics, {"reference": images.describe(), "features": features.protocol})
    return measured, False


def measure_samples(
    options: argparse.Namespace, images: ImageSet, features: FeatureExtractor, sampling: Sampling
) -> Measured:
    """The samples; nothing of them where no metric compares them."""
    if not set(options.metrics) - WITHOUT_REFERENCE:
        return Measured(GaussianStatistics())
    return measure_set(images, features, sampling, with_rows=bool(set(options.metrics) & OF_ROWS) or options.bootstrap > 0)


def evaluate(options: argparse.Namespace, processes: Processes = ALONE) -> dict[str, Any]:
    """Reads, measures, and says by what protocol. Raises Refusal."""
    name, other = check(options)
    features = make(options)
    keys = ("batch_size", "kid_subsets", "kid_subset_size", "kid_convention", "seed", "bootstrap")
    drawn = {key: getattr(options, key) for key in keys}
    sampling = Sampling(**drawn, device=own_device(options.device), processes=processes)
    logits = make(options, logits=True) if "inception_score" in options.metrics else None
    scorer, compared_sets = make_scorer(options), bool(set(options.metrics) - WITHOUT_REFERENCE)
    stated = statistics_of_reference(options, features)
    samples = read_set("--samples", options.samples, processes, options.num)
    prompts = read_prompts("--samples", samples) if scorer is not None else []
    if stated is None:
        images = read_set("--reference", options.reference, processes)
        if compared_sets and samples.shape != images.shape and name in ("pixels", "classifier"):
            sizes = f"its images are {samples.shape} (h, w, c), those of --reference {images.shape}"
            raise Refusal(f"--samples {samples.path}: {sizes}; compare images of one size")
        (reference, was_kept), described = measure_reference(options, images, features, sampling), images.describe()
    else:
        (reference, described), was_kept = stated, False
    measured = measure_samples(options, samples, features, sampling)
    if compared_sets and processes.rank == 0 and reference.statistics.total.shape != measured.statistics.total.shape:
        widths = [statistics.total.numel() for statistics in (measured.statistics, reference.statistics)]
        found = f"has {widths[1]} features, the samples {widths[0]}"
        raise Refusal(f"--reference {options.reference}: {found}; give images of one kind")
    scored = measure_set(samples, logits, sampling, True).rows if logits is not None else None
    try:
        metrics = compute(options.metrics, measured, reference, scored, sampling)
    except ValueError as error:
        raise Refusal(f"--samples {samples.path}: {error}") from error
    if scorer is not None:
        metrics["clip_score"] = clip_score(samples, prompts, scorer, sampling.batch_size, sampling.device, processes)
    protocol = measured_protocol(features.protocol, described["sha256"], samples.count, metrics)
    packages = {*KINDS[name].packages, *(() if scorer is None else KINDS["clip"].packages)}
    result = describe(features, samples, described | {"kept": was_kept}, metrics, protocol, tuple(sorted(packages)))
    return result | (compared(options.compare_to, other, result) if other is not None and processes.rank == 0 else {})


def describe(
    features: FeatureExtractor,
    samples: ImageSet,
    reference: dict[str, Any],
    metrics: dict[str, dict[str, Any]],
    protocol: dict[str, Any],
    packages: tuple[str, ...],
) -> dict[str, Any]:
    """The result: figures first, then all that they depend on."""
    result: dict[str, Any] = {"distance": metrics["frechet"]["value"]} if "frechet" in metrics else {}
    if samples.shape == (8, 8, 1) and samples.labels is not None:
        read = read_digits(samples.read(range(samples.count))).numpy()
        result["accuracy"] = float((read == samples.labels).mean())
    return result | {
        "metrics": metrics,
        "features": {"name": features.name, "hash": features.hash, "protocol": features.protocol},
        "samples": samples.describe(),
        "reference": reference,
        "protocol": protocol,
        "versions": {package: version(package) for package in (*PACKAGES, *packages)},
    }


def compared(path: Path, other: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """This result's figures beside those of another. Raises Refusal if the protocols differ."""
    if difference := unequal(result["protocol"], other["protocol"]):
        raise Refusal(f"--compare-to {path}: was measured by another protocol, {difference}; measure both alike")
    common = {metric: other["metrics"][metric]["value"] for metric in result["metrics"] if metric in other["metrics"]}
    return {"compared": {"path": str(path), "metrics": common}}


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Measures, and writes the result on one process; None on the others. Raises Refusal."""
    with joined() as processes:
        result = evaluate(options, processes)
    if processes.rank:
        return None
    if options.out is not None:
        with writable(f"--out {options.out}", "file"):
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


def main(arguments: list[str] | None = None) -> None:
    """Reads the options, prints the result; ends with 2 and one line on stderr if they cannot be followed."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--samples", required=True, help="the images to measure: .npz, a folder, shards, or digits")
    add("--reference", required=True, help="the images to measure them against, likewise, or statistics")
    add("--features", default="pixels", help=f"what is compared: {', '.join(KINDS)}, NAME=PATH or PATH (default pixels)")
    add("--clip", default="clip", help=f"folder of the CLIP score's towers, or clip=PATH (default {KINDS['clip'].path})")
    add("--metrics", nargs="+", default=["frechet"], help=f"some of: {', '.join(METRICS)} (default frechet)")
    add("--num", type=int, help="how many samples count, the first ones; fewer are refused (default all)")
    add("--batch-size", type=int, default=128, help="images at once")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where features are computed")
    add("--kid-subsets", type=int, default=100, help="parts of the kernel distance")
    add("--kid-subset-size", type=int, default=1000, help="images in each")
    add("--kid-convention", default="clean-fid", choices=["clean-fid", "torch-fidelity"], help="in what order they are drawn")
    add("--bootstrap", type=int, default=0, help="resamples of the samples for an interval of frechet (default 0: none)")
    add("--seed", type=int, default=0, help="of the parts of kernel distance and Inception score, and of resamples")
    add("--cache", type=Path, help=f"folder of references' statistics (default {default_cache()})")
    add("--compare-to", type=Path, help="a result to put beside this one, if the protocols are equal")
    add("--out", type=Path, help="a file for the JSON, beside printing it")
    try:
        if (result := run(parser.parse_args(arguments))) is not None:
            print(json.dumps(result, indent=2))
    except Refusal as refusal:
        parser.error(str(refusal))


if __name__ == "__main__":
    main()
