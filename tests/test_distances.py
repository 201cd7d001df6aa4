"""Distances: closed values, gradients where nothing differs, and LPIPS against the lpips package."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable

import pytest
import torch

from distill.distances import LPIPS, PseudoHuber, SquaredDistance, derivative

A = torch.zeros(2, 1, 2, 2)
B = torch.tensor([[3.0, 0.0, 0.0, 4.0], [1.0, 1.0, 1.0, 1.0]]).reshape(2, 1, 2, 2)


def test_squared_is_the_mean_over_elements():
    assert SquaredDistance()(A, B).tolist() == [25 / 4, 1.0]


def test_pseudo_huber_forms():
    """|d| = 5 and c = 12 make 13 - 12; element by element the first has (sqrt(9 + 144) + sqrt(16 + 144) - 24) / 4."""
    assert PseudoHuber(12.0, "vector")(A, B).tolist() == pytest.approx([1.0, math.sqrt(148) - 12], rel=1e-5)
    exact = [(math.sqrt(153) + math.sqrt(160) - 24) / 4, math.sqrt(145) - 12]
    assert PseudoHuber(12.0, "element")(A, B).tolist() == pytest.approx(exact, rel=1e-5)


def test_pseudo_huber_default_is_that_of_improved_consistency_training():
    """c = 0.00054 sqrt(D): 0.03 for a 32x32 image of three channels."""
    c = 0.00054 * math.sqrt(3 * 32 * 32)
    a, b = torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 1e-3)
    assert c == pytest.approx(0.03, rel=5e-3)
    exact = math.sqrt(3072e-6 + c**2) - c
    assert float(PseudoHuber()(a, b)) == pytest.approx(exact, rel=1e-4)


def test_pseudo_huber_mean_is_that_of_rfpp():
    """(sqrt(|d|^2 + c^2) - c) / D with c = 0.00054 D, by hand: D = 4, |d| = 5."""
    a = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    c = 0.00054 * 4
    expected = (math.sqrt(25 + c**2) - c) / 4
    assert float(PseudoHuber(form="mean")(a, torch.zeros_like(a))) == pytest.approx(expected, rel=1e-6)
    assert float(PseudoHuber(c=12.0, form="mean")(a, torch.zeros_like(a))) == pytest.approx((13 - 12) / 4, rel=1e-6)


def test_pseudo_huber_runs_from_squared_to_absolute():
    near, far = 1e-3 * B.double(), 1e6 * B.double()
    torch.testing.assert_close(PseudoHuber(1.0)(0 * near, near), near.flatten(1).square().sum(1) / 2, rtol=1e-4, atol=0)
    torch.testing.assert_close(PseudoHuber(1.0)(0 * far, far), far.flatten(1).norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("distance", [SquaredDistance(), PseudoHuber(), PseudoHuber(1e-8), PseudoHuber(1e-3, "element")])
def test_distances_are_zero_with_zero_gradient_where_nothing_differs(distance):
    a = torch.randn(2, 3, 4, requires_grad=True)
    value = distance(a, a.detach().clone())
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0] and torch.equal(a.grad, torch.zeros_like(a))


@pytest.mark.parametrize("distance", [SquaredDistance(), PseudoHuber(0.1), PseudoHuber(0.1, "element")])
def test_gradients_are_the_derivative_in_both_arguments(distance):
    a, b = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(distance, (a, b))


@pytest.mark.parametrize("form", ["vector", "element"])
def test_relative_c_goes_with_the_samples_size(form):
    """c = relative sqrt(D), and a c that is given goes before it."""
    a, b = (torch.randn(2, 3, 5, 7, dtype=torch.float64) for _ in range(2))
    relative = PseudoHuber(form=form, relative=0.03)(a, b)
    assert torch.equal(relative, PseudoHuber(0.03 * math.sqrt(105), form)(a, b))
    assert not torch.equal(relative, PseudoHuber(form=form)(a, b))
    assert torch.equal(PseudoHuber(0.5, form, relative=0.03)(a, b), PseudoHuber(0.5, form)(a, b))


def test_bad_constants_are_named():
    with pytest.raises(ValueError, match="c=0.0"):
        PseudoHuber(0.0)
    with pytest.raises(ValueError, match="relative=0.0"):
        PseudoHuber(relative=0.0)


# ------------------------------------------------------------------------------------------------------- derivatives


def slopes(y: torch.Tensor, c: float) -> list[tuple[torch.nn.Module, torch.Tensor]]:
    """Distances and their derivatives at ``y`` ``(b, c, h, w)``, by hand."""
    count, norm = y[0].numel(), y.flatten(1).square().sum(1)[:, None, None, None]
    return [
        (SquaredDistance(), 2 * y / count),
        (PseudoHuber(c, "vector"), y / (norm + c**2).sqrt()),
        (PseudoHuber(c, "element"), y / (y**2 + c**2).sqrt() / count),
    ]


def test_derivatives_by_hand():
    y = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    for distance, slope in slopes(y, 0.7):
        found = derivative(distance, y)
        torch.testing.assert_close(found, slope, rtol=1e-12, atol=0)
        assert not found.requires_grad and not y.requires_grad


@pytest.mark.parametrize("distance", [SquaredDistance(), PseudoHuber(0.3), PseudoHuber(0.3, "element")])
def test_derivatives_are_differentiable_again(distance):
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: derivative(distance, y), (y,))
    assert torch.autograd.gradgradcheck(lambda y: derivative(distance, y), (y,))


def test_derivatives_carry_gradients_to_what_the_argument_depends_on():
    """Two networks apart, as in score implicit matching: the same gradients as by the formula, in weights and in input."""
    first, second, x = torch.nn.Linear(4, 4).double(), torch.nn.Linear(4, 4).double(), torch.randn(3, 4, dtype=torch.float64)
    inputs = [x.requires_grad_(), *first.parameters(), *second.parameters()]

    def gradients(slope: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((slope(first(x) - second(x)) * first(x)).sum(), inputs)

    found = gradients(lambda y: derivative(PseudoHuber(0.2), y))
    exact = gradients(lambda y: y / (y.square().sum(1, keepdim=True) + 0.04).sqrt())
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        assert mine.abs().max() > 1e-3


def test_derivatives_without_a_graph():
    """Where none is asked for there is none, and the argument is left as it was."""
    y = torch.randn(2, 3, requires_grad=True)
    with torch.no_grad():
        found = derivative(SquaredDistance(), y)
    assert not found.requires_grad and y.grad is None
    torch.testing.assert_close(found, 2 * y.detach() / 3)


# ------------------------------------------------------------------------------------------------------------- LPIPS


pytestmark = pytest.mark.filterwarnings("ignore:.*weights:UserWarning")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A randomly initialised torchvision backbone's state dict, without the classifier's 500 MB."""
    import torchvision

    torch.manual_seed(0)
    state = {key: value for key, value in torchvision.models.vgg16().state_dict().items() if key.startswith("features.")}
    file = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save({**state, "classifier.0.bias": torch.zeros(3)}, file)
    return file


