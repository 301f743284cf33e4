"""Edges of a run that mutation testing found untested: what callbacks see, budgets, extension, notes and refusals."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from trainer_parts import ROWS, network, resident, same, shuffled_stream, weights

from sparse_training.callbacks import Callback
from sparse_training.criterion import Criterion
from sparse_training.data.stream import StreamLoader
from sparse_training.errors import UserError
from sparse_training.trainer import SparseTrainer
from sparse_training.training.settings import TrainerSettings


class Recorder(Callback):
    def __init__(self):
        self.steps, self.progress, self.saved, self.evaluations = None, [], 0, []

    def on_fit_start(self, run):
        self.steps = run.steps

    def on_step_end(self, run):
        self.progress.append(run.status.progress)

    def on_checkpoint_saved(self, run):
        self.saved += 1

    def on_evaluation_end(self, run):
        self.evaluations.append(run.status.evaluation)


def dense(**options):
    return SparseTrainer(network(), policy="dense", **options)


@pytest.mark.parametrize(
    ("budget", "steps", "progress"),
    [
        ({"epochs": 2}, 6, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0]),
        ({"steps": 4}, 4, [0.25, 0.5, 0.75, 1.0]),
        ({"rows": 2 * ROWS}, None, [16 / 88, 32 / 88, 44 / 88, 60 / 88, 76 / 88, 1.0]),
    ],
)
def test_a_callback_sees_the_length_and_the_progress_of_a_run(budget, steps, progress):
    recorder = Recorder()
    dense().fit(resident(), **budget, callbacks=[recorder], progress=False)
    assert recorder.steps == steps
    assert recorder.progress == pytest.approx(progress)


def test_a_checkpoint_is_told_of_where_there_is_one(tmp_path):
    with_folder, without = Recorder(), Recorder()
    options = {"steps": 4, "progress": False}
    dense().fit(resident(), checkpoint=tmp_path, checkpoint_interval=2, callbacks=[with_folder], **options)
    dense().fit(resident(), callbacks=[without], **options)
    assert (with_folder.saved, without.saved) == (2, 0)


def test_an_evaluation_names_its_step_and_its_second():
    recorder = Recorder()
    log = dense().fit(
        resident(), steps=4, evaluate=lambda model: {"answer": 42}, evaluations=2, callbacks=[recorder], progress=False
    )
    assert [(one["step"], one["answer"]) for one in log.evals] == [(2, 42.0), (4, 42.0)]
    assert all(set(one) == {"step", "seconds", "answer"} for one in log.evals)
    assert recorder.evaluations == log.evals


def test_a_run_of_seconds_ends_by_its_clock():
    class Ticks:
        costs, seconds, raw_seconds = None, 0.0, 0.0

        def start(self):
            pass

        def stop(self, device):
            pass

        def charge(self, *arguments, **named):
            self.seconds += 0.5

        def state_dict(self):
            return {}

    assert dense().fit(resident(), seconds=3.0, clock=Ticks(), progress=False).steps == 6


@pytest.mark.parametrize(
    ("first", "then", "options", "warned"),
    [
        ({"steps": 4}, {"steps": 8}, {}, False),
        ({"steps": 3}, {"steps": 6}, {"settings": TrainerSettings(accumulate=2)}, True),
        ({"steps": 4}, {"steps": 8}, {"schedule": "cosine"}, True),
    ],
)
def test_an_extended_run_warns_where_it_differs_from_a_whole_one(tmp_path, first, then, options, warned):
    options = {"schedule": "constant", "lr_warmup": 0.0} | options
    dense(**options).fit(resident(), **first, checkpoint=tmp_path, progress=False)
    log = dense(**options).fit(resident(), **then, checkpoint=tmp_path, resume=True, progress=False)
    assert log.steps == then["steps"]
    assert any("was extended from" in warning for warning in log.warnings) == warned


@pytest.mark.parametrize("kind", ["epochs", "steps", "rows", "seconds"])
def test_a_budget_is_finite(kind):
    with pytest.raises(UserError, match=rf"`{kind}` must be above 0 and finite, got inf"):
        dense().fit(resident(), **{kind: float("inf")})


def test_epochs_of_a_stream_are_refused():
    stream = [(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(UserError, match=r"`epochs` needs training data with a length; use steps= or seconds="):
        dense().fit(iter(stream), epochs=1)


def test_a_run_on_every_row_says_why_in_its_log():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TensorDataset(*next(iter(DataLoader(shuffled_stream().dataset, batch_size=ROWS)))))

    trainer = SparseTrainer(network())
    with pytest.warns(UserWarning, match="every row is trained on, because"):
        log = trainer.fit(DataLoader(Stream(), batch_size=16), steps=3, progress=False)
    assert [note for note in log.notes if note.startswith("every row is trained on, because")] == log.notes
    assert len(log.notes) == 1


def test_a_cost_budget_goes_on_where_it_was(tmp_path):
    def run(folder, **options):
        model = network()
        torch.manual_seed(3)
        trainer = SparseTrainer(model, policy="random", rate=0.5, dense_start=0.0, dense_end=0.0)
        log = trainer.fit(
            resident(), steps=12, cost_budget=(4e6, "flops"), checkpoint=folder, progress=False, **options
        )
        return weights(model), log

    taken = []
    whole, log = run(tmp_path / "whole")
    run(tmp_path / "part", stop=lambda: taken.append(None) or len(taken) >= 5)
    again, resumed = run(tmp_path / "part", resume=True)
    same(again, whole)
    assert resumed.kept == log.kept


class Named(nn.Module):
    """Returns its logits among other outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, inputs):
        return {"hidden": inputs, "scores": self.layer(inputs)}


