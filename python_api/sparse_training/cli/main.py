"""The command line: ``sparse-train train | compare | study | ceilings | resume | report``.

What a user got wrong is one line on stderr and exit code 2, before anything is written. SIGINT and
SIGTERM end a run at a step, with what is needed to resume it on disk, and exit with 128 + the signal.
"""

from __future__ import annotations

import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import sparse_kernels
from sparse_training import devices, files
from sparse_training.data.load import DATASETS, load_data
from sparse_training.data.resident import ResidentLoader
from sparse_training.errors import UserError
from sparse_training.experiments import compare as comparison
from sparse_training.experiments import study as studies
from sparse_training.experiments.store import CALIBRATION
from sparse_training.experiments.tasks import TASKS
from sparse_training.memory import keep_freed_memory
from sparse_training.models.build import MODELS, build_model
from sparse_training.precision import PRECISIONS
from sparse_training.profiling.speedup import speedup_bounds
from sparse_training.ranks import connect, launched, rank_seed
from sparse_training.reporting.report import load_result, print_table, write_report
from sparse_training.reporting.speedup import print_speedup_bounds
from sparse_training.reporting.study_report import PAGE, load_study, print_calibration, print_study, write_study
from sparse_training.selection.registry import FORMS as SCORER_FORMS
from sparse_training.selection.registry import POLICIES, make_policy, make_scorer, uses_rate
from sparse_training.trainer import SparseTrainer
from sparse_training.training.log import Status
from sparse_training.training.schedule import SHAPES
from sparse_training.training.settings import TrainerSettings
from sparse_training.training.state import CHECKPOINT
from sparse_training.training.tensorboard import TensorBoard

BUDGETS = ("epochs", "steps", "rows", "seconds")
OPTIONS, MODEL, RESULT, BOARD = "options.json", "model.pt", "result.json", "tensorboard"
FORMER_OPTIONS = {"warmup": "dense_start", "anneal": "dense_end"}  # in options.json of version 0.1.0


class _Positive(click.FloatRange):
    """A finite number above 0; click's own range lets NaN through."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        number = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value}: wanted a finite number", parameter, context)
        return number


POSITIVE = _Positive(min=0, min_open=True)
FRACTION = click.FloatRange(0, 1)
COUNT = click.IntRange(min=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _signals() as signals:
            cli.main(argv, prog_name="sparse-train", standalone_mode=False, obj=_Context(argv, signals))
            return 128 + signals.received if signals.received else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        message = error.format_message()
    except (UserError, sparse_kernels.BackendUnavailable, ImportError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
    except (click.Abort, KeyboardInterrupt):
        return 128 + (signals.received or signal.SIGINT)
    rank, ranks = launched()
    whose = f"rank {rank}: " if ranks > 1 else ""
    print(f"error: {whose}{' '.join(message.split())}", file=sys.stderr)
    return 2


class _Signals:
    """The signal that asked for an end, 0 before one did; a second one ends at once."""

    def __init__(self) -> None:
        self.received = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number

    def stop(self) -> bool:
        return self.received != 0


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    try:
        before = {number: signal.signal(number, signals.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone may handle signals
        before = {}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Context:
    """What every command is given: how it was called, and whether it should stop."""

    def __init__(self, argv: list[str], signals: _Signals) -> None:
        self.command = shlex.join(["sparse-train", *argv])
        self.signals = signals


def _numbers(context: click.Context, parameter: click.Parameter, text: str) -> list[int]:
    """ "3" is the seeds 0, 1, 2; "4,7" and "4," are those seeds."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if "," not in text and found:
        found = list(range(found[0]))
    if not found or min(found) < 0 or len(set(found)) != len(found):
        raise click.BadParameter(f"{text!r}: wanted how many, such as 3, or which, such as 0,1,2")
    return found


