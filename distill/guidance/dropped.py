"""Dropped conditions: what a network must be trained with to be guided classifier-free (Ho & Salimans 2207.12598)."""

from __future__ import annotations

import torch

from distill.denoiser import Denoiser
from distill.schedules import per_sample
from distill.types import Cond


def check_null_share(probability: float, denoiser: Denoiser) -> None:
    """Raises ValueError for a share of samples without conditions that is none, or that the network has no null class for."""
    if not 0 <= probability < 1:
        raise ValueError(f"null_probability={probability}: give a share in [0, 1).")
    if probability and denoiser.num_classes is not None and not denoiser.null_class:
        raise ValueError(f"null_probability={probability}: the network has no null class; set it to 0.")


def drop_conditions(cond: Cond, null: Cond, probability: float) -> Cond:
    """``cond`` with rows replaced by those of ``null``, each sample's with ``probability``, all its conditions together.

    Raises:
        ValueError: conditions to drop, and no null conditions to put in their place.
    """
    if not cond or probability == 0:
        return cond
    if not null:
        raise ValueError(f"null_probability={probability}: the data delivers no null conditions; set it to 0.")
    rows = next(iter(cond.values()))
    dropped = torch.rand(len(rows), device=rows.device) < probability
    return {key: torch.where(per_sample(dropped, value), null[key], value) for key, value in cond.items()}
