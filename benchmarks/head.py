"""The head of a language model, forward and backward, beside those that users run: ``python benchmarks/head.py``.

All sides of a shape take turns in one process: every row, a fifth of the rows by quantile and by gate, and the peers,
which multiply every row whatever is selected. Each part goes to benchmarks/results/head-DATE.json once it is measured,
so that an interrupted recording keeps what it has, and ``--missing`` takes it up. 15 minutes; ``--only TEXT`` for some
parts, ``--small`` for a few on tiny shapes and no record.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import heads
import torch
from conftest import machine
from readme import MEMORY
from timing import Cpu, Row, Side, interleave, quantiles, ratios, record_path, write_record
from torch import Tensor

import sparse_kernels as sk
from sparse_training import Gate, Significance

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
Operands = tuple[Tensor, Tensor, Tensor]
FAR = 4.0  # times as slow as ours: such a peer is timed once
MEASURED = ("torch mean", "torch none", "TRL", "Liger", "Cut Cross-Entropy", "dense")


class Shape(NamedTuple):
    rows: int
    hidden: int
    classes: int

    def case(self, dtype: torch.dtype) -> str:
        return f"{str(dtype)[6:]}-{self.rows}x{self.hidden}x{self.classes}"

    def operands(self, dtype: torch.dtype) -> Operands:
        torch.manual_seed(0)
        x = torch.randn(self.rows, self.hidden).to(dtype)
        w = (torch.randn(self.classes, self.hidden) / self.hidden**0.5).to(dtype)
        return x.requires_grad_(), w.requires_grad_(), torch.randint(0, self.classes, (self.rows,))


SMOLLM2, QWEN, SMALL = Shape(1024, 576, 49_152), Shape(1024, 896, 151_936), Shape(32, 16, 64)  # of their heads


def gradients(head: heads.Head, given: Operands) -> Side:
    x, w, y = given
    return lambda: torch.autograd.grad(head(x, w, y), (x, w))


def selective(select: Any) -> heads.Head:
    return lambda x, w, y: sk.selective_linear_cross_entropy(x, w, y, select=select).loss


def statistics(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Loss and entropy of every row that counts, as TRL's function gives; the mean of the losses."""
    loss = sk.linear_row_stats(x, w, y).loss
    assert loss is not None
    return loss.sum() / (y != -100).sum()


