"""Galleries: the training rows that a method selected most and least, as pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sparse_training.data.splits import ImageData
from sparse_training.experiments.store import Counts
from sparse_training.experiments.tasks import Task

COMPARISON_ROWS, STUDY_ROWS = 16, 12  # pictures in a gallery
COUNTED = ("selected", "seen", "losses")  # numbers for each training row
TOP = 100  # rows of a ranking whose precision is reported


def most_and_least(data: ImageData, selected: Tensor, seen: Tensor, rows: int = COMPARISON_ROWS) -> dict[str, Any]:
    """Show the training rows that were selected the largest and the smallest share of the times they were seen.

    Among equal shares the rows that were seen more often come first, then those with the lower number.

    Args:
        data: data set of the pictures.
        selected: [N], times that each training row was selected.
        seen: [N], times that it was scored.
        rows: pictures on each side. Default 16.

    Returns:
        Lists of pictures under "most" and "least".
    """
    known = seen.nonzero().squeeze(1).tolist()
    share = {row: selected[row].item() / seen[row].item() for row in known}

    def counted(row: int) -> dict[str, Any]:
        return {**picture(data, row), "selected": int(selected[row]), "seen": int(seen[row])}

    most = sorted(known, key=lambda row: (-share[row], -int(seen[row]), row))[:rows]
    least = sorted(known, key=lambda row: (share[row], -int(seen[row]), row))[:rows]
    return {"most": [counted(row) for row in most], "least": [counted(row) for row in least]}


def task_gallery(task: Task, counts: Sequence[Counts]) -> dict[str, list[dict[str, Any]]]:
    """Show the first rows of each ranking, by the counts of all seeds together.

    Empty without counts, and of data that are no pictures.
    """
    counts = [{kind: one[kind] for kind in COUNTED if kind in one} for one in counts]
    counts = [one for one in counts if one]
    if not counts or not isinstance(task.data, ImageData):
        return {}
    total = {kind: torch.stack([one[kind].double() for one in counts]).sum(0) for kind in counts[0]}
    shown = {}
    for name, rows in rankings(total).items():
        pictures = []
        for row in rows[:STUDY_ROWS].tolist():
            planted = bool(task.planted[row]) if task.planted is not None else None
            numbers = {kind: round(float(count[row]), 3) for kind, count in total.items()}
            pictures.append({**picture(task.data, row), "planted": planted, **numbers})
        shown[name] = pictures
    return shown


def planted_precision(planted: Tensor, counts: Counts) -> dict[str, float]:
    """Share of planted rows among the first 100 of each ranking."""
    return {name: planted[rows[:TOP]].float().mean().item() for name, rows in rankings(counts).items() if len(rows)}


def rankings(counts: Counts) -> dict[str, Tensor]:
    """Order the training rows by each count of a run, the most first; ties by row number.

    A row that was never seen is in neither ranking by selection.
    """
    ranked = {}
    if "selected" in counts:
        selected = counts["selected"].double()
        share = selected / counts["seen"].clamp(min=1) if "seen" in counts else selected
        known = (counts["seen"] if "seen" in counts else torch.ones_like(selected)).nonzero().squeeze(1)
        for name, sign in (("selected most", -1.0), ("selected least", 1.0)):
            ranked[name] = known[(sign * share[known]).argsort(stable=True)]
    if "losses" in counts:
        losses = counts["losses"].double()
        known = losses.isfinite().nonzero().squeeze(1)
        ranked["highest loss"] = known[(-losses[known]).argsort(stable=True)]
    return ranked


def picture(data: ImageData, row: int) -> dict[str, Any]:
    """A training row's number, label, class and image."""
    label = int(data.train.labels[row])
    return {"index": row, "label": label, "class": data.classes[label], "png": _png(data.train.images[row])}


def _png(image: Tensor) -> str:
    """An image uint8 [1 or 3, H, W] as a PNG file in base64."""
    pixels = image.permute(1, 2, 0).squeeze(2).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
