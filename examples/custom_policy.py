"""A policy of your own: leave out the hardest tenth of a batch, which may be mislabelled, and take the next rows.

Host: sparse_training's own trainer.
Hardware: 2 CPU cores.
Minutes: 0.2
Expected output:
    band kept 0.30 of the rows in the sparse phase, accuracy 0.90
"""

import torch

from sparse_training import Policy, ResidentLoader, SparseTrainer, build_model, load_data
from sparse_training.selection.types import Scores, WeightedIndices


# [policy]
class Band(Policy):
    """The rows of the largest losses but for the very largest."""

    name = "band"  # in results
    uses_scores = True  # ask the scorer: the model itself, unless another is given

    @property
    def target(self) -> float:
        """Fraction of the rows that it aims to keep, for reports."""
        return self.rate

    def decide(self, scores: Scores) -> WeightedIndices:
        """Positions in the batch of the rows to train on."""
        hardest = scores.losses.argsort(descending=True)
        left_out, count = round(0.1 * len(hardest)), max(1, round(self.rate * len(hardest)))
        return WeightedIndices(hardest[left_out : left_out + count])


# [/policy]

torch.manual_seed(0)
data = load_data("digits")
train = ResidentLoader(data.train, batch_size=100, mean=data.mean, std=data.std, drop_last=True)
test = ResidentLoader(data.test, batch_size=256, mean=data.mean, std=data.std, shuffle=False)
model = build_model("cnn-tiny", shape=data.shape, classes=len(data.classes))
trainer = SparseTrainer(model, policy=Band(rate=0.3), lr=1e-2)
log = trainer.fit(train, epochs=12)
accuracy = trainer.evaluate(test)["accuracy"]
print(f"band kept {log.rate:.2f} of the rows in the sparse phase, accuracy {accuracy:.2f}")
assert abs(log.rate - 0.3) < 0.01
assert accuracy > 0.8
