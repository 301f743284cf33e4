"""``sparse-train bounds``: speed-up bounds of scorers."""

from __future__ import annotations

from typing import Any

import click
import torch

from sparse_training.cli.display import Display
from sparse_training.cli.folders import prepare, refuse_torchrun
from sparse_training.cli.options import DATA_AND_MODEL, PRECISION, SCORER_NAMES, fractions, scorers, with_options
from sparse_training.data.load import load_data
from sparse_training.data.loaders import make_loader
from sparse_training.models.build import build_model
from sparse_training.profiling.speedup import speedup_bounds
from sparse_training.reporting.speedup import print_speedup_bounds
from sparse_training.trainer import SparseTrainer
from sparse_training.training.settings import TrainerSettings


@click.command(name="bounds")
@with_options(*DATA_AND_MODEL, PRECISION)
@click.option("--scorers", default="self,early:2,proxy,history", callback=scorers, help=f"Some of {SCORER_NAMES}.")
@click.option("--rates", default="0.1,0.3", callback=fractions, help="Fractions of rows to keep.")
def command(**options: Any) -> None:
    """Measure how fast each scorer lets a step be.

    A gate asks each scorer; random, which asks none, is measured too. Needs an idle machine. Nothing is written.
    """
    refuse_torchrun("bounds")
    device = prepare(options)
    data = load_data(options["data"], options["root"], size=options["image_size"])
    torch.manual_seed(0)
    model = build_model(options["model"], shape=data.shape, classes=len(data.classes))
    settings = TrainerSettings(scoring_precision=options["precision"])
    trainer = SparseTrainer(model, policy="dense", device=device, settings=settings)
    loader = make_loader(data.train, data, batch_size=options["batch_size"], device=device)
    policies = [*(f"gate@{scorer}" for scorer in options["scorers"]), "random"]
    with Display(total=1) as display:
        bounds = speedup_bounds(trainer, loader, policies, options["rates"], progress=display.calibrating)
    batches = f"batches of {options['batch_size']}"
    print_speedup_bounds(bounds, of=f"{options['model']} on {options['data']}, {batches}, {device}:")
