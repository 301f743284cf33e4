"""The reference against textbook formulas in float64 and PyTorch's own functions."""

import math

import pytest
import torch
import torch.nn.functional as F

import sparse_kernels as sk
from sparse_kernels import philox


def textbook(logits, targets, temperature=1.0, softcap=0.0):
    """Each statistic from its definition, in float64 and with no care for range."""
    z = logits.double()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    p = (z / temperature).softmax(-1)
    onehot = F.one_hot(targets.long(), p.shape[-1]).double()
    top = p.topk(min(2, p.shape[-1]), dim=-1).values
    return {
        "loss": -p.log().gather(-1, targets.long().unsqueeze(-1)).squeeze(-1),
        "entropy": torch.special.entr(p).sum(-1),
        "grad_norm": (p - onehot).norm(dim=-1),
        "sum_squares": p.square().sum(-1),
        "max_prob": p.amax(-1),
        "margin": top[..., 0] - top[..., 1] if p.shape[-1] > 1 else torch.ones_like(top[..., 0]),
        "argmax": z.argmax(-1),
        "logsumexp": (z / temperature).logsumexp(-1),
    }


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(16, 10), (3, 1), (2, 4, 33), (7, 1000)])
def test_every_statistic_is_its_definition(shape, temperature, softcap):
    torch.manual_seed(0)
    logits = 3 * torch.randn(shape, dtype=torch.float64)
    targets = torch.randint(0, shape[-1], shape[:-1])
    stats = sk.row_stats(
        logits, targets, outputs=sk.STATISTICS, temperature=temperature, softcap=softcap, backend="torch"
    )
    for name, wanted in textbook(logits, targets, temperature, softcap).items():
        torch.testing.assert_close(getattr(stats, name), wanted, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_loss_is_torch_cross_entropy(smoothing):
    logits = torch.randn(32, 11, dtype=torch.float64)
    targets = torch.randint(0, 11, (32,))
    targets[5] = -100
    stats = sk.row_stats(logits, targets, outputs=["loss"], label_smoothing=smoothing, backend="torch")
    wanted = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(stats.loss, wanted)


def test_class_dimension_in_the_middle():
    logits, targets = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 3, 4))
    middle = sk.row_stats(logits, targets, dim=1)
    last = sk.row_stats(logits.movedim(1, -1).contiguous(), targets)
    torch.testing.assert_close(middle.loss, last.loss)
    torch.testing.assert_close(middle.entropy, last.entropy)


def test_gradients_of_loss_and_entropy():
    logits = torch.randn(6, 5, dtype=torch.float64)
    logits[0, 0] = 4.0  # the target is the largest: the other branch of loss and entropy
    logits[1, 2] = 4.0
    logits.requires_grad_()
    targets = torch.tensor([0, 4, 2, -100, 1, 3])

    def both(z):
        stats = sk.row_stats(z, targets, temperature=1.3, softcap=4.0, label_smoothing=0.1, backend="torch")
        return stats.loss, stats.entropy

    assert torch.autograd.gradcheck(both, (logits,))


def test_gradient_of_a_row_with_masked_logits_is_finite():
    logits = torch.randn(2, 4, dtype=torch.float64)
    logits[:, 2] = -torch.inf
    logits.requires_grad_()
    stats = sk.row_stats(logits, torch.tensor([0, 3]), backend="torch")
    (stats.loss + stats.entropy).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 2] == 0).all()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_ignored_row_gives_zero_and_no_gradient_even_when_it_holds_nan(softcap):
    logits = torch.randn(3, 4)
    logits[1] = torch.nan
    logits.requires_grad_()
    stats = sk.row_stats(logits, torch.tensor([0, -100, 2]), outputs=sk.STATISTICS, softcap=softcap, backend="torch")
    for name in sk.STATISTICS:
        assert getattr(stats, name)[1] == 0, name
    (stats.loss + stats.entropy).sum().backward()
    assert (logits.grad[1] == 0).all()
    assert logits.grad[[0, 2]].abs().sum() > 0


