"""Image classifiers for demonstrations and comparisons."""

from sparse_training.models.build import MODELS, build_model

__all__ = ["MODELS", "build_model"]
