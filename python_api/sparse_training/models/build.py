"""Models by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from sparse_training.arguments import check_integer
from sparse_training.errors import UserError
from sparse_training.models.cnn import cnn_2m, cnn_620k, cnn_bn, cnn_tiny
from sparse_training.models.resnet import resnet
from sparse_training.models.resnet50 import resnet50
from sparse_training.models.shapes import Shape
from sparse_training.models.vit import vit, vit_sparse
from sparse_training.models.vit_s import vit_s


def build_model(name: str, *, shape: Shape, classes: int) -> nn.Module:
    """Build a model with fresh weights, drawn from torch's global generator.

    Example:
        >>> model = build_model("cnn-bn", shape=(1, 28, 28), classes=10)

    Args:
        name: one of ``MODELS``, or the import path "module:factory" of a callable that takes ``shape`` and
            ``classes`` as keywords and returns an ``nn.Module``.
        shape: (C, H, W) of one image, each at least 1.
        classes: number of classes, at least 2.

    Returns:
        A module that maps float images [N, C, H, W] to logits [N, classes].

    Raises:
        UserError: no such model or factory, a factory of another signature, or a shape too small for the model.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"`shape` must be (channels, height, width), each at least 1, got {shape}")
    check_integer("classes", classes, 2)
    if name in _FACTORIES:
        return _FACTORIES[name](shape=shape, classes=classes)
    if ":" not in name:
        raise UserError(f"unknown model {name!r}; use one of {', '.join(MODELS)} or module:factory")
    model = _import_factory(ModelFactory(name).name)(shape=shape, classes=classes)
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


@contextmanager
def without_code(advice: str) -> Iterator[None]:
    """Context in which models that are named as module:factory are refused: names that the user did not type.

    Args:
        advice: the rest of the error: where the name is from, and what the user can do.
    """
    global _advice
    before, _advice = _advice, advice
    try:
        yield
    finally:
        _advice = before


_advice = ""


@dataclass(frozen=True)
class ModelFactory:
    """A model by name, to be built once the shape of its inputs is known.

    Attributes:
        name: as for ``build_model``.

    Raises:
        UserError: a module:factory where those are refused.
    """

    name: str

    def __post_init__(self) -> None:
        if _advice and ":" in self.name:
            raise UserError(f"model {self.name!r} is Python code, {_advice}")

    def __call__(self, *, shape: Shape, classes: int) -> nn.Module:
        """Build the model; see ``build_model``."""
        return build_model(self.name, shape=shape, classes=classes)

    def __str__(self) -> str:
        return self.name


def _import_factory(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise UserError(f"model {name!r} is not an import path; use module:factory")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        reason = " ".join(str(error).split())  # of some packages it has several lines
        raise UserError(f"model {name!r}: cannot import {module_name}: {reason}") from error
    try:
        factory: object = getattr(module, attribute)
    except AttributeError:
        raise UserError(f"model {name!r}: module {module_name} has no {attribute!r}") from None
    if not callable(factory):
        raise UserError(f"model {name!r}: {attribute} must be callable, got {type(factory).__name__}")
    try:
        # Checked before the call, so that a TypeError from inside the factory keeps its traceback.
        inspect.signature(factory).bind(shape=(1, 1, 1), classes=2)
    except TypeError as error:
        raise UserError(f"model {name!r}: must be callable as {attribute}(shape=..., classes=...): {error}") from None
    except ValueError:
        pass  # some builtins have no signature
    return factory


_FACTORIES: dict[str, Callable[..., nn.Module]] = {
    "cnn-620k": cnn_620k,
    "cnn-2m": cnn_2m,
    "cnn-bn": cnn_bn,
    "cnn-tiny": cnn_tiny,
    "resnet": resnet,
    "resnet50": resnet50,
    "vit": vit,
    "vit-s": vit_s,
    "vit-sparse": vit_sparse,
}
MODELS = tuple(_FACTORIES)
