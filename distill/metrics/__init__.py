"""What samples are measured by. scikit-learn and the like are imported when a metric is first used."""

from distill.image_features import check_independent, is_independent
from distill.metrics.digits import DigitsAccuracy
from distill.metrics.features import FeatureExtractor, NetworkFeatures, PixelFeatures, to_uint8
from distill.metrics.frechet import FrechetDistance, GaussianStatistics, frechet_distance

__all__ = [
    "DigitsAccuracy",
    "FeatureExtractor",
    "FrechetDistance",
    "GaussianStatistics",
    "NetworkFeatures",
    "PixelFeatures",
    "check_independent",
    "frechet_distance",
    "is_independent",
    "to_uint8",
]
