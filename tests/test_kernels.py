"""Kernels and MMD: closed forms between Gaussians, unbiasedness, classes, chunks that keep nothing, two processes as one."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from two_ranks import found_by_two_ranks

from distill.kernels import (
    DistanceKernel,
    Kernel,
    LaplaceKernel,
    LinearKernel,
    PolynomialKernel,
    RadialKernel,
    gather,
    squared_distances,
    squared_mmd,
)

MATCHINGS = ["all", "joint", "class"]
KERNELS: dict[str, Kernel] = {
    "cubic": PolynomialKernel(),
    "linear": LinearKernel(),
    "radial": RadialKernel(),
    "bandwidths": RadialKernel([0.5, 2.0]),
    "laplace": LaplaceKernel(2.0),
}
BY_HAND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cubic": lambda a, b: (a @ b / len(a) + 1) ** 3,
    "linear": lambda a, b: a @ b / len(a),
    "radial": lambda a, b: torch.exp(-(a - b).square().mean()),
    "bandwidths": lambda a, b: (torch.exp(-2 * (a - b).square().sum()) + torch.exp(-(a - b).square().sum() / 8)) / 2,
    "laplace": lambda a, b: torch.exp(-(a - b).norm().clamp(min=1e-4) / 2),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_by_hand_and_in_groups(name):
    """The features of float32 are compared in float64, and groups are compared each by itself."""
    a, b = normal(2, 4, 3).float(), normal(2, 5, 3, seed=1).float()
    expected = [[[BY_HAND[name](x.double(), y.double()) for y in b[g]] for x in a[g]] for g in range(2)]
    torch.testing.assert_close(KERNELS[name](a, b), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_polynomial_with_settings_of_its_own():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    assert PolynomialKernel(2, 0.5, 3.0)(a, b).tolist() == [[8.5**2]] and LinearKernel()(a, b).tolist() == [[5.5]]


@pytest.mark.parametrize("kernel", [LaplaceKernel(), LaplaceKernel(0.7), RadialKernel(), RadialKernel([0.3, 4.0])])
def test_a_scale_multiplies_the_distances_of_its_group(kernel: DistanceKernel):
    a, b, scale = normal(2, 4, 3), normal(2, 4, 3, seed=1), torch.tensor([0.5, 3.0], dtype=torch.float64)
    expected = torch.stack([kernel(factor * x, factor * y) for factor, x, y in zip(scale, a, b, strict=True)])
    torch.testing.assert_close(kernel(a, b, scale), expected, rtol=1e-12, atol=0)


def test_laplace_is_that_of_inductive_moment_matching():
    """``exp(-w sqrt(max(|a - b|^2, 1e-8)) / D)`` (2503.07565), where nothing differs too: there w and D still count."""
    a, weight = normal(3, 4, 6), torch.tensor([1.0, 50.0, 1000.0], dtype=torch.float64)
    b = torch.cat([a[:, :2], normal(3, 2, 6, seed=1)], 1)
    squares = (a[:, :, None] - b[:, None]).square().sum(-1)
    expected = torch.exp(-weight[:, None, None] * squares.clamp(min=1e-8).sqrt() / 6)
    torch.testing.assert_close(LaplaceKernel()(a, b, weight), expected, rtol=1e-9, atol=0)


def test_laplace_has_no_gradient_where_nothing_differs():
    a = normal(5, 3).requires_grad_()
    (own,) = torch.autograd.grad(LaplaceKernel(0.1)(a, a).diagonal().sum(), a)
    (apart,) = torch.autograd.grad(LaplaceKernel(0.1)(a, a.detach() + 1e-3).diagonal().sum(), a)
    assert torch.equal(own, torch.zeros_like(a))
    torch.testing.assert_close(apart, torch.full_like(a, 10 * math.exp(-(3**0.5) / 100) / 3**0.5), rtol=1e-6, atol=0)


def test_near_features_keep_their_distance():
    """Of features whose squares are 10^4, apart by 10^-3: float32 would see 0 or twice as much."""
    a = 100 + normal(4, 3).float()
    b = a + 1e-3
    expected = (a.double()[:, None] - b.double()).square().sum(-1)
    torch.testing.assert_close(squared_distances(a, b), expected, rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------------------------------------- estimators


def mmd_by_loops(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], unbiased: bool) -> float:
    """The definition, pair by pair."""
    total = 0.0
    for side in (x, y):
        pairs = [(a, b) for i, a in enumerate(side) for j, b in enumerate(side) if i != j or not unbiased]
        total += float(sum(kernel(a, b) for a, b in pairs)) / len(pairs)
    return total - 2 * float(sum(kernel(a, b) for a in x for b in y)) / (len(x) * len(y))


X, Y = normal(9, 3), 0.8 * normal(7, 3, seed=1) + 0.5
# class 1 has one sample in y, class 3 none in y, class 4 none in x
X_LABELS, Y_LABELS = torch.tensor([0, 0, 1, 2, 1, 2, 0, 3, 3]), torch.tensor([2, 0, 0, 1, 2, 4, 4])


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_mmd_is_the_mean_over_pairs(name, unbiased):
    value = squared_mmd(X, Y, KERNELS[name], unbiased)
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(mmd_by_loops(X, Y, BY_HAND[name], unbiased), rel=1e-11)
    assert float(squared_mmd(Y, X, KERNELS[name], unbiased)) == pytest.approx(float(value), rel=1e-11)


@pytest.mark.parametrize("unbiased, counted", [(True, [0, 2]), (False, [0, 1, 2])])
@pytest.mark.parametrize("name", ["cubic", "laplace"])
def test_class_matching_is_the_mean_over_the_classes_that_both_sides_have(name, unbiased, counted):
    parts = [mmd_by_loops(X[X_LABELS == c], Y[Y_LABELS == c], BY_HAND[name], unbiased) for c in counted]
    value = squared_mmd(X, Y, KERNELS[name], unbiased, X_LABELS, Y_LABELS, "class")
    assert float(value) == pytest.approx(sum(parts) / len(parts), rel=1e-11)


@pytest.mark.parametrize("unbiased", [True, False])
def test_joint_matching_is_the_product_kernel(unbiased):
    def product(a: Tensor, b: Tensor) -> Tensor:
        return BY_HAND["cubic"](a[1:], b[1:]) * (a[0] == b[0])

    x, y = (torch.cat([label[:, None], side], 1) for side, label in ((X, X_LABELS), (Y, Y_LABELS)))
    value = squared_mmd(X, Y, KERNELS["cubic"], unbiased, X_LABELS, Y_LABELS, "joint")
    assert float(value) == pytest.approx(mmd_by_loops(x, y, product, unbiased), rel=1e-11)


def test_classes_without_a_counterpart_are_no_distance_and_no_gradient():
    x = X.clone().requires_grad_()
    value = squared_mmd(x, Y, KERNELS["cubic"], True, X_LABELS, Y_LABELS + 10, "class")
    value.backward()
    assert float(value.detach()) == 0 and torch.equal(x.grad, torch.zeros_like(x))


def test_kid_is_that_of_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    y = 0.8 * normal(9, 3, seed=1) + 0.5
    assert float(squared_mmd(X, y, PolynomialKernel())) == pytest.approx(float(poly_mmd(X, y)), rel=1e-11)


def estimates_of_equal_laws(name: str, matching: str, unbiased: bool, draws: int = 150) -> Tensor:
    """Of 8 and 5 samples of one normal law, in two classes."""
    columns = [normal(draws, size, 3, seed=size) for size in (8, 5)]
    labels = [normal(draws, size, seed=10 + size) > 0 for size in (8, 5)]
    rows = zip(*columns, *(label.long() for label in labels), strict=True)
    return torch.stack([squared_mmd(x, y, KERNELS[name], unbiased, c, d, matching) for x, y, c, d in rows])


@pytest.mark.parametrize(
    "name, matching", [("cubic", "all"), ("cubic", "joint"), ("cubic", "class"), ("bandwidths", "all"), ("laplace", "all")]
)
def test_unbiased_estimates_of_equal_laws_have_mean_zero(name, matching):
    """150 draws: the mean is within 4 standard errors of 0; by chance it is outside them once in 15,000 times."""
    estimates = estimates_of_equal_laws(name, matching, True)
    assert abs(float(estimates.mean())) < 4 * float(estimates.std()) / 150**0.5
    assert float(estimates.min()) < 0


def estimates_of_paired_laws(matching: str, paired: bool, draws: int = 300) -> Tensor:
    """Of 8 samples and as many images of the same three classes, row for row: one law, but a row's two share their class."""
    labels = torch.randint(3, (draws, 8), generator=torch.Generator().manual_seed(7))
    x, y = (2.0 * labels[..., None] + normal(draws, 8, 2, seed=seed) for seed in (1, 2))
    kernel = RadialKernel([2.0])
    rows = zip(x, y, labels, strict=True)
    return torch.stack([squared_mmd(a, b, kernel, True, c, c, matching, paired=paired) for a, b, c in rows])


