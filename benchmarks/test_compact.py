"""From a mask to packed rows and back, and from logits to packed rows, against what PyTorch offers for it.

Bytes that must move: the mask once, and each row kept read and written once. "copy" is PyTorch's own copy of as many
rows that lie together, into new tensors: the floor.

Where a tensor lies in memory decides up to a tenth of the time of moving it, for one side more than for another. So the
rounds of packing are divided among equal trees in different places, and compared in pairs.
"""

from __future__ import annotations

from functools import partial

import peers
import pytest
import torch

import sparse_kernels as sk

RATE = 0.1


def by_mask(tree, mask):
    return [tensor[mask] for tensor in tree]


def by_index(tree, mask):
    index = mask.nonzero().squeeze(-1)
    return [tensor.index_select(0, index) for tensor in tree]


def compiled(form):
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = torch.compile(form, dynamic=True)
        run([torch.randn(64, 3), torch.arange(64)], torch.rand(64) < 0.5)  # compiled while the setting holds
    return run


def images(rows, size):
    return [torch.randn(rows, 3, size, size)]


def tree_of_five():
    rows = 4096
    return [
        torch.randn(rows, 3, 32, 32), torch.randn(rows, 768).bfloat16(), torch.randint(0, 10, (rows,)),
        torch.rand(rows), torch.rand(rows, 10) < 0.5,
    ]  # fmt: skip


def pack(interleaved, make, places, targets, rounds, calls):
    torch.manual_seed(0)
    trees = [make() for _ in range(places)]
    tree = list(trees[0])
    mask = torch.rand(len(tree[0])) < RATE
    kept = int(mask.sum())
    forms = {"x[mask]": by_mask, "index_select(nonzero)": by_index}
    forms |= {f"compiled {name}": compiled(form) for name, form in forms.items()}

    def ours():
        return sk.compact(mask).take(tree)

    def place(other):
        tree[:] = other

    for form in forms.values():
        assert all(torch.equal(a, b) for a, b in zip(ours(), form(tree, mask), strict=True))
    sides = {name: (lambda form=form: form(tree, mask)) for name, form in forms.items()}
    sides["copy"] = lambda: [tensor[:kept].clone() for tensor in tree]
    moved = sum(2 * kept * tensor[0].numel() * tensor.element_size() for tensor in tree)
    row = interleaved(
        ours, sides, targets=targets, rounds=rounds, calls=calls, notes={"bytes": len(mask) + moved},
        places=[partial(place, other) for other in trees],
    )  # fmt: skip
    row.ratios["best"] = min(row.ratios[name] for name in forms)


@pytest.mark.keeps_freed_memory
@pytest.mark.parametrize(
    ("make", "places", "targets", "rounds", "calls"),
    [
        pytest.param(lambda: images(4096, 32), 5, {"best": 1.0, "copy": 0.8}, 300, 4, id="pack-4096x3x32x32-float32"),
        pytest.param(lambda: images(512, 224), 2, {"best": 1.0, "copy": 0.8}, 40, 1, id="pack-512x3x224x224-float32"),
        pytest.param(
            lambda: [torch.randn(65536, 768).bfloat16()], 3, {"best": 1.0}, 90, 1, id="pack-65536x768-bfloat16"
        ),
        pytest.param(tree_of_five, 5, {"best": 1.0}, 300, 4, id="pack-five-tensors-of-4096"),
        pytest.param(lambda: images(128, 32), 5, {"best": 1.0}, 150, 50, id="pack-128x3x32x32-float32"),
    ],
)
def test_mask_to_packed_rows(interleaved, make, places, targets, rounds, calls):
    pack(interleaved, make, places, targets, rounds, calls)


@pytest.mark.parametrize("size", [pytest.param(224, id="pack-fresh-512x3x224x224-float32")])
def test_mask_to_packed_rows_in_fresh_memory(interleaved, size):
    """Packed rows so large that the C library takes them from the system each time, unless told to keep memory."""
    pack(interleaved, lambda: images(512, size), 2, {"best": 1.0}, 40, 1)


@pytest.mark.parametrize(
    ("make", "rounds"),
    [
        pytest.param(lambda: images(4096, 32), 9, id="unpack-4096x3x32x32-float32"),
        pytest.param(lambda: [torch.randn(65536, 768).bfloat16()], 9, id="unpack-65536x768-bfloat16"),
    ],
)
def test_backward(interleaved, make, rounds):
    """The gradient of a gather: what autograd runs for x[index] (index_put) and for index_select (index_add)."""
    torch.manual_seed(0)
    (batch,) = make()
    mask = torch.rand(len(batch)) < RATE
    selection = sk.compact(mask)
    index, gradient = selection.index, sk.gather_rows(batch, selection)
    sides = {
        "index_put": lambda: torch.zeros_like(batch).index_put_((index,), gradient, accumulate=True),
        "index_add": lambda: torch.zeros_like(batch).index_add_(0, index, gradient),
    }

    def ours():
        return sk.scatter_rows(gradient, selection)

    assert all(torch.equal(ours(), side()) for side in sides.values())
    interleaved(ours, sides, targets=dict.fromkeys(sides, 1.5), rounds=rounds)


@pytest.mark.parametrize("rows", [pytest.param(2**24, id="compact-16M-flags")])
def test_indices_alone(interleaved, rows):
    torch.manual_seed(0)
    mask = torch.rand(rows) < RATE
    assert torch.equal(sk.compact(mask).index, mask.nonzero().squeeze(-1))
    interleaved(lambda: sk.compact(mask), {"nonzero": lambda: mask.nonzero()}, targets={"nonzero": 5.0}, rounds=9)


@pytest.mark.parametrize("rows", [pytest.param(128, id="select-128x10"), pytest.param(4096, id="select-4096x10")])
def test_select(interleaved, rows):
    """Logits to packed rows, as one call, as three calls, and unfused."""
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(rows, 10), torch.randint(0, 10, (rows,))
    batch = torch.randn(rows, 64), labels
    weights = {"loss": peers.LOSS, "entropy": peers.ENTROPY}
    significance = sk.gate_rows(logits, labels, torch.zeros(()), weights=weights).significance
    threshold = significance.quantile(1 - RATE)

    def ours():
        return sk.select(logits, labels, threshold, weights=weights, tree=batch).packed

    def three_calls():
        return sk.compact(sk.gate_rows(logits, labels, threshold, weights=weights).mask).take(batch)

    def unfused():
        return by_index(batch, peers.unfused_log_softmax(logits, labels, threshold)[0])

    sides = {"three calls": three_calls, "unfused": unfused}
    assert all(torch.equal(a, b) for side in sides.values() for a, b in zip(ours(), side(), strict=True))
    interleaved(ours, sides, targets={"three calls": 1.0}, rounds=31, calls=50)