@pytest.fixture(scope="module")
def distance(weights):
    """Built where any connection would fail: nothing is downloaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("a connection was tried"))
        return LPIPS(str(weights), size=32)


@pytest.fixture(scope="module")
def reference(weights):
    """The package's own module with the same backbone, its slices filled one by one."""
    import lpips

    model, state = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False), torch.load(weights)
    for part in (model.net.slice1, model.net.slice2, model.net.slice3, model.net.slice4, model.net.slice5):
        for number, layer in part.named_children():
            if isinstance(layer, torch.nn.Conv2d):
                layer.load_state_dict({"weight": state[f"features.{number}.weight"], "bias": state[f"features.{number}.bias"]})
    return model


def test_lpips_is_the_packages(distance, reference):
    a, b = 2 * torch.rand(2, 2, 3, 32, 32) - 1
    with torch.no_grad():
        torch.testing.assert_close(distance(a, b), reference(a, b).flatten(), rtol=1e-5, atol=1e-7)
        assert bool((distance(a, b) > 1e-4).all()) and distance(a, a).tolist() == [0.0, 0.0]


def test_lpips_of_small_grey_images_is_that_of_enlarged_colour_ones(distance, reference):
    a, b = 2 * torch.rand(2, 2, 1, 8, 8) - 1
    large = [torch.nn.functional.interpolate(x, scale_factor=4, mode="bilinear").expand(-1, 3, -1, -1) for x in (a, b)]
    with torch.no_grad():
        torch.testing.assert_close(distance(a, b), reference(*large).flatten(), rtol=1e-5, atol=1e-7)


def test_lpips_gradients_reach_the_images_only(distance):
    a, b = (2 * torch.rand(2, 2, 3, 32, 32) - 1).requires_grad_().unbind()
    grad = torch.autograd.grad(distance(a, b).sum(), (a, b))
    assert all(float(g.abs().sum()) > 0 for g in grad)
    assert list(distance.parameters()) == [] and distance.state_dict() == {}
    assert not any(p.requires_grad for p in distance.model.module.parameters())


def test_lpips_is_float32_under_autocast(distance):
    a, b = 2 * torch.rand(2, 2, 3, 32, 32) - 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside = distance(a, b)
    with torch.no_grad():
        torch.testing.assert_close(inside, distance(a, b))


def test_lpips_refuses_missing_and_foreign_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="distance.weights=.*absent.pth"):
        LPIPS(str(tmp_path / "absent.pth"))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="distance.weights lacks"):
        LPIPS(str(tmp_path / "resnet.pth"))
