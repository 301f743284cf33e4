"""Peak memory of attention, forward and backward: ``python attention_memory.py dense|sparse|gathered TOKENS``.

Beyond the operands, 3 heads of 64 in float32. In a process of its own, because a high-water mark only rises; a smaller
call before it brings in libraries. "gathered" is the form of other devices, on the CPU: all chosen blocks at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from unittest import mock

import torch
from peak_memory import peak
from torch import Tensor
from torch.nn import functional as F

from sparse_training.nn import block_attention, block_sparse_attention, sparse_attention

FORMS: dict[str, Callable[..., Tensor]] = {
    "dense": F.scaled_dot_product_attention,
    "sparse": block_sparse_attention,
    "gathered": block_sparse_attention,
}


def main() -> None:
    form, tokens = sys.argv[1], int(sys.argv[2])
    operands = [torch.randn(1, 3, tokens, 64).requires_grad_() for _ in range(3)]
    size = sum(x.numel() * x.element_size() for x in operands)
    attend = block_attention.gathered if form == "gathered" else block_attention.attend
    with mock.patch.object(sparse_attention, "attend", attend):
        small = [x[:, :, :1024] for x in operands]
        torch.autograd.grad(FORMS[form](*small).sum(), small)
        before = peak()
        torch.autograd.grad(FORMS[form](*operands).sum(), operands)
    print(json.dumps({"bytes": peak() - before, "operands": size, "share": (peak() - before) / size}))


if __name__ == "__main__":
    main()
