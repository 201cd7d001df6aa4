"""Couplings: the least cost, the laws of data and noise that they keep or shift, and two ranks that share one assignment.

Statistical tests have a stated level, the share of seeds at which they would fail if the code were right; seeds are fixed.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor
from two_ranks import found_by_two_ranks

from distill.couplings import Assignment, Coupling, ImmiscibleAssignment, NearestNoise, OptimalTransport, noise_for
from distill.types import Batch, label_conditions

LEVEL = 1e-3
CLASS_MEAN = torch.tensor([1.5, -1.0, 0.5, 0.0])
ASSIGNMENTS: dict[str, Assignment] = {
    "optimal transport": OptimalTransport(),
    "across classes": OptimalTransport(within_class=False),
    "immiscible": ImmiscibleAssignment(),
    "immiscible within": ImmiscibleAssignment(within_class=True),
}


def two_sided(number: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Samples of shape (4,) and their labels: class 1 about ``CLASS_MEAN``, class 0 about its negative."""
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(2, (size,), generator=generator)
    return (2 * labels - 1)[:, None] * CLASS_MEAN + 0.3 * torch.randn(size, 4, generator=generator), labels


def drawn(coupling: Coupling, x0: Tensor, labels: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """What the coupling draws, and the free noise of the same state of the generator."""
    torch.manual_seed(seed)
    coupled = coupling.draw(x0, labels)
    torch.manual_seed(seed)
    return coupled, torch.randn_like(x0)


def order_of(coupled: Tensor, free: Tensor) -> Tensor:
    """The permutation with ``coupled = free[order]``, bit for bit; there must be exactly one."""
    matches = (coupled.flatten(1)[:, None] == free.flatten(1)).all(2)
    assert bool((matches.sum(0) == 1).all()) and bool((matches.sum(1) == 1).all())
    return matches.int().argmax(1)


def squared_cost(x0: Tensor, noise: Tensor) -> float:
    """Sum of squared distances of what lies in the same row."""
    return float((x0.double() - noise.double()).square().sum())


# -------------------------------------------------------------------------------------------------------- the least cost


@pytest.mark.parametrize("seed", range(4))
def test_optimal_transport_is_the_best_of_all_permutations(seed):
    torch.manual_seed(seed)
    x0, noise = 2 * torch.randn(6, 2, 3) + 5, torch.randn(6, 2, 3)
    costs = {order: squared_cost(x0, noise[list(order)]) for order in itertools.permutations(range(6))}
    best = min(costs, key=costs.__getitem__)
    assert order_of(OptimalTransport().pair(x0, noise), noise).tolist() == list(best)


def test_within_a_class_it_is_the_best_of_the_permutations_that_keep_labels():
    x0, labels = two_sided(0, 7)
    noise = torch.randn(7, 4)
    orders = [list(order) for order in itertools.permutations(range(7)) if torch.equal(labels[list(order)], labels)]
    assert 1 < len(orders) < math.factorial(7)
    best = min(orders, key=lambda order: squared_cost(x0, noise[order]))
    assert order_of(OptimalTransport().pair(x0, noise, labels), noise).tolist() == best
    across = order_of(OptimalTransport(within_class=False).pair(x0, noise, labels), noise)
    assert torch.equal(across, order_of(OptimalTransport().pair(x0, noise), noise)), "across classes is as without labels"
    assert not torch.equal(labels[across], labels)


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_the_noise_is_a_permutation_of_what_was_drawn_and_costs_less(name):
    """In every batch, of data of any shape; within a class each sample's noise was drawn for one of its class."""
    coupling = ASSIGNMENTS[name]
    for number in range(20):
        x0, labels = two_sided(number)
        coupled, free = drawn(coupling, x0.reshape(-1, 1, 2, 2), labels, number)
        order = order_of(coupled, free)
        assert torch.equal(labels[order], labels) == coupling.within_class
        distances = [float((noise.flatten(1) - x0).norm(dim=1).sum()) for noise in (coupled, free)]
        assert squared_cost(x0, coupled.flatten(1)) < squared_cost(x0, free.flatten(1)) and distances[0] < distances[1]


def test_in_one_dimension_the_optimum_is_the_monotone_map():
    x0 = torch.rand(50, 1)
    coupled, _ = drawn(OptimalTransport(), x0, None, 0)
    assert torch.equal(coupled.flatten().argsort(), x0.flatten().argsort())


def test_a_step_with_bad_data_does_not_fail_and_the_rest_is_still_assigned():
    """The loss says that a sample is not finite, and the step is skipped; the assignment must not end the run."""
    for name, coupling in ASSIGNMENTS.items():
        x0, labels = two_sided(0)
        x0[3], x0[5] = math.nan, math.inf
        coupled, free = drawn(coupling, x0, labels, 0)
        order_of(coupled, free)
        good = x0.isfinite().all(1)
        assert squared_cost(x0[good], coupled[good]) < 0.9 * squared_cost(x0[good], free[good]), name


# ---------------------------------------------------------------------------------------------------- the laws that stay


def pooled(coupling: Coupling, batches: int = 150) -> tuple[Tensor, Tensor]:
    """Noise of many batches, ``(n, 4)``, and the labels ``(n,)`` that it was given to."""
    parts = []
    for number in range(batches):
        x0, labels = two_sided(number)
        parts.append((drawn(coupling, x0, labels, 10_000 + number)[0], labels))
    return torch.cat([noise for noise, _ in parts]), torch.cat([labels for _, labels in parts])


def along_and_norm(noise: Tensor) -> tuple[Tensor, Tensor]:
    """Along the direction in which the classes differ, and the squared norm."""
    return noise @ (CLASS_MEAN / CLASS_MEAN.norm()), noise.square().sum(1)


def unit_noise_tests(noise: Tensor) -> list[float]:
    """p-values of two Kolmogorov-Smirnov tests for ``N(0, I)``."""
    along, norms = along_and_norm(noise)
    return [stats.kstest(along.numpy(), "norm").pvalue, stats.kstest(norms.numpy(), stats.chi2(4).cdf).pvalue]


def same_law_tests(noise: Tensor, labels: Tensor) -> list[float]:
    """p-values of two Kolmogorov-Smirnov tests for one law of the noise in both classes."""
    return [stats.ks_2samp(one[labels == 0].numpy(), one[labels == 1].numpy()).pvalue for one in along_and_norm(noise)]


@pytest.mark.parametrize("name", ["optimal transport", "immiscible within"])
def test_within_classes_the_noise_of_every_class_is_unit_noise(name):
    """Level 1e-3 for the four tests together (Bonferroni). Data stay where they are, so their law is kept by construction."""
    noise, labels = pooled(ASSIGNMENTS[name])
    found = unit_noise_tests(noise[labels == 1]) + same_law_tests(noise, labels)
    print(f"{name}: p-values {found}")
    assert min(found) > LEVEL / 4


@pytest.mark.parametrize("name", ["across classes", "immiscible"])
def test_across_classes_the_noise_is_unit_noise_and_yet_tells_the_class(name):
    """The bias that `within_class` avoids; all classes together keep the law, at level 1e-3 (Bonferroni)."""
    noise, labels = pooled(ASSIGNMENTS[name])
    assert min(unit_noise_tests(noise)) > LEVEL / 2
    assert same_law_tests(noise, labels)[0] < 1e-12


@pytest.mark.parametrize("name", ["optimal transport", "across classes"])
def test_the_noise_of_a_fixed_row_is_unit_noise(name):
    """Of one row a batch, so that all are independent; level 1e-3."""
    rows = pooled(ASSIGNMENTS[name], 600)[0].reshape(600, -1, 4)[:, 7]
    assert stats.kstest(rows.flatten().numpy(), "norm").pvalue > LEVEL


def best_velocity(moments: tuple[Tensor, Tensor], t: float) -> tuple[float, float]:
    """Flow matching's optimum ``u(x, t) = slope x + offset`` for the mean and covariance of (x0, noise), Gaussian."""
    mean, covariance = moments
    place, target = torch.tensor([1 - t, t]).double(), torch.tensor([-1.0, 1.0]).double()
    slope = float(target @ covariance @ place / (place @ covariance @ place))
    return slope, float(target @ mean) - slope * float(place @ mean)


def test_a_flow_trained_on_coupled_noise_has_the_same_law_and_is_straight():
    """Data ``N(1.5, 0.4^2)``: both optima carry unit noise there, that of independent noise only in many steps.

    The transport map is ``z -> 1.5 + 0.4 z``, so u(z, 1) = 0.6 z - 1.5: one Euler step is exact.
    """
    torch.manual_seed(0)
    data = [1.5 + 0.4 * torch.randn(256) for _ in range(100)]
    coupled = torch.cat([OptimalTransport().draw(x0[:, None])[:, 0] for x0 in data])
    found = {}
    for name, noise in (("coupled", coupled), ("free", torch.randn(25_600))):
        both = torch.stack([torch.cat(data), noise]).double()
        for steps in (1, 200):
            mean, std = 0.0, 1.0
            for step in range(steps):
                slope, offset = best_velocity((both.mean(1), both.cov()), 1 - step / steps)
                mean, std = mean - (slope * mean + offset) / steps, std * (1 - slope / steps)
            found[name, steps] = mean, std
    print(f"mean and standard deviation of samples: {found}")
    for run in (("coupled", 1), ("coupled", 200), ("free", 200)):
        assert found[run] == pytest.approx((1.5, 0.4), abs=0.015), run
    assert found["free", 1] == pytest.approx((1.5, 0.0), abs=0.015), "one step goes to the mean of the data"


# ------------------------------------------------------------------------------------------------ immiscible assignment


def test_immiscible_costs_are_distances_of_scaled_half_precision():
    """The published formula, computed as it is written; the difference of two float16 tensors rounds once more."""
    x0, noise = 3 * torch.randn(5, 12), torch.randn(7, 12)
    halves = 0.1 * x0.half()[:, None] - 0.1 * noise.half()[None]
    costs = ImmiscibleAssignment().costs(x0, noise)
    assert torch.equal(costs.float(), costs.half().float()), "they are float16 numbers"
    torch.testing.assert_close(costs, torch.linalg.vector_norm(halves, dim=2).double(), rtol=4 * 2**-11, atol=0)


def test_immiscible_assignment_minimises_distances_and_not_their_squares():
    x0, noise = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.7, 0.7]])
    assert order_of(ImmiscibleAssignment().pair(x0, noise), noise).tolist() == [1, 0]
    assert order_of(OptimalTransport().pair(x0, noise), noise).tolist() == [0, 1]


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_immiscible_is_optimal_transport_where_costs_are_well_separated(size):
    """Also for values of 1e3, whose unscaled distances are beyond float16, and for values that are beyond it themselves."""
    torch.manual_seed(0)
    noise = size * torch.randn(20, 3072).sign() * (0.5 + torch.rand(20, 1))
    true = torch.randperm(20)
    x0 = noise[true] * 0.98 + 0.05 * size * torch.randn(20, 3072)
    assert not torch.cdist(x0, noise).half().isfinite().all() or size == 1
    for coupling in (OptimalTransport(), ImmiscibleAssignment()):
        found = order_of(coupling.pair(x0, noise), noise)
        assert torch.equal(found, true), type(coupling).__name__


