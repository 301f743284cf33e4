"""Image classifiers for demonstrations and comparisons."""
