"""What samples are measured by. scikit-learn and the like are imported when a metric is first used."""

from distill.metrics.digits import DigitsAccuracy
from distill.metrics.features import FeatureExtractor, PixelFeatures, to_uint8
from distill.metrics.frechet import FrechetDistance, GaussianStatistics, frechet_distance

__all__ = [
    "DigitsAccuracy",
    "FeatureExtractor",
    "FrechetDistance",
    "GaussianStatistics",
    "PixelFeatures",
    "frechet_distance",
    "to_uint8",
]
