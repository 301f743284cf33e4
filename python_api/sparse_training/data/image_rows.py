"""Images that are read, decoded and transformed one by one, by their row numbers."""

from __future__ import annotations

import io
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparse_kernels.sum_tree import uniform_double
from sparse_training.announcements import announce
from sparse_training.arguments import check_choice
from sparse_training.criterion import IGNORED
from sparse_training.data.pillow import check_depth, find_pillow, open_image
from sparse_training.errors import UserError
from sparse_training.generators import rng_state, set_rng_state

CPU = torch.device("cpu")
ON_ERROR = ("count", "retry", "raise")
_IMAGES = 4 << 48  # separates its random numbers from others of the same seed, as in samplers/importance.py


class ImageRows(Dataset[tuple[Tensor, int]], ABC):
    """The base of data sets that read an image when its row is asked for.

    A row is a tuple of the transformed image and its label. Random transforms depend on ``seed``, the epoch and the
    row alone: not on workers, on processes, or on the rows that were read before.

    Args:
        labels: class of each row, int64 [rows].
        names: name of each row, for messages.
        classes: name of each class.
        transform: maps Pillow's image of mode RGB to a tensor, all of one shape; from this package, from torchvision
            or your own. It may draw from the global generators of PyTorch, NumPy and ``random``.
        seed: seed of the transforms. Default 0.
        on_error: for an image that cannot be decoded, "count" (the default): the row has an image of zeros and the
            label -100, which cross-entropy leaves out, is named once, counted in ``unreadable`` and not read again.
            "retry": the same, but it is read again whenever its row is asked for. "raise": an error that names it.

    Attributes:
        labels: class of each row, int64 [rows].
        classes: name of each class.

    Raises:
        UserError: an argument out of range, or no Pillow.
    """

    def __init__(
        self,
        labels: Tensor,
        names: Sequence[bytes],
        classes: Sequence[str],
        transform: Callable[[Any], Tensor],
        *,
        seed: int,
        on_error: str,
    ) -> None:
        check_choice("on_error", on_error, ON_ERROR)
        if not callable(transform):
            raise UserError(f"`transform` must be callable, such as RandomCropAndFlip(224), got {transform!r:.60}")
        self.labels, self.classes = labels, tuple(classes)
        self.transform, self.seed, self.on_error = transform, seed, on_error
        self._names = _Names(names)
        find_pillow(type(self).__name__)
        # Shared with the workers, persistent ones too.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._failed = torch.zeros(len(labels), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]

    @abstractmethod
    def read(self, row: int) -> bytes:
        """Read a row's encoded image."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row numbers must be in 0 to {len(self) - 1}, got {row}")
        if self._failed[row] and self.on_error == "count":
            return self._empty(row), IGNORED
        try:
            with open_image(find_pillow(type(self).__name__), io.BytesIO(self.read(row))) as image:
                check_depth(image)
                pixels = image.convert("RGB")
        except Exception as error:  # decoders raise many types on corrupt files
            return self._lost(row, error), IGNORED
        if self._failed[row]:
            self._failed[row] = False
            announce(f"{self.name(row)}: could be read this time")
        return self._transformed(row, pixels), int(self.labels[row])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that random transforms depend on; the trainer does it by itself.

        Args:
            epoch: number of the epoch, from 0.
        """
        self._epoch[0] = epoch

    def name(self, row: int) -> str:
        """Return the name of a row, such as the path of its file."""
        return self._names[row].decode(errors="backslashreplace")

    @property
    def unreadable(self) -> list[str]:
        """Names of the images that could not be decoded so far, in any worker of this process."""
        return [self.name(row) for row in self._failed.nonzero().squeeze(1).tolist()]

    def _lost(self, row: int, error: Exception) -> Tensor:
        """Name and count an image that cannot be decoded; return what stands in its place."""
        reason = "no image of a known format" if type(error).__name__ == "UnidentifiedImageError" else str(error)
        sentence = f"{self.name(row)}: not an image that can be read: {' '.join(reason.split())}"
        if self.on_error == "raise":
            raise UserError(sentence) from error
        if not self._failed[row]:
            self._failed[row] = True
            announce(f"{sentence}; it is left out and counted")
        return self._empty(row)

    def _empty(self, row: int) -> Tensor:
        """Return what stands in the place of an image that cannot be decoded."""
        return torch.zeros_like(self._transformed(row, find_pillow(type(self).__name__).new("RGB", (256, 256))))

    def _transformed(self, row: int, image: Any) -> Tensor:
        """Transform an image with generators that begin from the seed, the epoch and the row, and are put back."""
        step = int(self._epoch) + _IMAGES
        seed = int(uniform_double(torch.tensor([row]), seed=self.seed, step=step) * 2.0**32)
        state = rng_state(CPU)
        try:
            _seed_generators(seed)
            return self.transform(image)
        finally:
            set_rng_state(state, CPU)


def _seed_generators(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # transforms of others draw from it


class _Names:
    """Strings in two arrays: a list of a million objects is copied into every worker, as its counts of uses change."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.text = np.frombuffer(b"".join(names), dtype=np.uint8)

    def __getitem__(self, number: int) -> bytes:
        begin = int(self.ends[number - 1]) if number else 0
        return self.text[begin : int(self.ends[number])].tobytes()
