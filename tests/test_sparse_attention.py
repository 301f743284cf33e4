"""Block-sparse attention: against dense attention under a mask, its gradients, its choice, and what it refuses."""

import copy
import logging

import pytest
import torch
from attention import assert_same, operands
from torch.nn import functional as F

from sparse_training import UserError
from sparse_training.models.vit import Attention
from sparse_training.nn import (
    BlockSparseAttention,
    attends_densely,
    block_attention,
    block_sparse_attention,
    choose_blocks,
)
from sparse_training.nn.block_attention import attend, gathered
from sparse_training.nn.block_choice import block_means, in_blocks
from sparse_training.nn.sparse_attention import _announce_dense

SMALL = {"block": 8, "local": 3, "top": 2, "global_blocks": 1}  # 48 keys a query
SHAPES = [
    pytest.param((2, 3, 96, 8), SMALL, id="whole-blocks"),
    pytest.param((2, 3, 101, 8), SMALL, id="padded"),
    pytest.param((1, 1, 57, 5), SMALL, id="one-head-odd-width"),
    pytest.param((1, 2, 65, 4), {**SMALL, "block": 16, "local": 1, "top": 0}, id="no-content"),
    pytest.param((1, 2, 64, 4), {**SMALL, "block": 1, "local": 2, "top": 5, "global_blocks": 0}, id="blocks-of-one"),
    pytest.param((1, 12, 640, 64), {}, id="bert-base"),
]


def no_means(parts):
    """Of blocks [sequences, blocks, block, width], where there is no summary."""
    return [part[:, :0, 0] for part in parts[1:]]


def means(parts, tokens):
    return [block_means(part.unsqueeze(0), tokens).squeeze(0) for part in parts[1:]]


def allowed(index, tokens, block):
    """Mask [batch, heads, tokens, tokens] of the keys in the chosen blocks."""
    blocks = index.shape[2]
    mask = torch.zeros(*index.shape[:2], blocks, blocks, dtype=torch.bool, device=index.device)
    mask = mask.scatter(-1, index, True).repeat_interleave(block, 2).repeat_interleave(block, 3)
    return mask[:, :, :tokens, :tokens]


@pytest.mark.parametrize(("shape", "settings"), SHAPES)
def test_is_dense_attention_under_a_mask_of_the_chosen_blocks(shape, settings):
    q, k, v = operands(shape)
    block = settings.get("block", 64)
    mask = allowed(choose_blocks(q, k, **settings), shape[2], block)
    chosen = sum(
        {"local": 3, "top": 4, "global_blocks": 1, **settings}[name] for name in ("local", "top", "global_blocks")
    )
    assert int(mask.sum(-1).max()) == min(chosen * block, shape[2])  # distinct: each key counts once
    y = block_sparse_attention(q, k, v, dense_below=0, **settings)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_same(y, expected, q, k, v)