def measured(
    ours: dict[str, Side], peers: dict[str, Side], rounds: int
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Each side's seconds, and the peers so far behind the first of ours that they were timed once.

    The first call of a side warms it, and no speed-up is recorded unless its gradients agree with those of our first,
    to some roundings of the largest.
    """
    sides, right, first = ours | peers, None, {}
    for name, side in sides.items():
        began = time.perf_counter()
        found = side()
        first[name] = time.perf_counter() - began
        right = right or found
        for a, c in zip(right, found, strict=True) if name in peers else ():
            error, largest = (a.float() - c.float()).abs().max(), c.float().abs().max()
            assert error <= 0.03 * largest, f"{name}: {float(error / largest):.3g}"
    once = [name for name in peers if first[name] > FAR * next(iter(first.values()))]
    seconds = interleave(Cpu(), {n: side for n, side in sides.items() if n not in once}, rounds=rounds, warm=0)
    return seconds | {name: quantiles([first[name]]) for name in once}, once


def of_every_peer(shape: Shape, dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    """All rows, and a fifth of them: one set of times for three rows of the record."""
    given = shape.operands(dtype)
    x, w, y = given
    found, left_out = heads.available(dtype=dtype)
    peers = {name: gradients(head, given) for name, head in found.items()}
    with torch.no_grad():
        losses = sk.linear_row_stats(x, w, y, outputs="loss").loss
    assert losses is not None
    gate = Gate(rate=0.2, significance=Significance(loss=1.0), threshold=float(losses.quantile(0.8)))
    ours = {
        "all": gradients(selective(None), given),
        "quantile": gradients(selective(sk.TopFraction(0.2, of="entropy")), given),
        "gate": gradients(selective(gate), given),
    }
    notes = {name: products(side) for name, side in ours.items()}
    stats = {"linear_row_stats": gradients(statistics, given)}
    seconds, once = measured(ours | stats, peers, rounds)
    for name, target in (("all", 0.97), ("quantile", 1.7), ("gate", 2.0)):
        others = (*stats, *peers) if name == "all" else tuple(peers)
        times = {"ours": seconds[name], **{other: seconds[other] for other in others}}
        more = more_notes(left_out, once)
        case = f"head-{name}-{shape.case(dtype)}"
        yield Row(case, times, ratios(times), dict.fromkeys(peers, target), notes[name] | more)


def products(side: Side) -> dict[str, float]:
    """Rows of one call, and how often each is multiplied by the weight."""
    with sk.count_multiplied_rows() as rows:
        side()
    return {"rows kept": rows.differentiated, "products a row": round(rows.products / max(rows.scored, 1), 2)}


def more_notes(left_out: dict[str, str], once: list[str]) -> dict[str, Any]:
    """What a row says besides: peers that do not run here, and those that were timed once."""
    return ({"left out": left_out} if left_out else {}) | ({"timed once": once} if once else {})


def half_prompt(shape: Shape, dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    """Half of the tokens have no label; TRL's function scores every position on a CPU."""
    x, w, y = shape.operands(dtype)
    y[: len(y) // 2] = -100
    found, left_out = heads.available("TRL", "torch mean", dtype=dtype)
    peers = {name: gradients(head, (x, w, y)) for name, head in found.items()}
    ours = gradients(statistics, (x, w, y))
    ours()
    seconds, once = measured({"ours": ours}, peers, rounds)
    notes = more_notes(left_out, once)
    targets = {"TRL": 3.0} if "TRL" in found else {}
    yield Row(f"head-prompts-{shape.case(dtype)}", seconds, ratios(seconds), targets, notes)


def backward_of_a_fifth(shape: Shape, dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    """``row_stats``' own backward: a fifth of the upstream gradients are not zero, beside all of them.

    The second pair also reads the gradient once, as the product that follows in a model does.
    """
    torch.manual_seed(0)
    logits = torch.randn(shape.rows, shape.classes).to(dtype).requires_grad_()
    loss = sk.row_stats(logits, torch.randint(0, shape.classes, (shape.rows,))).loss
    assert loss is not None
    every = torch.rand(shape.rows) + 0.5
    some = every * (torch.arange(shape.rows) % 5 == 0)

    def backward(above: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits, above, retain_graph=True)[0]

    sides = {
        "ours": lambda: backward(some),
        "all rows": lambda: backward(every),
        "ours, then read": lambda: backward(some).sum(),
        "all rows, then read": lambda: backward(every).sum(),
    }
    seconds = interleave(Cpu(), sides, rounds=rounds)
    case = f"backward-fifth-{str(dtype)[6:]}-{shape.rows}x{shape.classes}"
    read = {"ours": seconds.pop("ours, then read"), "all rows": seconds.pop("all rows, then read")}
    yield Row(case, seconds, ratios(seconds), {"all rows": 3.0}, {})
    yield Row(f"{case}-then-read", read, ratios(read), {}, {})


def memory(shape: Shape, names: tuple[str, ...]) -> Iterator[Row]:
    """Megabytes that a forward and backward take besides operands and gradients, in a process for each side."""
    script = Path(__file__).with_name("head_memory.py")
    found, left_out = heads.available(*names)
    taken: dict[str, float] = {}
    for name in ("ours", "ours-quantile", *found):
        command = [sys.executable, str(script), name, *map(str, shape)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            left_out[name] = done.stderr.strip().splitlines()[-1]
        else:
            taken[name] = round(json.loads(done.stdout)["extra"] / 2**20, 1)
    chunked = {"torch mean": 1.0} if "torch mean" in taken else {}
    times = {name: taken[name] / taken["ours"] for name in taken if name != "ours"}
    notes = {MEMORY: taken} | ({"left out": left_out} if left_out else {})
    yield Row(f"memory-head-{shape.case(BFLOAT16)}", {}, times, chunked, notes)


def parts(small: bool) -> dict[str, Iterator[Row]]:
    """Parts of the record, the most valuable first. None runs before it is asked for its rows."""
    if small:
        return {
            "head": of_every_peer(SMALL, BFLOAT16, 1),
            "backward": backward_of_a_fifth(SMALL, FLOAT32, 1),
            "prompts": half_prompt(SMALL, BFLOAT16, 1),
            "memory": memory(SMALL, ("torch mean",)),
        }
    return {
        "smollm2-bfloat16": of_every_peer(SMOLLM2, BFLOAT16, 5),
        "smollm2-float32": of_every_peer(SMOLLM2, FLOAT32, 3),
        "backward-float32": backward_of_a_fifth(SMOLLM2, FLOAT32, 9),
        "backward-bfloat16": backward_of_a_fifth(SMOLLM2, BFLOAT16, 9),
        "prompts-bfloat16": half_prompt(SMOLLM2, BFLOAT16, 3),
        "prompts-float32": half_prompt(SMOLLM2, FLOAT32, 3),
        "memory-smollm2": memory(SMOLLM2, MEASURED),
        "qwen-bfloat16": of_every_peer(QWEN, BFLOAT16, 3),
        "qwen-float32": of_every_peer(QWEN, FLOAT32, 2),
        "memory-qwen": memory(QWEN, ("torch mean", "dense")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="parts whose name holds it")
    parser.add_argument("--missing", action="store_true", help="leave out the parts that the day's record holds")
    parser.add_argument("--small", action="store_true", help="tiny shapes, nothing recorded")
    options = parser.parse_args()
    path, began = record_path("head"), time.perf_counter()
    done = json.loads(path.read_text())["parts"] if path.exists() else []
    for name, rows in parts(options.small).items():
        if options.only not in name or (options.missing and name in done):
            continue
        found = []
        for row in rows:
            found.append(row)
            print("\n".join(row.lines()), flush=True)
        print(f"  {name}: {time.perf_counter() - began:.0f} s since the start", flush=True)
        if not options.small:
            done = list(dict.fromkeys((*done, name)))
            write_record(path, machine(), found, parts=done)


if __name__ == "__main__":
    main()
