"""A gate in a training loop of your own: score a batch, keep the rows above a threshold, train on those.

Host: PyTorch alone.
Hardware: 2 CPU cores.
Minutes: 0.1
Expected output:
    kept 0.32 of the rows, aimed for 0.30
    accuracy 0.90
"""

import torch
from torch import nn
from torch.nn import functional as F

from sparse_training import Gate, load_data

torch.manual_seed(0)
data = load_data("digits")
inputs, targets = data.train.images.flatten(1) / 255, data.train.labels
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
gate = Gate(rate=0.3)

offered = trained = 0
for _ in range(20):
    for index in torch.randperm(len(targets)).split(128):
        x, y = inputs[index], targets[index]
        with torch.no_grad():
            kept = gate(model.eval()(x), y)  # no dropout, and BatchNorm would be left alone
        x, y = kept.take((x, y))
        loss = F.cross_entropy(model.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        offered, trained = offered + len(index), trained + len(y)

with torch.no_grad():
    logits = model.eval()(data.test.images.flatten(1) / 255)
accuracy = (logits.argmax(1) == data.test.labels).float().mean().item()
print(f"kept {trained / offered:.2f} of the rows, aimed for 0.30")
print(f"accuracy {accuracy:.2f}")
assert abs(trained / offered - 0.3) < 0.05
assert accuracy > 0.85
