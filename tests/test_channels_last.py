"""``optimization.channels_last``: the layout of every weight and of what optimisers keep; the same results, also across it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import closest, evaluation, everything, of_part, same, small, trainer
from tiny import TinyData
from torch import Tensor, nn

from distill.denoiser import NetworkDenoiser
from distill.distances import SquaredDistance
from distill.ema import DecayAveraging
from distill.grids import ConstantPoints, UniformGrid
from distill.methods.consistency import Consistency
from distill.networks.base import put_channels_last
from distill.networks.unet2d import UNet2D
from distill.optimization import Optimization
from distill.pairs import GridPairs
from distill.schedules import RectifiedFlow
from distill.solvers import Euler


def unet(seed: int, dropout: float = 0.0) -> NetworkDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet2D(channels=(8, 16), layers_per_block=1, heads_width=8, groups=4, dropout=dropout)
        return NetworkDenoiser(network, RectifiedFlow())


def method(channels_last: bool, student: Any = None) -> Consistency:
    """With a teacher, a target and an average; ``eps`` keeps Adam from dividing one rounding error by another."""

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-2, eps=1e-4, fused=True)

    return Consistency(
        GridPairs(UniformGrid(), ConstantPoints(8)), SquaredDistance(), Optimization(adam, channels_last=channels_last),
        evaluation(), student=student or unet(0), teacher=unet(1), solver=Euler(), target=DecayAveraging(0.5),
    )  # fmt: skip


def trained(
    channels_last: bool, steps: int, start: Path | None = None, end: Path | None = None, dropout: float = 0.0
) -> tuple[Consistency, Any]:
    """A run of so many steps, which may start from a checkpoint and leave one."""
    made, ready = method(channels_last, unet(0, dropout)), trainer(steps)
    ready.fit(made, datamodule=TinyData(), ckpt_path=start)
    if end is not None:
        ready.save_checkpoint(end)
    return made, ready


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    """Everything after four steps without."""
    return everything(*reversed(trained(False, 4)))


def laid_out(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last)


def test_every_network_and_all_state_has_its_channels_last_and_results_are_the_same(plain):
    made, ready = trained(True, 4)
    for owner in (made.student, made.ema, made.target, made.teacher):
        kernels = [part.weight for part in owner.modules() if isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3)]
        assert kernels and all(laid_out(weight) for weight in kernels)
    (optimizer,) = ready.optimizers
    for weight, state in optimizer.state.items():
        assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == weight.stride()
    found = everything(ready, made)
    assert closest(found, plain) < 1e-5
    start = {key: value for key, value in method(False).state_dict().items() if key.startswith("student.")}
    assert closest(of_part(found, "student"), start) > 1e-2


def test_a_run_resumes_to_the_bit(tmp_path):
    whole, half = everything(*reversed(trained(True, 4, dropout=0.1))), tmp_path / "half.ckpt"
    trained(True, 2, end=half, dropout=0.1)
    assert same(everything(*reversed(trained(True, 4, half, dropout=0.1))), whole)


@pytest.mark.parametrize("first", [False, True], ids=["without, then with", "with, then without"])
def test_a_checkpoint_of_the_other_layout_goes_on(plain, first, tmp_path):
    """A fused Adam on a CPU is wrong, and says nothing, if its state is laid out unlike the weights."""
    trained(first, 2, end=tmp_path / "half.ckpt")
    made, ready = trained(not first, 4, tmp_path / "half.ckpt")
    assert closest(everything(ready, made), plain) < 1e-5
    (optimizer,) = ready.optimizers
    assert all(state["exp_avg"].stride() == weight.stride() for weight, state in optimizer.state.items())


def test_the_layout_stays_inside_the_network():
    """What is drawn like the result, such as noise, is drawn in its order of memory."""
    network = UNet2D(in_channels=3, channels=(8, 16), layers_per_block=1, heads_width=8, groups=4).eval()
    x, t, cond = torch.randn(2, 3, 8, 8), torch.tensor([100.0, 700.0]), {"labels": torch.tensor([1, 2])}
    seen: list[Tensor] = []
    with torch.no_grad():
        expected = network(x, t, cond)
        put_channels_last(network)
        network.model.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(output))
        found = network(x, t, cond)
    assert laid_out(seen[0]) and not seen[0].is_contiguous() and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_student_without_such_a_network_is_refused():
    with pytest.raises(ValueError, match="optimization.channels_last=true: only U-Nets of diffusers"):
        method(True, small())
