"""Folders and shards of small JPEGs, for tests of images that are read row by row."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

ROWS, CLASSES = 24, 3


def pixels(row: int, width: int = 50, height: int = 37) -> np.ndarray:
    """Smooth content that tells the rows and the classes apart."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    wave = 60 * np.sin(x / (4 + row % 5) + row) + 40 * np.cos(y / 5 - row)
    channels = [wave + 128 + 60 * (row % CLASSES == channel) for channel in range(3)]
    return np.stack(channels, -1).clip(0, 255).astype(np.uint8)


def jpeg(row: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(row)).save(file, "JPEG", quality=90)
    return file.getvalue()


def image_folder(root: Path, rows: int = ROWS) -> Path:
    """``root/<class>/<row>.jpg``; the label of row i, in file order within classes, is i % CLASSES."""
    for row in range(rows):
        folder = root / f"class{row % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row:04}.jpg").write_bytes(jpeg(row))
    return root


def shards(root: Path, count: int = 2, rows: int = ROWS) -> str:
    """Shards by the library's own writer; return their names in its notation."""
    from webdataset import TarWriter

    root.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        with TarWriter(str(root / f"part-{shard}.tar")) as writer:
            for row in range(shard * rows // count, (shard + 1) * rows // count):
                writer.write({"__key__": f"{row:04}", "jpg": jpeg(row), "cls": row % CLASSES})
    return str(root / f"part-{{0..{count - 1}}}.tar")