@pytest.mark.parametrize("scale", [0.0, -0.1, 1.5])
def test_a_scale_out_of_range_is_refused(scale):
    with pytest.raises(ValueError, match=f"scale={scale}"):
        ImmiscibleAssignment(scale)


# -------------------------------------------------------------------------------------------------------- nearest noise


@pytest.mark.parametrize("k", [1, 2, 5])
def test_nearest_noise_is_the_nearest_of_k(k):
    x0 = 2 * torch.randn(40, 1, 2, 2) + 0.5
    torch.manual_seed(3)
    kept = NearestNoise(k).draw(x0)
    torch.manual_seed(3)
    candidates = torch.stack([torch.randn_like(x0) for _ in range(k)])
    nearest = (candidates - x0).flatten(2).norm(dim=2).argmin(0)
    assert torch.equal(kept, candidates[nearest, torch.arange(40)])
    assert len(nearest.unique()) == k
    with pytest.raises(ValueError, match="k=0"):
        NearestNoise(0)


@pytest.mark.parametrize("size, k, std", [(64, 4, 0.95), (64, 64, 0.905), (768, 4, 0.985)])
def test_nearest_noise_shrinks_by_its_order_statistics(size, k, std):
    """Unit data at distance r from 0: of k pairs of a normal a and a chi-square q, the least ``(a - r)^2 + q`` is kept, and
    its ``a^2 + q`` is the squared norm.
    """
    torch.manual_seed(0)
    r, a = torch.randn(20_000, size).norm(dim=1), torch.randn(20_000, k)
    q = torch.distributions.Chi2(torch.tensor(size - 1.0)).sample((20_000, k))
    kept = ((a - r[:, None]) ** 2 + q).argmin(1, keepdim=True)
    predicted = float((a**2 + q).gather(1, kept).mean() / size) ** 0.5
    measured = float(NearestNoise(k).draw(torch.randn(4000, size)).square().mean().sqrt())
    print(f"D={size}, k={k}: root mean square {measured:.4f}, predicted {predicted:.4f}")
    assert measured == pytest.approx(predicted, abs=0.003) and measured == pytest.approx(std, abs=0.003)