def test_masked_logit_has_probability_zero_and_adds_nothing_to_the_entropy():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    stats = sk.row_stats(logits, torch.tensor([0]), backend="torch")
    assert stats.entropy.item() == pytest.approx(math.log(2))
    assert sk.row_stats(logits, torch.tensor([2]), backend="torch").loss.item() == math.inf


@pytest.mark.parametrize("row", [[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
def test_invalid_row_is_nan_never_kept_and_counted(row):
    logits = torch.tensor([row, [0.0, 3.0]])
    gated = sk.gate_rows(
        logits,
        torch.tensor([1, 0]),
        torch.tensor([-9.0]),
        weights={"loss": 1.0},
        outputs=sk.STATISTICS,
        backend="torch",
    )
    assert gated.significance[0].isnan()
    assert gated.mask.tolist() == [False, True]
    assert gated.invalid == 1
    assert gated.stats.argmax.tolist() == [-1, 1]
    assert all(getattr(gated.stats, name)[0].isnan() for name in sk.STATISTICS if name != "argmax")


def test_confident_row_keeps_its_relative_accuracy():
    # PyTorch's own float32 cross entropy reads 0 here; 1 - 2 p + sum p^2 would be noise.
    logits = torch.tensor([[30.0, 0.0, 0.0]])
    stats = sk.row_stats(logits, torch.tensor([0]), outputs=["loss", "grad_norm"], backend="torch")
    exact = textbook(logits, torch.tensor([0]))
    assert stats.loss.item() == pytest.approx(math.log1p(2 * math.exp(-30)), rel=1e-5)
    assert stats.grad_norm.item() == pytest.approx(exact["grad_norm"].item(), rel=1e-3)


def test_argmax_is_the_lowest_index_among_equals():
    logits = torch.zeros(2, 7)
    logits[1, 3:5] = 1.0
    stats = sk.row_stats(logits, torch.tensor([0, 0]), outputs=["argmax"], backend="torch")
    assert stats.argmax.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("counter", "seed", "wanted"),
    [  # the known answers of Random123's kat_vectors for philox4x32, 10 rounds
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFF_FFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, seed, wanted):
    words = philox.philox(tuple(torch.tensor(c) for c in counter), seed)
    assert tuple(int(w) for w in words) == wanted


def test_stochastic_gate_is_unbiased():
    torch.manual_seed(0)
    logits, targets = 2 * torch.randn(512, 10), torch.randint(0, 10, (512,))
    loss = sk.row_stats(logits, targets, outputs=["loss"]).loss.double()
    estimates = []
    for step in range(400):
        gated = sk.gate_rows(
            logits,
            targets,
            torch.tensor([3.0]),
            weights={"loss": 1.0},
            gate_temperature=1.0,
            p_min=0.05,
            seed=7,
            step=step,
        )
        assert torch.equal(gated.mask, gated.weight > 0)
        estimates.append((gated.weight.double() * loss).sum())
    estimates = torch.stack(estimates)
    error = (estimates.mean() - loss.sum()) / (estimates.std() / len(estimates) ** 0.5)
    assert abs(error) < 4  # deviations of the mean
    assert 0.05 < gated.mask.float().mean() < 0.9


def test_reference_compiles_whole():
    def pack(logits, targets, threshold):
        mask = sk.gate_rows(logits, targets, threshold, weights={"loss": 1.0}, backend="torch").mask
        return sk.compact(mask, capacity=8, backend="torch").take(logits)

    compiled = torch.compile(pack, fullgraph=True, backend="eager")
    logits, targets, threshold = torch.randn(32, 5), torch.randint(0, 5, (32,)), torch.tensor([1.5])
    assert torch.equal(compiled(logits, targets, threshold), pack(logits, targets, threshold))
