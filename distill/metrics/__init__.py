"""What samples are measured by. scikit-learn and the like are imported when a metric is first used."""

from distill.image_features import check_independent, is_independent
from distill.metrics.digits import DigitsAccuracy
from distill.metrics.features import FeatureExtractor, NetworkFeatures, PixelFeatures, to_uint8
from distill.metrics.frechet import FrechetDistance, GaussianStatistics, frechet_distance
from distill.metrics.inception_score import InceptionScore, inception_score
from distill.metrics.kernel_distance import KernelDistance, kernel_distance
from distill.metrics.neighbours import Neighbours, neighbours
from distill.metrics.processes import Processes, joined
from distill.metrics.torchmetrics_scores import TorchmetricsFID, TorchmetricsInceptionScore, TorchmetricsKID

__all__ = [
    "DigitsAccuracy",
    "FeatureExtractor",
    "FrechetDistance",
    "GaussianStatistics",
    "InceptionScore",
    "KernelDistance",
    "Neighbours",
    "NetworkFeatures",
    "PixelFeatures",
    "Processes",
    "TorchmetricsFID",
    "TorchmetricsInceptionScore",
    "TorchmetricsKID",
    "check_independent",
    "frechet_distance",
    "inception_score",
    "is_independent",
    "joined",
    "kernel_distance",
    "neighbours",
    "to_uint8",
]
