"""Small models of tables and of texts."""

from __future__ import annotations

from torch import Tensor, nn


class Regressor(nn.Module):
    """Multilayer perceptron with two hidden layers and one output for each row.

    Args:
        features: columns of the input, at least 1.
        width: units of a hidden layer. Default 128.
    """

    def __init__(self, features: int, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return values, float [N], of features, float [N, features]."""
        values: Tensor = self.layers(features).squeeze(1)
        return values


class TextClassifier(nn.Module):
    """Mean of word embeddings, a hidden layer, and logits.

    Args:
        words: size of the vocabulary; number 0 is padding.
        classes: number of classes.
        width: size of an embedding and of the hidden layer. Default 64.
    """

    def __init__(self, words: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(words, width, mode="mean", padding_idx=0)
        self.layers = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, classes)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return class logits, float [N, classes], of numbers of words, int64 [N, tokens]."""
        logits: Tensor = self.layers(self.embedding(tokens))
        return logits
