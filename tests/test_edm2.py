"""EDM2's network: magnitudes are preserved, and weights are normalised in training forwards and in no other."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from published_edm import fill, picture

from distill.networks.edm2 import EDM2, WIDTHS
from distill.networks.edm2_modules import (
    Attention,
    Block,
    MPConv,
    MPFourier,
    double,
    halve,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
)

TINY = {"size": 16, "sample_size": 8, "num_classes": 3, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "head_width": 16}
X, TIME, LABEL = picture("adm")
COND = {"labels": LABEL}


def tiny(**settings) -> EDM2:
    """With weights of no particular size, and no gain at zero."""
    network = EDM2(**{**TINY, **settings})
    with torch.no_grad():
        for name, value in network.model.named_parameters():
            value.copy_(fill(name, tuple(value.shape)) * (3 if value.dim() else 1))
    return network


def magnitude(x: torch.Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def weights(network: EDM2) -> list[torch.Tensor]:
    return [part.weight for part in network.modules() if isinstance(part, MPConv)]


# --------------------------------------------------------------------------------------------------------- magnitudes


def test_layers_preserve_unit_magnitude():
    a, b = torch.randn(2, 64, 48, 16, 16)
    assert magnitude(mp_silu(a)) == pytest.approx(1, abs=0.005)
    assert magnitude(MPConv(48, 96, 3)(a)[..., 1:-1, 1:-1]) == pytest.approx(1, abs=0.01)
    assert magnitude(MPConv(48, 96)(a[..., 0, 0])) == pytest.approx(1, abs=0.05)
    assert magnitude(MPFourier(512)(torch.randn(64))) == pytest.approx(1, abs=0.02)
    assert magnitude(normalize(7 * a, (1,))) == pytest.approx(1, abs=1e-4)
    assert magnitude(double(a)) == pytest.approx(1, abs=0.005) and magnitude(halve(torch.ones(1, 1, 4, 4))) == 1
    for balance in (0.3, 0.5, 0.9):
        assert magnitude(mp_sum(a, b, balance)) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("wide", [24, 48, 192])
def test_concatenation_gives_each_side_its_balance_whatever_its_width(wide):
    a, b = torch.randn(16, 48, 16, 16), torch.randn(16, wide, 16, 16)
    joined = mp_cat(a, b, 0.3)
    first, second = (float(part.square().sum()) for part in joined.split([48, wide], dim=1))
    assert magnitude(joined) == pytest.approx(1, abs=0.01)
    assert math.sqrt(second / first) == pytest.approx(0.3 / 0.7, rel=0.02)


def test_weights_sum_like_balances():
    assert float(mp_sum(torch.tensor(1.0), torch.tensor(0.0), 0.3)) == pytest.approx(0.7 / math.hypot(0.7, 0.3))


@pytest.mark.parametrize("encoder", [True, False])
def test_blocks_preserve_unit_magnitude(encoder):
    """With the zero gain that they begin with, and without attention, whose values are averaged."""
    block, x = Block(48, 64, 32, encoder, None, 0, 0.0), torch.randn(16, 48, 16, 16)
    assert magnitude(block(x, torch.randn(16, 32))) == pytest.approx(1, abs=0.05)


def test_activations_are_clipped_at_256():
    value = Block(48, 48, 32, False, None, 0, 0.0)(1e4 * torch.randn(2, 48, 4, 4), torch.randn(2, 32)).detach()
    assert (float(value.max()), float(value.min())) == (256.0, -256.0)


def test_output_does_not_follow_the_size_of_weights():
    """But for the gains, that is, and the epsilon of the normalisation."""
    network = tiny().eval()
    before = network(X, TIME, COND)
    with torch.no_grad():
        for weight in weights(network):
            weight.mul_(5.0)
    torch.testing.assert_close(network(X, TIME, COND), before, rtol=0.02, atol=0.01)


def test_gradient_is_orthogonal_to_the_weights():
    layer = MPConv(8, 6, 3)
    layer(torch.randn(4, 8, 5, 5)).pow(3).sum().backward()
    assert layer.weight.grad.norm() > 1
    product = (layer.weight.detach() * layer.weight.grad).sum((1, 2, 3)).abs()
    cosine = product / (layer.weight.detach().norm() * layer.weight.grad.norm())
    assert float(cosine.max()) < 1e-3


def test_attention_of_one_pixel_is_its_value():
    """The softmax over one pixel is 1: what is left is the normalised value, in heads of channels that take turns."""
    attention, x = Attention(32, 2), torch.randn(3, 32, 1, 1)
    value = normalize(attention.qkv(x).reshape(3, 2, 16, 3), (2,))[..., 2].reshape(3, 32, 1, 1)
    torch.testing.assert_close(attention(x), attention.out(value))


def test_new_networks_begin_at_zero():
    assert bool((EDM2(**TINY)(X, TIME, COND) == 0).all())


# ------------------------------------------------------------------------------------------- forced weight normalisation


def rows(weight: torch.Tensor) -> torch.Tensor:
    """Root mean square of each row."""
    return weight.detach().flatten(1).square().mean(1).sqrt()


def test_training_forward_normalises_weights():
    network = tiny().train()
    assert not all(torch.allclose(rows(weight), torch.ones(len(weight)), atol=1e-3) for weight in weights(network))
    gains = {name: value.clone() for name, value in network.named_parameters() if "gain" in name}
    network(X, TIME, COND)
    assert all(torch.allclose(rows(weight), torch.ones(len(weight)), atol=1e-3) for weight in weights(network))
    assert all(torch.equal(value, gains[name]) for name, value in network.named_parameters() if "gain" in name)


def no_gradient(network: EDM2) -> None:
    """A consistency target: the student itself in training mode, without gradient."""
    with torch.no_grad():
        network.train()(X, TIME, COND)


def evaluated(network: EDM2) -> None:
    network.eval()(X, TIME, COND)


def frozen(network: EDM2) -> None:
    """The other player's turn."""
    network.train().requires_grad_(False)(X, TIME, COND)