@pytest.mark.parametrize("matching", ["all", "joint", "class"])
def test_unbiased_estimates_of_rows_that_share_a_label_have_mean_zero_if_they_are_said_to_be_paired(matching):
    """The pairs i = j of a sample and its image always agree in class: counted, they would draw the samples together."""
    means = {}
    for paired in (True, False):
        estimates = estimates_of_paired_laws(matching, paired)
        means[paired] = float(estimates.mean()) / float(estimates.std()) * 300**0.5
    assert abs(means[True]) < 4
    # within a class its samples and images are independent, tied labels or not
    assert abs(means[False]) < 4 if matching == "class" else means[False] < -10


def test_paired_estimates_are_the_same_by_chunks_and_need_equal_sizes():
    x, y = normal(9, 3), normal(9, 3, seed=1)
    labels = torch.arange(9) % 3
    whole, parts = (squared_mmd(x, y, KERNELS["cubic"], True, labels, labels, "joint", chunk, True) for chunk in (None, 4))
    assert float(whole) == pytest.approx(float(parts), rel=1e-12)
    alike = squared_mmd(x, y, KERNELS["cubic"], False, paired=True)
    assert float(alike) == pytest.approx(float(squared_mmd(x, y, KERNELS["cubic"], False)), rel=1e-12)
    with pytest.raises(ValueError, match="paired=True, of 9 and 8"):
        squared_mmd(x, y[:8], KERNELS["cubic"], paired=True)


