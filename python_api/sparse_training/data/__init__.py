"""Loaders and real image data sets, read from the package or from local files; nothing is downloaded."""

from sparse_training.data.load import DATASETS, load_data
from sparse_training.data.splits import ImageData, Split

__all__ = ["DATASETS", "ImageData", "Split", "load_data"]
