"""An extra scalar input: without effect at first, its own in every copy, and felt once it is trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distill.adapters import ScalarInput, sinusoid
from distill.networks.unet2d import UNet2D
from distill.types import label_conditions

COND, _ = label_conditions(torch.tensor([0, 2]), 3)
GUIDANCE = {**COND, "guidance": torch.tensor([2.0, 5.0])}


def network() -> UNet2D:
    return UNet2D(1, 8, 3, (8, 16), layers_per_block=1, attention=(False, False), groups=4).eval()


def call(net: UNet2D, cond) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return net(torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([10.0, 500.0]), cond)


def moved(net: UNet2D) -> UNet2D:
    """With a trained projection."""
    nn.init.normal_(net.scalars["guidance"].projection.weight)
    return net


def test_sinusoid_is_that_of_latent_consistency_models():
    """Frequencies 10000^(-j / (half - 1)), sines then cosines, as diffusers' training script embeds w."""
    half, value = 4, torch.tensor([0.0, 7.0])
    angles = value.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / (half - 1))
    torch.testing.assert_close(sinusoid(value, 8).double(), torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1e-6)


def test_no_effect_at_first():
    net = network()
    plain, keys = call(net, COND), set(net.model.state_dict())
    net.add_scalar_input("guidance")
    assert torch.equal(call(net, GUIDANCE), plain) and set(net.model.state_dict()) == keys
    # It can learn: the first gradient is not zero.
    net(torch.randn(2, 1, 8, 8), torch.tensor([10.0, 500.0]), GUIDANCE).square().sum().backward()
    assert float(net.scalars["guidance"].projection.weight.grad.abs().sum()) > 0


def test_projection_of_the_scaled_value_is_added_to_what_the_time_embedding_is_made_of():
    """MLP(time + W sinusoid(1000 (scale - 1))); each sample has its own."""
    embedding = nn.Sequential(nn.Linear(3, 6), nn.SiLU())
    scalar = ScalarInput(embedding, 3, origin=1.0, dimension=8)
    time = torch.randn(2, 3)
    scalar.value = torch.tensor([1.0, 1.0])
    layers = nn.Sequential(*embedding)  # without the hook
    nn.init.normal_(scalar.projection.weight)
    scalar.value = torch.tensor([1.003, 3.5])
    added = sinusoid(1000 * (scalar.value - 1.0), 8) @ scalar.projection.weight.T
    torch.testing.assert_close(embedding(time), layers(time + added))


def test_value_matters_once_trained():
    net = network()
    net.add_scalar_input("guidance")
    plain = call(moved(net), GUIDANCE)
    other = call(net, {**COND, "guidance": torch.tensor([2.0, 6.0])})
    assert torch.equal(plain[0], other[0]) and not torch.isclose(plain[1], other[1]).all()


def test_deep_copies_hook_their_own():
    net = network()
    net.add_scalar_input("guidance")
    twin = moved(copy.deepcopy(net))
    before = call(net, GUIDANCE)
    assert not torch.equal(call(twin, GUIDANCE), before)
    # The twin's call and its weights leave the first as it was, and no value is shared.
    call(twin, {**COND, "guidance": torch.tensor([9.0, 9.0])})
    assert torch.equal(call(net, GUIDANCE), before) and net.scalars["guidance"].value.tolist() == [2.0, 5.0]


def test_adding_twice_is_once():
    net = network()
    net.add_scalar_input("guidance")
    first = call(moved(net), GUIDANCE)
    net.add_scalar_input("guidance")
    assert torch.equal(call(net, GUIDANCE), first)


def test_missing_value_is_named():
    net = network()
    net.add_scalar_input("guidance")
    with pytest.raises(ValueError, match=r"cond\['guidance'\] is missing"):
        call(net, COND)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"channels": (8, 16), "attention": (True,)}, "attention="),
        ({"channels": (8, 18), "attention": (True, True)}, "channels="),
        ({"sample_size": 7, "channels": (8, 16)}, "sample_size=7"),
    ],
)
def test_bad_networks_are_named(settings, key):
    with pytest.raises(ValueError, match=key):
        UNet2D(**settings)
