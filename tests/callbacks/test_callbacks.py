"""Callbacks of a run, as a stranger writes and gives them."""

import csv
import logging
import math
import os
import sys
import time

import fresh
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_training import Callback, SparseTrainer, UserError
from sparse_training.callbacks import BestModel, CsvLogger, EarlyStopping, KeepLast, ProgressLine, TensorBoard


def data(rows=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 8, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def loader(**options):
    return DataLoader(data(), batch_size=16, shuffle=True, **options)


def make(policy="dense", **options):
    torch.manual_seed(0)
    return SparseTrainer(nn.Linear(8, 2), policy=policy, lr=0.05, **options)


class Events(Callback):
    def __init__(self):
        self.seen = []

    def on_fit_start(self, run):
        self.seen.append(("start", run.log.steps))

    def on_step_end(self, run):
        self.seen.append(("step", run.status.step))
        assert math.isfinite(float(run.status.loss))

    def on_evaluation_end(self, run):
        self.seen.append(("evaluation", run.status.step))
        assert set(run.status.evaluation) == {"accuracy", "loss", "seconds", "step"}

    def on_checkpoint_saved(self, run):
        self.seen.append(("checkpoint", run.log.steps))
        assert run.checkpoint.is_file()

    def on_fit_end(self, run):
        self.seen.append(("end", run.log.steps))

    def on_exception(self, run, error):
        self.seen.append((type(error).__name__, run.log.steps))


def test_events_come_in_order(tmp_path):
    events = Events()
    make().fit(
        loader(), steps=4, evaluate=loader(), evaluations=2, checkpoint=tmp_path, checkpoint_interval=2,
        callbacks=[events],
    )  # fmt: skip
    assert events.seen == [
        ("start", 0), ("step", 1), ("evaluation", 2), ("step", 2), ("checkpoint", 2), ("step", 3), ("evaluation", 4),
        ("step", 4), ("checkpoint", 4), ("end", 4),
    ]  # fmt: skip


class Raises(Callback):
    def __init__(self, event, at=0):
        self.at = at
        setattr(self, event, self.fail)

    def fail(self, run, *error):
        if run.log.steps >= self.at:
            raise RuntimeError("mine")


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluation_end", "on_checkpoint_saved"])
def test_a_callback_that_raises_ends_the_run_and_its_checkpoint_goes_on(tmp_path, event):
    options = {"steps": 8, "evaluate": loader(), "evaluations": 4}
    whole = make()
    whole.fit(loader(generator=torch.Generator().manual_seed(1)), **options)
    events = Events()
    with pytest.raises(RuntimeError, match="mine"):
        make().fit(
            loader(generator=torch.Generator().manual_seed(1)), checkpoint=tmp_path, checkpoint_interval=2,
            callbacks=[Raises(event, at=6), events], **options,
        )  # fmt: skip
    assert events.seen[-1][0] == "RuntimeError"
    again = make()
    log = again.fit(
        loader(generator=torch.Generator().manual_seed(1)),
        checkpoint=tmp_path,
        checkpoint_interval=2,
        resume=True,
        **options,
    )
    assert log.steps == 8
    torch.testing.assert_close(again.model.weight, whole.model.weight, rtol=0, atol=0)


def test_an_exception_reaches_every_callback_even_where_one_raises_again():
    events = Events()
    broken = Raises("on_exception")
    with pytest.raises(RuntimeError, match="mine"):
        make().fit(loader(), steps=3, callbacks=[Raises("on_step_end"), broken, events])
    assert events.seen[-1] == ("RuntimeError", 1)


def test_ctrl_c_is_told():
    class Interrupts(Callback):
        def on_step_end(self, run):
            raise KeyboardInterrupt

    events = Events()
    with pytest.raises(KeyboardInterrupt):
        make().fit(loader(), steps=3, callbacks=[Interrupts(), events])
    assert events.seen == [("start", 0), ("KeyboardInterrupt", 1)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"callbacks": [Events]}, "`callbacks` must be objects .* of Callback, got Events; make it: Events"),
        ({"callbacks": [print]}, "`callbacks` must be objects of subclasses of Callback, got print"),
        ({"progress": 3}, "`progress` must be True, False or a function of the status; .*got int"),
        ({"callbacks": [EarlyStopping()]}, "EarlyStopping needs evaluations: give `evaluate` to fit"),
        ({"callbacks": [BestModel("best.pt")]}, "BestModel needs evaluations"),
        ({"callbacks": [KeepLast(2)]}, "KeepLast needs checkpoints: give `checkpoint` to fit"),
    ],
)
def test_what_cannot_serve_is_refused_before_a_step(given, message):
    trainer = make()
    before = trainer.model.weight.clone()
    with pytest.raises(UserError, match=message):
        trainer.fit(loader(), steps=3, **given)
    assert torch.equal(trainer.model.weight, before)


