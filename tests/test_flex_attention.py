"""Sparse attention by PyTorch's FlexAttention: ``implementation="flex"``."""

import copy

import pytest
import torch
import torch.nn.attention.flex_attention as pytorch

from sparse_training import UserError
from sparse_training.nn import BlockSparseAttention, block_sparse_attention, choose_blocks, flex_attention
from sparse_training.nn.block_choice import in_blocks
from sparse_training.nn.sparse_attention import attends_densely

SMALL = {"block": 8, "local": 3, "top": 2, "global_blocks": 1, "dense_below": 0}
CASES = [(tokens, summary) for tokens in (96, 101) for summary in (False, True)]


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention as PyTorch runs it for debugging: the mask decides, kernels are not compiled."""
    monkeypatch.setattr(flex_attention, "_compiled", lambda kind: pytorch.flex_attention)


def operands(tokens):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 16, generator=generator) for _ in range(3)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("tokens", "summary"), CASES)
def test_gives_the_same_without_gradients(tokens, summary):
    q, k, v = (x.requires_grad_() for x in operands(tokens))
    with torch.no_grad():
        y = block_sparse_attention(q, k, v, summary=summary, implementation="flex", **SMALL)
        torch.testing.assert_close(y, block_sparse_attention(q, k, v, summary=summary, **SMALL))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("tokens", "summary"), CASES)
def test_gives_the_same_gradients(tokens, summary, monkeypatch):
    """PyTorch has this backward for debugging alone, and refuses it on a CPU: its refusal and ours are taken out."""
    monkeypatch.setattr(pytorch, "_validate_device", lambda *operands: None)
    monkeypatch.setattr("sparse_training.nn.sparse_attention.check_flex", lambda *arguments: None)
    inputs = [x.requires_grad_() for x in operands(tokens)]
    grad = torch.randn(2, 3, tokens, 16)
    results = []
    for form in ("gathered", "flex"):
        y = block_sparse_attention(*inputs, summary=summary, implementation=form, **SMALL)
        results.append(torch.autograd.grad(y, inputs, grad))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("tokens", "summary"), CASES)
def test_kernels_are_given_the_chosen_blocks_and_no_other(tokens, summary, monkeypatch):
    """What is skipped is what the mask forbids: a kernel asks the mask of no block that is said to be whole."""
    seen = {}

    def watched(query, key, value, *, score_mod, block_mask, scale):
        seen.update(mask=block_mask, keys=key.shape[2], score_mod=score_mod)
        return torch.zeros_like(query)

    monkeypatch.setattr(flex_attention, "_compiled", lambda kind: watched)
    q, k, v = operands(tokens)
    block_sparse_attention(q, k, v, summary=summary, implementation="flex", **SMALL)
    mask, keys = seen["mask"], seen["keys"]
    sequence, query, key = torch.arange(6).view(-1, 1, 1), torch.arange(tokens).view(-1, 1), torch.arange(keys)
    allowed = mask.mask_mod(sequence, 0 * sequence, query, key)
    index = choose_blocks(q, k, **{name: value for name, value in SMALL.items() if name != "dense_below"})
    blocks = index.shape[2]
    chosen = torch.zeros(6, blocks, blocks, dtype=torch.bool).scatter(-1, index.flatten(0, 1), True)
    mine = torch.arange(tokens) // 8
    expected = torch.zeros(allowed.shape, dtype=torch.bool)
    expected[:, :, :tokens] = chosen[:, mine][..., mine]
    if summary:
        expected[:, :, 8 * blocks : 9 * blocks] = ~chosen[:, mine]
    assert torch.equal(allowed, expected)
    assert (seen["score_mod"] is None) == (not summary)
    # Whole blocks: all allowed. Blocks in part: some allowed. No others hold an allowed key.
    shares = in_blocks(allowed.float().unsqueeze(0), 1)[0, :, :, 0].unflatten(-1, (-1, 8)).mean(-1)[:, ::8]
    for number, indices, fits in (
        (mask.full_kv_num_blocks, mask.full_kv_indices, lambda share: share == 1),
        (mask.kv_num_blocks, mask.kv_indices, lambda share: (share > 0) | (torch.arange(len(share)) >= tokens // 8)),
    ):
        for row in range(6):
            for place in range(blocks):
                at = indices[row, 0, place, : number[row, 0, place]].long()
                assert fits(shares[row, place])[at].all()
                shares[row, place, at] = 0
    assert not shares.any()


def test_a_gradient_on_a_cpu_is_refused_in_one_line():
    q, k, v = (x.requires_grad_() for x in operands(96))
    with pytest.raises(UserError, match=r"'flex' has no gradient on a CPU, .*; use implementation=") as caught:
        block_sparse_attention(q, k, v, implementation="flex", **SMALL)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="'flex' has no gradient on a CPU"):
        BlockSparseAttention(16, 2, implementation="flex", **SMALL)(torch.randn(1, 96, 16))


def test_other_devices_are_refused_in_one_line():
    q, k, v = (x.to("meta") for x in operands(96))
    with pytest.raises(UserError, match="'flex' serves tensors on cpu and cuda, got them on meta; use"):
        block_sparse_attention(q, k, v, implementation="flex", **SMALL)


def test_a_short_sequence_is_served_densely_whatever_was_asked_for():
    assert attends_densely(200)
    q, k, v = (x.requires_grad_() for x in operands(200))
    torch.testing.assert_close(block_sparse_attention(q, k, v, implementation="flex"), block_sparse_attention(q, k, v))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [512, 500])
def test_compiled_kernels_give_the_same_and_are_compiled_once(tokens):
    settings = {**SMALL, "block": 32, "local": 1, "summary": True}
    graphs = []
    for _ in range(2):
        q, k, v = operands(tokens)
        y = block_sparse_attention(q, k, v, implementation="flex", **settings)
        torch.testing.assert_close(y, block_sparse_attention(q, k, v, **settings))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


def test_a_module_is_one_graph(monkeypatch):
    """As far as a machine without a GPU can tell: PyTorch has no kernel for a CPU inside a larger graph."""
    attention = BlockSparseAttention(48, 3, implementation="flex", summary=True, **SMALL)
    x = torch.randn(2, 101, 48)
    with torch.no_grad(), pytest.raises(Exception, match="'flex' is compiled by itself on a CPU, got a call under"):
        torch.compile(attention, fullgraph=True, backend="eager")(x)
    monkeypatch.setattr("sparse_training.nn.sparse_attention.check_flex", lambda *arguments: None)
    compiled = torch.compile(copy.deepcopy(attention), fullgraph=True, backend="eager")
    attention.implementation = "gathered"
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), attention(x))


def test_cuda_needs_blocks_of_which_its_tiles_are_parts():
    q = torch.zeros(1, 1, 64, 8)
    cuda = type("Operand", (), {"device": torch.device("cuda"), "requires_grad": True})()
    flex_attention.check_flex(128, cuda, cuda, cuda)
    with pytest.raises(UserError, match="'flex' on cuda needs `block` to be a multiple of 64, got 28; use"):
        flex_attention.check_flex(28, cuda, cuda, cuda)
    flex_attention.check_flex(28, q, q, q)
