"""Draws from a tree of partial sums: what they find, that C++ and tensor arithmetic agree, and nothing drifts."""

import pytest
import torch

from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.sum_tree import FAN, SumTree, uniform_double

needs_cpp = pytest.mark.skipif(cpp_backend.unavailable_reason() is not None, reason="the C++ backend is not built")
BOTH = [pytest.param(True, marks=needs_cpp), False]
# One leaf; a node that is full, and one leaf more; two and three levels with short ends.
SIZES = [1, 2, FAN, FAN + 1, FAN**2, FAN**2 + 1, 3 * FAN**2 - 7]


def leaves(size, seed=0):
    """Uniform in [0, 1), a sixth of them 0 and a seventh NaN, as rows without a score."""
    found = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    found[3::6] = 0.0
    found[5::7] = torch.nan
    return found


def by_definition(values, targets):
    """The first leaf at which the running sum is above each target."""
    sums = values.double().nan_to_num(0.0).cumsum(0)
    return torch.searchsorted(sums, targets, right=True).clamp(max=len(values) - 1)


@pytest.mark.parametrize("cpp", BOTH)
@pytest.mark.parametrize("size", SIZES)
def test_finds_the_leaf_at_which_the_running_sum_is_above_the_target(cpp, size):
    values = leaves(size)
    tree = SumTree(values, cpp=cpp)
    assert tree.total == pytest.approx(float(values.double().nan_to_num(0.0).sum()), rel=1e-12)
    # Not at the borders between leaves, where the order of additions may decide.
    sums = values.double().nan_to_num(0.0).cumsum(0)
    targets = (torch.cat((torch.zeros(1, dtype=torch.float64), sums[:-1])) + sums) / 2
    targets = targets[values > 0]
    found = tree.find(targets)
    assert torch.equal(found, by_definition(values, targets))
    assert torch.equal(found, (values > 0).nonzero().squeeze(1))


@pytest.mark.parametrize("cpp", BOTH)
def test_leaves_of_zero_and_nan_are_never_found(cpp):
    values = leaves(5000)
    tree = SumTree(values, cpp=cpp)
    targets = torch.cat((torch.rand(20000, dtype=torch.float64), torch.tensor([0.0, 1.0]).double())) * tree.total
    assert (values[tree.find(targets)] > 0).all()  # 1.0 too: rounding may put a target at the total


@pytest.mark.parametrize("cpp", BOTH)
@pytest.mark.parametrize("size", SIZES)
def test_an_update_gives_the_sums_of_a_new_tree_bit_for_bit(cpp, size):
    values = leaves(size)
    tree = SumTree(values, cpp=cpp)
    generator = torch.Generator().manual_seed(1)
    for count in (1, 7, 3000):
        index = torch.randint(0, size, (count,), generator=generator)
        values[index] = torch.rand(count, generator=generator) * 1e6  # a difference added would leave its rounding
        tree.update(index)
        values[index] = torch.rand(count, generator=generator)
        tree.update(index)
    for level, again in zip(tree.levels, SumTree(values.clone(), cpp=cpp).levels, strict=True):
        assert torch.equal(level, again)


@needs_cpp
def test_cpp_and_tensors_agree_bit_for_bit_on_any_number_of_threads():
    values = leaves(300_000)
    rows = torch.randint(0, 2**40, (50_000,), generator=torch.Generator().manual_seed(0))
    plain = SumTree(values, cpp=False)
    numbers = uniform_double(rows, seed=-3, step=2**48 + 5, cpp=False)
    expected = plain.find(numbers * plain.total)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            tree = SumTree(values)
            for level, other in zip(tree.levels, plain.levels, strict=True):
                assert torch.equal(level, other)
            assert torch.equal(uniform_double(rows, seed=-3, step=2**48 + 5), numbers)
            assert torch.equal(tree.find(numbers * tree.total), expected)
            values[rows % 300_000] += 1.0
            tree.update(rows % 300_000)
            plain.update(rows % 300_000)
            for level, other in zip(tree.levels, plain.levels, strict=True):
                assert torch.equal(level, other)
            expected = plain.find(numbers * plain.total)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("cpp", BOTH)
def test_numbers_are_uniform_and_each_its_own(cpp):
    rows = torch.arange(100_000)
    numbers = uniform_double(rows, seed=1, step=2, cpp=cpp)
    ordered = numbers.sort().values
    assert ordered[0] >= 0.0
    assert ordered[-1] < 1.0
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is passed once in a thousand seeds.
    assert (ordered - (rows + 0.5) / len(rows)).abs().max() < 1.95 / len(rows) ** 0.5
    assert torch.equal(numbers[[5, 3]], uniform_double(torch.tensor([5, 3]), seed=1, step=2, cpp=cpp))
    assert len(numbers.unique()) == len(numbers)  # 24 bits would repeat some 300
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}, {"seed": 1, "step": 2 + 2**32}):
        assert not torch.isclose(uniform_double(rows[:8], **other, cpp=cpp), numbers[:8]).any()


@pytest.mark.parametrize("cpp", BOTH)
def test_what_does_not_fit_is_refused(cpp):
    with pytest.raises(ValueError, match=r"`leaves` must be contiguous float32 \[N\]"):
        SumTree(torch.zeros(3, dtype=torch.float64), cpp=cpp)
    with pytest.raises(ValueError, match="N > 0"):
        SumTree(torch.zeros(0), cpp=cpp)
    tree = SumTree(torch.ones(3), cpp=cpp)
    with pytest.raises(IndexError, match=r"`index` must be in \[0, 2\], got 1 to 3"):
        tree.update(torch.tensor([1, 3]))
    tree.update(torch.tensor([], dtype=torch.int64))
