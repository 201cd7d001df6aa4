"""What every method shares: a student, a teacher and a space, in the training loop of `trained.py`; a method writes
``losses(batch)``. (`two_player.py` has those with a critic.)
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from distill.denoiser import Denoiser
from distill.evaluation import Evaluation
from distill.frozen import Frozen
from distill.guidance import GuidanceRule
from distill.methods.sampled import SampledModule
from distill.methods.trained import TrainedModule
from distill.networks.base import inner_models
from distill.optimization import Optimization
from distill.pretrained import identity_of
from distill.sharding import networks_of
from distill.space import ModelSpace


class Method(SampledModule, TrainedModule, ABC):
    """Trains ``student``, with the help of a frozen ``teacher`` if there is one.

    Args:
        student: the denoiser that is trained.
        teacher: a denoiser that is never trained and never saved; checkpoints keep its path and hash.
        guidance: how the teacher is guided, in training and in its samples; None for not.
        optimization: optimiser, learning rate, clipping, accumulation, averaging.
        evaluation: what is drawn and measured in validation.
        space: how pixels and prompts become what the networks see; None if the data is that already.
    """

    student: Denoiser

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser | None,
        guidance: GuidanceRule | None,
        optimization: Optimization,
        evaluation: Evaluation,
        space: ModelSpace | None = None,
    ):
        frozen = None if teacher is None else Frozen(teacher)
        super().__init__(student, optimization)
        self._teacher: Frozen | None = frozen
        self._space = Frozen(space or ModelSpace())
        self.guidance, self.evaluation = guidance, evaluation
        self.metrics = nn.ModuleDict(
            {str(n): nn.ModuleDict({str(m.name): m.clone() for m in evaluation.metrics}) for n in evaluation.steps}
        )

    def on_fit_start(self) -> None:
        """Compiles the inner networks, in place: the names of their weights stay as they are."""
        if self.optimization.compile:
            for model in (model for owner in self.owners for model in inner_models(owner)):
                model.compile()
        half = self.has_teacher and getattr(self.teacher, "frozen_dtype", None) == torch.float16
        if half and self.shared_names():
            raise ValueError(
                "model.teacher.dtype=float16 with LoRA layers or adapters on its weights: gradients would pass it unscaled; "
                "set it to null (and trainer.precision=bf16-mixed to compute in bfloat16), or to bfloat16."
            )

    @property
    def owners(self) -> list[nn.Module]:
        return [self] if self._teacher is None else [self, self._teacher.module]

    def sharded_parts(self) -> list[nn.Module]:
        return super().sharded_parts() + self.frozen_parts()

    def frozen_parts(self) -> list[nn.Module]:
        return [] if self._teacher is None else networks_of(self._teacher.module)

    def drawn(self, rule: GuidanceRule | None) -> GuidanceRule | None:
        """The rule of this batch, if there is one: its scale may be drawn."""
        return None if rule is None else rule.drawn(self.device)

    def shared_names(self) -> set[str]:
        """The names under which parameters of the teacher itself appear: LoRA layers stand on them. They are not saved."""
        own = set() if self._teacher is None else {id(parameter) for parameter in self._teacher.module.parameters()}
        return {name for name, parameter in self.named_parameters(remove_duplicate=False) if id(parameter) in own}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Everything but what is the teacher's."""
        state, shared = super().state_dict(*args, **kwargs), self.shared_names()
        return type(state)((name, value) for name, value in state.items() if name not in shared)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what `state_dict` gave; a key too few or too many is an error if ``strict``."""
        shared, present = self.shared_names(), super().state_dict()
        return super().load_state_dict({**state_dict, **{name: present[name] for name in shared}}, strict, assign)

    @property
    def guides(self) -> dict[str, Any]:
        """Path and hash of each further network by which the teacher is guided, by name."""
        return {} if self.guidance is None else self.guidance.identity

    @property
    def trained_sampling(self) -> dict[str, Any] | None:
        """Settings of the sampler that the student is trained for, which a checkpoint keeps; None if it is for any."""
        return None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        teacher = None if self._teacher is None else identity_of(self._teacher.module)
        checkpoint["distill"] |= {"teacher": teacher, "space": self.space.identity, "guidance": self.guides}
        if self.trained_sampling is not None:
            checkpoint["distill"]["sampler"] = self.trained_sampling

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["distill"]
        own: dict[str, Any] = {"teacher": None if self._teacher is None else identity_of(self._teacher.module)}
        if "teacher" not in saved:
            raise ValueError("The checkpoint is of a part of a pipeline (autoencoder, text tower), not of a method.")
        theirs = {"teacher": saved["teacher"], **{f"space.{part}": value for part, value in saved.get("space", {}).items()}}
        own |= {f"space.{part}": value for part, value in self.space.identity.items()}
        theirs |= {f"guidance.{part}": value for part, value in saved.get("guidance", {}).items()}
        own |= {f"guidance.{part}": value for part, value in self.guides.items()}
        for part in sorted({*theirs, *(part for part in own if part.startswith("guidance."))}):
            identity = theirs.get(part)
            if (identity or {}).get("sha256") != (own.get(part) or {}).get("sha256"):
                raise ValueError(
                    f"The checkpoint was trained with the {part} {identity}, but model.{part} is {own.get(part)}: "
                    "give the same, or start a new run."
                )
        if (sampling := saved.get("sampler")) != self.trained_sampling:
            raise ValueError(
                f"The checkpoint's student was trained with sampler={sampling}, but model.sampler is {self.trained_sampling}: "
                "give the same, or start a new run."
            )
        super().on_load_checkpoint(checkpoint)