@pytest.mark.parametrize("forward", [no_gradient, evaluated, frozen])
def test_other_forwards_leave_weights_alone(forward):
    network = tiny()
    before = copy.deepcopy(network.state_dict())
    forward(network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_target_after_the_student_sees_the_students_weights():
    """And the student's gradient is that of the weights of its own forward, whatever came after."""
    network = tiny().train()
    value = network(X, TIME, COND)
    before = [weight.clone() for weight in weights(network)]
    no_gradient(network)
    assert all(torch.equal(*pair) for pair in zip(before, weights(network), strict=True))
    value.square().sum().backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in weights(network))


def test_two_training_forwards_make_one_gradient():
    """As in losses that ask the student twice: the second forward must not touch what the first one keeps for its backward."""
    network = tiny().train()
    (network(X, TIME, COND) + network(-X, TIME, COND)).square().sum().backward()
    assert all(float(weight.grad.abs().sum()) > 0 for weight in weights(network))


@pytest.mark.parametrize("fused", [True, False])
def test_normalisation_comes_again_after_a_step(fused):
    network = tiny().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1, fused=fused)
    network(X, TIME, COND).square().sum().backward()
    optimizer.step()
    assert max(float((rows(weight) - 1).abs().max()) for weight in weights(network)) > 1e-3
    network(X, TIME, COND)
    assert max(float((rows(weight) - 1).abs().max()) for weight in weights(network)) < 1e-3


# ---------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    ("size", "millions"), [("XS", 124.7), ("S", 280.2), ("M", 497.8), ("L", 777.5), ("XL", 1119.3), ("XXL", 1523.2)]
)
def test_published_sizes(size, millions):
    """Parameters of the latent ImageNet-512 networks (2312.02696, table 2)."""
    with torch.device("meta"):
        network = EDM2(size, 64, 4, 1000)
    assert sum(value.numel() for value in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert network.model.stem.weight.shape[0] == WIDTHS[size]


def test_no_class_is_a_row_of_zeros():
    network = tiny().eval()
    none = network(X, TIME, {"labels": torch.tensor([3, 3])})
    assert not torch.allclose(none, network(X, TIME, {"labels": torch.tensor([0, 1])}))
    with torch.no_grad():
        network.model.label.weight.zero_()
    torch.testing.assert_close(network(X, TIME, {"labels": torch.tensor([0, 1])}), none)


def test_dropout_up_to_a_resolution():
    network = tiny(dropout=0.4, dropout_resolution=4)
    high = [*network.model.encoder[0].blocks, *network.model.decoder[1].entry, *network.model.decoder[1].blocks]
    low = [network.model.encoder[1].down, *network.model.decoder[0].entry, *network.model.decoder[0].blocks]
    assert {block.dropout for block in high} == {0.0} and {block.dropout for block in low} == {0.4}
    with torch.no_grad():
        assert not torch.equal(network.train()(X, TIME, COND), network(X, TIME, COND))
        assert torch.equal(network.eval()(X, TIME, COND), network(X, TIME, COND))


def test_scalar_inputs_begin_without_effect():
    network = tiny().eval()
    plain = network(X, TIME, COND)
    network.add_scalar_input("guidance")
    cond = {**COND, "guidance": torch.tensor([3.0, 7.0])}
    assert torch.equal(network(X, TIME, cond), plain)
    torch.nn.init.normal_(network.scalars["guidance"].projection.weight)
    assert not torch.allclose(network(X, TIME, cond), plain)


@torch.no_grad()
def test_half_precision_keeps_frequencies_and_phases():
    network = tiny().eval()
    expected, kept = network(X, TIME, COND), copy.deepcopy(network.model.time)
    network.to(torch.bfloat16)
    assert network.model.stem.weight.dtype == torch.bfloat16
    assert torch.equal(network.model.time.frequencies, kept.frequencies) and torch.equal(network.model.time.phases, kept.phases)
    torch.testing.assert_close(network(X, TIME, COND).float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tiny(sample_size=9), "sample_size=9"),
        (lambda: tiny(head_width=64), "head_width=64: 32 channels at resolution 4"),
        (lambda: tiny()(X, TIME, COND, torch.ones(2)), "no second time"),
        (lambda: tiny().model(X, TIME), "labels=None"),
    ],
)
def test_misuse_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
