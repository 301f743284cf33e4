"""mmseg's sampler of hard pixels, from the real wheel, with ours and without."""

import sys
from types import SimpleNamespace

import host_files
import pytest
import torch
from torch import nn

from sparse_training.errors import UserError
from sparse_training.integrations.mmseg import ohem

IGNORED = 255


@pytest.fixture
def kind():
    with host_files.mmseg():
        from mmseg.structures.sampler import ohem_pixel_sampler

        yield ohem_pixel_sampler.OHEMPixelSampler
        ohem.off()


def cross_entropy(**options):
    from mmseg.models.losses import cross_entropy_loss

    return cross_entropy_loss.CrossEntropyLoss(avg_non_ignore=True, **options)


def images(classes=19, size=(2, 13, 11), dtype=torch.float32, ignored=0.2, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    batch, *pixels = size
    logits = (scale * torch.randn(batch, classes, *pixels, generator=generator)).to(dtype)
    label = torch.randint(0, classes, (batch, 1, *pixels), generator=generator)
    label[torch.rand(label.shape, generator=generator) < ignored] = IGNORED
    return logits, label


def both(sampler, logits, label):
    theirs = sampler.sample(logits, label)
    with ohem:
        ours = sampler.sample(logits, label)
    assert ours.dtype is theirs.dtype
    assert ours.shape == theirs.shape
    return ours, theirs


@pytest.mark.parametrize("min_kept", [2, 20, 100, 100000])
@pytest.mark.parametrize("thresh", [0.0, 1e-3, 0.3, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("classes", [2, 19, 150])
def test_with_a_threshold_the_pixels_are_the_hosts(kind, classes, thresh, min_kept):
    sampler = kind(SimpleNamespace(ignore_index=IGNORED), thresh=thresh, min_kept=min_kept)
    ours, theirs = both(sampler, *images(classes))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_keep_theirs(kind, dtype):
    """A bfloat16 softmax rounds probabilities, so a pixel near the limit may fall on its other side."""
    sampler = kind(SimpleNamespace(ignore_index=IGNORED), thresh=0.5, min_kept=50)
    ours, theirs = both(sampler, *images(dtype=dtype))
    assert (ours != theirs).sum() <= (0 if dtype is torch.float64 else 4)


@pytest.mark.parametrize("seed", [0, 7, 22])  # with the last two, losses at the end of a plane have differed by a bit
@pytest.mark.parametrize("size", [(1, 8, 8), (2, 13, 11), (3, 31, 17), (1, 1, 1), (1, 33, 5)])
@pytest.mark.parametrize("classes", [2, 19, 150])
@pytest.mark.parametrize("thresh", [1e-6, 0.7])
@pytest.mark.parametrize("min_kept", [2, 30])
def test_pixels_that_tie_with_the_limit_are_not_kept(kind, size, classes, thresh, min_kept, seed):
    """Each image is one pixel repeated at every place of a plane, but for a harder one; the host's rounding differs."""
    generator = torch.Generator().manual_seed(seed)
    batch, *pixels = size
    easy = torch.randn(classes, generator=generator)
    hard = easy - 2.0 * torch.eye(classes)[1]
    logits = easy.view(1, -1, 1, 1).repeat(batch, 1, *pixels)
    logits[..., 0, 0] = hard
    label = torch.ones(batch, 1, *pixels, dtype=torch.long)
    with ohem:
        ours = kind(SimpleNamespace(ignore_index=IGNORED), thresh=thresh, min_kept=min_kept).sample(logits, label)
    p_hard, p_easy = (float(row.double().softmax(0)[1]) for row in (hard, easy))
    ordered = sorted([p_hard] * batch + [p_easy] * (label.numel() - batch))
    limit = max(ordered[min(min_kept * batch, label.numel() - 1)], thresh)
    right = torch.full((batch, *pixels), float(p_easy < limit))
    right[..., 0, 0] = float(p_hard < limit)
    assert torch.equal(ours, right)


@pytest.mark.parametrize("thresh", [0.7, None])
def test_an_image_of_ignored_pixels_keeps_none(kind, thresh):
    context = SimpleNamespace(ignore_index=IGNORED, loss_decode=cross_entropy())
    ours, theirs = both(kind(context, thresh=thresh, min_kept=5), *images(ignored=1.1))
    assert torch.equal(ours, theirs)
    assert ours.count_nonzero() == 0


def test_pixels_without_a_number_are_not_kept(kind):
    logits, label = images()
    logits[0, 3, :4] = torch.nan
    ours, theirs = both(kind(SimpleNamespace(ignore_index=IGNORED), thresh=0.7, min_kept=5), logits, label)
    assert torch.equal(ours, theirs)


LOSSES = {
    "plain": lambda: cross_entropy(),
    "weighted": lambda: cross_entropy(loss_weight=0.4),
    "classes weigh": lambda: cross_entropy(class_weight=[0.1 + 0.3 * i for i in range(19)]),
    "two": lambda: nn.ModuleList([cross_entropy(), cross_entropy(class_weight=[1.0, 3.0] * 9 + [1.0])]),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("min_kept", [2, 30, 100000])
def test_without_a_threshold_the_hardest_by_the_decoders_losses_are_kept(kind, loss, min_kept):
    context = SimpleNamespace(ignore_index=IGNORED, loss_decode=LOSSES[loss]())
    logits, label = images()
    ours, theirs = both(kind(context, min_kept=min_kept), logits, label)
    assert torch.equal(ours, theirs)
    assert ours.sum() == min(2 * min_kept, int((label != IGNORED).sum()))


def test_the_logits_are_neither_copied_nor_sorted(kind, monkeypatch):
    """The largest tensor that an operator of PyTorch makes has a number a pixel."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            found = function(*arguments, **(options or {}))
            parts = found if isinstance(found, tuple) else (found,)
            made.extend((str(function), part.numel()) for part in parts if isinstance(part, torch.Tensor))
            return found

    logits, label = images(150)
    sampler = kind(SimpleNamespace(ignore_index=IGNORED), thresh=0.7, min_kept=10)
    with ohem, Watch():
        sampler.sample(logits, label)
    assert max(size for _, size in made) <= label.numel()
    assert not [name for name, _ in made if "sort" in name]


def test_small_labels_are_read_as_the_host_reads_them(kind):
    logits, label = images()
    sampler = kind(SimpleNamespace(ignore_index=IGNORED), thresh=0.7, min_kept=10)
    ours, theirs = both(sampler, logits, label.to(torch.uint8))
    assert torch.equal(ours, theirs)


BAD = {
    "another size": (
        lambda label: label[..., :-1],
        AssertionError,
        r"`seg_label`.*\(2, 19, 13, 11\).*\(2, 1, 13, 10\)",
    ),
    "no channel": (lambda label: label.expand(2, 2, 13, 11), AssertionError, r"`seg_label`.*\(2, 2, 13, 11\)"),
    "a class out of range": (lambda label: label.clamp(max=40).fill_(40), ValueError, "target 40.*out of range"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_labels_are_refused_in_one_line(kind, change, error, message):
    logits, label = images()
    with ohem, pytest.raises(error, match=message) as caught:
        kind(SimpleNamespace(ignore_index=IGNORED), thresh=0.7, min_kept=10).sample(logits, change(label))
    assert "\n" not in str(caught.value)


def test_on_and_off_concern_samplers_that_there_are(kind):
    sampler = kind(SimpleNamespace(ignore_index=IGNORED), thresh=0.7, min_kept=10)
    theirs = kind.sample
    with ohem:
        assert kind.sample is not theirs
        assert sampler.sample.__func__ is kind.sample
    assert kind.sample is theirs


def test_another_version_is_refused(kind):
    sys.modules["mmseg"].__version__ = "0.30.0"
    with pytest.raises(UserError, match=r"mmsegmentation from 1\.2 up to, but not including, 1\.3, got 0\.30\.0"):
        ohem.on()
