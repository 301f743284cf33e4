"""Command ``python -m sparse_kernels check``: the self-check in full, printed on one screen to paste into a report."""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from sparse_kernels import ops
from sparse_kernels._dispatch import BACKENDS, FAMILIES, GPU, TABLE, members
from sparse_kernels._info import with_index
from sparse_kernels.self_check import proof, verdicts
from sparse_kernels.self_check.cases import comparisons, dtypes
from sparse_kernels.self_check.comparisons import Comparison

SHOWN = 3  # comparisons that differ, of one operation
ROUNDS = 9


class Outcome(NamedTuple):
    """Comparisons of one operation of a backend, for one dtype."""

    compared: int
    different: list[str]
    error: float
    torch_error: float
    passing: bool  # a failure that says nothing about the kernel
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options.

    Args:
        parser: of the command.
    """
    parser.add_argument("--device", help="such as cuda:1 or cpu. Default: the current GPU, or the CPU without one")
    names = [name for name in (*BACKENDS, *FAMILIES) if name != "torch"]
    parser.add_argument("--backend", choices=names, help="default: every one that serves the device by default")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs. Default: 0, as at first use")
    parser.add_argument("--quick", action="store_true", help="what the first use compares, and no speeds")


def main(options: argparse.Namespace) -> int:
    """Run the check and print its screen; return 1 if something disagrees or nothing could be checked.

    Args:
        options: of ``add_arguments``.
    """
    try:
        device = with_index(torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        print(f"`--device` must be a device of this machine, got {options.device!r}: {_line(error)}")
        return 2
    print("\n".join(_versions(device)), flush=True)
    parts, missing = _parts(device, options.backend)
    for name, reason in missing.items():
        print(f"not checked: {name}: {reason}")
    found: dict[tuple[str, str, torch.dtype | None], Outcome] = {}
    for name, op, dtype in parts:
        found[name, op, dtype] = outcome = _outcome(name, op, dtype, device, options)
        print("\n".join(_lines(name, op, dtype, outcome)), flush=True)
    judged = {part: "; ".join(o.different[:1]) for part, o in found.items() if part[0] in GPU and not o.passing}
    if judged and not proof.record(device, judged):
        print(f"the verdicts cannot be kept in {verdicts.folder()}")
    if found and not options.quick:
        for line in _speeds(device, parts):
            print(line, flush=True)
    wrong = sum(bool(outcome.different) for outcome in found.values())
    seconds = sum(outcome.seconds for outcome in found.values())
    if not found:
        print("nothing was checked")
    elif wrong:
        print(f"{wrong} of {len(found)} DISAGREE with the float64 reference ({seconds:.0f} s, seed {options.seed})")
    else:
        print(f"all {len(found)} agree with the float64 reference ({seconds:.0f} s, seed {options.seed})")
    return int(wrong > 0 or not found)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _versions(device: torch.device) -> Iterator[str]:
    around = verdicts.surroundings(device)
    title = f"{around['device']} ({around['capability']})" if device.type == "cuda" else platform.processor() or "CPU"
    yield f"sparse-kernels {around['sparse_kernels']} ({around['sources']}) on {device}: {title}"
    yield (
        f"torch {around['torch']}, CUDA {around['cuda']}, driver {around['driver']}, Triton {around['triton']}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )


def _parts(device: torch.device, asked: str | None) -> tuple[list[tuple[str, str, torch.dtype | None]], dict[str, str]]:
    """Return backend, operation and dtype of all that is to be checked, and the backends that cannot be."""
    parts = []
    missing: dict[str, str] = {}
    for op, servers in TABLE.items():
        for server in servers:
            name = server.backend
            by_default = not server.by_name and server.kinds is not None and device.type in server.kinds
            if name not in members(asked) if asked else not by_default:
                continue
            if asked in FAMILIES and server.by_name:
                continue
            reason = BACKENDS[name].unavailable_reason()
            if reason is not None:
                missing[name] = reason
                continue
            parts += [(name, op, dtype) for dtype in dtypes(op)]
    return parts, missing


def _outcome(
    name: str, op: str, dtype: torch.dtype | None, device: torch.device, options: argparse.Namespace
) -> Outcome:
    began, count, different, errors, theirs = time.monotonic(), 0, [], [0.0], [0.0]
    passing = False
    try:
        with proof.undisturbed(device):
            found: Comparison
            for found in comparisons(op, BACKENDS[name], device, dtype, full=not options.quick, seed=options.seed):
                count += 1
                if not found.agrees:
                    different.append(proof.described(found))
                errors.append(found.error)
                theirs.append(found.torch_error)
    except Exception as error:
        reason, is_verdict = proof.failure(error)
        different.append(reason)
        passing = not is_verdict
    finite = [error for error in theirs if error < float("inf")]
    return Outcome(count, different, max(errors), max(finite), passing, time.monotonic() - began)


def _lines(name: str, op: str, dtype: torch.dtype | None, outcome: Outcome) -> Iterator[str]:
    kind = "" if dtype is None else str(dtype).removeprefix("torch.")
    word = "DISAGREES" if outcome.different else "agrees"
    errors = f"error {outcome.error:.1e}, PyTorch's {outcome.torch_error:.1e}" if outcome.error else "exact"
    detail = f"{outcome.compared:4} comparisons in {outcome.seconds:.1f} s"
    detail += "" if outcome.different else f", {errors}"
    yield f"{op:13}{name:7}{kind:9} {word:10}{detail}"
    yield from (f"    {text}" for text in outcome.different[:SHOWN])


def _speeds(device: torch.device, parts: Sequence[tuple[str, str, Any]]) -> Iterator[str]:
    """Yield the bytes a second of one large call of each kind, beside those of a copy in the same minute."""
    gpu = device.type == "cuda"
    by_op = {op: name for name, op, _ in parts}
    scale = 1 if gpu else 16
    copy = _copy_speed(512 * 2**20 // scale, device)
    yield f"a copy moves {copy / 1e9:.0f} GB/s; of that:"
    for name, op, moved, call in _calls(device, by_op, scale):
        try:
            speed = moved / _median(call, device)
        except Exception as error:
            yield f"    {op:13}{name:7} failed: {_line(error)[:200]}"
            continue
        yield f"    {op:13}{name:7} {speed / 1e9:8.1f} GB/s, {100 * speed / copy:4.0f}%"


def _copy_speed(size: int, device: torch.device) -> float:
    """Return the bytes a second that a copy reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median(lambda: target.copy_(source), device)


