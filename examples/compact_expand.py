"""Compact and Expand inside a network: a costly block runs on the rows that need it, the others pass by.

Host: PyTorch alone.
Hardware: 2 CPU cores.
Minutes: 0.1
Expected output:
    the block ran on 0.61 of the rows, accuracy 0.88
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_training import Compact, Expand, load_data


class EarlyExit(nn.Module):
    """An early head decides; rows that it is unsure of go through the block as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.early = nn.Linear(64, 10)
        self.block = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        self.head = nn.Linear(64, 10)
        self.compact, self.expand = Compact(), Expand()
        self.rows = self.rows_in_block = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the early head and of the last one, each [B, 10]."""
        x = self.stem(x)
        early = self.early(x)
        unsure = early.detach().softmax(1).amax(1) < 0.9
        rows, selection = self.compact(x, unsure)
        x = self.expand(rows + self.block(rows), selection, skip=x)
        self.rows, self.rows_in_block = self.rows + len(x), self.rows_in_block + len(rows)
        return early, self.head(x)


torch.manual_seed(0)
data = load_data("digits")
inputs, targets = data.train.images.flatten(1) / 255, data.train.labels
model = EarlyExit()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(15):
    for index in torch.randperm(len(targets)).split(64):
        early, last = model(inputs[index])
        loss = F.cross_entropy(last, targets[index]) + 0.5 * F.cross_entropy(early, targets[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
share = model.rows_in_block / model.rows
with torch.no_grad():
    _, logits = model(data.test.images.flatten(1) / 255)
accuracy = (logits.argmax(1) == data.test.labels).float().mean().item()
print(f"the block ran on {share:.2f} of the rows, accuracy {accuracy:.2f}")
assert share < 0.9
assert accuracy > 0.8
