"""Samples of a source, batch by batch: what each of them is to show, its pixels, and how many evaluations it has cost."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from distill.space import ModelSpace
from distill.types import Batch, Cond, label_conditions


def requests(source: Any, arguments: argparse.Namespace) -> Batch:
    """What each of the samples is to show: a batch of ``num`` conditions and prompts, without images.

    Raises:
        ValueError: labels or prompts that the source cannot take.
    """
    examples: Batch = source.examples(arguments.num)
    cycle = torch.arange(arguments.num)
    if arguments.labels:
        if source.num_classes is None or arguments.prompts:
            raise ValueError("--labels: this network has no classes, or is given prompts; leave the option out.")
        if wrong := [label for label in arguments.labels if not 0 <= label < source.num_classes]:
            raise ValueError(f"--labels={wrong}: give labels from 0 to {source.num_classes - 1}.")
        labels = torch.tensor(arguments.labels)[cycle % len(arguments.labels)]
        return Batch(None, *label_conditions(labels, source.num_classes))
    if arguments.prompts:
        if source.space.conditioner is None:
            raise ValueError("--prompts: this network reads none; leave the option out.")
        return Batch(None, {}, {}, prompts=[arguments.prompts[i % len(arguments.prompts)] for i in cycle.tolist()])
    return examples


def rows(batch: Batch, indices: range, device: str) -> Batch:
    """Some rows of a batch of conditions and prompts, on a device."""
    part = slice(indices.start, indices.stop)
    cond, null = ({key: value[part].to(device) for key, value in side.items()} for side in (batch.cond, batch.null))
    return Batch(None, cond, null, prompts=None if batch.prompts is None else batch.prompts[part])


def negative(space: ModelSpace, prompt: str, count: int) -> Cond:
    """The conditions of a prompt, ``count`` rows. Raises ValueError if the network reads none."""
    if space.conditioner is None:
        raise ValueError("--negative-prompt: this network reads no prompts; leave the option out.")
    return space.encode(Batch(None, {}, {}, prompts=[prompt] * count)).cond


def conditions(source: Any, arguments: argparse.Namespace, wanted: Batch, indices: range) -> Batch:
    """What some of the samples are to show, in model space, on the device."""
    ready = source.space.encode(rows(wanted, indices, arguments.device))
    if arguments.negative_prompt is not None:
        ready.null = ready.null | negative(source.space, arguments.negative_prompt, len(indices))
    return ready


class Evaluations:
    """How much a network was called.

    Attributes:
        forwards: calls.
        samples: evaluations of one sample; a call has as many as its batch has rows, two for each sample that is guided.
    """

    def __init__(self) -> None:
        self.forwards, self.samples = 0, 0

    def count(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook."""
        self.forwards += 1
        self.samples += len(output if isinstance(output, Tensor) else output[0])


@contextmanager
def counted(network: nn.Module) -> Iterator[Evaluations]:
    """Counts the evaluations of a network within the block."""
    evaluations = Evaluations()
    hook = network.register_forward_hook(evaluations.count)
    try:
        yield evaluations
    finally:
        hook.remove()


@torch.no_grad()
def draw_batch(source: Any, arguments: argparse.Namespace, wanted: Batch, indices: range) -> tuple[Tensor, int]:
    """Samples ``(b, c, h, w)`` with these numbers, pixels in [-1, 1] on the CPU, and the evaluations of all of them."""
    with counted(source.network) as evaluations:
        drawn = source.draw(arguments, indices, conditions(source, arguments, wanted, indices))
        return source.space.decode(drawn).cpu(), evaluations.samples


def draw_all(source: Any, arguments: argparse.Namespace, wanted: Batch) -> Tensor:
    """All samples ``(num, c, h, w)`` as pixels in [-1, 1], on the CPU, batch by batch under a progress bar."""
    batches = []
    for first in tqdm(range(0, arguments.num, arguments.batch_size), desc="sampling", unit="batch"):
        indices = range(first, min(first + arguments.batch_size, arguments.num))
        batches.append(draw_batch(source, arguments, wanted, indices)[0])
    return torch.cat(batches)
