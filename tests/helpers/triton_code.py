"""What compiled Triton kernels do: their loads and stores, the threads that these are dealt out to, and waits."""

from __future__ import annotations

import re
from typing import Any


def dealt(built: Any) -> list[tuple[int, int, int]]:
    """Return a thread's columns, the threads beside it, and the axis, for each tile of logits that is moved."""
    text = built.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #\w+\.blocked<\{(.*)\}>$", text, flags=re.MULTILINE))
    used = re.findall(r"tt\.(?:load|store) .*tensor<\d+x\d+x\d+x\d+x!tt\.ptr<\w+>, (#\w+)>", text)
    found = []
    for name in sorted(set(used) & set(layouts)):
        parts = dict(re.findall(r"(\w+) = \[([\d, ]+)\]", layouts[name]))
        last = {key: [int(value) for value in parts[key].split(",")] for key in parts}
        found.append((last["sizePerThread"][-1], last["threadsPerWarp"][-1], last["order"][0]))
    return found


def accesses(access: str, built: Any) -> list[tuple[int, int]]:
    """Return the number of wide and of other accesses in each stretch of PTX without a label, where there are any."""
    stretches = re.split(r"^\$L__BB\w+:", built.asm["ptx"], flags=re.MULTILINE)
    every = [re.findall(access + r"\.global[.\w]*", stretch) for stretch in stretches]
    wide = [sum(bool(re.search(r"\.v(4\.b32|2\.b64)", one)) for one in found) for found in every]
    return [(w, len(found) - w) for w, found in zip(wide, every, strict=True) if found]


REGISTERS = {"64": 2, "128": 4}  # that a load of so many bits writes; 1 otherwise
PAIRS = re.compile("WIDE|F64|CS2R|^D(ADD|MUL|FMA|SETP)")  # operations on two registers at a time


def waits(code: list[str]) -> list[list[str]]:
    """Return the loads of global memory that are in flight at each wait for one of them, in order.

    A thread waits at the first instruction that reads, or writes anew, a register which a load has still to write. All
    loads that were issued by then arrive at about the same time. A load is its width in bits, or ``U16``.

    Args:
        code: machine instructions.
    """
    pending: list[str] = []
    loading: set[int] = set()
    found = []
    for word in code:
        operation, _, operands = re.sub(r"^@!?U?P\w+\s+", "", word).partition(" ")
        for number, more in re.findall(r"(?<![A-Z])R(\d+)((?:\.\w+)*)", operands):
            second = int(".64" in more or bool(PAIRS.search(operation)))
            if not loading.isdisjoint((int(number), int(number) + second)):
                found.append(pending)
                pending, loading = [], set()
        if operation.startswith("LDG"):
            parts = operation.split(".")[2:]
            start = int(re.search(r"R(\d+)", operands)[1])  # type: ignore[index]
            loading |= set(range(start, start + next((REGISTERS[part] for part in parts if part in REGISTERS), 1)))
            pending.append(next((part for part in parts if part[-1].isdigit()), "32"))
    return found
