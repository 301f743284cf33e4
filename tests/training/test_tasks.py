"""What a study does to data is what it says, the same every time, and leaves the test split alone."""

import pytest
import torch

from sparse_training.data.load import load_data
from sparse_training.data.splits import ImageData, Split
from sparse_training.errors import UserError
from sparse_training.experiments.tasks import TASKS, make_task


def numbered(rows=1000, classes=10):
    """Images that say which row they were: two bytes of its number."""
    index = torch.arange(rows)
    images = torch.stack((index // 256, index % 256), 1).to(torch.uint8).reshape(rows, 1, 1, 2)
    split = Split(images, index % classes)
    return ImageData.from_splits("numbered", split, split, [str(label) for label in range(classes)], "made up")


def row_of(split):
    pair = split.images.long().reshape(-1, 2)
    return pair[:, 0] * 256 + pair[:, 1]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_the_same_every_time_and_measured_on_the_same_test(name):
    data = numbered()
    one, other = make_task(name, data), make_task(name, data)
    assert one.name == name
    assert torch.equal(one.data.train.images, other.data.train.images)
    assert torch.equal(one.data.train.labels, other.data.train.labels)
    assert one.data.test is data.test
    assert torch.equal(data.train.labels, torch.arange(1000) % 10)  # untouched
    if one.planted is not None:
        assert one.planted.shape == one.data.train.labels.shape
        assert one.planted_name


def test_noise_replaces_exactly_a_fifth_by_another_class_each_as_likely():
    data = numbered(20_000)
    task = make_task("noise", data)
    assert torch.equal(task.data.train.labels != data.train.labels, task.planted)
    assert task.planted.sum() == 4000
    shift = (task.data.train.labels - data.train.labels)[task.planted] % 10
    assert torch.bincount(shift, minlength=10)[1:].min() > 4000 / 9 * 0.85
    assert torch.bincount(data.train.labels[task.planted]).min() > 400 * 0.85


def test_longtail_falls_a_hundredfold_exponentially():
    counts = torch.bincount(make_task("longtail", numbered(20_000)).data.train.labels)
    assert (counts[0], counts[-1]) == (2000, 20)
    ratios = counts[1:] / counts[:-1]
    assert torch.allclose(ratios, torch.full((9,), 100 ** (-1 / 9)), atol=0.02)


def test_duplicated_is_few_images_ten_times_beside_many_once():
    task = make_task("duplicated", numbered(2000))
    times = torch.bincount(row_of(task.data.train), minlength=2000)
    assert torch.equal(times.unique(), torch.tensor([0, 1, 10]))
    assert ((times == 1).sum(), (times == 10).sum()) == (200, 180)
    assert torch.equal(times[row_of(task.data.train)] == 1, task.planted)
    assert not torch.equal(task.planted, task.planted.sort(descending=True).values)  # mixed


def test_finetune_starts_from_the_first_half_and_clean_from_nothing():
    assert make_task("finetune", numbered()).start_rows == 500
    assert make_task("clean", numbered()).start_rows == 0


def test_an_unknown_task_or_too_little_data_is_refused():
    with pytest.raises(
        UserError, match="task 'hard' is unknown; use one of clean, noise, longtail, duplicated, finetune"
    ):
        make_task("hard", load_data("digits"))
    with pytest.raises(UserError, match="at least 100 rows to train on, got 99"):
        make_task("clean", numbered(99))
