"""Plans of calls: loops, tiles and compiled kernels, kept from call to call. Triton is not imported here.

A plan is found by all that does not change between like calls. What a call adds are its tensors and numbers, in the
order of ``FORWARD`` or ``BACKWARD``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from sparse_kernels.backends.current import on
from sparse_kernels.backends.triton.launch import (
    BYTES,
    MERGE,
    SLICE,
    WHOLE,
    Launch,
    choose,
    merged,
    most_registers,
    pixels,
    slices,
    unaligned_rows,
)
from sparse_kernels.types import STATISTICS, WEIGHABLE

MAX_PROGRAMS = 2**31 - 1  # of a grid's first dimension

SETTINGS = ("ignore_index", "inverse_temperature", "softcap", "label_smoothing")
DECISION = (
    "mask_ptr", "significance_ptr", "weight_ptr", "offset_ptr", "threshold_ptr", "invalid_ptr", "finished_ptr",
    "step_ptr",
)  # fmt: skip
DRAW = ("gate_temperature", "p_min", "seed", "step")
FORWARD = (
    "logits_ptr", "targets_ptr", *(f"{name}_ptr" for name in STATISTICS), "maximum_ptr", "total_ptr", *DECISION,
    *SETTINGS, *DRAW, *(f"w_{name}" for name in WEIGHABLE), "sums_ptr", "lowest_ptr",
)  # fmt: skip
BACKWARD: tuple[str, ...] = (
    "logits_ptr", "gradient_ptr", "targets_ptr", "maximum_ptr", "total_ptr", "entropy_ptr", "loss_gradient_ptr",
    "entropy_gradient_ptr", *SETTINGS,
)  # fmt: skip


# The statistics that are stored, those that are weighed, and whether the backward's are saved.
Computed = tuple[tuple[str, ...], tuple[str, ...], bool]


def layout(
    shape: Sequence[int], dim: int, strides: Sequence[Sequence[int]]
) -> tuple[int, int, list[tuple[int, int, int]]] | None:
    """Return outer rows, inner rows, and each tensor's strides (outer, inner, class); None if it takes more loops."""
    dim %= len(shape)
    loops: list[tuple[int, list[int]]] = []
    for axis, size in enumerate(shape):
        if axis == dim or (size == 1 and len(shape) > 2):  # one row has a stride, or it would compile anew
            continue
        along = [tensor_strides[axis] for tensor_strides in strides]
        if loops and all(before == size * stride for before, stride in zip(loops[-1][1], along, strict=True)):
            loops[-1] = (loops[-1][0] * size, along)
        else:
            loops.append((size, along))
    if len(loops) > 2:
        return None
    absent = (1, [0] * len(strides))
    (outer, outer_strides), (inner, inner_strides) = [absent, absent, *loops][-2:]
    classes = [tensor_strides[dim] for tensor_strides in strides]
    return outer, inner, list(zip(outer_strides, inner_strides, classes, strict=True))


