"""The second time of a network: without effect at first, then read; what is embedded of it; jumps in all parameterisations."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import SHAPE, small
from oracle import SCHEDULES, Gaussian

from distill.adapters import sinusoid
from distill.denoiser import NetworkDenoiser
from distill.guidance import ClassifierFreeGuidance
from distill.jump_times import CutGrid
from distill.jumps import jump, jump_coefficients
from distill.networks.edm import EDM
from distill.networks.edm2 import EDM2
from distill.networks.families import FAMILIES as WRAPPERS
from distill.networks.unet2d import UNet2D
from distill.pretrained import PretrainedDenoiser, save_denoiser
from distill.samplers import JumpSampler, RenoiseSampler
from distill.schedules import NoiseSchedule, RectifiedFlow, VarianceExploding, VariancePreserving
from distill.solvers import DDIM
from distill.types import label_conditions


def digits_network(seed: int = 0) -> UNet2D:
    torch.manual_seed(seed)
    return UNet2D(num_classes=10, channels=(8, 16), layers_per_block=1)


def denoiser(schedule: NoiseSchedule | None = None, prediction: Any = "flow") -> NetworkDenoiser:
    return NetworkDenoiser(digits_network(), schedule or RectifiedFlow(), prediction).eval()


def trained(of: NetworkDenoiser) -> NetworkDenoiser:
    """As after some training of what reads the second time."""
    torch.manual_seed(3)
    torch.nn.init.normal_(of.network.scalars["r"].projection.weight, std=0.3)
    return of


X, T, R = torch.randn(2, 1, 8, 8), torch.tensor([0.9, 0.5]), torch.tensor([0.4, 0.1])
COND, NULL = label_conditions(torch.tensor([1, 7]), 10)

# ------------------------------------------------------------------------------------------------------------ the input


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_given_one_that_changes_nothing_at_first(name):
    family = FAMILIES[name]
    network, cond = WRAPPERS[family.model_class].of(family.model()), family.cond(2)[0] | {"guidance": torch.tensor([2.0, 7.5])}
    x, time = torch.randn(2, family.channels, family.size, family.size), torch.tensor([100.0, 600.0])
    with torch.no_grad():
        before = network(x, time, cond)
        network.add_second_time(0.0, 1000.0)
        torch.testing.assert_close(network(x, time, cond, time / 2), before, rtol=0, atol=0)
        torch.nn.init.normal_(network.scalars["r"].projection.weight, std=0.3)
        near, far = (network(x, time, cond, time * share) for share in (0.5, 0.9))
    assert (near - before).abs().max() > 1e-4 < (far - near).abs().max()


@pytest.mark.parametrize("kind", [EDM, EDM2])
def test_edms_networks_read_one_too(kind):
    torch.manual_seed(0)
    size = dict(width=16) if kind is EDM else dict(size=16, head_width=16)
    network = kind(**size, sample_size=8, multipliers=(1, 2), blocks=1, attention=(4,)).eval()
    # EDM's networks end in a layer that is zero at first.
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, time = torch.randn(2, 3, 8, 8), torch.tensor([0.3, -1.0])
    with torch.no_grad():
        before = network(x, time, {})
        network.add_second_time(-1.5, 1.1)
        torch.testing.assert_close(network(x, time, {}, time - 0.2), before, rtol=0, atol=0)
        torch.nn.init.normal_(network.scalars["r"].projection.weight, std=0.3)
        assert (network(x, time, {}, time - 0.2) - network(x, time, {}, time - 0.4)).abs().max() > 1e-4


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stride", [False, True])
def test_shares_of_the_networks_times_are_embedded_on_every_schedule(name, stride):
    """0 at the schedule's end, 1 at its start; a stride is the difference of the two."""
    schedule = SCHEDULES[name]
    student = denoiser(schedule)
    student.add_second_time(stride)
    half = (schedule.t_min * schedule.t_max) ** 0.5 if name == "ve" else (schedule.t_min + schedule.t_max) / 2
    t, r = torch.tensor([schedule.t_max, half]), torch.tensor([half, schedule.t_min])
    seen: list[torch.Tensor] = []
    scalar = student.network.scalars["r"]
    scalar.projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    student(X, t, COND, r)
    middle = {"rf-shift3": 0.75}.get(name, 0.5)
    shares = [1 - middle, middle] if stride else [middle, 0.0]
    torch.testing.assert_close(scalar.value, torch.tensor(shares), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[0], sinusoid(1000 * scalar.value, 256))


def test_without_one_the_end_of_the_schedule_is_meant():
    for schedule in (RectifiedFlow(), VarianceExploding()):
        student = denoiser(schedule)
        student.add_second_time()
        trained(student)
        end = torch.full_like(T, schedule.t_min)
        assert student(X, T, COND).equal(student(X, T, COND, end))
        assert not student(X, T, COND).equal(student(X, T, COND, R))