def test_biased_estimates_of_equal_laws_are_above_zero():
    estimates = estimates_of_equal_laws("cubic", "all", False)
    assert float(estimates.mean()) > 15 * float(estimates.std()) / 150**0.5 and float(estimates.min()) > 0


# ----------------------------------------------------------------------------------------------- closed forms, Gaussians


MEANS = torch.tensor([[0.3, -0.2, 0.5], [-0.4, 0.4, 0.6]], dtype=torch.float64)
ROOTS = torch.tensor(
    [[[0.3, 0.0, 0.0], [0.1, 0.2, 0.0], [0.0, -0.1, 0.2]], [[0.2, 0.0, 0.0], [-0.2, 0.4, 0.0], [0.0, 0.1, 0.4]]],
    dtype=torch.float64,
)
COVARIANCES = ROOTS @ ROOTS.mT


def polynomial_mmd(degree: int) -> float:
    """``E (x.y)^p`` is the product of the p-th moment tensors, so that they differ by a square; binomials go before."""
    moments = []
    for mean, covariance in zip(MEANS, COVARIANCES, strict=True):
        mixed = torch.einsum("i,jk->ijk", mean, covariance)
        cubes = torch.einsum("i,j,k->ijk", mean, mean, mean) + mixed + mixed.permute(1, 0, 2) + mixed.permute(1, 2, 0)
        moments.append([mean, covariance + torch.outer(mean, mean), cubes])
    squares = [float((a - b).square().sum()) for a, b in zip(*moments, strict=True)]
    factors = [1, 0, 0] if degree == 1 else [3, 3, 1]
    return sum(factor * square / 3 ** (order + 1) for order, (factor, square) in enumerate(zip(factors, squares, strict=True)))


def radial_mmd(bandwidth: float) -> float:
    """``x - y`` is normal: ``E exp(-|u|^2 / (2 h^2)) = |1 + S / h^2|^(-1/2) exp(-m (S + h^2)^-1 m / 2)``."""

    def expected(mean: Tensor, covariance: Tensor) -> float:
        wider = covariance + bandwidth**2 * torch.eye(3, dtype=torch.float64)
        size = torch.linalg.det(wider / bandwidth**2) ** -0.5
        return float(size * torch.exp(-mean @ torch.linalg.solve(wider, mean) / 2))

    nothing = torch.zeros(3, dtype=torch.float64)
    within = sum(expected(nothing, 2 * covariance) for covariance in COVARIANCES)
    return within - 2 * expected(MEANS[0] - MEANS[1], COVARIANCES.sum(0))