# ------------------------------------------------------------------------------------------------------ a method's batch


def test_a_batch_that_carries_noise_keeps_it_and_labels_reach_the_coupling():
    x0, labels = two_sided(0)
    cond, null = label_conditions(labels, 2)
    own = torch.randn_like(x0)
    assert noise_for(Batch(x0, cond, null, own), None) is own
    for batch, given in ((Batch(x0, cond, null), labels), (Batch(x0, {}, {}), None)):
        expected, free = drawn(OptimalTransport(), x0, given, 1)
        torch.manual_seed(1)
        assert torch.equal(noise_for(batch, OptimalTransport()), expected)
        torch.manual_seed(1)
        assert torch.equal(noise_for(batch, None), free)


# ------------------------------------------------------------------------------------------------------------ two ranks

GATHERED: dict[str, Assignment] = {
    "transport": OptimalTransport(gathered=True),
    "transport across": OptimalTransport(within_class=False, gathered=True),
    "immiscible": ImmiscibleAssignment(),
}
ALONE: dict[str, Assignment] = {"transport": OptimalTransport(), "immiscible": ImmiscibleAssignment(gathered=False)}


def rank_batch(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Data, labels and noise of a rank."""
    x0, labels = two_sided(rank, 12)
    return x0.reshape(12, 1, 2, 2), labels, torch.randn(12, 1, 2, 2, generator=torch.Generator().manual_seed(50 + rank))


def both_kinds(rank: int, folder: Path) -> None:
    """One of the two processes: pairs its batch by every coupling and leaves what it got."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x0, labels, noise = rank_batch(rank)
    got = {f"gathered {name}": coupling.pair(x0, noise, labels) for name, coupling in GATHERED.items()}
    got |= {f"alone {name}": coupling.pair(x0, noise, labels) for name, coupling in ALONE.items()}
    torch.save(got, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Tensor]]:
    """What each of two ranks got."""
    return found_by_two_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", GATHERED)
def test_a_gathered_assignment_is_that_of_the_joined_batch(ranks, name):
    """And moves noise between the ranks; without a process group it is the batch's own."""
    x0, labels, noise = (torch.cat(parts) for parts in zip(rank_batch(0), rank_batch(1)))
    expected = GATHERED[name].pair(x0, noise, labels)
    got = torch.cat([found[f"gathered {name}"] for found in ranks])
    assert torch.equal(got, expected)
    order = order_of(got, noise)
    assert bool((order[:12] >= 12).any()) and bool((order[12:] < 12).any())


@pytest.mark.parametrize("name", ALONE)
def test_an_assignment_that_is_not_gathered_stays_on_its_rank(ranks, name):
    for rank in (0, 1):
        x0, labels, noise = rank_batch(rank)
        assert torch.equal(ranks[rank][f"alone {name}"], ALONE[name].pair(x0, noise, labels))


if __name__ == "__main__":
    both_kinds(int(sys.argv[1]), Path(sys.argv[2]))
