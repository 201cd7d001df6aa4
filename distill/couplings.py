"""Data-noise couplings: which noise of a batch goes with which data, by minibatch optimal transport and its relatives.

Noise that is drawn apart from the data makes trajectories cross; noise that lies near its data crosses less, so a flow is
straighter and learned sooner, while any denoising, flow-matching or consistency loss stays as it is. Independent noise is no
coupling: ``coupling: null``.

An `Assignment` permutes the noise that was drawn, so that over many batches data and noise keep their laws exactly, in
any dimension. Across classes it does not keep the law of the noise *of one class*: noise that lies towards a class goes to that
class, and a sampler that draws ``z ~ N(0, I)`` for a class then starts where training seldom was. ``within_class`` permutes
among samples of the same label alone, which keeps that law too. Labels are those of the data, read before any condition is
dropped for guidance; data without labels (prompts among them) is one class.

Draws use torch's global generator, which a method seeds at each step from (seed, step, rank).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.types import Batch, DataSpec, Labels, Sample

Rows = Float[Tensor, "n d"]
Costs = Float[Tensor, "n m"]

HALF_MAX = torch.finfo(torch.float16).max


class Coupling(ABC):
    """Draws unit noise that goes with data."""

    @abstractmethod
    def draw(self, x0: Sample, labels: Labels | None = None) -> Sample:
        """Noise ``(b, *shape)`` for clean data of the same shape; ``labels`` are its classes, or None."""


class Assignment(Coupling, ABC):
    """Permutes noise among the samples of a batch so that the summed cost is least, by SciPy's linear assignment.

    The assignment is solved on the CPU: each step waits for the device once, and longer the larger the batch (seconds from
    about 4,096 samples).

    Args:
        within_class: whether noise stays among the samples of one label, where there are labels.
        gathered: whether the batch is that of all ranks, which must then be equally large, or of each rank by itself.
    """

    def __init__(self, within_class: bool, gathered: bool):
        self.within_class, self.gathered = within_class, gathered

    @abstractmethod
    def costs(self, x0: Rows, noise: Float[Tensor, "m d"]) -> Costs:
        """Cost ``(n, m)``, float64, of giving each of ``m`` noises to each of ``n`` samples, all flattened."""

    def draw(self, x0: Sample, labels: Labels | None = None) -> Sample:
        return self.pair(x0, torch.randn_like(x0), labels)

    @torch.no_grad()
    def pair(self, x0: Sample, noise: Sample, labels: Labels | None = None) -> Sample:
        """The given noise ``(b, *shape)`` in the order that goes with ``x0``: a permutation of it (of all ranks' if gathered).

        Samples that are not finite do not fail here: they take what is left, and their loss says what they are.
        """
        gathered = self.gathered and torch.distributed.is_available() and torch.distributed.is_initialized()
        everyones = _all_gather(noise) if gathered else noise
        costs = self.costs(x0.reshape(len(x0), -1), everyones.reshape(len(everyones), -1))
        classes = labels if self.within_class else None
        first = 0
        if gathered:
            # Each rank computes the costs of its own data; all then hold the same bits, and solve the same problem.
            costs, first = _all_gather(costs), torch.distributed.get_rank() * len(x0)
            classes = None if classes is None else _all_gather(classes)
        chosen = _assign(costs.nan_to_num(0.0, 0.0, 0.0), classes)[first : first + len(x0)]
        return everyones[chosen.to(everyones.device)]


class OptimalTransport(Assignment):
    """Exact minibatch optimal transport of squared distances (Pooladian et al. 2304.14772; Tong et al. 2302.00482).

    The plan between two uniform sets of n points is a permutation, which is used as it is; the papers draw n pairs from it with
    replacement. The least sum of ``|x - z|^2 = |x|^2 + |z|^2 - 2 x.z`` is the greatest sum of x.z: the other terms are the same
    for every permutation. So it is the same assignment at whatever scale a schedule adds the noise.

    Args:
        within_class, gathered: see `Assignment`; across classes the noise is coupled with the label (see above).
    """

    def __init__(self, within_class: bool = True, gathered: bool = False):
        super().__init__(within_class, gathered)

    def costs(self, x0: Rows, noise: Float[Tensor, "m d"]) -> Costs:
        return -(x0.double() @ noise.double().T)


class ImmiscibleAssignment(Assignment):
    """Immiscible diffusion's quantised assignment (Li et al. 2406.12303): distances, not squared, of scaled float16 tensors.

    As in the authors' code: data and noise are rounded to float16, then scaled, so that a distance does not overflow; the
    distances are float16 too, the sums in them are not. What overflows all the same counts as float16's largest number.
    The authors assign over all ranks and, also in class-conditional training, across classes.

    Args:
        scale: of both tensors, in (0, 1].
        gathered, within_class: see `Assignment`.

    Raises:
        ValueError: a scale out of its range.
    """

    def __init__(self, scale: float = 0.1, gathered: bool = True, within_class: bool = False):
        if not 0 < scale <= 1:
            raise ValueError(f"scale={scale}: give a number in (0, 1]; the paper's is 0.1.")
        super().__init__(within_class, gathered)
        self.scale = scale

    def costs(self, x0: Rows, noise: Float[Tensor, "m d"]) -> Costs:
        # Products of float16 numbers are exact in float64, so nothing is lost by the one matrix product.
        x, z = (self.scale * rows.clamp(-HALF_MAX, HALF_MAX).half() for rows in (x0, noise))
        x, z = x.double(), z.double()
        squares = x.square().sum(1)[:, None] + z.square().sum(1) - 2 * (x @ z.T)
        return squares.clamp_min(0).sqrt().clamp_max(HALF_MAX).half().double()


class NearestNoise(Coupling):
    """The nearest of k noises, for each sample by itself (improved immiscible diffusion, Li et al. 2505.18521).

    No communication, no wait for the device, and memory for a few noises a sample whatever k. The authors round to float16 for
    the distances; this does not. Unlike an assignment it changes the law of the noise, whose mean square in D dimensions falls
    to about ``1 - m_k sqrt(2 / (D (1 + 2 s^2)))`` for data of mean square s^2 and large D (m_k the mean of the largest of k
    standard normals: 1.03 for k = 4, 2.4 for 64): a standard deviation of 0.95 at D = 64, k = 4, s = 1, and 0.99 at D = 3072,
    s = 0.5. Sampling starts from unit noise all the same: a mild mismatch. The noise also lies towards the data of its class.

    Args:
        k: noises drawn for each sample, at least 1; the paper takes 4 for flow matching and 64 for Stable Diffusion.

    Raises:
        ValueError: k below 1.
    """

    def __init__(self, k: int):
        if k < 1:
            raise ValueError(f"k={k}: give the number of noises drawn for each sample, at least 1.")
        self.k = k

    @torch.no_grad()
    def draw(self, x0: Sample, labels: Labels | None = None) -> Sample:
        rows = (len(x0), *[1] * (x0.dim() - 1))
        nearest = torch.randn_like(x0)
        least = (nearest - x0).square().reshape(len(x0), -1).sum(1)
        for _ in range(self.k - 1):
            noise = torch.randn_like(x0)
            squares = (noise - x0).square().reshape(len(x0), -1).sum(1)
            nearest = torch.where((squares < least).reshape(rows), noise, nearest)
            least = torch.minimum(squares, least)
        return nearest


def noise_for(batch: Batch, coupling: Coupling | None) -> Sample:
    """Noise of a training batch: its own if it carries pairs, else what the coupling draws, else free unit noise."""
    assert batch.x0 is not None
    if batch.noise is not None:
        return batch.noise
    return torch.randn_like(batch.x0) if coupling is None else coupling.draw(batch.x0, batch.cond.get("labels"))


def refuse_pairs(coupling: Coupling | None, spec: DataSpec) -> None:
    """Raises ValueError if there is a coupling though the data says which noise goes with it."""
    if coupling is not None and spec.paired:
        raise ValueError(
            f"model.coupling={type(coupling).__name__} draws noise for the data, but data delivers pairs, each with a noise of "
            "its own: set model.coupling to null, or give data without noise."
        )


def _assign(costs: Costs, classes: Int[Tensor, " n"] | None) -> Int[Tensor, " n"]:
    """For each row the column of the assignment of least cost, ``(n,)`` on the CPU; within equal ``classes`` if given."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    table = costs.cpu().numpy()
    if classes is None:
        return torch.from_numpy(linear_sum_assignment(table)[1])
    columns, names = np.empty(len(table), dtype=np.int64), classes.cpu().numpy()
    for name in np.unique(names):
        own = np.flatnonzero(names == name)
        columns[own] = own[linear_sum_assignment(table[np.ix_(own, own)])[1]]
    return torch.from_numpy(columns)


def _all_gather(own: Tensor) -> Tensor:
    """The rows of all ranks, in the order of the ranks."""
    own = own.contiguous()  # NCCL takes no other
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own)
    return torch.cat(parts)