class Plan:
    """Loops, tiles and launches of one kind of call; tensors of logits come first among its tensors.

    Args:
        shape: of the logits.
        dim: of the classes.
        dtype: of the logits.
        processors: of the GPU.
        strides: of each tensor of the logits' shape, the logits first.
        starts: of each of them, in bytes past a multiple of 16.
        device: of all tensors.
        dtypes: of the other tensors, as far as the logits' does not decide them; None for those that are absent.
        computed: the statistics; None for a backward.
        smoothing: label_smoothing > 0.
        softcap: softcap > 0.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dim: int,
        dtype: torch.dtype,
        processors: int,
        strides: Sequence[Sequence[int]],
        starts: Sequence[int],
        device: torch.device,
        dtypes: tuple[torch.dtype | None, ...],
        computed: Computed | None,
        smoothing: bool,
        softcap: bool,
    ) -> None:
        found = layout(shape, dim, strides)
        assert found is not None
        outer, inner, loops = found
        itemsize, classes = dtype.itemsize, shape[dim]
        starts = [start // itemsize for start in starts]
        class_stride = 1 if classes == 1 else max(loop[2] for loop in loops)
        tile = choose(classes, class_stride, itemsize, len(strides))
        adjacent = not tile.contiguous and classes > 1 and all(loop[1] == 1 for loop in loops)
        aligned = _aligned(tile, adjacent, inner, classes, itemsize, loops, starts)
        if adjacent and not aligned:  # single loads: half of the rows, or registers spill
            tile = replace(tile, rows=tile.rows // 2)
        if tile.contiguous and not aligned:  # each thread has columns of every row, and ends them all
            tile = replace(tile, rows=min(tile.rows, unaligned_rows(itemsize)))
        programs = outer * -(-inner // tile.rows)
        if programs > MAX_PROGRAMS:
            raise ValueError(
                f"{outer} x {inner} rows of {classes} classes need {programs} programs; "
                f"the most is {MAX_PROGRAMS}: split the batch"
            )
        count, slice_columns = slices(tile, programs, classes, processors)
        names = ("outer_stride", "inner_stride", "class_stride")
        constants: dict[str, Any] = {
            f"{prefix}{name}": stride
            for prefix, loop in zip(("", "gradient_"), loops, strict=False)
            for name, stride in zip(names, loop, strict=True)
        }
        constants |= {
            "misaligned": starts[0],
            "inner_rows": inner,
            "classes": classes,
            "slice_columns": slice_columns,
            "SMOOTHING": smoothing,
            "SOFTCAP": softcap,
            "DOUBLE": itemsize == 8,
            "PIXELS": pixels(itemsize) if adjacent else 0,
            "ALIGNED": aligned,
            # A row that is one block, but not aligned, is loaded as a loop's last block is: thread by thread.
            "LOOP": classes > tile.columns or (tile.lanes > 1 and not aligned),
        }
        phases: list[tuple[Launch, int, dict[str, Any]]] = [(tile, count, {})]
        rows, self.names, self.scratch = outer * inner, BACKWARD, 0
        if computed is not None:
            self.names = FORWARD
            constants |= {"rows": rows, "slices": count, **_constants(*computed)}
            merge = merged(tile, count, rows)
            if merge is None:
                phases = [(tile, 1, {"PHASE": WHOLE})]
            else:
                phases = [(tile, count, {"PHASE": SLICE}), (merge, 1, {"PHASE": MERGE})]
                self.scratch = count * rows  # numbers of each kind
        many = softcap or any(constants.get(name) for name in ("SQUARES", "MARGIN", "ARGMAX"))
        self.device = device
        self.launches = [
            KeptLaunch(part, (outer * -(-inner // part.rows), of, 1), many, constants | phase)
            for part, of, phase in phases
        ]

    def launch(self, kernel: Any, values: Sequence[Any]) -> None:
        """Enqueue the kernel for every row and slice.

        Args:
            kernel: the same for each call.
            values: of the call, in the order of ``names``.
        """
        with on(self.device):
            for kept in self.launches:
                if kept.run is None:
                    kept.compile_and_run(kernel, dict(zip(self.names, values, strict=True)))
                else:
                    kept.run(*kept.in_order((*values, *kept.last)))


class KeptLaunch:
    """A launch on one grid. Triton is asked for the kernel once; later calls launch what it compiled then."""

    def __init__(self, tile: Launch, grid: tuple[int, int, int], many: bool, constants: dict[str, Any]) -> None:
        shape = {"CONTIGUOUS": tile.contiguous, "ROWS": tile.rows, "CHUNKS": tile.chunks}
        self.constants = constants | shape | {"LANES": tile.lanes, "WIDTH": tile.width}
        self.grid = grid  # a compiled kernel takes all three numbers
        self.options = {"num_warps": tile.warps, "maxnreg": most_registers(tile, many)}
        self.run: Callable[..., object] | None = None

    def compile_and_run(self, kernel: Any, arguments: dict[str, Any]) -> None:
        """Run the kernel through Triton, which compiles it, and keep what it compiled.

        Args:
            kernel: the kernel.
            arguments: by name, those of a call.
        """
        built = kernel[self.grid](**arguments, **self.constants, **self.options)
        if built is not None:  # the interpreter compiles nothing
            self.last = tuple(self.constants.values())
            every = (*arguments, *self.constants)
            self.in_order = operator.itemgetter(*map(every.index, built.src.signature))
            self.run = built[self.grid]


def _aligned(
    tile: Launch,
    adjacent: bool,
    inner: int,
    classes: int,
    itemsize: int,
    loops: Sequence[tuple[int, int, int]],
    starts: Sequence[int],
) -> bool:
    """Return True if all rows start, and end, where loads of 16 bytes do; of ``pixels`` logits, if ``adjacent``."""
    if adjacent:
        width = pixels(itemsize)
        return inner % width == 0 and all(
            start % width == loop[0] % width == loop[2] % width == 0 for start, loop in zip(starts, loops, strict=True)
        )
    # Rows of one block must start on 16 bytes, longer ones as the logits' do.
    width, whole = BYTES // itemsize, classes <= tile.columns
    start_0, strides_0 = (0, (0, 0)) if whole else (starts[0], loops[0][:2])
    return (
        (whole or tile.contiguous)
        and (not whole or classes % width == 0)
        and all(
            (start - start_0) % width == 0
            and all((stride - stride_0) % width == 0 for stride, stride_0 in zip(loop[:2], strides_0, strict=True))
            for start, loop in zip(starts, loops, strict=True)
        )
    )


def _constants(outputs: tuple[str, ...], weights: tuple[str, ...], saved: bool) -> dict[str, bool]:
    """Return the forward kernel's constants: it is compiled for these statistics and no more."""
    computed = {*outputs, *weights}
    return {
        "LOSS": "loss" in computed,
        "ENTROPY": "entropy" in computed,
        "SQUARES": not computed.isdisjoint(("grad_norm", "sum_squares")),
        "MARGIN": "margin" in computed,
        "ARGMAX": "argmax" in computed,
        **{f"W_{name.upper()}": name in weights for name in WEIGHABLE},
    }
