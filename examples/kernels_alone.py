"""The kernels alone: statistics of rows, a threshold on them, packed indices, packed rows; then all as one call.

Host: PyTorch alone.
Hardware: 2 CPU cores (AVX-512, AVX2 or neither), or any device of PyTorch's.
Minutes: 0.1
Expected output:
    mean loss 10.94, mean entropy 9.87
    26 of 256 rows kept, packed into [26, 8]
    one call gives the same rows: True
    with a capacity of 32: 26 rows, 6 slots of padding, 0 rows that did not fit
"""

import torch

from sparse_kernels import compact, gate_rows, gather_rows, row_stats, select

generator = torch.Generator().manual_seed(0)
logits = torch.randn(256, 32000, generator=generator)
targets = torch.randint(0, 32000, (256,), generator=generator)
inputs = torch.randn(256, 8, generator=generator)

stats = row_stats(logits, targets, outputs=("loss", "entropy"))
print(f"mean loss {stats.loss.mean():.2f}, mean entropy {stats.entropy.mean():.2f}")

weights = {"loss": 0.7, "entropy": 0.3}
significance = gate_rows(logits, targets, torch.zeros(()), weights=weights).significance
threshold = significance.sort().values[-27]  # 26 of 256 are above it
gated = gate_rows(logits, targets, threshold, weights=weights)
kept = compact(gated.mask)
packed, labels = gather_rows((inputs, targets), kept)
print(f"{int(kept.count)} of {kept.size} rows kept, packed into {list(packed.shape)}")

at_once = select(logits, targets, threshold, weights=weights, tree=(inputs, targets))
print(f"one call gives the same rows: {torch.equal(at_once.packed[0], packed)}")

fixed = compact(gated.mask, capacity=32)  # a static shape: nothing waits for the device
print(
    f"with a capacity of {len(fixed.index)}: {int(fixed.count)} rows, {int((~fixed.valid()).sum())} slots of padding, "
    f"{int(fixed.overflow)} rows that did not fit"
)
assert int(kept.count) == 26
assert torch.equal(at_once.packed[1], labels)
assert torch.equal(inputs[gated.mask], packed)
