"""Peak memory of a head besides its gradients: ``python head_memory.py SIDE ROWS HIDDEN CLASSES``.

SIDE is ours, ours-quantile or one of ``heads.HEADS``. In a process of its own, because a high-water mark only rises.
"""

from __future__ import annotations

import json
import sys

import heads
import torch
from peak_memory import peak

import sparse_kernels as sk

OURS = {"ours": None, "ours-quantile": sk.TopFraction(0.2, of="loss")}


def main() -> None:
    side, *shape = sys.argv[1:]
    rows, hidden, classes = map(int, shape)
    if side in OURS:

        def head(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return sk.selective_linear_cross_entropy(x, w, y, select=OURS[side]).loss
    else:
        head = heads.HEADS[side]()
    torch.set_num_threads(1)
    head(*operands(8, 64, 512)).backward()  # brings in libraries
    x, w, y = operands(rows, hidden, classes)
    gradients = [
        torch.zeros_like(operand) for operand in (x, w)
    ]  # held before, so that what is measured is beside them
    before, held = peak(), sum(gradient.nbytes for gradient in gradients)
    del gradients
    head(x, w, y).backward()
    extra = peak() - before
    print(json.dumps({"extra": extra, "gradients": held, "logits": rows * classes * w.element_size()}))


def operands(rows: int, hidden: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.empty(rows, hidden, dtype=torch.bfloat16).uniform_(-1, 1).requires_grad_()
    w = torch.empty(classes, hidden, dtype=torch.bfloat16).uniform_(-0.1, 0.1).requires_grad_()
    return x, w, torch.randint(0, classes, (rows,))


if __name__ == "__main__":
    main()
