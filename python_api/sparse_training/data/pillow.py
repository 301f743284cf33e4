"""Decoding of images by Pillow."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from sparse_training.errors import UserError

# Pillow goes by a file's content, not by its name, and would hand PostScript to an interpreter: it is told the formats.
FORMATS = {
    ".bmp": "BMP", ".gif": "GIF", ".jpeg": "JPEG", ".jpg": "JPEG", ".pgm": "PPM", ".png": "PNG", ".ppm": "PPM",
    ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
}  # fmt: skip
DEEP_MODES = ("I", "F")  # beginnings of Pillow's modes with more than 8 bits, such as I;16


def find_pillow(user: str) -> ModuleType:
    """Import Pillow.

    Args:
        user: what needs it, for the error.

    Returns:
        The module ``PIL.Image``.

    Raises:
        UserError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(f"{user} needs Pillow: pip install pillow") from error
    return Image


def open_image(pillow: ModuleType, source: Any) -> Any:
    """Open an image of one of ``FORMATS``; its pixels are not decoded yet.

    Args:
        pillow: the module ``PIL.Image``.
        source: a path, or a binary file.

    Returns:
        Pillow's image.
    """
    return pillow.open(source, formats=sorted(set(FORMATS.values())))


def check_depth(image: Any) -> None:
    """Refuse an image of more than 8 bits per channel: conversion to RGB clips at 255, so most of them turn white.

    Raises:
        UserError: more than 8 bits.
    """
    if image.mode.startswith(DEEP_MODES):
        raise UserError(f"images must have 8 bits per channel, got Pillow mode {image.mode}")
