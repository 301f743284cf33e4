"""Draw rows by what training last made of them, in a plain DataLoader: rows left out are never read or decoded.

Host: PyTorch's DataLoader.
Hardware: 2 CPU cores.
Minutes: 0.1
Expected output:
    read 14370 rows in 10 epochs of 1437
    accuracy 0.88, wrong labels among the rows drawn in the last epoch: 5% (in the data: 20%)
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sparse_training import HistorySampler, Indexed, load_data

EPOCHS = 10
torch.manual_seed(0)
data = load_data("digits")
inputs, labels = data.train.images.flatten(1) / 255, data.train.labels.clone()
wrong = torch.rand(len(labels)) < 0.2  # a fifth of the labels is replaced
labels[wrong] = (labels[wrong] + torch.randint(1, 10, (int(wrong.sum()),))) % 10
dataset = TensorDataset(inputs, labels)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

sampler = HistorySampler(dataset, batch_size=64, method="adaptive", denoise=True, targets=labels)
read = wrong_drawn = 0
for epoch in range(EPOCHS):
    for index, (x, y) in DataLoader(Indexed(dataset), batch_sampler=sampler):
        logits = model(x)
        losses = F.cross_entropy(logits, y, reduction="none")
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        sampler.update(index, losses, logits)
        read += len(index)
        wrong_drawn += int(wrong[index].sum()) if epoch == EPOCHS - 1 else 0

logits = model(data.test.images.flatten(1) / 255)
accuracy = (logits.argmax(1) == data.test.labels).float().mean().item()
share = wrong_drawn / len(dataset)
state = sampler.state_dict()  # with the model's, enough to go on in the middle of an epoch
print(f"read {read} rows in {EPOCHS} epochs of {len(dataset)}")
print(f"accuracy {accuracy:.2f}, wrong labels among the rows drawn in the last epoch: {share:.0%} (in the data: 20%)")
assert accuracy > 0.8
assert share < 0.15