CLOSED = {
    "cubic": polynomial_mmd(3),
    "linear": polynomial_mmd(1),
    "radial": radial_mmd(1.5**0.5),
    "bandwidths": (radial_mmd(0.5) + radial_mmd(2.0)) / 2,
}


def in_parts(x: Tensor, y: Tensor, kernel: Kernel) -> float:
    """The mean of the unbiased estimates of parts of 500 and 500 samples: a little less certain than that of all at once.

    Of 10^5 samples it compares 1.5e8 pairs rather than 3e10.
    """
    parts = [squared_mmd(a, b, kernel, chunk=250) for a, b in zip(x.split(500), y.split(500), strict=True)]
    return float(torch.stack(parts).mean())


@pytest.mark.parametrize("name", CLOSED)
def test_mmd_of_gaussians_is_the_closed_form(name):
    """At 10^5 samples of each, to 1e-2 and to 2 % of the value."""
    x, y = (normal(100_000, 3, seed=side) @ ROOTS[side].mT + MEANS[side] for side in (0, 1))
    assert in_parts(x, y, KERNELS[name]) == pytest.approx(CLOSED[name], abs=min(1e-2, 0.02 * CLOSED[name]))


def test_laplace_mmd_of_gaussians_is_the_closed_form():
    """On the line ``E exp(-|u| / h)`` is two error functions."""

    def expected(mean: float, deviation: float) -> float:
        side = [math.exp(m / 2) * math.erfc((deviation / 2 + m / deviation) / 2**0.5) for m in (-mean, mean)]
        return math.exp(deviation**2 / 8) * sum(side) / 2

    exact = expected(0.0, 2**0.5) + expected(0.0, 0.5 * 2**0.5) - 2 * expected(1.0, 1.25**0.5)
    x, y = normal(30_000, 1), 1 + 0.5 * normal(30_000, 1, seed=1)
    assert in_parts(x, y, LaplaceKernel(2.0)) == pytest.approx(exact, abs=1e-2) and exact > 0.1


# -------------------------------------------------------------------------------------------------------- chunks, gradients


def value_and_gradients(kernel: Kernel, chunk: int | None, matching: str = "all", unbiased: bool = True) -> list[Tensor]:
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    value = squared_mmd(x, y, kernel, unbiased, X_LABELS, Y_LABELS, matching, chunk)
    return [value.detach(), *torch.autograd.grad(value, (x, y))]


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("name", ["cubic", "bandwidths", "laplace"])
def test_chunks_make_the_whole_and_its_gradients(name, matching, unbiased):
    whole = value_and_gradients(KERNELS[name], None, matching, unbiased)
    for chunk in (1, 4, 100):
        for part, expected in zip(value_and_gradients(KERNELS[name], chunk, matching, unbiased), whole, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_are_those_of_finite_differences(name):
    def mmd(x: Tensor, y: Tensor) -> Tensor:
        return squared_mmd(x, y, KERNELS[name], True, X_LABELS, Y_LABELS, "class")

    assert torch.autograd.gradcheck(mmd, (X.clone().requires_grad_(), Y.clone().requires_grad_()), fast_mode=True)


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that any operation makes, forward and backward."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self.numbers = max(self.numbers, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return result


@pytest.mark.parametrize("name", ["cubic", "bandwidths", "laplace"])
def test_memory_does_not_grow_with_the_pairs(name):
    """400 samples of 16 features: all at once makes 400^2 values but never 400^2 x 16; 20 rows at a time make 20 x 400, and
    what waits for the backward pass is the features, the classes and the rows' weights of each chunk alone."""
    samples, features, chunk = 400, 16, 20
    labels = torch.arange(samples) % 10
    largest, kept = {}, {}
    for rows in (None, chunk):
        x, y = normal(samples, features).requires_grad_(), normal(samples, features, seed=1)
        saved: list[Tensor] = []
        with Largest() as largest[rows]:
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
                value = squared_mmd(x, y, KERNELS[name], True, labels, labels, "class", rows)
            value.backward()
        kept[rows] = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}.values())
    assert samples**2 <= largest[None].numbers < 2 * samples**2
    assert largest[chunk].numbers <= chunk * samples
    assert kept[None] > 2 * 8 * samples**2
    assert kept[chunk] <= 8 * (2 * samples * features + 5 * samples)


