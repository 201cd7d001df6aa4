"""f-divergences: weights against f by automatic differentiation, their gradient by quadrature, means and running means."""

from __future__ import annotations

import copy
import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from distill.divergences import RATIO_WEIGHTS, DivergenceName, FDivergence

NAMES = get_args(DivergenceName)

F = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened_reverse_kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "neyman": lambda r: (r - 1) ** 2 / (2 * r),
    "squared_hellinger": lambda r: 2 * (r.sqrt() - 1) ** 2,
    "jeffreys": lambda r: (r - 1) * r.log(),
}
"""f of ``D = E_q f(p / q)``, each of which is 0 at r = 1."""

H = {
    "reverse_kl": [1.0, 1.0, 1.0],
    "forward_kl": [0.25, 1.0, 4.0],
    "jensen_shannon": [0.2, 0.5, 0.8],
    "softened_reverse_kl": [0.8, 0.5, 0.2],
    "neyman": [4.0, 1.0, 0.25],
    "squared_hellinger": [0.5, 1.0, 2.0],
    "jeffreys": [1.25, 2.0, 5.0],
}
"""h at 1/4, 1 and 4, from the formulas by hand."""


def divergence_of(p: Tensor, q: Tensor) -> dict[str, Tensor]:
    """The textbook's divergences of densities per grid cell, times the constants that the module's docstring names."""
    m = (p + q) / 2

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    return {
        "reverse_kl": kl(q, p),
        "forward_kl": kl(p, q),
        "jensen_shannon": kl(p, m) + kl(q, m),
        "softened_reverse_kl": 2 * kl(m, p),
        "neyman": ((p - q) ** 2 / (2 * p)).sum(),
        "squared_hellinger": 4 * (1 - (p * q).sqrt().sum()),
        "jeffreys": kl(p, q) + kl(q, p),
    }


def test_every_divergence_is_tested():
    assert set(NAMES) == set(RATIO_WEIGHTS) == set(F) == set(H)


@pytest.mark.parametrize("name", NAMES)
def test_weights_by_hand(name):
    ratio = torch.tensor([0.25, 1.0, 4.0])
    assert RATIO_WEIGHTS[name](ratio).tolist() == pytest.approx(H[name], rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_r_squared_times_the_second_derivative(name):
    ratio = torch.logspace(-2, 2, 60, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(F[name](ratio).sum(), ratio, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), ratio)
    torch.testing.assert_close(RATIO_WEIGHTS[name](ratio.detach()), ratio.detach() ** 2 * second, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_weighted_score_difference_is_the_gradient_of_the_divergence(name):
    """``x = mean + spread z`` against a wider Gaussian, by quadrature: both derivatives, and f against the textbook."""
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    cell = x[1] - x[0]
    mean, spread = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.4, 0.8))
    q = Normal(mean, spread).log_prob(x).exp() * cell
    p = Normal(0 * cell, 1.1 + 0 * cell).log_prob(x).exp() * cell
    value = (q * F[name](p / q)).sum()
    torch.testing.assert_close(value, divergence_of(p, q)[name], rtol=1e-9, atol=1e-12)
    slope = torch.stack(torch.autograd.grad(value, [mean, spread]))
    with torch.no_grad():
        bracket = -(x - mean) / spread**2 + x / 1.1**2  # score_q - score_p
        z = (x - mean) / spread
        weighted = q * RATIO_WEIGHTS[name](p / q) * bracket
        torch.testing.assert_close(torch.stack([weighted.sum(), (weighted * z).sum()]), slope, rtol=1e-7, atol=1e-9)
    assert slope[0] > 0.05


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decay", [None, 0.5])
def test_weights_of_a_batch_have_mean_1_and_no_gradient(name, decay):
    ratio = (torch.randn(32).exp() + 0.1).requires_grad_()
    weights = FDivergence(name, decay=decay)(ratio, torch.rand(32))
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-5)
    assert not weights.requires_grad and bool((weights > 0).all())
    assert bool(weights.std() > 0.05) is (name != "reverse_kl")


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_h_over_its_mean(name):
    h = torch.tensor(H[name])
    torch.testing.assert_close(FDivergence(name)(torch.tensor([0.25, 1.0, 4.0]), torch.rand(3)), h / h.mean())


def test_running_means_are_kept_by_bin():
    """Two batches by hand; position 1 is of the last bin, and bins that no sample fell in stay."""
    divergence = FDivergence("forward_kl", bins=4, decay=0.75)
    ratio, position = torch.tensor([2.0, 4.0, 8.0, 6.0]), torch.tensor([0.0, 0.2, 0.6, 1.0])
    weights = divergence(ratio, position)
    means = [0.75 + 0.25 * 3, 1.0, 0.75 + 0.25 * 8, 0.75 + 0.25 * 6]
    assert divergence.mean_ratios.tolist() == pytest.approx(means)
    relative = ratio / torch.tensor([means[0], means[0], means[2], means[3]])
    torch.testing.assert_close(weights, relative / relative.mean())
    divergence(torch.tensor([10.0, 0.5]), torch.tensor([0.3, 0.7]))
    again = [means[0], 0.75 + 0.25 * 10, 0.75 * means[2] + 0.25 * 0.5, means[3]]
    assert divergence.mean_ratios.tolist() == pytest.approx(again)


def test_running_means_take_a_biased_discriminator_out():
    """A factor on the ratios that depends on time alone goes out of the weights once the means have followed it."""
    divergence, plain = FDivergence("jensen_shannon", bins=2, decay=0.5), FDivergence("jensen_shannon")
    ratio, position = torch.tensor([0.5, 1.5, 0.5, 1.5]), torch.tensor([0.1, 0.2, 0.7, 0.9])
    biased = ratio * torch.tensor([5.0, 5.0, 0.2, 0.2])
    for _ in range(40):
        weights = divergence(biased, position)
    torch.testing.assert_close(weights, plain(ratio, position))
    assert (plain(biased, position) - weights).abs().max() > 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_ratio_that_is_not_finite_leaves_the_running_means(bad):
    divergence = FDivergence("forward_kl", bins=2, decay=0.5)
    divergence(torch.tensor([bad, 3.0]), torch.tensor([0.2, 0.8]))
    assert divergence.mean_ratios.tolist() == [1.0, 2.0]


def test_running_means_go_through_checkpoints():
    divergence, restored, fresh = (FDivergence("neyman", bins=3, decay=0.9) for _ in range(3))
    divergence(torch.tensor([3.0, 0.2]), torch.tensor([0.1, 0.5]))
    saved = copy.deepcopy(divergence.state_dict())
    assert list(saved) == ["mean_ratios"]
    restored.load_state_dict(saved)
    ratio, position = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.1, 0.5, 0.9])
    weights = divergence(ratio, position)
    assert torch.equal(restored(ratio, position), weights) and not torch.equal(fresh(ratio, position), weights)
    assert torch.equal(restored.mean_ratios, divergence.mean_ratios)
    assert FDivergence("neyman").state_dict() == {} and list(divergence.parameters()) == []


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="bins=0"):
        FDivergence("neyman", bins=0, decay=0.5)
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"decay={decay}"):
            FDivergence("neyman", decay=decay)
