"""Features of images that carry gradients: what moment matching compares samples in. Heavy libraries are imported when used."""

from distill.image_features.base import ImageFeatures, PretrainedFeatures
from distill.image_features.classifier import ClassifierFeatures
from distill.image_features.image_towers import ClipFeatures, DinoFeatures
from distill.image_features.inception import InceptionFeatures
from distill.image_features.independence import check_independent, is_independent
from distill.image_features.lpips import LpipsFeatures
from distill.image_features.preprocessing import Preprocessing

__all__ = [
    "ClassifierFeatures",
    "ClipFeatures",
    "DinoFeatures",
    "ImageFeatures",
    "InceptionFeatures",
    "LpipsFeatures",
    "Preprocessing",
    "PretrainedFeatures",
    "check_independent",
    "is_independent",
]