def test_nothing_is_read_back_from_the_device():
    """A tensor without values would say so."""
    x, y, labels = X.to("meta"), Y.to("meta"), (X_LABELS.to("meta"), Y_LABELS.to("meta"))
    for matching in MATCHINGS:
        assert squared_mmd(x, y, PolynomialKernel(), True, *labels, matching, chunk=4).shape == ()


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: PolynomialKernel(0), "degree=0"),
        (lambda: PolynomialKernel(scale=0.0), "scale=0.0"),
        (lambda: PolynomialKernel(offset=-1.0), "offset=-1.0"),
        (lambda: RadialKernel([]), r"bandwidths=\[\]"),
        (lambda: RadialKernel([1.0, 0.0]), r"bandwidths=\[1.0, 0.0\]"),
        (lambda: LaplaceKernel(-1.0), "bandwidth=-1.0"),
        (lambda: squared_mmd(X[:1], Y, LinearKernel()), "1 and 7 samples: give 2"),
        (lambda: squared_mmd(X, Y[:0], LinearKernel(), False), "9 and 0 samples: give 1"),
        (lambda: squared_mmd(X, Y, LinearKernel(), x_labels=X_LABELS, matching="class"), "matching='class'"),
        (lambda: squared_mmd(X, Y, LinearKernel(), chunk=0), "chunk=0"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ---------------------------------------------------------------------------------------------------------- two processes


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()


def columns() -> dict[str, Tensor]:
    """What both ranks hold together, the first half rank 0's."""
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1, 1, 0, 2, 0])
    return {"noise": normal(12, 4), "x_labels": labels, "real": normal(12, 3, seed=1), "y_labels": labels.flip(0)}


def trained(model: torch.nn.Module, own: dict[str, Tensor], name: str, matching: str, chunk: int | None) -> list[Tensor]:
    """The value, and the parameters' gradients as an optimiser would find them."""
    model.zero_grad()
    x, y = gather(model(own["noise"])), gather(own["real"])
    value = squared_mmd(x, y, KERNELS[name], True, gather(own["x_labels"]), gather(own["y_labels"]), matching, chunk)
    value.backward()
    return [value.detach(), *[parameter.grad.clone() for parameter in model.parameters()]]


SCENARIOS = [("cubic", "all", None), ("bandwidths", "joint", None), ("laplace", "class", 5)]


def all_scenarios(rank: int) -> dict:
    own = {name: column.chunk(2)[rank] for name, column in columns().items()}
    model = DistributedDataParallel(network())
    found: dict = {scenario: trained(model, own, *scenario) for scenario in SCENARIOS}
    return found | {"gathered": {name: gather(column) for name, column in own.items()}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks found: this file as a program."""
    return found_by_two_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_equal_one(ranks, scenario):
    """Value and gradient, and neither is what the ranks would find of their own halves."""
    alone = trained(network(), columns(), *scenario)
    for found in ranks:
        for seen, expected in zip(found[scenario], alone, strict=True):
            torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-13)
    halves = [{name: column.chunk(2)[rank] for name, column in columns().items()} for rank in (0, 1)]
    parts = [trained(network(), half, *scenario) for half in halves]
    means = [(first + second) / 2 for first, second in zip(*parts, strict=True)]
    assert all(float((mean - whole).abs().max()) > 1e-3 for mean, whole in zip(means, alone, strict=True))


def test_rows_are_gathered_in_rank_order(ranks):
    for found in ranks:
        assert all(torch.equal(found["gathered"][name], column) for name, column in columns().items())


def test_one_process_keeps_its_rows():
    x = X.clone().requires_grad_()
    assert gather(x) is x


if __name__ == "__main__":
    own_rank, results_folder = int(sys.argv[1]), Path(sys.argv[2])
    meeting = f"file://{results_folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=own_rank, world_size=2)
    torch.save(all_scenarios(own_rank), results_folder / f"{own_rank}.pt")
    torch.distributed.destroy_process_group()
