"""The head under the compiler, autocast, transforms, operator checks and DistributedDataParallel."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from processes import Processes
from test_head import CLASSES, HIDDEN, dense, gradients, head, upstream
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_kernels as sk
from sparse_kernels import count_multiplied_rows, linear_row_stats

AS_IT_IS = aot_autograd(fw_compiler=lambda module, _inputs: make_boxed_func(module.forward))


@pytest.mark.parametrize(
    "settings", [{}, {"softcap": 5.0, "logit_scale": 0.5, "label_smoothing": 0.1, "chunk": 4}], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_one_graph_gives_what_eager_gives_and_skips_the_same_rows(masked, settings):
    torch._dynamo.reset()
    x, w, b, target, mask = head()

    def step(x, w, b, target, mask, above):
        stats = linear_row_stats(
            x * 2, w, target, linear_bias=b, row_mask=mask if masked else None, outputs=("loss", "entropy", "argmax"),
            **settings,
        )  # fmt: skip
        return (stats.loss * above[0] + stats.entropy * above[1]).sum(), stats

    results = []
    for call in (step, torch.compile(step, backend=AS_IT_IS, fullgraph=True)):
        with count_multiplied_rows() as rows:
            total, stats = call(x, w, b, target, mask, upstream())
            results.append(
                (total, *stats[:2], *torch.autograd.grad(total, (x, w, b)), torch.tensor([*vars(rows).values()]))
            )
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=0, atol=0)
    assert 0 < results[0][-1][1] < results[0][-1][0]


def test_another_number_of_rows_is_the_same_graph():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w, y: linear_row_stats(x, w, y).loss.mean(), backend=AS_IT_IS, fullgraph=True, dynamic=True
    )  # fmt: skip
    for rows in (5, 8, 11):
        x, w, _, target, _ = head(rows=(rows,))
        loss = compiled(x, w, target)
        torch.testing.assert_close(loss, dense(x, w, None, target).loss.mean())
        loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_operator_checks():
    x, w, b, target, mask = head(rows=(5,), classes=7)
    arguments = (x, w, target, b, mask, 0.7, 5.0, 0.1, -100, 2)
    operators = torch.ops.sparse_kernels
    torch.library.opcheck(operators.linear_row_stats, (*arguments, ["loss", "entropy", "argmax"], True))
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    _, entropy, maximum, total = operators.linear_row_stats(*plain, ["loss", "entropy"], True)
    above = torch.randn(2, 5, dtype=x.dtype)
    torch.library.opcheck(
        operators.linear_row_stats_backward, (*plain, maximum, total, entropy, *above, [True, True, True]),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_fake_tensors_have_the_shapes():
    with FakeTensorMode():
        x, w = torch.empty(2, 3, 8, dtype=torch.bfloat16), torch.empty(11, 8, dtype=torch.bfloat16)
        stats = linear_row_stats(x, w, torch.empty(2, 3, dtype=torch.int64), outputs=("loss", "argmax", "mean_logits"))
    assert stats.loss.shape == (2, 3)
    assert (stats.loss.dtype, stats.argmax.dtype) == (torch.float32, torch.int64)


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_multiplies_in_its_dtype_and_leaves_gradients_in_the_parameters(dtype, compiled):
    torch._dynamo.reset()
    x, w, b, target, _ = head(torch.float32)
    above = upstream()

    def ours(x, w, b):
        return linear_row_stats(x, w, target, linear_bias=b)

    results = []
    for function in (torch.compile(ours, backend=AS_IT_IS, fullgraph=True) if compiled else ours, None):
        with torch.autocast("cpu", dtype):
            stats = function(x, w, b) if function else sk.row_stats(F.linear(x, w, b), target)
            inside = gradients(stats, above, (x, w, b))
        results.append((stats.loss, stats.entropy, *inside))
    for a, c in zip(*results, strict=True):
        assert a.dtype is torch.float32
        torch.testing.assert_close(a, c, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(results[0][:2], results[1][:2])
    full = dense(x, w, b, target)
    assert not torch.equal(results[0][0], full.loss)  # it was in 16 bits


def test_autocast_takes_operands_of_both_dtypes_and_leaves_float64_alone():
    x, w, b, target, _ = head(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = linear_row_stats(x.bfloat16(), w, target, linear_bias=b).loss
        torch.testing.assert_close(mixed, linear_row_stats(x, w, target, linear_bias=b).loss)
        wide = [leaf.double() for leaf in (x, w, b)]
        right = dense(*wide, target).loss
        torch.testing.assert_close(linear_row_stats(*wide[:2], target, linear_bias=wide[2]).loss, right)


# Transforms: the logits are held, and everything composes


def test_transforms_give_what_the_dense_graph_gives():
    x, w, b, target, mask = (tensor.detach() for tensor in head(rows=(6,)))

    def ours(x, w, b):
        return linear_row_stats(x, w, target, linear_bias=b, row_mask=mask, logit_scale=0.5).loss.sum()

    def theirs(x, w, b):
        labels = torch.where(mask, target, -100)
        return F.cross_entropy(F.linear(x, w, b) * 0.5, labels, reduction="sum")

    for found, right in zip(
        torch.func.grad(ours, (0, 1, 2))(x, w, b), torch.func.grad(theirs, (0, 1, 2))(x, w, b), strict=True
    ):
        torch.testing.assert_close(found, right)
    tangents = tuple(torch.ones_like(tensor) for tensor in (x, w, b))
    for found, right in zip(
        torch.func.jvp(ours, (x, w, b), tangents), torch.func.jvp(theirs, (x, w, b), tangents), strict=True
    ):
        torch.testing.assert_close(found, right)

    def row(x, y):
        stats = linear_row_stats(x, w, y, outputs=("loss", "mean_logits"))
        return stats.loss, stats.mean_logits

    torch.testing.assert_close(torch.func.vmap(row)(x, target), row(x, target))


# Two processes


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(HIDDEN, HIDDEN).double(), nn.Linear(HIDDEN, CLASSES).double()

    def forward(self, x, target):
        return linear_row_stats(self.body(x).tanh(), self.head.weight, target, linear_bias=self.head.bias)


def rows_of(rank):
    x, _, _, target, _ = head(rows=(8,), seed=rank)
    if rank == 1:
        target.fill_(-100)  # this rank has nothing to multiply
    return x.detach(), target


def a_step(rank, ranks, group):
    model = nn.parallel.DistributedDataParallel(Model(), process_group=group)
    for _ in range(2):  # the second step uses the buckets as they settled
        model.zero_grad()
        model(*rows_of(rank)).loss.sum().backward()
    return [parameter.grad.tolist() for parameter in model.parameters()]


def test_ranks_of_which_one_has_no_rows_get_the_mean_gradient(tmp_path):
    processes = Processes(tmp_path, 2)
    try:
        first, second = processes.run(a_step, 2)
    finally:
        processes.stop()
    assert first == second
    model = Model()
    model(*rows_of(0)).loss.sum().backward()
    for found, parameter in zip(first, model.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), parameter.grad / 2)