def test_is_dense_attention_where_every_block_is_chosen():
    q, k, v = operands((2, 2, 100, 8))
    every = {"block": 8, "local": 3, "top": 9, "global_blocks": 1}
    assert torch.equal(choose_blocks(q, k, **every).sort(-1).values[0, 0, 5], torch.arange(13))
    torch.testing.assert_close(
        block_sparse_attention(q, k, v, dense_below=0, **every), F.scaled_dot_product_attention(q, k, v)
    )
    # The same through the blocks themselves, which the public door spares here.
    index = choose_blocks(q, k, **every).flatten(0, 1)
    parts = [in_blocks(x, 8).flatten(0, 1) for x in (q, k, v)]
    y = attend(*parts, *no_means(parts), index, 100, 8**-0.5)
    torch.testing.assert_close(y.view(2, 2, 104, 8)[:, :, :100], F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("tokens", [24, 21])
def test_gradcheck(tokens, summary):
    settings = {"block": 4, "local": 1, "top": 1, "global_blocks": 1, "summary": summary, "dense_below": 0}
    assert torch.autograd.gradcheck(
        lambda q, k, v: block_sparse_attention(q, k, v, **settings), operands((1, 2, tokens, 3), seed=1)
    )


@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("tokens", [96, 101])
def test_the_form_for_other_devices_gives_the_same(tokens, summary):
    q, k, v = operands((2, 3, tokens, 8))
    index = choose_blocks(q, k, **SMALL).flatten(0, 1)
    results = []
    for form in (attend, gathered):
        parts = [in_blocks(x, 8).flatten(0, 1) for x in (q, k, v)]
        y = form(*parts, *(means(parts, tokens) if summary else no_means(parts)), index, tokens, 0.3)
        y = y.view(2, 3, -1, 8)[:, :, :tokens]
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("summary", [False, True])
def test_other_devices_take_it(summary):
    q, k, v = (torch.randn(2, 3, 1100, 16, device="meta", requires_grad=True) for _ in range(3))
    y = block_sparse_attention(q, k, v, summary=summary)
    y.sum().backward()
    assert y.shape == q.grad.shape == (2, 3, 1100, 16)


def test_padding_and_its_neighbours_change_nothing():
    """A sequence's results do not depend on how far its last block is filled with zeros: keys of 0 would get weight."""
    q, k, v = operands((1, 2, 61, 8))
    with torch.no_grad():
        k += 5.0  # products far below 0 for some queries, where padding's 0 would win
    y = block_sparse_attention(q, k, v, dense_below=0, **SMALL)
    mask = allowed(choose_blocks(q, k, **SMALL), 61, 8)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert int(mask.sum(-1).min()) == 45  # a query whose blocks hold the last one


def test_the_choice_holds_neighbours_and_global_blocks_and_then_the_best():
    q, k, _ = operands((1, 1, 160, 4))
    with torch.no_grad():
        q[..., 0] = 1.0
        k[..., 0] = 0.0
        k[:, :, 96:104, 0] = 1000.0  # block 12
        k[:, :, 48:56, 0] = 500.0  # block 6
    index = choose_blocks(q, k, **SMALL).sort(-1).values[0, 0].tolist()
    assert index[9] == [0, 6, 8, 9, 10, 12]
    assert index[19] == [0, 6, 12, 17, 18, 19]  # the window is shifted at the end
    assert {0, 1, 2, 6, 12} < set(index[0])  # what is neighbour and global leaves a place to content
    assert all(len(set(row)) == 6 for row in index)


def test_the_mean_of_the_last_block_is_of_its_tokens_alone():
    q, k, _ = operands((1, 1, 153, 4))
    with torch.no_grad():
        q[..., 0], k[..., 0] = 1.0, 0.0
        k[:, :, 152:, 0] = 100.0  # alone in block 19: its mean is 100, not an eighth of that
        k[:, :, 48:64, 0] = 50.0  # blocks 6 and 7
    assert {19} < set(choose_blocks(q, k, **{**SMALL, "top": 1})[0, 0, 3].tolist())


def test_a_row_of_nan_keeps_its_neighbours():
    q, k, v = operands((1, 1, 96, 8))
    with torch.no_grad():
        k[:, :, 40:72:8] = torch.nan  # in blocks 5 to 8, more than are chosen by content
    index = choose_blocks(q, k, **SMALL).sort(-1).values[0, 0].tolist()
    assert all(len(set(row)) == 6 and {0, min(max(i, 1), 10)} <= set(row) for i, row in enumerate(index))
    y = block_sparse_attention(q, k, v, dense_below=0, **SMALL)[0, 0].isnan().any(-1)
    read = [bool({5, 6, 7, 8} & set(row)) for row in index]
    assert y.tolist() == [read[i // 8] for i in range(96)]  # it spreads as far as those blocks are read
    assert not all(read)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_errors_are_no_larger_than_of_dense_attention_in_the_same_precision(dtype, monkeypatch):
    monkeypatch.setattr(block_attention, "_GATHERED_BYTES", 1)  # a block at a time: a gradient is a sum of many pieces
    settings = {"block": 16, "local": 1, "top": 1, "global_blocks": 1}
    q, k, v = operands((1, 2, 1024, 32))
    low = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in low]
    mask = allowed(choose_blocks(*low[:2], **settings), 1024, 16)
    grad = torch.randn(1, 2, 1024, 32, dtype=torch.float64).to(dtype)

    def results(form, inputs):
        y = form(*inputs)
        return y, *torch.autograd.grad(y, inputs, grad.to(y.dtype))

    exact = results(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask), wide)
    dense = results(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask), low)
    ours = results(lambda *x: block_sparse_attention(*x, dense_below=0, **settings), low)
    for mine, theirs, right in zip(ours, dense, exact, strict=True):
        assert mine.dtype == dtype
        # The gradients of the global block are sums over all 64 blocks of queries: in 16 bits they would be far off.
        assert (mine.double() - right).norm() <= 1.2 * (theirs.double() - right).norm() + 1e-6


