"""Rows in lanes: few classes, pixels, and whatever a tile of them may hold, against the reference."""

import pytest
import torch
from test_cpp import DTYPES, OUTPUTS, compare

import sparse_kernels as sk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 7, 8, 9, 10, 12, 15, 16, 17, 21, 31, 32, 33])
def test_every_number_of_few_classes(instruction_set, classes, dtype):
    """Both sides of four and eight columns, which are transposed at once, and of whole groups of rows."""
    torch.manual_seed(classes)
    for rows in (1, 15, 16, 17, 40):
        compare((4 * torch.randn(rows, classes)).to(dtype), torch.randint(0, classes, (rows,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 150, 20, 29),  # two tiles and a part of one, five blocks of columns; rows are left over
        (1, 21, 17, 31),
        (3, 19, 1, 15),  # less than a group of lanes
        (2, 40, 16, 16),  # exactly one tile
    ],
    ids=str,
)
def test_pixels_of_several_tiles_and_blocks(instruction_set, shape, dtype):
    torch.manual_seed(1)
    classes = shape[1]
    logits = (3 * torch.randn(shape)).to(dtype)
    targets = torch.randint(0, classes, (shape[0], *shape[2:]))
    targets[..., ::7] = -100
    compare(logits, targets, dim=1)
    compare(logits, targets.int(), dim=1, softcap=5.0, temperature=0.7, label_smoothing=0.1)
    logits.view(shape[0], classes, -1)[:, : classes - 1, ::3] = -torch.inf  # whole blocks of -inf
    compare(logits, targets, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_planes_are_as_their_images_alone(dtype):
    """From 16 million logits on planes are fetched in another way, past the caches."""
    torch.manual_seed(6)
    logits = torch.randn(3, 22, 504, 513, dtype=torch.float16).to(dtype)
    assert logits.numel() > 16 << 20 > 2 * logits[0].numel()
    targets = torch.randint(0, 22, (3, 504, 513))
    together = sk.row_stats(logits, targets, outputs=OUTPUTS, dim=1, backend="cpp")
    for image in range(3):
        alone = sk.row_stats(
            logits[image : image + 1], targets[image : image + 1], outputs=OUTPUTS, dim=1, backend="cpp"
        )
        for name in OUTPUTS:
            assert torch.equal(getattr(together, name)[image], getattr(alone, name)[0]), name


@pytest.mark.parametrize("rows", [31, 33, 63, 65, 127, 128, 129, 160, 255, 256, 257, 290])
def test_rows_about_those_that_are_decided_together(instruction_set, rows):
    """Statistics and decisions are made of several vectors of rows at once, of which the last may be in part."""
    torch.manual_seed(rows)
    logits, targets = 3 * torch.randn(rows, 9), torch.randint(0, 9, (rows,))
    compare(logits, targets)
    compare(logits.t().contiguous(), targets, dim=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["pixels", "few classes"])
def test_bad_rows_of_a_tile_are_counted_and_leave_the_others_alone(instruction_set, layout, dtype):
    """Also a NaN with a sign, which is below all numbers where logits of 16 bits are compared as integers."""
    torch.manual_seed(2)
    logits, targets = torch.randn(600, 21).to(dtype), torch.randint(0, 21, (600,))
    bad = {3: torch.nan, 255: torch.inf, 256: torch.nan, 257: -torch.nan, 598: -torch.nan, 599: torch.nan}
    for row, value in bad.items():
        logits[row, row % 21] = value
    negative = [257, 598]
    logits[negative] = torch.where(logits[negative].isnan(), -logits[negative].abs(), logits[negative])
    assert logits[negative].isnan().logical_and(logits[negative].signbit()).sum() == 2
    targets[[3, 257]] = torch.tensor([3, 257 % 21])  # the target's own logit
    logits[17] = -torch.inf
    bad_rows = torch.tensor([*bad, 17])
    dim = 1
    if layout == "pixels":
        logits, dim = logits.t().contiguous(), 0
    offset = torch.randn(600)
    settings = {"weights": {"loss": 1.0, "entropy": 0.5}, "offset": offset, "dim": dim, "outputs": OUTPUTS}
    ours = sk.gate_rows(logits, targets, torch.tensor([2.0]), backend="cpp", **settings)
    wanted = sk.gate_rows(logits, targets, torch.tensor([2.0]), backend="torch", **settings)
    assert ours.invalid == wanted.invalid == len(bad_rows)
    assert ours.significance.isnan().nonzero().ravel().tolist() == sorted(bad_rows.tolist())
    torch.testing.assert_close(ours.significance, wanted.significance, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(ours.mask, wanted.mask)
    assert torch.equal(ours.stats.argmax, wanted.stats.argmax)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pixels_of_16_bits_are_as_the_same_logits_in_float32(instruction_set, dtype):
    """Signs of zeros, the largest and smallest numbers and infinities among them, as targets and as others."""
    torch.manual_seed(3)
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, info.max, info.min, info.tiny, -info.tiny, info.tiny / 4, -torch.inf, 3.0])
    logits = special[torch.randint(0, len(special), (2, 33, 20, 21))].to(dtype)
    logits[:, 7] = torch.randn(2, 20, 21).to(dtype)  # no row is of infinities alone
    targets = torch.randint(0, 33, (2, 20, 21))
    ours = sk.row_stats(logits, targets, outputs=OUTPUTS, dim=1, backend="cpp")
    wide = sk.row_stats(logits.float(), targets, outputs=OUTPUTS, dim=1, backend="cpp")
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(ours, name), getattr(wide, name), rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("row", [0, 300, 599])
def test_a_target_out_of_range_is_named_by_its_row(instruction_set, row):
    targets = torch.zeros(600, dtype=torch.int64)
    targets[row:] = 21
    for logits, dim in ((torch.randn(600, 21), 1), (torch.randn(21, 600), 0)):
        with pytest.raises(ValueError, match=f"21.* {row}|{row}.* 21"):
            sk.row_stats(logits, targets, dim=dim, backend="cpp")


def test_classes_that_a_float_cannot_count(instruction_set):
    """2^24 + 1 is no float32: the target must not be mistaken for its neighbours."""
    classes, target = 2**24 + 4, 2**24 + 1
    logits = torch.zeros(classes, 2, dtype=torch.bfloat16)
    logits[target - 1 : target + 2] = torch.tensor([[21.0], [22.0], [23.0]], dtype=torch.bfloat16)
    found = sk.row_stats(logits, torch.tensor([target, target + 1]), dim=0, backend="cpp")
    e = torch.tensor([21.0, 22.0, 23.0], dtype=torch.float64).exp()
    total = e.sum() + classes - 3
    torch.testing.assert_close(
        found.loss.double(), total.log() - torch.tensor([22.0, 23.0]).double(), rtol=1e-5, atol=0
    )
