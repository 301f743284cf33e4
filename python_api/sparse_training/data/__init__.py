"""Loaders and real image data sets, read from the package or from local files; nothing is downloaded."""