@pytest.mark.parametrize("policy", ["dense", "gate"])
def test_tokens_of_a_model_with_several_outputs(policy):
    torch.manual_seed(0)
    inputs, targets = torch.randn(8, 3, 6), torch.randint(0, 5, (8, 3))
    model = Named()
    before = weights(model)
    loss = Criterion(nn.CrossEntropyLoss(reduction="none"), granularity="token", outputs=lambda found: found["scores"])
    trainer = SparseTrainer(model, loss=loss, policy=policy, **({"rate": 0.5} if policy == "gate" else {}))
    log = trainer.fit(DataLoader(TensorDataset(inputs, targets), batch_size=4), steps=2, progress=False)
    assert log.steps == 2
    assert all((before[name] != value).any() for name, value in weights(model).items())


def test_a_gate_scores_the_output_that_the_criterion_names():
    torch.manual_seed(0)
    inputs, targets = torch.randn(8, 6), torch.randint(0, 5, (8,))
    loss = Criterion(nn.CrossEntropyLoss(reduction="none"), outputs=lambda found: found["scores"])
    trainer = SparseTrainer(Named(), loss=loss, policy="gate", rate=0.5, dense_start=0.0, dense_end=0.0)
    log = trainer.fit(DataLoader(TensorDataset(inputs, targets), batch_size=4), steps=4, progress=False)
    assert log.offered == 16
    assert 0 < log.kept <= 16


def test_data_whose_rows_have_no_numbers_are_refused_by_their_kind():
    class Own(StreamLoader):
        pass

    with pytest.raises(UserError, match="asks for rows by their number, and a Own does not number its rows; use data"):
        SparseTrainer(network(), policy="infobatch").fit(Own(shuffled_stream(), device=torch.device("cpu")), steps=1)


def test_tokens_are_not_timed_by_a_calibrated_clock():
    loss = Criterion(nn.CrossEntropyLoss(reduction="none"), granularity="token", outputs=lambda found: found["scores"])
    data = DataLoader(TensorDataset(torch.randn(8, 3, 6), torch.randint(0, 5, (8, 3))), batch_size=4)
    with pytest.raises(UserError, match=r'a calibrated clock cannot be used with granularity="token"; use Clock\(\)'):
        SparseTrainer(Named(), loss=loss, policy="dense").fit(data, steps=1, clock=SimpleNamespace(costs={}))


def test_the_meter_that_was_given_is_read_but_for_evaluation():
    class Meter:
        source, running = "a meter of mine", 0

        def start(self):
            self.running += 1

        def stop(self):
            self.running -= 1
            return 2.0

    meter = Meter()
    log = dense().fit(
        resident(),
        steps=4,
        meter=meter,
        evaluate=lambda model: {"running": meter.running},
        evaluations=2,
        progress=False,
    )
    assert log.meter == "a meter of mine"
    assert log.joules == 6.0  # to the first evaluation, to the second, and after it
    assert [one["running"] for one in log.evals] == [0.0, 0.0]
