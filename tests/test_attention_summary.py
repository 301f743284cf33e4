"""Sparse attention that also reads the means of the blocks that it does not choose: ``summary=True``."""

import pytest
import torch
from attention import assert_same, operands
from torch.nn import functional as F

from sparse_training.nn import BlockSparseAttention, block_sparse_attention, choose_blocks

SMALL = {"block": 8, "local": 3, "top": 2, "global_blocks": 1}


def expected(q, k, v, index, block):
    """Dense attention under a mask, with a further key for each block: the mean, where the block was not chosen."""
    tokens, blocks = q.shape[2], index.shape[2]
    chosen = torch.zeros(*index.shape[:2], blocks, blocks, dtype=torch.bool).scatter(-1, index, True)
    mine = torch.arange(tokens) // block
    counts = torch.bincount(mine).to(q.dtype)
    averages = F.one_hot(mine, blocks).to(q.dtype).T / counts.unsqueeze(1)
    keys, values = (torch.cat([x, averages @ x], 2) for x in (k, v))
    bias = torch.zeros(chosen.shape, dtype=q.dtype)
    of_keys = bias.masked_fill(~chosen, -torch.inf)[:, :, mine][..., mine]
    of_means = (bias + counts.log()).masked_fill(chosen, -torch.inf)[:, :, mine]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=torch.cat([of_keys, of_means], -1))


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        pytest.param((2, 3, 96, 8), SMALL, id="whole-blocks"),
        pytest.param((2, 3, 101, 8), SMALL, id="padded"),
        pytest.param((1, 1, 57, 5), SMALL, id="one-head-odd-width"),
        pytest.param((1, 2, 65, 4), {**SMALL, "block": 16, "local": 1, "top": 0}, id="no-content-one-token-left"),
        pytest.param(
            (1, 2, 64, 4), {**SMALL, "block": 1, "local": 2, "top": 5, "global_blocks": 0}, id="blocks-of-one"
        ),
        pytest.param((1, 2, 1100, 16), {}, id="defaults"),
    ],
)
def test_is_attention_with_a_key_for_each_block_that_is_not_chosen(shape, settings):
    q, k, v = operands(shape)
    y = block_sparse_attention(q, k, v, summary=True, dense_below=0, **settings)
    right = expected(q, k, v, choose_blocks(q, k, **settings), settings.get("block", 64))
    assert_same(y, right, q, k, v)


def test_where_a_block_is_its_mean_it_is_dense_attention():
    """Keys and values that are constant within a block: the summary then loses nothing, and a rest of 5 counts as 5."""
    q, k, v = operands((2, 2, 101, 8))
    k, v = (x[:, :, ::8].repeat_interleave(8, 2)[:, :, :101] for x in (k, v))
    y = block_sparse_attention(q, k, v, summary=True, dense_below=0, **SMALL)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v))
    assert not torch.allclose(block_sparse_attention(q, k, v, dense_below=0, **SMALL), y)


def test_queries_of_zero_give_the_mean_of_all_values():
    """Attention begins so, when its weights are small."""
    _, k, v = operands((1, 2, 101, 8))
    y = block_sparse_attention(torch.zeros_like(k), k, v, summary=True, dense_below=0, **SMALL)
    torch.testing.assert_close(y, v.mean(2, keepdim=True).expand_as(v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_errors_are_near_those_of_dense_attention_in_the_same_precision(dtype):
    settings = {"block": 16, "local": 1, "top": 1, "global_blocks": 1}
    low = [x.detach().to(dtype).requires_grad_() for x in operands((1, 2, 1024, 32))]
    wide = [x.detach().double().requires_grad_() for x in low]
    index, grad = choose_blocks(*low[:2], **settings), torch.randn(1, 2, 1024, 32, dtype=torch.float64).to(dtype)

    def results(form, inputs):
        y = form(*inputs)
        return y, *torch.autograd.grad(y, inputs, grad.to(y.dtype))

    exact = results(lambda *x: expected(*x, index, 16), wide)
    theirs = results(lambda *x: expected(*x, index, 16), low)
    ours = results(lambda *x: block_sparse_attention(*x, summary=True, dense_below=0, **settings), low)
    for mine, their, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - right).norm() <= 1.2 * (their.double() - right).norm() + 1e-6


def test_a_module_has_it_and_the_same_parameters():
    plain, summed = (BlockSparseAttention(32, 4, summary=it, dense_below=0, **SMALL) for it in (False, True))
    summed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 101, 32)
    assert not torch.allclose(plain(x), summed(x))
    assert "summary=True" in repr(summed)
    assert torch.equal(plain(x[:, :48]), summed(x[:, :48]))  # as many blocks as are chosen: dense, and nothing is left
    with torch.autocast("cpu", torch.bfloat16):
        y = summed(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in summed.parameters())


def test_nothing_in_a_batch_and_no_token():
    for shape in ((0, 2, 200, 8), (2, 2, 0, 8)):
        q = torch.randn(shape)
        assert block_sparse_attention(q, q, q, summary=True, dense_below=0, **SMALL).shape == q.shape
