"""A trainer from one set of keywords, for tests that vary them."""

from dataclasses import fields

from sparse_training import SparseTrainer, TrainerSettings

SETTINGS = {field.name for field in fields(TrainerSettings)}


def make_trainer(model, **options):
    """``SparseTrainer(model, ...)`` with the step's settings among the keywords."""
    settings = {name: options.pop(name) for name in list(options) if name in SETTINGS}
    return SparseTrainer(model, settings=TrainerSettings(**settings), **options)