def test_it_is_no_condition_and_comes_once():
    student = denoiser()
    student.network.add_scalar_input("guidance")
    assert not student.second_time
    student.add_second_time()
    weight = trained(student).network.scalars["r"].projection.weight.clone()
    student.add_second_time()
    assert student.second_time and student.scalar_inputs == ("guidance",)
    assert student.network.scalars["r"].projection.weight.equal(weight)
    student(X, T, {**COND, "guidance": torch.ones(2)}, R)


def test_a_copy_reads_its_own():
    student = denoiser()
    student.add_second_time()
    other = trained(copy.deepcopy(student))
    plain = student(X, T, COND, R)
    assert plain.equal(student(X, T, COND, R / 2)) and not plain.equal(other(X, T, COND, R))


@pytest.mark.parametrize("stride", [False, True])
def test_what_is_embedded_is_saved_with_the_weights(stride, tmp_path):
    student = denoiser(VariancePreserving(), "eps")
    student.add_second_time(stride)
    trained(student)
    save_denoiser(student, tmp_path / "export")
    loaded = PretrainedDenoiser(str(tmp_path / "export"))
    t, r = torch.tensor([900.0, 500.0]), torch.tensor([400.0, 20.0])
    assert loaded.second_time
    torch.testing.assert_close(loaded(X, t, COND, r), student(X, t, COND, r), rtol=0, atol=0)
    loaded.add_second_time(stride)
    with pytest.raises(ValueError, match=f"stride={not stride}: the network was trained on a second time that is embedded"):
        loaded.add_second_time(not stride)


def test_what_cannot_be_given_one_is_named():
    with pytest.raises(ValueError, match="SmallNetwork cannot be given a second time"):
        small().add_second_time()
    with pytest.raises(ValueError, match="stride=True: SmallNetwork cannot be given a stride"):
        small(second_time=True).add_second_time(stride=True)
    network = digits_network()
    network.add_second_time(0.0, 1000.0)
    with pytest.raises(ValueError, match="UNet2DModel has a second time input, and was called without one"):
        network(X, T, COND)


# ------------------------------------------------------------------------------------------------------------- the jump


PREDICTIONS = ["x0", "eps", "v", "flow", "edm"]


def jumper(name: str, prediction: Any, sigma_data: float = 0.5) -> NetworkDenoiser:
    """A network that knows s, in float64."""
    student = small(SCHEDULES[name], prediction, second_time=True).double()
    student.sigma_data = sigma_data
    return student


def interior(name: str, count: int = 6) -> torch.Tensor:
    schedule = SCHEDULES[name]
    t = torch.linspace(schedule.t_max, schedule.t_min, count + 2, dtype=torch.float64)[1:-1]
    return t


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_jump_to_its_own_time_is_the_identity(name, prediction):
    t = interior(name)
    x = torch.randn(len(t), *SHAPE, dtype=torch.float64)
    assert jump(jumper(name, prediction), x, t, t, {}).equal(x)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_jumps_are_ddim_steps_of_the_denoiser(name, prediction):
    """alpha_s D + sigma_s (x - alpha_t D) / sigma_t; simple-EDM is the parameterisation ``edm``."""
    t = interior(name)[:-1]
    s = interior(name)[1:]
    student = jumper(name, prediction)
    x = torch.randn(len(t), *SHAPE, dtype=torch.float64)

    class Told(NetworkDenoiser):
        """Tells DDIM, which knows no second time, where it goes."""

        def forward(self, x, t, cond, r=None):  # type: ignore[no-untyped-def]
            return super().forward(x, t, cond, s)

    told = Told(student.network, student.schedule, prediction, student.sigma_data)
    expected = DDIM().step(told, x, t, s, {})
    torch.testing.assert_close(jump(student, x, t, s, {}), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sigma_d", [0.5, 1.0, 0.3])
def test_simple_edm_is_the_papers(sigma_d):
    """Of ``x = (1 - t) x0 + t sigma_d z``, F of the other sign; on the flow of shift sigma_d, x over 1 + (sigma_d - 1) t."""
    t, s = torch.tensor([0.994, 0.7, 0.4], dtype=torch.float64), torch.tensor([0.5, 0.1, 0.0], dtype=torch.float64)
    student = NetworkDenoiser(small().network, RectifiedFlow(sigma_d), "edm", sigma_data=sigma_d)
    own = [1 + (sigma_d - 1) * time for time in (t, s)]
    c_skip, c_out = jump_coefficients(student, t, s)
    norm = (1 - t) ** 2 + t**2
    skip = ((1 - t) * (1 - s) + t * s) / norm
    out = -((1 - s) * t - (1 - t) * s) * sigma_d / norm.sqrt()
    torch.testing.assert_close(c_skip * own[1] / own[0], skip)
    torch.testing.assert_close(-c_out * own[1], out)
    c_in = student.coefficients(t)[0] / own[0]
    torch.testing.assert_close(c_in, 1 / (sigma_d * norm.sqrt()))


def test_euler_fm_is_the_papers_with_data_over_sigma_d():
    """``x - (t - s) sigma_d F``, x and f over sigma_d."""
    t, s = torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64), torch.tensor([0.5, 0.1, 0.0], dtype=torch.float64)
    c_skip, c_out = jump_coefficients(NetworkDenoiser(small().network, RectifiedFlow(), "flow"), t, s)
    torch.testing.assert_close(c_skip, torch.ones_like(t))
    torch.testing.assert_close(c_out, s - t)