def test_autocast_and_strided_operands():
    x = torch.randn(2, 200, 3, 4, 8)
    q, k, v = x.permute(2, 0, 3, 1, 4)  # of one projection, as a model has them
    y = block_sparse_attention(q, k, v, dense_below=0, **SMALL)
    copies = (part.contiguous() for part in (q, k, v))
    torch.testing.assert_close(y, block_sparse_attention(*copies, dense_below=0, **SMALL))
    attention = BlockSparseAttention(32, 4, dense_below=0, **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert block_sparse_attention(q, k, v, dense_below=0, **SMALL).dtype == torch.bfloat16
        assert block_sparse_attention(q.double(), k.double(), v.double(), dense_below=0, **SMALL).dtype == torch.float64
        out = attention(torch.randn(2, 200, 32))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("tokens", [96, 101])
def test_opcheck(tokens, summary):
    q, k, v = operands((2, 3, tokens, 8), torch.float32)
    index = choose_blocks(q, k, **SMALL).flatten(0, 1)
    parts = [in_blocks(x.detach(), 8).flatten(0, 1).requires_grad_() for x in (q, k, v)]
    extra = [x.detach().requires_grad_() for x in (means(parts, tokens) if summary else no_means(parts))]
    torch.library.opcheck(torch.ops.sparse_training.block_attention, (*parts, *extra, index, tokens, 0.3))


@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("tokens", [96, 101])
def test_compiles_as_one_graph(tokens, summary):
    attention = BlockSparseAttention(24, 3, summary=summary, dense_below=0, **SMALL)
    compiled = torch.compile(copy.deepcopy(attention), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, tokens, 24)
    results = []
    for module in (attention, compiled):
        y = module(x)
        y.square().sum().backward()
        results.append([y, *(parameter.grad for parameter in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_scale_may_change_in_one_compiled_graph():
    form = torch.compile(
        lambda x, scale: block_sparse_attention(x, x, x, scale=scale, dense_below=0, **SMALL),
        fullgraph=True,
        backend="aot_eager",
    )
    x = torch.randn(1, 2, 101, 8)
    for scale in (0.3, 0.4, 0.5):
        torch.testing.assert_close(form(x, scale), block_sparse_attention(x, x, x, scale=scale, dense_below=0, **SMALL))


def test_a_compiled_module_of_a_short_sequence_is_one_graph_too():
    attention = torch.compile(BlockSparseAttention(8, 2), fullgraph=True, backend="eager")
    _announce_dense.cache_clear()  # as in a process that has announced nothing
    assert attention(torch.randn(1, 20, 8)).shape == (1, 20, 8)
    assert _announce_dense.cache_info().currsize == 0


def test_the_form_for_other_devices_compiles_as_one_graph():
    q, k, v = (torch.randn(1, 2, 200, 16, device="meta", requires_grad=True) for _ in range(3))
    form = torch.compile(lambda *x: block_sparse_attention(*x, dense_below=0, **SMALL), fullgraph=True, backend="eager")
    assert form(q, k, v).shape == q.shape


def test_short_sequences_are_served_densely_and_said_so(caplog):
    assert attends_densely(1023)
    assert not attends_densely(1024)
    assert attends_densely(511, block=32)
    assert attends_densely(511, block=16)  # where twice the keys is 256
    assert not attends_densely(512, block=32)
    assert attends_densely(48, dense_below=0, **SMALL)
    assert not attends_densely(49, dense_below=0, **SMALL)
    q, k, v = operands((1, 2, 1023, 4))
    assert torch.equal(block_sparse_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    _announce_dense.cache_clear()
    attention = BlockSparseAttention(8, 2)
    with caplog.at_level(logging.WARNING, logger="sparse_training"):
        attention(torch.randn(1, 784, 8))
        attention(torch.randn(1, 784, 8))
    (line,) = caplog.messages
    assert line == "sparse attention over 784 tokens is served by dense attention: below 1024 that is faster"
    assert "dense_below=1024" in repr(attention)


def test_the_module_is_dense_attention_of_the_same_parameters_where_all_is_chosen():
    dense, sparse = Attention(32, 4), BlockSparseAttention(32, 4, block=8, dense_below=0)
    sparse.load_state_dict(dense.state_dict())
    x = torch.randn(2, 64, 32)
    torch.testing.assert_close(sparse(x), dense(x))
    x = torch.randn(2, 130, 32)
    assert not torch.allclose(sparse(x), dense(x))


def test_nothing_in_a_batch_and_no_token():
    q = torch.randn(0, 2, 200, 8)
    assert block_sparse_attention(q, q, q, dense_below=0, **SMALL).shape == q.shape
    q = torch.randn(2, 2, 0, 8)
    assert block_sparse_attention(q, q, q, dense_below=0, **SMALL).shape == q.shape


BAD_TENSORS = [
    (
        lambda q: (q[0], q[0], q[0]),
        r"`q` must be a floating-point tensor of shape \[batch, heads, tokens, width\], got",
    ),
    (lambda q: (q.long(), q.long(), q.long()), "`q` must be a floating-point tensor .*int64"),
    (lambda q: (q, q[:, :1], q), r"`k` must be as `q`, .*\(1, 2, 64, 8\).* got .*\(1, 1, 64, 8\)"),
    (lambda q: (q, q[:, :, :9], q), "`k` must be as `q`"),
    (lambda q: (q, q, q[..., :4]), "`v` must be as `q`"),
    (lambda q: (q, q.double(), q), "`k` must be as `q`, torch.float32 .* got torch.float64"),
    (lambda q: (q, q, q.to("meta")), "`v` must be as `q`.* on cpu, got .* on meta"),
    (lambda q: (q, q.tolist(), q), "`k` must be a tensor, got list"),
    (lambda q: (q[..., :0], q[..., :0], q[..., :0]), "`q` must have a width of at least 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        block_sparse_attention(*change(torch.randn(1, 2, 64, 8)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 0}, "`block` must be an integer of at least 1, got 0"),
        ({"block": 6.4}, "`block` must be an integer of at least 1, got 6.4"),
        ({"local": 0}, "`local` must be an integer of at least 1, got 0"),
        ({"local": True}, "`local` must be an integer of at least 1, got True"),
        ({"top": -1}, "`top` must be an integer of at least 0, got -1"),
        ({"global_blocks": "1"}, "`global_blocks` must be an integer of at least 0, got '1'"),
        ({"summary": 1}, "`summary` must be True or False, got 1"),
        ({"implementation": "fast"}, "`implementation` must be 'gathered' or 'flex', got 'fast'"),
        ({"scale": float("nan")}, "`scale` must be None or a finite number, got nan"),
        ({"scale": "1"}, "`scale` must be None or a finite number, got '1'"),
        ({"implementation": None}, "`implementation` must be 'gathered' or 'flex', got None"),
        ({"dense_below": -5}, "`dense_below` must be an integer of at least 0, got -5"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(settings, message):
    q = torch.randn(1, 1, 2048, 8)
    calls = [lambda: block_sparse_attention(q, q, q, **settings)]
    if "scale" not in settings:
        calls.append(lambda: BlockSparseAttention(8, 2, **settings))
    if not {"summary", "implementation", "scale"} & set(settings):
        calls.append(lambda: attends_densely(2048, **settings))
    for call in calls:
        with pytest.raises(UserError, match=message):
            call()


def test_modules_that_cannot_be_are_refused():
    for dim, heads in ((10, 4), (8, 0), (0, 1), (8.0, 2)):
        with pytest.raises(
            UserError, match=f"`dim` must be a multiple of `heads`, both at least 1, got {dim} and {heads}"
        ):
            BlockSparseAttention(dim, heads)
    with pytest.raises(UserError, match=r"`x` must have shape \[batch, tokens, 8\], got \(4, 8\)"):
        BlockSparseAttention(8, 2)(torch.randn(4, 8))
