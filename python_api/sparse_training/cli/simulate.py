"""``sparse-train simulate``: a run on more ranks and samples than are at hand."""

from __future__ import annotations

from typing import Any

import click

from sparse_training.cli.folders import new_folder
from sparse_training.cli.values import COUNT, FRACTION, NOT_NEGATIVE, PART, POSITIVE, SEED, SHARE
from sparse_training.errors import UserError
from sparse_training.profiling.scale import Cluster, Plan, simulate
from sparse_training.profiling.scale_costs import StageCosts, read_costs
from sparse_training.reporting.simulation import Simulation, write_simulation

GIVEN = ("load_ms", "forward_ms", "backward_ms", "optimizer_ms")


def _counts(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Read whole numbers apart by commas; 1e9 is one."""
    try:
        numbers = [float(part) for part in value.split(",")]
        if not all(number.is_integer() and 1 <= number < 2**62 for number in numbers):
            raise ValueError
    except ValueError:
        name = f"--{(parameter.name or '').replace('_', '-')}"
        raise UserError(f"{name} must be whole numbers from 1 on, apart by commas, got {value!r}") from None
    return tuple(dict.fromkeys(map(int, numbers)))


@click.command(name="simulate")
@click.option("--costs", type=click.Path(), help="calibration.json of compare or study, or advice.json of advise.")
@click.option(
    "--load-ms", type=NOT_NEGATIVE, help="In place of --costs: milliseconds of loading a batch.  [default: 0]"
)
@click.option("--forward-ms", type=NOT_NEGATIVE, help="Milliseconds of its forward pass.")
@click.option("--backward-ms", type=NOT_NEGATIVE, help="Milliseconds of its backward pass.")
@click.option("--optimizer-ms", type=NOT_NEGATIVE, help="Milliseconds of the optimizer's step.  [default: 0]")
@click.option("--batch-size", type=COUNT, help="Rows that a rank is offered a step.  [default: that of --costs]")
@click.option("--parameters", type=COUNT, required=True, help="Parameters of the model, float32.")
@click.option("--samples", default="1.28e6,1e9", callback=_counts, help="Rows of the data set.")
@click.option("--ranks", default="8,64,256,1024", callback=_counts, help="Numbers of processes, 2 to 65536.")
@click.option("--rate", type=SHARE, default=0.1, help="Fraction of the rows that gate and importance keep.")
@click.option("--prune", type=PART, default=0.5, help="infobatch: probability of leaving out a well-learned row.")
@click.option("--below-mean", type=FRACTION, default=0.6, help="Share of rows with a loss below the mean; see advise.")
@click.option("--bandwidth", type=POSITIVE, default=10.0, help="Gigabytes a second that a rank sends.")
@click.option("--latency", type=NOT_NEGATIVE, default=20.0, help="Microseconds of a message.")
@click.option("--jitter", type=NOT_NEGATIVE, default=0.0, help="Deviation of a rank's seconds, by their mean.")
@click.option("--cores", type=COUNT, help="Cores that all ranks share.  [default: each has its own]")
@click.option("--seed", type=SEED, default=0, help="Seed of the draws.")
@click.option(
    "--out", type=click.Path(), help="Folder for simulation.json and report.html.  [default: none is written]"
)
def command(**options: Any) -> None:
    """Play a run on more ranks and samples than are at hand.

    Takes the seconds of one rank's step, measured or given, and says what memory, bytes, imbalance and time a step
    has for dense training, gates, unbiased pruning and past losses.
    """
    costs, batch_size = _costs(options)
    cluster = Cluster(1e9 * options["bandwidth"], 1e-6 * options["latency"], options["jitter"], options["cores"])
    numbers = {name: options[name] for name in ("parameters", "rate", "prune", "below_mean")}
    plans = [
        Plan(samples, ranks, batch_size, **numbers) for samples in options["samples"] for ranks in options["ranks"]
    ]
    folder = None if options["out"] is None else new_folder(options["out"], "simulate")
    results = [result for plan in plans for result in simulate(plan, costs, cluster, seed=options["seed"])]
    simulation = Simulation({**options, "batch_size": batch_size}, tuple(results))
    written = [] if folder is None else write_simulation(simulation, folder)
    click.echo(str(simulation))
    if written:
        click.echo(f"\nwritten: {', '.join(map(str, written))}")


def _costs(options: dict[str, Any]) -> tuple[StageCosts, int]:
    """Return the costs that the options name, and the rows of a batch."""
    given = [name for name in GIVEN if options[name] is not None]
    if options["costs"] is not None:
        if given:
            raise UserError(f"--costs holds measured seconds; give no --{given[0].replace('_', '-')} with it")
        costs, measured = read_costs(options["costs"])
        return costs, options["batch_size"] or measured
    needed = ("batch_size", "forward_ms", "backward_ms")
    if missing := [name for name in needed if options[name] is None]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise UserError(f"give --costs, or the seconds of a step; of these there is no {names}")
    seconds = {name[:-3]: 1e-3 * (options[name] or 0.0) for name in GIVEN}
    return StageCosts.from_step(options["batch_size"], **seconds), options["batch_size"]
