"""Plans of calls: loops, tiles and compiled kernels, kept from call to call. Triton is not imported here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from sparse_kernels._arguments import StatsCall
from sparse_kernels.backends.triton.launch import BYTES, Launch, choose, most_registers, pixels, slices, unaligned_rows
from sparse_kernels.types import STATISTICS, WEIGHABLE

MAX_PROGRAMS = 2**31 - 1  # of a grid's first dimension


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


class Variant(NamedTuple):
    """The settings that a kernel is compiled for beside a plan."""

    outputs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    phase: int | None = None  # None: the backward


class _Compiled(NamedTuple):
    """A kernel compiled and loaded, on its grid: launched without Triton's search for it in each call."""

    run: Callable[..., object]
    arguments: list[Any]  # in the kernel's order; None for a call's own
    places: list[int]  # of a call's own, in its order


class Plan:
    """Loops, tiles and programs for tensors of a shape and strides, the logits first."""

    def __init__(
        self,
        shape: Sequence[int],
        dim: int,
        dtype: torch.dtype,
        processors: int,
        strides: Sequence[Sequence[int]],
        starts: Sequence[int],  # of each tensor, in elements past a multiple of 16 bytes
    ) -> None:
        found = layout(shape, dim, strides)
        assert found is not None
        self.outer, self.inner, loops = found
        self.compiled: dict[tuple[Any, ...], _Compiled] = {}
        itemsize, classes = dtype.itemsize, shape[dim]
        class_stride = 1 if classes == 1 else max(loop[2] for loop in loops)
        self.tile = choose(classes, class_stride, itemsize, len(strides))
        width = BYTES // itemsize
        whole = classes <= self.tile.columns
        adjacent = not self.tile.contiguous and classes > 1 and all(loop[1] == 1 for loop in loops)
        if adjacent:  # all rows must start on so many logits
            width = pixels(itemsize)
            aligned = self.inner % width == 0 and all(
                start % width == loop[0] % width == loop[2] % width == 0
                for start, loop in zip(starts, loops, strict=True)
            )
        else:  # rows of one block must start on 16 bytes, longer ones as the logits' do
            aligned = (
                (whole or self.tile.contiguous)
                and all(
                    (start - (0 if whole else starts[0])) % width == 0
                    and all(
                        (stride - (0 if whole else stride_0)) % width == 0
                        for stride, stride_0 in zip(loop[:2], loops[0][:2], strict=True)
                    )
                    for start, loop in zip(starts, loops, strict=True)
                )
                and (not whole or classes % width == 0)
            )
        if adjacent and not aligned:  # single loads: half of the rows, or registers spill
            self.tile = replace(self.tile, rows=self.tile.rows // 2)
        if self.tile.contiguous and not aligned:  # each thread has columns of every row, and ends them all
            self.tile = replace(self.tile, rows=min(self.tile.rows, unaligned_rows(itemsize)))
        programs = self.programs(self.tile)
        self.slices, slice_columns = 1, classes
        if programs > MAX_PROGRAMS:
            raise ValueError(
                f"{self.outer} x {self.inner} rows of {classes} classes need {programs} programs; "
                f"the most is {MAX_PROGRAMS}: split the batch"
            )
        if programs:
            self.slices, slice_columns = slices(self.tile, programs, classes, processors)
        names = ("outer_stride", "inner_stride", "class_stride")
        self.arguments: dict[str, Any] = {
            f"{prefix}{name}": stride
            for prefix, loop in zip(("", "gradient_"), loops, strict=False)
            for name, stride in zip(names, loop, strict=True)
        }
        self.arguments |= {
            "misaligned": starts[0],
            "inner_rows": self.inner,
            "classes": classes,
            "slice_columns": slice_columns,
            "DOUBLE": itemsize == 8,
            "PIXELS": pixels(itemsize) if adjacent else 0,
            "ALIGNED": aligned,
            # A row that is one block, but not aligned, is loaded as a loop's last block is: thread by thread.
            "LOOP": not whole or (self.tile.lanes > 1 and not aligned),
        }

    def programs(self, tile: Launch) -> int:
        """Return the number of programs of one slice."""
        return self.outer * -(-self.inner // tile.rows)

    def launch(
        self, kernel: Any, call: StatsCall, tile: Launch, slices: int, variant: Variant, values: dict[str, Any]
    ) -> None:
        """Run the programs of ``tile`` for every row and slice.

        Args:
            kernel: the same for each call of a variant.
            call: for its settings and its device.
            tile: the same for each call of a variant.
            slices: the same for each call of a variant.
            variant: what the kernel is compiled for.
            values: the kernel's tensors and numbers of this call.
        """
        device, settings = call.logits.device, call.settings
        values |= {
            "ignore_index": settings.ignore_index,
            "inverse_temperature": 1.0 / settings.temperature,
            "softcap": float(settings.softcap),
            "label_smoothing": float(settings.label_smoothing),
        }
        smoothing, softcap = settings.label_smoothing > 0, settings.softcap > 0
        # All that Triton would look a compilation up by: numbers' types are the kernel's, or the plan decides them.
        dtypes = [getattr(value, "dtype", None) for value in values.values()]
        key = (device, variant, smoothing, softcap, tuple(values), tuple(dtypes))
        compiled = self.compiled.get(key)
        with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
            if compiled is not None:
                arguments = compiled.arguments.copy()
                for place, value in zip(compiled.places, values.values(), strict=True):
                    arguments[place] = value
                compiled.run(*arguments)
                return
            everything = self.arguments | _constants(*variant) | values
            everything |= {
                "SMOOTHING": smoothing,
                "SOFTCAP": softcap,
                "CONTIGUOUS": tile.contiguous,
                "ROWS": tile.rows,
                "CHUNKS": tile.chunks,
                "LANES": tile.lanes,
                "WIDTH": tile.width,
            }
            many = softcap or any(everything.get(name) for name in ("SQUARES", "MARGIN", "ARGMAX"))
            grid = (self.programs(tile), slices, 1)  # a compiled kernel wants all three
            built = kernel[grid](**everything, num_warps=tile.warps, maxnreg=most_registers(tile, many))
            if built is not None:  # the interpreter compiles nothing
                names = list(built.src.signature)
                self.compiled[key] = _Compiled(
                    built[grid],
                    [None if name in values else everything[name] for name in names],  # no tensor is kept
                    [names.index(name) for name in values],
                )


def _constants(outputs: tuple[str, ...], weights: tuple[str, ...], phase: int | None) -> dict[str, Any]:
    """Return the kernel's constants and defaults: the forward is compiled for these statistics and no more."""
    if phase is None:
        return {}
    computed = {*outputs, *weights}
    pointers = (
        *STATISTICS, "maximum", "total", "sums", "lowest", "mask", "significance", "weight", "offset", "threshold",
        "invalid", "finished", "step",
    )  # fmt: skip
    return {
        **dict.fromkeys(f"{name}_ptr" for name in pointers),
        **dict.fromkeys((f"w_{name}" for name in WEIGHABLE), 0.0),
        "gate_temperature": 1.0,
        "p_min": 0.0,
        "seed": 0,
        "step": 0,
        "PHASE": phase,
        "LOSS": "loss" in computed,
        "ENTROPY": "entropy" in computed,
        "SQUARES": not computed.isdisjoint(("grad_norm", "sum_squares")),
        "MARGIN": "margin" in computed,
        "ARGMAX": "argmax" in computed,
        **{f"W_{name.upper()}": name in weights for name in WEIGHABLE},
    }
