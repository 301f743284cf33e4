"""A run goes on with the loss and the policy that it began with, or says which differs."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_training import Criterion, Gate, Significance, SparseTrainer, TrainerSettings
from sparse_training.errors import UserError
from sparse_training.selection.policies.infobatch import InfoBatchPolicy
from sparse_training.training.run_settings import compare_settings, describe


def loader():
    generator = torch.Generator().manual_seed(0)
    inputs, classes = torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    return DataLoader(TensorDataset(inputs, classes), batch_size=16)


def stopped(folder, **options):
    torch.manual_seed(0)
    steps = iter((False, True))
    trainer = SparseTrainer(nn.Linear(8, 3), **options)
    assert trainer.fit(loader(), epochs=2, checkpoint=folder, stop=lambda: next(steps)).interrupted
    return trainer


def resumed(folder, **options):
    torch.manual_seed(0)
    return SparseTrainer(nn.Linear(8, 3), **options).fit(loader(), epochs=2, checkpoint=folder, resume=True)


def smoothed(logits, targets, smoothing):
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


WEIGHTS = torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("began", "now", "name"),
    [
        ({"policy": InfoBatchPolicy(prune=0.5)}, {"policy": InfoBatchPolicy(prune=0.3)}, "policy_options.*0.5.*0.3"),
        ({"policy": Gate(0.5)}, {"policy": Gate(0.5, floor=0.25)}, "policy_options.*floor"),
        (
            {"policy": Gate(0.5)},
            {"policy": Gate(0.5, significance=Significance(loss=1.0, entropy=0.0))},
            "policy_options.*significance",
        ),
        (
            {"loss": nn.CrossEntropyLoss(reduction="none")},
            {"loss": nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)},
            "label_smoothing': 0.0.*label_smoothing': 0.1",
        ),
        (
            {"loss": nn.CrossEntropyLoss(reduction="none", weight=WEIGHTS)},
            {"loss": nn.CrossEntropyLoss(reduction="none", weight=WEIGHTS + 1)},
            "'weight'",
        ),
        (
            {"loss": functools.partial(smoothed, smoothing=0.0)},
            {"loss": functools.partial(smoothed, smoothing=0.1)},
            "smoothed.*0.0.*smoothed.*0.1",
        ),
    ],
)
def test_another_loss_or_option_is_refused(tmp_path, began, now, name):
    stopped(tmp_path, **began)
    with pytest.raises(UserError, match=rf"other settings: .*{name}"):
        resumed(tmp_path, **now)
    assert not resumed(tmp_path, **began).interrupted


def sgd(**options):
    return functools.partial(torch.optim.SGD, **options)


def scheduled(make):
    """Options of a trainer whose optimizer has a scheduler; called anew for each run, as by a program."""

    def options():
        torch.manual_seed(0)
        model = nn.Linear(8, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return {"model": model, "optimizer": optimizer, "schedule": make(optimizer)}

    return options


def frozen(*names):
    def options():
        torch.manual_seed(0)
        model = nn.Linear(8, 3)
        for name in names:
            getattr(model, name).requires_grad_(False)
        return {"model": model}

    return options


def part_of(name):
    def options():
        torch.manual_seed(0)
        model = nn.Linear(8, 3)
        return {"model": model, "optimizer": torch.optim.SGD([getattr(model, name)], lr=0.1)}

    return options


SCHEDULERS = torch.optim.lr_scheduler
ROWS = [torch.randn(64, 8), torch.randint(0, 3, (64,))]


def a_run(folder, options, *, ends, resume):
    options = dict(options() if callable(options) else options)
    torch.manual_seed(0)
    options.setdefault("model", nn.Linear(8, 3))
    data = DataLoader(TensorDataset(*options.pop("rows", ROWS)), **{"batch_size": 16, **options.pop("data", {})})
    steps = iter([False, ends] + [False] * 6)
    trainer = SparseTrainer(options.pop("model"), **{"policy": "dense", **options})
    return trainer.fit(data, steps=8, checkpoint=folder, resume=resume, stop=lambda: next(steps), progress=False)


@pytest.mark.parametrize(
    ("began", "now", "said"),
    [
        ({"optimizer": sgd(momentum=0.9)}, {"optimizer": sgd(momentum=0.5)}, r"groups\[0\].momentum 0.9 is now 0.5"),
        (
            {"optimizer": functools.partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0.1)},
            {"optimizer": functools.partial(torch.optim.AdamW, betas=(0.5, 0.99), weight_decay=0.2)},
            "betas .0.9, 0.99. is now .0.5, 0.99.*weight_decay 0.1 is now 0.2",
        ),
        (part_of("weight"), part_of("bias"), "parameters weight is now bias"),
        (frozen(), frozen("bias"), "trainable weight and bias is now weight"),
        (
            scheduled(lambda optimizer: SCHEDULERS.StepLR(optimizer, 3, gamma=0.1)),
            scheduled(lambda optimizer: SCHEDULERS.StepLR(optimizer, 3, gamma=0.5)),
            "gamma 0.1 is now 0.5",
        ),
        (
            scheduled(lambda optimizer: SCHEDULERS.MultiStepLR(optimizer, [3, 5])),
            scheduled(lambda optimizer: SCHEDULERS.MultiStepLR(optimizer, [3, 6])),
            "5 is now 6",
        ),
        (
            scheduled(lambda optimizer: SCHEDULERS.LambdaLR(optimizer, lambda step: 0.9**step)),
            scheduled(lambda optimizer: SCHEDULERS.LambdaLR(optimizer, lambda step: 0.8**step)),
            "0.9 is now 0.8",
        ),
        (
            scheduled(lambda optimizer: SCHEDULERS.ChainedScheduler([SCHEDULERS.ConstantLR(optimizer, 0.5)])),
            scheduled(lambda optimizer: SCHEDULERS.ChainedScheduler([SCHEDULERS.ConstantLR(optimizer, 0.2)])),
            "factor 0.5 is now 0.2",
        ),
        (
            {"schedule": lambda progress: 1.0},
            {"schedule": lambda progress: 0.5},
            r"schedule_options\[0\] 1.0 is now 0.5, .* and 13 more",
        ),
        (
            {"loss": lambda logits, classes: F.cross_entropy(logits, classes, reduction="none")},
            {"loss": lambda logits, classes: 2 * F.cross_entropy(logits, classes, reduction="none")},
            "loss .*<lambda>",
        ),
        (
            {"loss": Criterion(outputs=lambda output: output)},
            {"loss": Criterion(outputs=lambda output: -output)},
            "criterion.outputs",
        ),
        (
            {"settings": TrainerSettings(targets=lambda batch: batch[1])},
            {"settings": TrainerSettings(targets=lambda batch: 2 - batch[1])},
            "batch.targets",
        ),
        ({"rows": ROWS}, {"rows": [part[:60] for part in ROWS]}, "data_rows 64 is now 60"),
        ({"data": {"batch_size": 13}}, {"data": {"batch_size": 14}}, "data.batch_size 13 is now 14"),
        ({"data": {}}, {"data": {"shuffle": True}}, "data.sampler SequentialSampler is now RandomSampler"),
        ({"data": {}}, {"data": {"drop_last": True}}, "data.drop_last False is now True"),
        (
            {},
            lambda: {"model": nn.Linear(8, 3).bfloat16(), "rows": [ROWS[0].bfloat16(), ROWS[1]]},
            "32 is now .*bfloat16",
        ),
    ],
)
def test_what_decides_a_run_must_agree(tmp_path, began, now, said):
    """The first of the two would otherwise go on in silence, or the second with the first one's numbers."""
    assert a_run(tmp_path, began, ends=True, resume=False).interrupted
    with pytest.raises(UserError, match=said):
        a_run(tmp_path, now, ends=False, resume=True)
    assert a_run(tmp_path, began, ends=False, resume=True).steps == 8


