"""Comparisons of ``compact``, ``gather_rows`` and ``scatter_rows``, which are exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_kernels import reference
from sparse_kernels._arguments import CompactCall, TreeCall
from sparse_kernels.self_check.comparisons import Comparison, equal
from sparse_kernels.self_check.scores import Setup
from sparse_kernels.types import Selection

# About a warp's flags, a tile's, and where a mask is dealt out in tiles or in shares of a block.
_MASKS = (1, 33, 129, 4097, 65_536, 65_537, 200_000)
_MORE_MASKS = (0, 31, 32, 127, 128, 4095, 4096, 30_000, 1_000_000)
# About 2, 4, 8 and 16 bytes, a warp's loads of them, and whole rounds.
_ROW_BYTES = (1, 2, 4, 8, 12, 16, 33, 64, 511, 512, 4097)
_MORE_ROW_BYTES = (3, 15, 17, 24, 60, 100, 513, 4095, 4096, 9000, 12_288)
_ROWS, _SLOTS = 60, 30


def _mask(rows: int, density: float, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, generator=generator, dtype=torch.float32, device="cpu") < density


def _compacted(name: str, setup: Setup, mask: Tensor, weight: Tensor | None, capacity: int | None) -> list[Comparison]:
    exact = reference.compact(CompactCall(mask, weight, capacity))
    moved = torch.empty(len(mask) + 16, dtype=torch.bool, device=setup.device)[len(mask) % 16 :][: len(mask)]
    moved.copy_(mask)  # not on 16 bytes
    found = setup.backend.compact(CompactCall(moved, None if weight is None else weight.to(setup.device), capacity))
    return selections(name, found, exact)


def selections(name: str, found: Selection, exact: Selection) -> list[Comparison]:
    """Return the comparisons of a selection's four tensors.

    Args:
        name: of the call.
        found: on any device.
        exact: on the CPU.
    """
    fields = ("index", "weight", "count", "overflow")
    return [equal(f"{field} of {name}", getattr(found, field), getattr(exact, field)) for field in fields]


def compact(setup: Setup) -> Iterator[Comparison]:
    """Yield the comparisons of masks around the kernels' block sizes, with and without room for what they keep.

    Args:
        setup: the surroundings.
    """
    for rows in (*_MASKS, *(_MORE_MASKS if setup.full else ())):
        for density in (0.0, 0.1, 1.0) if rows < 5000 else (0.3,):
            mask = _mask(rows, density, setup.generator)
            kept = int(mask.sum())
            weight = torch.rand(rows, generator=setup.generator, dtype=torch.float32, device="cpu")
            for capacity, weights in ((None, None), (kept // 2, weight), (kept + 3000, None)):
                yield from _compacted(f"compact, {kept} of {rows}, capacity {capacity}", setup, mask, weights, capacity)


def _selection(setup: Setup) -> tuple[Selection, Selection]:
    """Return a selection with padding, on the CPU and on the device."""
    selection = reference.compact(CompactCall(_mask(_ROWS, 0.4, setup.generator), None, _SLOTS))
    index, weight, count, overflow = (tensor.to(setup.device) for tensor in selection[:4])
    return selection, Selection(index, weight, count, overflow, selection.size)


def _bytes(rows: int, row_bytes: int, offset: int, setup: Setup) -> tuple[Tensor, Tensor]:
    """Return rows of random bytes, on the CPU, and on the device ``offset`` bytes past an aligned address."""
    numbers = torch.randint(0, 256, (rows, row_bytes), generator=setup.generator, dtype=torch.uint8, device="cpu")
    buffer = torch.empty(rows * row_bytes + 16, dtype=torch.uint8, device=setup.device)
    moved = buffer[offset:][: rows * row_bytes].view(rows, row_bytes)
    moved.copy_(numbers)
    return numbers, moved


def _trees(rows: int, setup: Setup) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """Yield trees for the widths of loads and stores, of rows apart, and of more tensors than a launch moves."""
    for row_bytes in (*_ROW_BYTES, *(_MORE_ROW_BYTES if setup.full else ())):
        pairs = [_bytes(rows, row_bytes, offset, setup) for offset in (0, 1, 2, 4, 8)]
        yield f"{row_bytes} bytes a row", [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    wide = [_bytes(rows, row_bytes, 0, setup) for row_bytes in (24, 600)]
    cut = [(numbers[:, 3:-5], moved[:, 3:-5]) for numbers, moved in wide]
    cut += [(numbers[:1].expand_as(numbers), moved[:1].expand_as(moved)) for numbers, moved in wide]
    yield "rows apart or repeated", [pair[0] for pair in cut], [pair[1] for pair in cut]
    many = [_bytes(rows, 1 + number % 7, 0, setup) for number in range(40)]
    yield "40 tensors", [pair[0] for pair in many], [pair[1] for pair in many]


def gather_rows(setup: Setup) -> Iterator[Comparison]:
    """Yield the comparisons of packed rows of every width and alignment, padding among them.

    Args:
        setup: the surroundings.
    """
    selection, moved = _selection(setup)
    for name, tensors, given in _trees(_ROWS, setup):
        packed = setup.backend.gather_rows(TreeCall(given, moved, _ROWS))
        for tensor, rows in zip(tensors, packed, strict=True):
            yield equal(f"gather_rows, {name}", rows, tensor.index_select(0, selection.index))

    if setup.device.type != "cpu":  # there a bad index is an error, before any kernel runs
        yield _bad_indices(setup)


def _bad_indices(setup: Setup) -> Comparison:
    """Compare rows gathered by indices out of range: zeros, and nothing is read beyond the tensor."""
    numbers, moved = _bytes(_ROWS, 24, 0, setup)
    index = torch.tensor([3, -1, _ROWS, 2**62, -(2**63), _ROWS - 1], device="cpu")
    good = (index >= 0) & (index < _ROWS)
    given = index.to(setup.device)
    selection = Selection(given, given, torch.tensor(6, dtype=torch.int32, device=setup.device), given, _ROWS)
    (packed,) = setup.backend.gather_rows(TreeCall([moved], selection, _ROWS))
    return equal("gather_rows, bad indices", packed, numbers[torch.where(good, index, 0)] * good[:, None])


def scatter_rows(setup: Setup) -> Iterator[Comparison]:
    """Yield the comparisons of rows put back, where padding writes nothing.

    Args:
        setup: the surroundings.
    """
    selection, moved = _selection(setup)
    for name, tensors, given in _trees(_SLOTS, setup):
        placed = setup.backend.scatter_rows(TreeCall(given, moved, _SLOTS, scatter=True))
        for tensor, rows in zip(tensors, placed, strict=True):
            yield equal(f"scatter_rows, {name}", rows, reference.scatter_tensor(tensor, selection))
