"""Guidance: a rule turns a denoiser into a denoiser; methods, solvers and samplers never see the difference.

House convention: ``x0 = x0_null + scale (x0_cond - x0_null)``, so 1 is no guidance. Papers that write ``(1 + w) cond - w null``
(Ho & Salimans 2207.12598; latent consistency models) have ``scale = 1 + w``.
"""

from distill.guidance.adaptive import AdaptiveGuidance
from distill.guidance.autoguidance import Autoguidance
from distill.guidance.classifier_free import ClassifierFreeGuidance, RandomGuidance
from distill.guidance.dropped import check_null_share, drop_conditions
from distill.guidance.independent import IndependentConditionGuidance
from distill.guidance.plus_plus import CfgPlusPlus
from distill.guidance.projected import AdaptiveProjectedGuidance
from distill.guidance.rule import GuidanceRule
from distill.guidance.scales import check_range, draw_scales, guided
from distill.guidance.time_step import TimeStepGuidance
from distill.guidance.two_evaluations import GuidedDenoiser

__all__ = [
    "AdaptiveGuidance",
    "AdaptiveProjectedGuidance",
    "Autoguidance",
    "CfgPlusPlus",
    "ClassifierFreeGuidance",
    "GuidanceRule",
    "GuidedDenoiser",
    "IndependentConditionGuidance",
    "RandomGuidance",
    "TimeStepGuidance",
    "check_null_share",
    "check_range",
    "draw_scales",
    "drop_conditions",
    "guided",
]
