"""Statistics and Fréchet distance beside clean-fid's NumPy and SciPy path, and the metrics' agreement with other packages.

    python tools/bench_metrics.py speed --count 50000 --width 2048 --threads 2
    python tools/bench_metrics.py agreement --count 5000 --width 2048

``speed``: float32 features in memory, against a reference's mean and covariance, as clean-fid measures a folder: its path
(``numpy.mean``, ``numpy.cov``, ``cleanfid.fid.frechet_distance``) and ours, batch by batch, in one process, in turn. Wall and
CPU time, and by how much each raises the peak memory of the process; ours, which must not depend on the number of features,
first.
``agreement``: relative differences on the same features. Features are positive and correlated, with a spectrum that decays, as
those of the Inception network; packages are given float64 for the kernel distance, of which float32 leaves two digits. A
package that cannot run with the installed SciPy is said to fail.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy
import torch

from distill.command_line import Parser
from distill.metrics import GaussianStatistics, kernel_distance, neighbours

BATCH = 2048
SUBSETS = 5
SCALE = 8
"""Brings features to a mean of 0.2, near that of Inception's."""


def features(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Features ``(count, width)``, float32, at least 0."""
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    scales = torch.arange(1, width + 1) ** -0.5
    generator, result = torch.Generator().manual_seed(seed), torch.empty(count, width)
    for first in range(0, count, BATCH):
        rows = result[first : first + BATCH]
        rows.copy_(((torch.randn(rows.shape, generator=generator) + shift) * scales @ mix).relu() * SCALE)
    return result


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What ``work`` returns, its wall and CPU seconds, and the MiB by which it raised the peak of memory."""
    peak, cpu, wall = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), time.perf_counter()
    value = work()
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    raised = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    return value, {**{name: round(figure, 3) for name, figure in seconds.items()}, "mebibytes": round(raised)}


def statistics_of(rows: torch.Tensor) -> GaussianStatistics:
    """Streamed, as tools/fid.py does it."""
    result = GaussianStatistics()
    for batch in rows.split(BATCH):
        result.update(batch)
    return result


def theirs(rows: numpy.ndarray, mean: numpy.ndarray, covariance: numpy.ndarray) -> float:
    """What clean-fid does with the features of a folder."""
    from cleanfid.fid import frechet_distance

    return float(frechet_distance(numpy.mean(rows, axis=0), numpy.cov(rows, rowvar=False), mean, covariance))


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Both paths in turn."""
    reference = statistics_of(features(2 * options.width, options.width, seed=1))
    rows = features(options.count, options.width, seed=2, shift=0.1)
    small, _ = timed(lambda: statistics_of(rows[:BATCH]).distance(reference))  # libraries loaded, threads started
    own, our_times = timed(lambda: statistics_of(rows).distance(reference))
    mean, covariance = reference.mean.numpy(), reference.covariance.numpy()
    other, their_times = timed(lambda: attempt(lambda: theirs(rows.numpy(), mean, covariance)))
    result = {"ours": {"distance": own, **our_times}, "clean-fid": {"distance": other, **their_times}}
    if isinstance(other, float):
        result["times faster"] = {kind: round(their_times[kind] / our_times[kind], 2) for kind in ("wall", "cpu")}
        result["relative difference"] = abs(own - other) / own
    result["mebibytes of a matrix of d x d"] = options.width**2 * 8 / 2**20
    return result


def attempt(work: Callable[[], Any]) -> Any:
    """What ``work`` returns, or why it failed."""
    try:
        return work()
    except TypeError as error:
        return f"fails: {error}"


def agreement(options: argparse.Namespace) -> dict[str, Any]:
    """Relative differences of each metric to each package that has it."""
    from cleanfid.fid import kernel_distance as clean_kernel_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric
    from torchmetrics.image.fid import _compute_fid

    fake, real = (features(options.count, options.width, seed, shift) for seed, shift in ((1, 0.1), (2, 0.0)))
    ours, reals = statistics_of(fake), statistics_of(real)
    sides = [fid_features_to_statistics(rows.double()) for rows in (fake, real)]
    moments = [side[name] for side in sides for name in ("mu", "sigma")]
    frechet = {
        "torchmetrics": float(_compute_fid(*map(torch.from_numpy, moments))),
        "torch-fidelity": fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"],
        "clean-fid": attempt(lambda: theirs(fake.numpy(), *moments[2:])),
    }
    numpy.random.seed(0)
    clean_kid = clean_kernel_distance(fake.double().numpy(), real.double().numpy(), num_subsets=SUBSETS)
    settings: dict[str, Any] = {"kid_subsets": SUBSETS, "kid_subset_size": 1000, "rng_seed": 0, "verbose": False}
    fidelity_kid = kid_features_to_metric(fake.double(), real.double(), **settings)["kernel_inception_distance_mean"]
    their_shares, our_shares = prc_features_to_metric(fake, real, verbose=False), neighbours(fake, real)
    result = {"frechet": compared(ours.distance(reals), frechet)}
    result["kid"] = compared(kernel_distance(fake, real, SUBSETS).mean, {"clean-fid": clean_kid})
    own_kid = kernel_distance(fake, real, SUBSETS, convention="torch-fidelity").mean
    result["kid, torch-fidelity's draws"] = compared(own_kid, {"torch-fidelity": fidelity_kid})
    for name in ("precision", "recall"):
        result[name] = compared(getattr(our_shares, name), {"torch-fidelity": their_shares[name]})
    return result


def compared(own: float, others: dict[str, Any]) -> dict[str, Any]:
    """A figure, and the relative differences of others to it."""
    differences = {name: abs(other - own) / abs(own) if isinstance(other, float) else other for name, other in others.items()}
    return {"ours": own, "relative differences": differences}


def main() -> None:
    """Measures, prints JSON."""
    parser = Parser(__doc__)
    parser.add_argument("what", choices=["speed", "agreement"])
    parser.add_argument("--count", type=int, default=5000, help="features of a set")
    parser.add_argument("--width", type=int, default=2048, help="numbers in each")
    parser.add_argument("--threads", type=int, default=2, help="torch's; NumPy's are set by OMP_NUM_THREADS before the start")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # of SciPy, about the argument that it will remove
    result = speed(options) if options.what == "speed" else agreement(options)
    packages = ("torch", "numpy", "scipy", "clean-fid", "torch-fidelity", "torchmetrics")
    print(json.dumps(vars(options) | result | {"versions": {name: version(name) for name in packages}}, indent=2))


if __name__ == "__main__":
    main()
