"""A validation split is made of training rows alone, evenly over the classes, and is the same every time."""

import pytest
import torch

from sparse_training.data.load import load_data
from sparse_training.data.splits import ImageData, Split, hold_out, split_validation
from sparse_training.errors import UserError


def rows_of(split):
    return sorted(bytes(image.flatten().tolist()) for image in split.images)


def test_every_training_row_is_in_one_of_the_parts_and_the_test_is_untouched():
    data = load_data("digits")
    rest, validation = split_validation(data)
    assert rest.test is data.test
    assert len(validation) == round(0.1 * len(data.train))
    assert sorted(rows_of(rest.train) + rows_of(validation)) == rows_of(data.train)
    assert rest.mean != data.mean  # of the rows that are trained on


def test_each_class_has_its_share():
    labels = torch.cat((torch.zeros(9500), torch.ones(500))).long()[torch.randperm(10_000)]
    held = hold_out(labels, fraction=0.1)
    assert int((labels[held.validation] == 1).sum()) in (49, 50, 51)
    assert len(held.train) + len(held.validation) == 10_000
    assert not set(held.train.tolist()) & set(held.validation.tolist())


def test_values_are_held_out_evenly_along_their_range():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)).exp()
    held = hold_out(values, fraction=0.25)
    assert float(values[held.validation].mean()) == pytest.approx(float(values.mean()), rel=0.03)


def test_the_seed_alone_decides():
    data = load_data("digits")
    (_, one), (_, same), (_, other) = (split_validation(data, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.images, same.images)
    assert not torch.equal(one.images, other.images)


def test_a_few_rows_are_parted_and_one_row_is_refused():
    assert [len(part) for part in hold_out(torch.tensor([0, 1]), fraction=0.01)] == [1, 1]
    assert [len(part) for part in hold_out(torch.tensor([0, 1, 1]), fraction=0.99)] == [1, 2]
    images = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    one = Split(images, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(UserError, match="at least 2 training rows, got 1"):
        split_validation(ImageData.from_splits("one", one, one, ("a",), "made up"))
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"must be in \(0, 1\), got"):
            split_validation(load_data("digits"), fraction=fraction)
