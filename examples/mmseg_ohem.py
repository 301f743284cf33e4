"""mmseg's sampler of hard pixels (OHEM) without a softmax, a sort or a copy of the logits.

Host: mmsegmentation 1.2; a stand-in with its functions in plain PyTorch where it is not installed.
Hardware: 2 CPU cores.
Minutes: 0.2
Expected output:
    hard pixels: 8,221 of 16,384 by theirs, 8,221 by ours, 0 differ
"""

from types import SimpleNamespace

import torch
from stand_ins import HardPixels, host_or_stand_in

from sparse_training.integrations.mmseg import ohem

host = host_or_stand_in(
    "mmseg.structures.sampler.ohem_pixel_sampler", "mmseg", "1.2.2",
    {"mmseg.structures.sampler.ohem_pixel_sampler": {"OHEMPixelSampler": HardPixels}},
)  # fmt: skip
torch.manual_seed(0)
label = torch.randint(0, 19, (1, 1, 128, 128))
logits = torch.randn(1, 19, 128, 128).scatter_add(1, label, torch.full((1, 1, 128, 128), 4.0))
label[:, :, :16] = 255
sampler = host.OHEMPixelSampler(SimpleNamespace(ignore_index=255), thresh=0.7, min_kept=1000)
theirs = sampler.sample(logits, label)
with ohem:  # before training: ohem.on()
    ours = sampler.sample(logits, label)
print(
    f"hard pixels: {int(theirs.sum()):,} of {label.numel():,} by theirs, {int(ours.sum()):,} by ours, "
    f"{int((ours != theirs).sum())} differ"
)
assert torch.equal(ours, theirs)