def _policy(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """A policy's name, or policy@scorer."""
    try:
        if text is not None:
            make_policy(text, rate=1.0, seed=0)
    except UserError as error:
        raise click.BadParameter(str(error)) from None
    return text


def _scorer(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    try:
        if text is not None:
            make_scorer(text)
    except UserError as error:
        raise click.BadParameter(str(error)) from None
    return text


def _names(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    for name in found:
        if name != studies.AGAIN or parameter.name != "arms":
            _policy(context, parameter, name)
    if len(set(found)) != len(found):
        raise click.BadParameter(f"{text!r}: wanted each policy once")
    return found


def _scorers(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    for name in found:
        _scorer(context, parameter, name)
    if len(set(found)) != len(found):
        raise click.BadParameter(f"{text!r}: wanted each scorer once")
    return found


def _tasks(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    if unknown := [name for name in found if name not in TASKS]:
        raise click.BadParameter(f"{unknown[0]!r}: wanted some of {', '.join(TASKS)}")
    if len(set(found)) != len(found):
        raise click.BadParameter(f"{text!r}: wanted each task once")
    return found


def _fractions(context: click.Context, parameter: click.Parameter, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0.0 < fraction <= 1.0 for fraction in found):
        raise click.BadParameter(f"{text!r}: wanted fractions above 0 and at most 1, such as 1,0.5")
    return list(dict.fromkeys(found))


ABOUT = (
    click.option("--data", type=click.Choice(DATASETS), default="digits", help="Data set."),
    click.option("--root", type=click.Path(), help="Folder of the data set."),
    click.option("--model", default="cnn-620k", help=f"{', '.join(MODELS)}, or module:factory."),
    click.option("--batch-size", type=COUNT, default=128),
    click.option("--device", default="cpu", help="A device of PyTorch's."),
    click.option("--threads", type=COUNT, help="CPU threads; PyTorch's choice by default."),
)
SHARED = (
    *ABOUT,
    click.option(
        "--rate",
        type=click.FloatRange(0, 1, min_open=True),
        default=0.1,
        help="Fraction of rows to keep.",
    ),
    click.option("--lr", type=POSITIVE, default=1e-3, help="Learning rate."),
    click.option(
        "--dense-start",
        type=FRACTION,
        default=0.05,
        help="Fraction of the run that is dense, at its start.",
    ),
    click.option(
        "--dense-end",
        type=FRACTION,
        default=0.125,
        help="Fraction of the run that is dense, at its end.",
    ),
    click.option(
        "--out",
        type=click.Path(),
        help="Folder of the run, new or empty.  [default: runs/<time>-<command>]",
    ),
)


PRECISION = click.option(
    "--precision", type=click.Choice(["auto", *PRECISIONS]), default="auto", help="Of the scoring pass."
)


def _with(*options: Callable[..., Any]) -> Callable[..., Any]:
    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return give


@click.group(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(sparse_kernels.__version__)
def cli() -> None:
    """Train on the rows that matter, and measure what that is worth."""


@cli.command()
@_with(*SHARED)
@PRECISION
@click.option(
    "--policy",
    callback=_policy,
    help=f"{', '.join(POLICIES)}, or policy@scorer.  [default: adaptive, or gate with a --scorer]",
)
@click.option("--scorer", callback=_scorer, help=f"What rows are judged by: {SCORER_FORMS}.  [default: policy's]")
@click.option("--epochs", type=POSITIVE, help="Budget; one of the four is wanted.")
@click.option("--steps", type=COUNT, help="Budget.")
@click.option("--rows", type=COUNT, help="Budget: gone through, trained on or not.")
@click.option("--seconds", type=POSITIVE, help="Budget, on the calibrated clock.")
@click.option("--schedule", type=click.Choice(SHAPES), default="cosine")
@click.option("--accumulate", type=COUNT, default=1, help="Batches an optimiser step.")
@click.option("--clip-norm", type=POSITIVE, help="Largest norm of the gradient.")
@click.option("--ema", type=FRACTION, help="Decay of an average of the weights, to be tested and kept.")
@click.option("--amp", type=click.Choice(list(PRECISIONS)), help="Of training.")
@click.option("--compile", is_flag=True, help="Compile the model.")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard's scalars into the run's folder.")
@click.option("--checkpoint-every", type=COUNT, help="Steps.  [default: at the end, and when stopped]")
@click.pass_obj
def train(context: _Context, /, out: str | None, **options: Any) -> None:
    """Train one model with one policy; on several processes by torchrun -m sparse_training train."""
    _train(context, _new_folder(out, "train"), {"command": "train", **options})


@cli.command()
@_with(*SHARED)
@PRECISION
@click.option(
    "--policies",
    default="dense,random,gate",
    callback=_names,
    help=f"Some of {', '.join(POLICIES)}, or policy@scorer, such as gate@early:3.",
)
@click.option("--seconds", type=POSITIVE, default=20.0, help="Of the calibrated clock, for each run.")
@click.option("--seeds", default="3", callback=_numbers, help="How many (3), or which (0,1,2).")
@click.option("--evaluations", type=COUNT, default=20, help="Times each run is tested, off the clock.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted comparison in --out.")
@click.pass_obj
def compare(context: _Context, /, out: str | None, resume: bool, **options: Any) -> None:
    """Train policies side by side at equal wall-clock."""
    if resume and out is None:
        raise UserError("--resume without --out: wanted the folder to go on with")
    resume = resume and out is not None and Path(out).exists()
    folder = Path(out) if resume and out is not None else _new_folder(out, "compare")
    _compare(context, folder, {"command": "compare", "line": context.command, **options}, resume)


@cli.command()
@_with(*SHARED)
@click.option("--tasks", default=",".join(TASKS), callback=_tasks, help="What is learned.")
@click.option(
    "--arms",
    default=",".join(studies.ARMS),
    callback=_names,
    help=f"Policies, and {studies.AGAIN}: random with other draws. random is always among them.",
)
@click.option("--seconds", type=POSITIVE, default=20.0, help="Of the calibrated clock, for each run.")
@click.option("--fractions", default="1", callback=_fractions, help="Of the seconds: 1,0.5 adds runs of half the time.")
@click.option("--seeds", default="3", callback=_numbers, help="How many (3), or which (0,1,2).")
@click.option("--evaluations", type=COUNT, default=8, help="Times a whole run is tested, off the clock.")
@click.option("--amp", type=click.Choice(["auto", *PRECISIONS]), default="auto", help="Of training and scoring.")
@click.option("--calibrate-only", is_flag=True, help="Time the arms' steps, which wants an idle machine, and end.")
@click.option(
    "--resume", is_flag=True, help="Go on in --out, by its calibration; with more tasks, arms or seeds, if asked."
)
@click.pass_obj
def study(context: _Context, /, out: str | None, resume: bool, calibrate_only: bool, **options: Any) -> None:
    """Compare policies with random on several tasks, at equal cost, pair by pair of seeds.

    --batch-size is rows trained a step: arms that keep a fraction r are offered batch size / r.
    """
    if resume and out is None:
        raise UserError("--resume without --out: wanted the folder to go on with")
    resume = resume and out is not None and Path(out).exists()
    folder = Path(out) if resume and out is not None else _new_folder(out, "study")
    options = {"command": "study", "line": context.command, **options}
    _study(context, folder, options, resume, calibrate_only)


@cli.command(name="ceilings")
@_with(*ABOUT, PRECISION)
@click.option("--scorers", default="self,early:2,proxy,history", callback=_scorers, help=f"Some of {SCORER_FORMS}.")
@click.option("--rates", default="0.1,0.3", callback=_fractions, help="Fractions of rows to keep.")
@click.pass_obj
def ceilings_(context: _Context, /, **options: Any) -> None:
    """What each scorer costs, and how fast that lets a step be; wants an idle machine.

    A gate asks each scorer; random, which asks none, stands beside them. Nothing is written.
    """
    _ceilings(context, options)


@cli.command()
@click.argument("folder", type=click.Path())
@click.pass_obj
def resume(context: _Context, folder: str) -> None:
    """Go on with what was interrupted in FOLDER."""
    options = {FORMER_OPTIONS.get(name, name): value for name, value in files.read_json(Path(folder) / OPTIONS).items()}
    if options.get("command") == "train":
        _train(context, Path(folder), options, resume=True)
    elif options.get("command") == "study":
        _study(context, Path(folder), options, resume=True)
    else:
        _compare(context, Path(folder), options, resume=True)


@cli.command()
@click.argument("folder", type=click.Path())
def report(folder: str) -> None:
    """Draw the comparison or the study in FOLDER again."""
    if (Path(folder) / studies.RESULT).exists():
        found = load_study(Path(folder) / studies.RESULT)
        print_study(found)
        write_study(found, folder)
        return
    result = load_result(Path(folder) / comparison.RESULT)
    print_table(result)
    write_report(result, folder)


def _train(context: _Context, folder: Path, options: dict[str, Any], resume: bool = False) -> None:
    budget: dict[str, Any] = {name: options.get(name) for name in BUDGETS}
    given = [name for name, amount in budget.items() if amount is not None]
    if len(given) != 1:
        raise UserError(
            f"{' and '.join(f'--{name}' for name in given) or 'no budget'}: "
            f"wanted one of {', '.join(f'--{name}' for name in BUDGETS)}"
        )
    connect()
    device = _prepare(options)
    data = load_data(options["data"], options["root"])
    seed = options["seed"]
    torch.manual_seed(seed)
    model = build_model(options["model"], shape=data.shape, classes=len(data.classes))
    policy = options.get("policy") or ("gate" if options.get("scorer") else "adaptive")
    names = ("policy", "scorer", "dense_start", "dense_end", "lr", "schedule", "seed")
    trainer = SparseTrainer(
        model,
        device=device,
        settings=TrainerSettings(
            accumulate=options.get("accumulate", 1),
            clip_norm=options.get("clip_norm"),
            ema=options.get("ema"),
            amp=options.get("amp"),
            scoring_precision=options.get("precision", "auto"),
            compile=options.get("compile", False),
        ),
        rate=options["rate"] if uses_rate(policy) else None,
        **{name: options[name] for name in names if name in options},
    )
    facts: dict[str, Any] = {"mean": data.mean, "std": data.std, "device": device}
    loader = ResidentLoader(data.train, batch_size=options["batch_size"], seed=seed, **facts)
    test = ResidentLoader(
        data.test,
        batch_size=min(comparison.EVALUATION_BATCH, -(-len(data.test) // trainer.ranks.size)),
        shuffle=False,
        **facts,
    )
    folder = trainer.ranks.all(folder)[0]  # the first one's, if named by the time
    first = trainer.ranks.rank == 0  # it alone writes and prints
    if first:
        _start(folder, options, resume)
    else:
        torch.manual_seed(rank_seed(seed, trainer.ranks.rank))
    board = TensorBoard(folder / BOARD, trainer.optimizer) if first and options.get("tensorboard") else None

    def tell(status: Status) -> None:
        if display is not None:
            display.update(options["policy"], seed, status)
        if board is not None:
            board(status)

    with _Display(total=1) if first else nullcontext() as display, board or nullcontext():
        history = trainer.fit(
            loader,
            **budget,
            evaluate=test,
            checkpoint=folder,
            checkpoint_interval=options["checkpoint_every"],
            resume=resume,
            progress=tell if first else None,
            stop=context.signals.stop,
        )
    if not first:
        return
    if history.interrupted:
        _say_resume(folder)
        return
    result = {
        "settings": options,
        "environment": comparison.environment(device),
        "run": history.to_dict(),
    }
    files.write_json(folder / RESULT, result)
    files.write_torch(folder / MODEL, trainer.update.evaluated.state_dict())
    final, rate = history.evals[-1], history.rate
    kept = "" if rate is None else f", {rate:.1%} of the rows kept in the sparse phase"
    print(
        f"accuracy {final['accuracy']:.2%} after {history.steps} steps, {history.seconds:.1f} s, "
        f"{int(history.rows_trained)} of {history.rows_seen} rows trained on{kept}"
    )
    joules = "no meter of joules" if history.joules is None else f"{history.joules:.1f} J measured ({history.meter})"
    print(f"{sum(history.operations.values()):.3g} FLOPs counted, {joules}")
    for warning in history.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"written: {folder / MODEL}, {folder / RESULT}, {folder / CHECKPOINT}")


def _compare(context: _Context, folder: Path, options: dict[str, Any], resume: bool = False) -> None:
    _alone("compare")
    device = _prepare(options)
    data = load_data(options["data"], options["root"])
    # What can be refused is refused here, before the folder is made.
    ResidentLoader(data.train, batch_size=options["batch_size"])
    build_model(options["model"], shape=data.shape, classes=len(data.classes))
    _start(folder, options, resume)
    done = len(list(folder.glob("runs/*.json")))
    runs = len(options["policies"]) * len(options["seeds"]) - done
    names = (
        "model",
        "policies",
        "rate",
        "seeds",
        "seconds",
        "batch_size",
        "lr",
        "dense_start",
        "dense_end",
        "precision",
        "evaluations",
    )
    try:
        with _Display(runs) as display:
            result = comparison.compare(
                data,
                device=device,
                folder=folder,
                resume=resume,
                command=options["line"],
                progress=display.update,
                stop=context.signals.stop,
                **{name: options[name] for name in names},
            )
    except comparison.Interrupted:
        _say_resume(folder)
        return
    write_report(result, folder)
    print_table(result)
    print(f"written: {', '.join(str(folder / name) for name in ('compare.json', 'compare.png', 'report.html'))}")


def _study(
    context: _Context, folder: Path, options: dict[str, Any], resume: bool, calibrate_only: bool = False
) -> None:
    _alone("study")
    device = _prepare(options)
    data = load_data(options["data"], options["root"])
    fixed = ("command", "line", "data", "root", "out", "device", "threads")
    given = {name: value for name, value in options.items() if name not in fixed}
    made = studies.Study(data, device=device, folder=folder, resume=resume, command=options["line"], **given)
    files.write_json(folder / OPTIONS, options)
    if calibrate_only:
        print_calibration(made.costs())
        print(f"written: {folder / CALIBRATION}; to go on: sparse-train resume {shlex.quote(str(folder))}")
        return
    missing = made.missing()
    print(f"{len(missing)} of {len(made.cells)} runs to do", file=sys.stderr)
    display = _StudyDisplay(missing)
    try:
        with display:
            made.run(progress=display.step, stop=context.signals.stop)
    except studies.Interrupted:
        if len(made.missing()) < len(made.cells):
            write_study(made.result(), folder)
        _say_resume(folder)
        return
    result = made.result()
    write_study(result, folder)
    print_study(result)
    print(f"written: {folder / studies.RESULT}, {folder / PAGE}")


def _ceilings(context: _Context, options: dict[str, Any]) -> None:
    _alone("ceilings")
    device = _prepare(options)
    data = load_data(options["data"], options["root"])
    torch.manual_seed(0)
    model = build_model(options["model"], shape=data.shape, classes=len(data.classes))
    trainer = SparseTrainer(
        model, policy="dense", device=device, settings=TrainerSettings(scoring_precision=options["precision"])
    )
    facts: dict[str, Any] = {"mean": data.mean, "std": data.std, "device": device}
    loader = ResidentLoader(data.train, batch_size=options["batch_size"], **facts)
    console = Console(stderr=True)
    with Progress(
        TextColumn("timing"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("timing", total=1.0)

        def tell(share: float) -> None:
            bar.update(task, completed=share)
            if context.signals.stop():
                raise KeyboardInterrupt

        policies = [*(f"gate@{scorer}" for scorer in options["scorers"]), "random"]
        found = speedup_bounds(trainer, loader, policies, options["rates"], progress=tell)
    print_speedup_bounds(found)


def _alone(command: str) -> None:
    if launched()[1] > 1:
        raise UserError(f"{command} on {launched()[1]} processes, which would time one another: wanted one")


def _prepare(options: dict[str, Any]) -> torch.device:
    """The device, with the threads set; whatever a name can get wrong is found here.

    Raises:
        UserError: no such device here, no such backend, or phases that leave nothing to gate.
    """
    keep_freed_memory()
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    sparse_kernels.compact(torch.ones(1, dtype=torch.bool))  # refuses a backend that is not there
    if options.get("dense_start", 0.0) + options.get("dense_end", 0.0) > 1.0:
        raise UserError(
            f"--dense-start {options['dense_start']} and --dense-end {options['dense_end']} add up to more than 1"
        )
    try:
        device = devices.find(options["device"])
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"device {options['device']!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _new_folder(out: str | None, command: str) -> Path:
    """The folder of a new run, not made yet.

    Raises:
        UserError: it exists and is not an empty folder.
    """
    folder = Path(out) if out is not None else Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{command}"
    # Of a run that was killed before it began nothing may be left but half a file of its options.
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {OPTIONS + ".tmp"}):
        raise UserError(f"{folder} exists and is not empty: wanted a new folder, or: sparse-train resume {folder}")
    return folder


def _start(folder: Path, options: dict[str, Any], resume: bool) -> None:
    """Make the folder of a run and write down how to repeat it."""
    if not resume:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / OPTIONS, options)


def _say_resume(folder: Path) -> None:
    print(f"stopped; to go on: sparse-train resume {shlex.quote(str(folder))}", file=sys.stderr)


class _Display:
    """Live on a terminal: arm, seed, accuracy so far, rate, time left. Plain lines otherwise."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.current: tuple[str, int] | None = None
        self.finished = 0
        self.last = -math.inf
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(12),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("calibrating", total=total)

    def __enter__(self) -> _Display:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def update(self, arm: str, seed: int, status: Status) -> None:
        """After a step of that arm and seed."""
        if self.current != (arm, seed):
            self.finished += self.current is not None
            self.current = (arm, seed)
        ended = status.progress >= 1.0
        if self.console.is_terminal:
            if ended or time.monotonic() - self.last > 0.1:
                self.last = time.monotonic()
                done = self.finished + min(status.progress, 1.0)
                said = "  ".join([f"{arm} seed {seed}", status.phase, *self.figures(status)])
                self.bar.update(self.task, completed=done, description=said)
        elif ended:
            steps = f"{status.step} steps in {status.seconds:.1f} s"
            print("  ".join([f"{arm} seed {seed}", steps, *self.figures(status)]), flush=True)

    def figures(self, status: Status) -> list[str]:
        found = [] if status.evaluation is None else [f"accuracy {status.evaluation['accuracy']:.1%}"]
        if (trace := status.policy.trace()) is not None:
            found.append(f"rate {float(trace[0]):.1%}")
        return found


class _StudyDisplay(_Display):
    """One bar for all runs of a study, and the time left; a line for each finished run where there is no terminal."""

    def __init__(self, cells: Sequence[studies.Cell]) -> None:
        self.share = {cell: cell.fraction for cell in cells}
        super().__init__(total=math.ceil(sum(self.share.values())))
        self.runs, self.done, self.spent = len(cells), 0, 0.0
        self.began = time.monotonic()

    def step(self, cell: studies.Cell, status: Status) -> None:
        """After a step of that run."""
        ended = status.progress >= 1.0
        share = self.share.get(cell, 0.0)  # 0 for the weights that runs start from
        spent = self.spent + share * min(status.progress, 1.0)
        if ended:
            self.done, self.spent = self.done + (cell in self.share), spent
        what = f"{cell.task} {cell.arm} seed {cell.seed}" + (f" x{cell.fraction:g}" if cell.fraction != 1.0 else "")
        if self.console.is_terminal:
            if ended or time.monotonic() - self.last > 0.1:
                self.last = time.monotonic()
                said = "  ".join([f"{self.done}/{self.runs}", what, status.phase, *self.figures(status)])
                self.bar.update(self.task, completed=spent, total=sum(self.share.values()), description=said)
        elif ended:
            elapsed = time.monotonic() - self.began
            left = elapsed * (sum(self.share.values()) / spent - 1.0) if spent else math.nan
            said = f"{self.done}/{self.runs}, {_duration(left)} left"
            print("  ".join([said, what, f"{status.step} steps", *self.figures(status)]), flush=True)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s"