def test_numbers_out_of_range_are_refused():
    for make_one, message in (
        (lambda: EarlyStopping(patience=0), r"`patience` must be an integer of at least 1, got 0"),
        (lambda: EarlyStopping(patience=True), "got True"),
        (lambda: EarlyStopping("score"), r"\(`mode`\) must be min or max, where 'score' does not tell it, got None"),
        (lambda: EarlyStopping(mode="up"), "got 'up'"),
        (lambda: EarlyStopping(min_delta=-1), "`min_delta`"),
        (lambda: KeepLast(0), "`count`"),
        (lambda: CsvLogger("x.csv", interval=0), r"`interval` must be an integer of at least 1, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            make_one()


class Scripted:
    """Evaluates to given numbers, one after another."""

    def __init__(self, *values):
        self.values, self.calls = values, 0

    def __call__(self, model):
        self.calls += 1
        return {"loss": self.values[min(self.calls, len(self.values)) - 1]}


def test_early_stopping_ends_the_run_and_says_why(caplog):
    caplog.set_level(logging.INFO, "sparse_training")
    evaluate = Scripted(3.0, 2.0, 2.5, float("nan"), 1.0)
    log = make().fit(loader(), steps=40, evaluate=evaluate, evaluations=10, callbacks=[EarlyStopping(patience=2)])
    assert (log.steps, evaluate.calls, log.interrupted) == (16, 4, False)
    assert log.stopped == "loss was best at step 8, 2, and not better in 2 evaluations since"
    assert log.to_dict()["stopped"] == log.stopped
    assert any(log.stopped in message for message in caplog.messages)


def test_early_stopping_goes_on_counting_after_a_resume(tmp_path):
    options = {"steps": 40, "evaluations": 10, "checkpoint": tmp_path}
    asked = iter(range(100))
    values = (3.0, 2.0, 2.5, 2.4, 2.3)
    first = make().fit(
        loader(), evaluate=Scripted(*values), stop=lambda: next(asked) == 12,
        callbacks=[EarlyStopping(patience=3)], **options,
    )  # fmt: skip
    assert first.interrupted
    rest = Scripted(*values[3:])
    log = make().fit(loader(), evaluate=rest, resume=True, callbacks=[EarlyStopping(patience=3)], **options)
    assert (log.steps, rest.calls) == (20, 2)
    # It ended: resumed once more, it ends at once; without the callback it goes on.
    log = make().fit(loader(), evaluate=rest, resume=True, callbacks=[EarlyStopping(patience=3)], **options)
    assert (log.steps, rest.calls) == (20, 2)
    assert log.stopped is not None
    log = make().fit(loader(), evaluate=rest, resume=True, **options)
    assert (log.steps, log.stopped) == (40, None)


def test_a_stop_at_a_step_is_evaluated_and_checkpointed(tmp_path):
    class StopsAt5(Callback):
        def on_step_end(self, run):
            if run.status.step == 5:
                run.stop("five is enough")

    events = Events()
    log = make().fit(
        loader(), steps=40, evaluate=loader(), evaluations=2, checkpoint=tmp_path, callbacks=[StopsAt5(), events]
    )
    assert (log.steps, log.stopped, log.evals[-1]["step"]) == (5, "five is enough", 5)
    assert events.seen[-3:] == [("evaluation", 5), ("checkpoint", 5), ("end", 5)]


def test_the_best_model_is_kept_and_restored(tmp_path):
    states = []

    class Remember(Callback):
        def on_evaluation_end(self, run):
            states.append(run.trainer.model.weight.detach().clone())

    trainer, best = make(), BestModel(tmp_path / "best.pt", restore=True)
    trainer.fit(
        loader(), steps=12, evaluate=Scripted(3.0, 1.0, 2.0), evaluations=3, callbacks=[best, Remember()],
        checkpoint=tmp_path,
    )  # fmt: skip
    assert (best.best, best.step) == (1.0, 8)
    kept = torch.load(tmp_path / "best.pt", weights_only=True)
    assert torch.equal(kept["weight"], states[1])
    assert torch.equal(trainer.model.weight, states[1])
    resumed = make()  # the checkpoint holds the run's end
    resumed.fit(loader(), steps=12, checkpoint=tmp_path, resume=True, evaluate=Scripted(3.0), evaluations=3)
    assert torch.equal(resumed.model.weight, states[2])


def test_the_name_of_the_number_is_checked_at_the_first_evaluation(tmp_path):
    with pytest.raises(UserError, match=r"BestModel\(`monitor`\) must be one of accuracy, loss, got 'f1'"):
        make().fit(loader(), steps=4, evaluate=loader(), callbacks=[BestModel(tmp_path / "best.pt", "f1")])


def test_the_last_checkpoints_are_kept_and_each_can_be_gone_on_from(tmp_path):
    whole = make()
    whole.fit(loader(), steps=10, checkpoint=tmp_path / "run", checkpoint_interval=2, callbacks=[KeepLast(3)])
    assert sorted(os.listdir(tmp_path / "run")) == [
        "checkpoint-10.pt", "checkpoint-6.pt", "checkpoint-8.pt", "checkpoint.pt", "checkpoint.pt.prev",
    ]  # fmt: skip
    (tmp_path / "again").mkdir()
    (tmp_path / "run" / "checkpoint-6.pt").rename(tmp_path / "again" / "checkpoint.pt")
    again = make()
    assert again.fit(loader(), steps=10, checkpoint=tmp_path / "again", resume=True).steps == 10
    assert torch.equal(again.model.weight, whole.model.weight)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_for_each_step_that_is_due(tmp_path):
    path = tmp_path / "logs" / "run.csv"
    make("gate", rate=0.5).fit(
        loader(), steps=12, evaluate=loader(), evaluations=2, callbacks=[CsvLogger(path, interval=5)]
    )
    rows = rows_of(path)
    assert [int(row["step"]) for row in rows] == [5, 6, 10, 12]
    assert [row["eval/accuracy"] != "" for row in rows] == [False, True, False, True]
    assert all(0 < float(row["train/loss"]) < 3 for row in rows)
    assert [row["gate/rate"] != "" for row in rows] == [True, True, True, False]  # the end is dense
    rates = [float(row["train/learning_rate"]) for row in rows]
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_csv_of_a_resumed_run_is_that_of_the_whole_run(tmp_path):
    def fit(folder, path, stop=None, **options):
        make().fit(
            loader(), steps=20, checkpoint=folder, checkpoint_interval=6, stop=stop,
            callbacks=[CsvLogger(path, interval=2), *options.pop("callbacks", [])], **options,
        )  # fmt: skip

    torch.manual_seed(3)
    fit(tmp_path / "a", tmp_path / "a.csv")
    torch.manual_seed(3)
    with pytest.raises(RuntimeError, match="mine"):
        fit(tmp_path / "b", tmp_path / "b.csv", callbacks=[Raises("on_step_end", at=11)])
    assert int(rows_of(tmp_path / "b.csv")[-1]["step"]) == 10
    fit(tmp_path / "b", tmp_path / "b.csv", resume=True)
    whole, resumed = ([{**row, "clock/seconds": ""} for row in rows_of(tmp_path / f"{name}.csv")] for name in "ab")
    assert resumed == whole


def test_tensorboard_draws_steps_taken_again_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def fit(**options):
        callbacks = [TensorBoard(tmp_path / "board", interval=2), *options.pop("callbacks", [])]
        make().fit(loader(), steps=12, checkpoint=tmp_path, checkpoint_interval=4, callbacks=callbacks, **options)

    with pytest.raises(RuntimeError, match="mine"):
        fit(callbacks=[Raises("on_step_end", at=7)])
    fit(resume=True)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]
    assert {"train/loss", "train/learning_rate"} <= set(events.Tags()["scalars"])


def test_weights_and_biases_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    from sparse_training.callbacks import WeightsAndBiases

    with pytest.raises(UserError, match="pip install wandb"):
        WeightsAndBiases(project="mine")


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    from sparse_training.callbacks import WeightsAndBiases

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    board = WeightsAndBiases(project="mine", interval=2, dir=str(tmp_path), config={"note": "kept"})
    written = []
    init = board._init

    def watched(**arguments):
        run = init(**arguments)
        log = run.log
        run.log = lambda values, step: (written.append((step, values)), log(values, step=step))
        written.append(arguments["config"])
        return run

    board._init = watched
    make().fit(loader(), steps=4, evaluate=loader(), evaluations=1, callbacks=[board])
    config, *rows = written
    assert config["policy"] == "dense"
    assert config["note"] == "kept"
    assert [step for step, _ in rows] == [2, 4]
    assert {"train/loss", "train/learning_rate", "eval/accuracy"} <= set(rows[-1][1])
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = folder.glob("*.wandb")
    end = time.monotonic() + 60.0
    while b"train/learning_rate" not in record.read_bytes():  # written by a process of wandb's own
        assert time.monotonic() < end, f"{record} holds {record.stat().st_size} bytes"
        time.sleep(0.1)


def test_messages_are_logged_and_warnings_are_seen_without_a_word():
    code = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from sparse_training import SparseTrainer
{setup}
x = torch.randn(64, 8); x[3] = float("nan")
loader = DataLoader(TensorDataset(x, torch.zeros(64).long()), batch_size=16)
SparseTrainer(nn.Linear(8, 2), policy="dense").fit(loader, epochs=1, evaluate=loader, evaluations=1)
"""

    def said(setup):
        done = fresh.run("-c", code.format(setup=setup))
        assert done.returncode == 0, done.stderr
        return done.stderr.splitlines()

    assert said("") == ["1 batch of 4 had a loss that is not finite and were not learned from"]
    lines = said("import logging; logging.basicConfig(level='INFO', format='%(name)s %(message)s')")
    assert lines[0] == "sparse_training training begins: 4 steps, policy dense, on cpu"
    assert lines[1].startswith("sparse_training step 4: accuracy ")
    assert lines[2].startswith("sparse_training training ended after 4 steps, ")
    assert lines[2].endswith(" s, 64 of 64 rows trained on")
    assert len(lines) == 4


class Terminal:
    def __init__(self, terminal=True):
        self.text, self.terminal = "", terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self.terminal


def test_a_terminal_sees_a_progress_line_by_default(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    make().fit(loader(), steps=6, evaluate=loader(), evaluations=2)
    last = terminal.text.split("\r")[-1]
    assert last.startswith("100% [####################]  step 6  0:0")
    assert "loss 0." in last
    assert "accuracy " in last
    assert last.endswith("\n")
    for options, stream in (({"progress": False}, Terminal()), ({}, Terminal(terminal=False))):
        monkeypatch.setattr(sys, "stderr", stream)
        make().fit(loader(), steps=2, **options)
        assert stream.text == ""


def test_the_line_shows_what_the_run_does_beside_training(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.warns(UserWarning, match="every row is trained on"):
        SparseTrainer(nn.Linear(8, 2)).fit([(torch.randn(4, 8), torch.zeros(4).long())], steps=2)
    assert "every row is trained on, because " in terminal.text.split("\r")[-1]


def test_a_terminal_that_is_gone_ends_no_run():
    class Gone(Terminal):
        def write(self, text):
            raise BrokenPipeError

    assert make().fit(loader(), steps=2, callbacks=[ProgressLine(Gone())]).steps == 2


def extended(folder, first, then, **options):
    def trainer():
        torch.manual_seed(0)
        model = nn.Linear(8, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        if "schedule" in options:
            return SparseTrainer(model, policy="dense", schedule=options["schedule"])
        return SparseTrainer(model, policy="dense", optimizer=optimizer, schedule=schedule)

    def fit(budget, **more):
        made = trainer()
        log = made.fit(loader(), **budget, evaluate=loader(), evaluations=4, **more)
        return made.model.weight.detach().clone(), log

    torch.manual_seed(5)
    fit(first, checkpoint=folder)
    ended = fit(then, checkpoint=folder, resume=True)
    torch.manual_seed(5)
    return ended, fit(then)


def test_a_finished_run_is_extended_exactly_where_the_schedule_allows(tmp_path):
    (weights, log), (wanted, whole) = extended(tmp_path, {"epochs": 2}, {"epochs": 4})
    assert log.steps == whole.steps == 16
    assert torch.equal(weights, wanted)
    assert log.warnings == []
    assert [point["step"] for point in log.evals] == [2, 4, 6, 8, 12, 16]


def test_an_extension_says_where_it_is_not_the_longer_run(tmp_path):
    (_, log), _ = extended(tmp_path, {"steps": 4}, {"steps": 8}, schedule="cosine")
    assert log.steps == 8
    assert log.warnings == [
        "the run was extended from 4 to 8 steps: its beginning followed the schedule of the shorter run, so the whole "
        "differs from a run of this length"
    ]


def test_a_shorter_budget_or_another_kind_is_refused(tmp_path):
    make().fit(loader(), steps=4, checkpoint=tmp_path)
    for budget in ({"steps": 3}, {"rows": 640}):
        with pytest.raises(UserError, match=r"budget 4 steps is now"):
            make().fit(loader(), **budget, checkpoint=tmp_path, resume=True)