@pytest.mark.parametrize("prediction", ["v", "flow", "edm"])
@pytest.mark.parametrize("name", ["rf", "rf-shift3", "trig"])
def test_jumps_from_pure_noise_and_from_data_are_finite(name, prediction):
    schedule, student = SCHEDULES[name], jumper(name, prediction)
    t = torch.tensor([schedule.t_max, schedule.t_max, schedule.t_min], dtype=torch.float64)
    s = torch.tensor([schedule.t_max / 2, schedule.t_min, schedule.t_min], dtype=torch.float64)
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    landed = jump(student, x, t, s, {})
    assert landed.isfinite().all()
    # To the data it is x0 itself.
    torch.testing.assert_close(landed[1:], student(x, t, {}, s)[1:], rtol=0, atol=1e-7)


def test_an_oracle_jumps_along_its_flow():
    t, s = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.3, 0.2]).double()
    exact = Gaussian(RectifiedFlow(), torch.zeros(SHAPE), torch.full(SHAPE, 0.3))
    x = torch.randn(2, *SHAPE).double()
    torch.testing.assert_close(jump(exact, x, t, s, {}), exact.flow(x, t, s))


# ------------------------------------------------------------------------------------------------------------- sampling


def test_pushforward_and_restart_sampling_by_hand():
    """x <- f(x, t_i, t_{i+1}); f(x, t_i, end), then noise of level t_{i+1}."""
    student, noise, grid = small(second_time=True), torch.randn(3, *SHAPE), CutGrid(0.994)
    high, middle, low = (torch.full((3,), t) for t in (0.994, 0.497, 0.0))
    pushed = jump(student, jump(student, noise, high, middle, {}), middle, low, {})
    torch.testing.assert_close(JumpSampler(grid)(student, noise, {}, 2), pushed, rtol=0, atol=1e-5)
    fresh = torch.randn(3, *SHAPE)
    renoised = student.schedule.add_noise(jump(student, noise, high, low, {}), fresh, middle)
    expected = jump(student, renoised, middle, low, {})
    torch.testing.assert_close(RenoiseSampler(grid)(student, noise, {}, 2, lambda x: fresh), expected, rtol=0, atol=1e-5)


def test_guidance_of_the_raw_prediction_is_that_of_x0():
    """The paper guides F before the map; both are affine in F with the same coefficients."""
    student = small(second_time=True, num_classes=2)
    cond, null = label_conditions(torch.tensor([0, 1, 1]), 2)
    x, t, s = torch.randn(3, *SHAPE), torch.tensor([0.9, 0.6, 0.5]), torch.tensor([0.5, 0.2, 0.0])
    raw = [student.raw(x, t, each, s) for each in (cond, null)]
    c_skip, c_out = (c.float().reshape(3, 1, 1, 1) for c in jump_coefficients(student, t, s))
    expected = c_skip * x + c_out * (raw[1] + 1.5 * (raw[0] - raw[1]))
    guided = ClassifierFreeGuidance(1.5)(student, null)
    torch.testing.assert_close(jump(guided, x, t, s, cond), expected, rtol=1e-4, atol=1e-5)
    plain = c_skip * x + c_out * raw[0]
    assert (expected - plain).abs().max() > 1e-2


def test_a_cut_grid_starts_below_the_schedules_end_and_takes_given_times():
    grid, schedule = CutGrid(0.994, {2: [0.994, 0.583]}), RectifiedFlow()
    torch.testing.assert_close(grid.starts(schedule, 4), torch.tensor([0.994, 0.7455, 0.497, 0.2485]).double())
    assert grid.starts(schedule, 2).tolist() == [0.994, 0.583]
    assert grid.nodes(schedule, 1).tolist() == [0.994, 0.0]
    assert math.isclose(float(CutGrid(1.0).starts(schedule, 3)[1]), 2 / 3)
    with pytest.raises(ValueError, match=r"times\[2\]=\[0.5, 0.9\]: give 2 decreasing"):
        CutGrid(0.994, {2: [0.5, 0.9]})
    with pytest.raises(ValueError, match="high=1.5: give a time of RectifiedFlow"):
        CutGrid(1.5).starts(schedule, 2)
