"""Sentences to the user on what a run does besides training on what it was given."""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("sparse_training")


def announce(sentence: str) -> None:
    """Print a sentence through the logger "sparse_training", as a warning, which is shown where nothing is set up."""
    LOGGER.warning(sentence)