def test_how_a_run_is_computed_may_differ(tmp_path):
    began = {"optimizer": functools.partial(torch.optim.AdamW, foreach=True)}
    assert a_run(tmp_path, began, ends=True, resume=False).interrupted
    now = {"optimizer": functools.partial(torch.optim.AdamW, fused=True), "data": {"num_workers": 1}}
    assert a_run(tmp_path, now, ends=False, resume=True).steps == 8


def test_a_scheduler_that_knows_few_steps_is_described_by_those(tmp_path):
    factors = [1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1]
    options = scheduled(lambda optimizer: SCHEDULERS.LambdaLR(optimizer, lambda step: factors[step]))
    assert a_run(tmp_path, options, ends=True, resume=False).interrupted
    assert a_run(tmp_path, options, ends=False, resume=True).steps == 8


@pytest.mark.parametrize(
    ("was", "now", "differs"),
    [
        ("f.<lambda> cpython-310 0123abcd", "f.<lambda> cpython-311 4567abcd", False),
        ("f.<lambda>", "f.<lambda> cpython-311 4567abcd", False),
        ("f.<lambda> cpython-311 0123abcd", "f.<lambda> cpython-311 4567abcd", True),
        ("g.<lambda> cpython-310 0123abcd", "f.<lambda> cpython-311 4567abcd", True),
    ],
)
def test_another_python_has_other_code_for_a_function_without_a_name(was, now, differs):
    settings = {"rate": None, "loss": now}
    with pytest.raises(UserError, match="loss") if differs else contextlib.nullcontext():
        compare_settings({"rate": None, "loss": was}, settings)


def test_the_code_of_a_function_without_a_name_is_its_description():
    def weighing(factor):
        return lambda logits, classes: factor * logits[:, 0]

    assert describe(weighing(1.0)) == describe(weighing(1.0)) != describe(weighing(2.0))


def test_a_loss_that_counts_its_calls_goes_on_in_one_process(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, logits, targets):
            self.calls += 1
            return F.cross_entropy(logits, targets, reduction="none")

    trainer = stopped(tmp_path, loss=Counting())
    assert trainer.criterion.loss.calls
    assert not trainer.fit(loader(), epochs=2, checkpoint=tmp_path, resume=True).interrupted
