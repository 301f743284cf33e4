"""Tasks do to data as their descriptions say, the same every time."""

import pytest
import torch

from sparse_training.data.load import load_data
from sparse_training.data.splits import ImageData, Split, split_validation
from sparse_training.errors import UserError
from sparse_training.experiments import tasks
from sparse_training.experiments.tasks import OF_THE_IMAGES, make_task
from sparse_training.models.augment import RandomShiftFlip


def numbered(rows=1000, classes=10):
    """Images that say which row they were: two bytes of its number."""
    index = torch.arange(rows)
    images = torch.stack((index // 256, index % 256), 1).to(torch.uint8).reshape(rows, 1, 1, 2)
    split = Split(images, index % classes)
    return ImageData.from_splits("numbered", split, split, [str(label) for label in range(classes)], "made up")


def row_of(split):
    pair = split.images.long().reshape(-1, 2)
    return pair[:, 0] * 256 + pair[:, 1]


def kept(data):
    """The rows that tasks are made of: the validation split is held out first."""
    return split_validation(data)[0].train


@pytest.mark.parametrize("name", OF_THE_IMAGES)
def test_a_task_is_the_same_every_time_and_leaves_the_data_alone(name):
    data = numbered()
    one, other = make_task(name, data), make_task(name, data)
    assert one.name == name
    for split in ("train", "test"):
        assert torch.equal(getattr(one.data, split).images, getattr(other.data, split).images)
        assert torch.equal(getattr(one.data, split).labels, getattr(other.data, split).labels)
    assert (one.data.test is data.test) == (name not in ("imbalanced", "longtail-alike"))
    assert torch.equal(data.train.labels, torch.arange(1000) % 10)  # untouched
    if one.planted is not None:
        assert one.planted.shape == one.data.train.labels.shape
        assert one.planted_name


@pytest.mark.parametrize("name", OF_THE_IMAGES)
def test_no_row_is_both_trained_on_and_chosen_by(name):
    task = make_task(name, numbered())
    assert not set(row_of(task.data.train).tolist()) & set(row_of(task.validation).tolist())
    more = make_task(name, numbered(), validation=0.5).validation
    assert len(more) == pytest.approx(5 * len(task.validation), rel=0.2)


def test_noise_replaces_exactly_a_fifth_by_another_class_each_as_likely():
    data = numbered(20_000)
    task, before = make_task("noise", data), kept(data)
    assert torch.equal(task.data.train.labels != before.labels, task.planted)
    assert task.planted.sum() == 3600
    shift = (task.data.train.labels - before.labels)[task.planted] % 10
    assert torch.bincount(shift, minlength=10)[1:].min() > 3600 / 9 * 0.85
    assert torch.bincount(before.labels[task.planted]).min() > 360 * 0.85
    assert torch.equal(task.validation.labels, row_of(task.validation) % 10)  # drawn as the test is


@pytest.mark.parametrize("name", ["longtail", "longtail-alike"])
def test_longtail_falls_a_hundredfold_exponentially(name):
    task = make_task(name, numbered(20_000))
    counts = torch.bincount(task.data.train.labels)
    assert (counts[0], counts[-1]) == (1800, 18)
    ratios = counts[1:] / counts[:-1]
    assert torch.allclose(ratios, torch.full((9,), 100 ** (-1 / 9)), atol=0.03)
    test = torch.bincount(task.data.test.labels)
    assert (test[0], test[-1]) == ((2000, 20) if name == "longtail-alike" else (2000, 2000))
    assert len(task.validation) < 2000 if name == "longtail-alike" else len(task.validation) == 2000


def test_imbalanced_has_one_rare_row_in_twenty_in_every_split():
    task = make_task("imbalanced", numbered(20_000))
    for split in (task.data.train, task.data.test, task.validation):
        assert split.labels.double().mean() == pytest.approx(0.05, abs=0.002)
        assert torch.equal(split.labels == 1, row_of(split) % 10 == 0)
    assert task.data.classes == ("others", "0")
    assert torch.equal(task.planted, task.data.train.labels == 1)


def test_duplicated_is_few_images_ten_times_beside_many_once():
    task = make_task("duplicated", numbered(2000))
    times = torch.bincount(row_of(task.data.train), minlength=2000)
    assert torch.equal(times.unique(), torch.tensor([0, 1, 10]))
    assert ((times == 1).sum(), (times == 10).sum()) == (180, 162)
    assert torch.equal(times[row_of(task.data.train)] == 1, task.planted)
    assert not torch.equal(task.planted, task.planted.sort(descending=True).values)  # mixed


def test_finetune_starts_from_the_first_half_and_clean_from_nothing():
    assert make_task("finetune", numbered()).start_rows == 450
    assert make_task("clean", numbered()).start_rows == 0


def test_a_long_run_is_of_fewer_rows_that_its_model_shifts_and_reflects_in_training_alone(monkeypatch):
    monkeypatch.setattr(tasks, "LONG_ROWS", 200)
    task = make_task("long", load_data("digits"))
    assert len(task.data.train) == 200
    model = task.build("cnn-bn")
    images = torch.rand(64, 1, 8, 8)
    assert torch.equal(model.eval()[0](images), images)
    shifted = model.train()[0](images)
    assert shifted.shape == images.shape
    assert not torch.equal(shifted, images)
    assert shifted.unique().numel() <= images.unique().numel() + 1  # the same pixels, and 0
    with pytest.raises(UserError, match="`shift` must be an integer of at least 0, got -1"):
        RandomShiftFlip(shift=-1)
    plain = RandomShiftFlip(shift=0, flip=False)
    assert torch.equal(plain(images), images)


def test_an_unknown_task_or_too_little_data_is_refused():
    with pytest.raises(
        UserError, match="task 'hard' is unknown; use one of clean, noise, longtail, duplicated, finetune, imbalanced"
    ):
        make_task("hard", load_data("digits"))
    with pytest.raises(UserError, match="at least 100 rows to train on, got 99"):
        make_task("clean", numbered(99))
