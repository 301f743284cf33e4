"""Callbacks for ``SparseTrainer.fit(callbacks=[...])``: stopping, keeping checkpoints, logs and loggers."""

from sparse_training.callbacks.checkpoints import BestModel, KeepLast
from sparse_training.callbacks.display import Messages, ProgressLine
from sparse_training.callbacks.scalars import CsvLogger, ScalarLogger
from sparse_training.callbacks.stopping import EarlyStopping
from sparse_training.callbacks.tensorboard import TensorBoard
from sparse_training.callbacks.wandb import WeightsAndBiases
from sparse_training.training.callbacks import Callback, Run

__all__ = [
    "BestModel",
    "Callback",
    "CsvLogger",
    "EarlyStopping",
    "KeepLast",
    "Messages",
    "ProgressLine",
    "Run",
    "ScalarLogger",
    "TensorBoard",
    "WeightsAndBiases",
]