def _calls(
    device: torch.device, by_op: dict[str, str], scale: int
) -> Iterator[tuple[str, str, int, Callable[[], Any]]]:
    """Yield backend, operation, bytes that must move, and the call."""
    logits = torch.zeros(4096 // scale, 32_000, dtype=torch.bfloat16, device=device)
    targets = torch.zeros(len(logits), dtype=torch.int64, device=device)
    threshold, weights = torch.ones((), dtype=torch.float32, device=device), {"loss": 0.7, "entropy": 0.3}
    flags = torch.zeros(2**24 // scale, dtype=torch.bool, device=device)
    flags[::10] = True
    rows = torch.zeros(2**18 // scale, 2048, dtype=torch.bfloat16, device=device)
    selection = ops.compact(flags[: len(rows)], backend="torch")
    slots = len(flags) // 8
    calls: dict[str, tuple[int, Callable[[str], Any]]] = {
        "row_stats": (logits.nbytes, lambda name: ops.row_stats(logits, targets, backend=name)),
        "gate_rows": (
            logits.nbytes,
            lambda name: ops.gate_rows(logits, targets, threshold, weights=weights, backend=name),
        ),
        "compact": (len(flags) + 12 * slots, lambda name: ops.compact(flags, capacity=slots, backend=name)),
        "gather_rows": (
            2 * len(selection.index) * rows[0].nbytes,
            lambda name: ops.gather_rows(rows, selection, backend=name),
        ),
    }
    for op, (moved, call) in calls.items():
        if op in by_op:
            yield by_op[op], op, moved, functools.partial(call, by_op[op])


def _median(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a call, on the device."""
    samples: list[float] = []
    event: Any = torch.cuda.Event  # untyped
    for number in range(ROUNDS + 2):
        if device.type == "cuda":
            start, end = (event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds = float(start.elapsed_time(end)) / 1e3
        else:
            began = time.perf_counter()
            call()
            seconds = time.perf_counter() - began
        if number >= 2:  # the first compile and allocate
            samples.append(seconds)
    return statistics.median(samples)
