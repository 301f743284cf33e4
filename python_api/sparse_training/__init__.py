"""Training on the rows that matter: policies, a gate, a trainer, and comparisons at equal cost.

    trainer = SparseTrainer(model, policy="infobatch")
    trainer.fit(loader, epochs=10, evaluate=test_loader)

or, inside your own loop:

    gate = Gate(rate=0.1)
    kept = gate(logits, targets)
    inputs, targets = kept.take((inputs, targets))

Names are imported when first used, so that ``sparse-train --help`` does not import PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_kernels import __version__
    from sparse_training import nn as nn
    from sparse_training.criterion import Criterion
    from sparse_training.data.image_files import ImageFiles
    from sparse_training.data.image_shards import ImageShards
    from sparse_training.data.load import load_data
    from sparse_training.data.resident import ResidentLoader
    from sparse_training.data.stream import StreamLoader
    from sparse_training.data.transforms import CenterCrop, RandomCropAndFlip
    from sparse_training.errors import UserError
    from sparse_training.gate import Budget, Gate, PIController, Ramp, Significance
    from sparse_training.models.build import build_model
    from sparse_training.nn import Compact, Expand
    from sparse_training.profiling.advise import advise
    from sparse_training.profiling.advise_result import Advice
    from sparse_training.samplers.batch_sampler import HistorySampler, Indexed
    from sparse_training.selection.policies.base import Policy
    from sparse_training.selection.registry import POLICIES
    from sparse_training.trainer import SparseTrainer
    from sparse_training.training.callbacks import Callback
    from sparse_training.training.settings import TrainerSettings

__all__ = [
    "POLICIES",
    "Advice",
    "Budget",
    "Callback",
    "CenterCrop",
    "Compact",
    "Criterion",
    "Expand",
    "Gate",
    "HistorySampler",
    "ImageFiles",
    "ImageShards",
    "Indexed",
    "PIController",
    "Policy",
    "Ramp",
    "RandomCropAndFlip",
    "ResidentLoader",
    "Significance",
    "SparseTrainer",
    "StreamLoader",
    "TrainerSettings",
    "UserError",
    "__version__",
    "advise",
    "build_model",
    "load_data",
]

_MODULES = {
    "sparse_kernels": ("__version__",),
    "sparse_training.criterion": ("Criterion",),
    "sparse_training.data.image_files": ("ImageFiles",),
    "sparse_training.data.image_shards": ("ImageShards",),
    "sparse_training.data.load": ("load_data",),
    "sparse_training.data.resident": ("ResidentLoader",),
    "sparse_training.data.stream": ("StreamLoader",),
    "sparse_training.data.transforms": ("CenterCrop", "RandomCropAndFlip"),
    "sparse_training.errors": ("UserError",),
    "sparse_training.gate": ("Budget", "Gate", "PIController", "Ramp", "Significance"),
    "sparse_training.models.build": ("build_model",),
    "sparse_training.nn": ("Compact", "Expand"),
    "sparse_training.profiling.advise": ("advise",),
    "sparse_training.profiling.advise_result": ("Advice",),
    "sparse_training.samplers.batch_sampler": ("HistorySampler", "Indexed"),
    "sparse_training.selection.policies.base": ("Policy",),
    "sparse_training.selection.registry": ("POLICIES",),
    "sparse_training.trainer": ("SparseTrainer",),
    "sparse_training.training.callbacks": ("Callback",),
    "sparse_training.training.settings": ("TrainerSettings",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
# Reachable as attributes after ``import sparse_training`` alone.
_SUBMODULES = (
    "callbacks", "criterion", "data", "errors", "gate", "models", "nn", "profiling", "samplers", "selection", "trainer",
    "training",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"sparse_training.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sparse_training' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
