"""Features of a small classifier that was trained here: for images that the published networks are not made for."""

from __future__ import annotations

from pathlib import Path

from distill import hub
from distill.classifier import ConvClassifier, locate_classifier
from distill.image_features.base import Features, Images, PretrainedFeatures
from distill.image_features.preprocessing import Preprocessing

FILES = ["config.json", "model.safetensors"]


class ClassifierFeatures(PretrainedFeatures):
    """The normalised hidden layer of a `ConvClassifier` (configs/digits/classifier.yaml trains one).

    Args:
        path: the folder of the classifier: ``config.json`` and ``model.safetensors``.

    Raises:
        FileNotFoundError, ValueError: see `ConvClassifier.load`.
    """

    name = "classifier"

    def __init__(self, path: str):
        classifier, folder = ConvClassifier.load(path), self.locate(path)
        channels, size, _ = classifier.shape
        reading = "hidden layer of a ConvClassifier after its normalisation"
        super().__init__(classifier, Preprocessing(channels, size), reading, hub.identity(path, folder, FILES))

    @staticmethod
    def locate(path: str) -> Path:
        """The folder. Raises FileNotFoundError if a file of it is missing."""
        return locate_classifier(path)

    def extract(self, images: Images) -> Features:
        return self.network.module.hidden(images)
