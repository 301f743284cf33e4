"""The C++ backend against the reference, for every instruction set that this processor runs."""

import ctypes
import mmap

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

import sparse_kernels as sk
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.types import WEIGHABLE

if cpp_backend.unavailable_reason() is not None:
    pytest.skip(f"the C++ backend is {cpp_backend.unavailable_reason()}", allow_module_level=True)

OUTPUTS = (*WEIGHABLE, "argmax")
VALUES = tuple(name for name in OUTPUTS if name != "argmax")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SINGLE = DTYPES[:3]
# Rows: none, one, part of a group of lanes, several groups. Classes: one, both sides of the switch
# between the two ways through the logits (32), of a block (1,024), no multiple of any lane count.
SHAPES = [
    (0, 10),
    (1, 1),
    (5, 2),
    (17, 10),
    (33, 32),
    (9, 33),
    (33, 64),
    (9, 65),
    (7, 1000),
    (3, 1024),
    (5, 1025),
    (4, 5003),
]


def compare(logits, targets, tiny=2e-6, **settings):
    """Every row's error against float64 is a few roundings of the reference's own in float32."""
    ours = sk.row_stats(logits, targets, outputs=OUTPUTS, backend="cpp", **settings)
    exact = sk.row_stats(logits.double(), targets, outputs=OUTPUTS, backend="torch", **settings)
    same = sk.row_stats(logits, targets, outputs=OUTPUTS, backend="torch", **settings)
    double = logits.dtype is torch.float64
    if double:  # nothing is more exact here: the reference too has rounded each scaled logit
        finite = logits[logits.isfinite()].abs()
        tiny = 1e-14 + 2.0**-52 * (float(finite.max()) if finite.numel() else 0.0) / settings.get("temperature", 1.0)
    assert torch.equal(ours.argmax, exact.argmax)
    for name in VALUES:
        assert getattr(ours, name).dtype is (torch.float64 if double else torch.float32)
        a, b, c = (getattr(s, name).double() for s in (ours, exact, same))
        finite = b.isfinite()
        assert torch.equal(a[~finite].isnan(), b[~finite].isnan()), name
        assert torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()), name
        size = (1 + b[finite].abs()) / 2
        error, allowed = (a - b)[finite].abs(), 2 * (c - b)[finite].abs() + tiny * size
        assert (error <= allowed).all(), f"{name}: {error.max():.3g}, allowed {allowed[error.argmax()]:.3g}"


def plain_stats(logits, targets, temperature):
    """The statistics as PyTorch's own functions give them."""
    z = logits if logits.dtype is torch.float64 else logits.float()
    z = z / temperature
    log_p, p = torch.log_softmax(z, -1), torch.softmax(z, -1)
    top = p.topk(2, dim=-1).values
    return {
        "loss": F.cross_entropy(z, targets, reduction="none"),
        "entropy": -(p * log_p.masked_fill(p == 0, 0)).sum(-1),
        "grad_norm": (p - F.one_hot(targets, z.shape[-1])).norm(dim=-1),
        "sum_squares": p.square().sum(-1),
        "max_prob": top[:, 0],
        "margin": top[:, 0] - top[:, 1],
        "logsumexp": z.logsumexp(-1),
    }


# The hard ones for one pass in float32: sums that round the same way everywhere (equal logits), large
# exponents, a range that a shift has already rounded, terms of nothing.
DISTRIBUTIONS = {
    **{f"randn x {s}": lambda r, c, s=s: s * torch.randn(r, c) for s in (0.1, 1, 10, 100)},
    **{f"shift {s:+.0e}": lambda r, c, s=s: torch.randn(r, c) + s for s in (1e4, -1e4)},
    "confident": lambda r, c: torch.zeros(r, c).index_copy_(1, torch.tensor([0]), torch.linspace(1, 60, r)[:, None]),
    "equal": lambda r, c: torch.full((r, c), 3.3),
    "masked": lambda r, c: torch.randn(r, c).masked_fill(torch.rand(r, c) < 0.5, -torch.inf),
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("classes", [2, 10, 64, 100, 1000, 5003, 151_936])
def test_error_is_no_larger_than_pytorchs_own(instruction_set, classes, temperature):
    """The largest error over a set of rows is that of PyTorch's own functions, or of the reference, at the same
    precision, and at most a rounding more."""
    if classes > 100_000 and (temperature != 1.0 or instruction_set == "portable"):
        pytest.skip("slow, and shown by fewer classes")
    rows = 192 if classes < 5000 else 8 if classes > 100_000 else 32
    torch.manual_seed(12)
    for label, make in DISTRIBUTIONS.items():
        for dtype in SINGLE if temperature == 1.0 else SINGLE[:1]:
            logits, targets = make(rows, classes), torch.randint(0, classes, (rows,))
            targets[::3], targets[1::3] = 0, classes - 1
            logits = logits.scatter(1, targets[:, None], logits.gather(1, targets[:, None]).nan_to_num(0, 0, 0))
            logits = logits.to(dtype)
            settings = {"outputs": VALUES, "temperature": temperature}
            ours = sk.row_stats(logits, targets, backend="cpp", **settings)
            reference_stats = sk.row_stats(logits, targets, backend="torch", **settings)
            exact = sk.row_stats(logits.double(), targets, backend="torch", **settings)
            plain = plain_stats(logits, targets, temperature)
            for name in VALUES:
                wanted = getattr(exact, name)
                error = (getattr(ours, name).double() - wanted).abs()
                others = (plain[name], getattr(reference_stats, name))
                allowed = max((other.double() - wanted).abs().max() for other in others)
                # One rounding; of a difference of probabilities, that of the larger. A sum of squares over the square
                # of a sum rounds three times: the first sum once, and the second counts twice.
                size = getattr(exact, "max_prob" if name == "margin" else name).abs().max()
                allowed += (3 if name == "sum_squares" else 1) * 2**-24 * size
                assert error.max() <= allowed, f"{label} {dtype} {name}: {error.max():.3g} > {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_rows(instruction_set, shape, dtype):
    torch.manual_seed(0)
    targets = torch.randint(0, shape[1], shape[:1])
    for scale in (0.1, 1.0, 10.0, 100.0):
        compare((scale * torch.randn(shape)).to(dtype), targets)
    compare(torch.zeros(shape, dtype=dtype), targets)
    compare(torch.randn(shape).to(dtype), targets.int(), temperature=0.6)
    compare(torch.randn(shape).to(dtype), targets, label_smoothing=0.1)
    compare(torch.randint(0, 3, shape).to(dtype), targets)  # equals everywhere, so argmax has a choice


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(17, 10), (9, 65), (3, 3001)], ids=str)
def test_softcap(instruction_set, shape, dtype):
    torch.manual_seed(7)
    targets = torch.randint(0, shape[1], shape[:1])
    for scale in (0.1, 3.0, 100.0):
        logits = (scale * torch.randn(shape)).to(dtype)
        for softcap in (0.5, 5.0, 30.0):
            if scale <= softcap:  # beyond, float32 has equals where float64 has none
                compare(logits, targets, softcap=softcap, temperature=0.7, label_smoothing=0.2)
    logits = torch.randn(shape)
    logits[0, 1], logits[1, 2], logits[2, 3] = torch.inf, -torch.inf, torch.nan  # the cap makes two of them finite
    compare(logits, targets, softcap=3.0)


# Shape, the order of its dimensions in memory, and the dimension of the classes.
LAYOUTS = [
    ((2, 5, 6, 7), (0, 1, 2, 3), 1),
    ((3, 200, 3, 7), (0, 1, 2, 3), 1),
    ((3, 200, 3, 7), (0, 2, 3, 1), 1),
    ((40, 9), (1, 0), 1),
    ((40, 90), (1, 0), 1),
    ((6, 4, 5, 3, 2), (4, 2, 0, 1, 3), 2),
    ((130, 50), (0, 1), 0),
    ((1, 70, 1, 33), (0, 1, 2, 3), 1),
    ((4, 1, 5), (0, 1, 2), 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "order", "dim"), LAYOUTS, ids=str)
def test_classes_in_any_dimension_and_any_strides(instruction_set, shape, order, dim, dtype):
    torch.manual_seed(8)
    memory = (3 * torch.randn([shape[d] for d in order])).to(dtype)
    logits = memory.permute([order.index(d) for d in range(len(shape))])
    assert logits.shape == shape
    targets = torch.randint(0, shape[dim], shape[:dim] + shape[dim + 1 :])
    targets.view(-1)[::5] = -100
    compare(logits, targets, dim=dim)
    compare(logits, targets, dim=dim, label_smoothing=0.1, softcap=8.0)
    compare(logits[:-1] if dim else logits[:, :-1], targets[:-1], dim=dim)
    masked = logits.clone(memory_format=torch.preserve_format)
    masked.movedim(dim, -1)[..., : shape[dim] - 1][..., :80] = -torch.inf
    compare(masked, targets, dim=dim)


@pytest.mark.parametrize("classes", [10, 64, 1000, 3001])
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_shifted_rows(instruction_set, classes, shift):
    torch.manual_seed(1)
    compare(torch.randn(9, classes) + shift, torch.randint(0, classes, (9,)))


@pytest.mark.parametrize("classes", [3, 64, 65, 2500])
def test_confident_rows(instruction_set, classes):
    logits = torch.zeros(8, classes)
    targets = torch.tensor([0, classes - 1] * 4)
    for row, logit in enumerate((5.0, 20.0, 50.0, 500.0)):
        logits[2 * row : 2 * row + 2, 0] = logit  # right in the even rows, wrong in the odd
    compare(logits, targets)
    ours = sk.row_stats(logits, targets, outputs=OUTPUTS, backend="cpp")
    exact = sk.row_stats(logits.double(), targets, outputs=OUTPUTS, backend="torch")
    # Relative accuracy where the class is right and sure, which summing the target in would lose.
    for name in ("loss", "entropy", "grad_norm"):
        torch.testing.assert_close(
            getattr(ours, name)[[0, 2]], getattr(exact, name)[[0, 2]].float(), rtol=2e-6, atol=0, msg=name
        )
    assert ours.loss[6] == 0
    assert ours.entropy[6] == 0


@pytest.mark.parametrize("classes", [12, 1000, 3000])
def test_masked_and_ignored_rows(instruction_set, classes):
    torch.manual_seed(2)
    logits, targets = torch.randn(12, classes), torch.randint(0, classes, (12,))
    logits[0, ::2] = -torch.inf
    logits[1, : classes - 1] = -torch.inf  # all but one: probability exactly 1, entropy exactly 0
    targets[1] = classes - 1
    logits[2, 1:] = -torch.inf
    targets[2] = 1  # a masked target: the loss is inf
    targets[3] = targets[8] = -100
    logits[3] = torch.nan
    logits[4, : min(classes, 2048) - 1] = -torch.inf  # whole blocks of -inf
    targets[4] = classes - 1
    compare(logits, targets)
    stats = sk.row_stats(logits, targets, outputs=OUTPUTS, backend="cpp")
    assert stats.entropy[1] == 0
    assert stats.loss[1] == 0
    assert stats.loss[2] == torch.inf
    assert all(getattr(stats, name)[3] == 0 for name in OUTPUTS)


@pytest.mark.parametrize("classes", [12, 64, 65, 1000, 3000])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_bad_logit_anywhere_is_never_lost(instruction_set, classes, bad):
    torch.manual_seed(3)
    columns = sorted({0, 1, 7, 8, classes // 2, classes - 2, classes - 1} & set(range(classes)))
    logits = torch.randn(2 * len(columns) + 1, classes)
    targets = torch.full((logits.shape[0],), 5)
    for i, column in enumerate(columns):
        logits[i, column] = bad
        logits[len(columns) + i, column] = bad
        targets[len(columns) + i] = column
    logits[-1] = -torch.inf
    gated = sk.gate_rows(
        logits, targets, torch.tensor([-1e30]), weights={"loss": 0.7, "entropy": 0.3}, outputs=OUTPUTS, backend="cpp"
    )
    assert gated.significance.isnan().all()
    assert all(getattr(gated.stats, name).isnan().all() for name in VALUES)
    assert (gated.stats.argmax == -1).all()
    assert not gated.mask.any()
    assert gated.invalid == logits.shape[0]


def test_nan_in_a_block_of_masked_logits(instruction_set):
    logits = torch.full((1, 3000), -torch.inf)
    logits[0, 100] = torch.nan
    logits[0, 2500] = 1.0
    assert sk.row_stats(logits, torch.tensor([2500]), backend="cpp").loss.isnan().all()


@pytest.mark.parametrize("gate_temperature", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(100, 10), (300, 100), (20, 3000)])
def test_gate_is_the_reference_gate(instruction_set, shape, gate_temperature):
    torch.manual_seed(4)
    logits, targets = 3 * torch.randn(shape), torch.randint(0, shape[1], shape[:1])
    targets[::7] = -100
    settings = {
        "weights": {"loss": 0.7, "entropy": 0.3, "grad_norm": -0.1, "max_prob": 0.5},
        "offset": torch.randn(shape[0]),
        "outputs": ["loss", "max_prob"],
        "gate_temperature": gate_temperature,
        "p_min": 0.1,
        "seed": 2**63 + 12345,
        "step": torch.tensor(2**33 + 1),
    }
    threshold = torch.tensor([5.0])
    ours = sk.gate_rows(logits, targets, threshold, backend="cpp", **settings)
    wanted = sk.gate_rows(logits, targets, threshold, backend="torch", **settings)
    torch.testing.assert_close(ours.significance, wanted.significance, rtol=1e-5, atol=1e-5)
    near = (wanted.significance - threshold).abs() < 1e-4  # rounding may fall on either side
    assert torch.equal(ours.mask[~near], wanted.mask[~near])
    assert not ours.mask[::7].any()
    assert (ours.significance[::7] == 0).all()
    assert 0 < ours.mask.sum() < shape[0]
    assert ours.stats.entropy is None
    torch.testing.assert_close(ours.stats.loss, wanted.stats.loss)
    if gate_temperature:
        torch.testing.assert_close(ours.weight[~near], wanted.weight[~near], rtol=1e-4, atol=1e-5)
    else:
        assert ours.weight is None


@pytest.mark.parametrize("classes", [6, 100])
@pytest.mark.parametrize("ignored", [0, 3, -1])
def test_ignore_index_may_be_a_class(instruction_set, classes, ignored):
    targets = torch.tensor([0, 3, 5, 3, 0, 1]) if ignored >= 0 else torch.tensor([0, -1, 5, 3, -1, 1])
    compare(torch.randn(6, classes), targets, ignore_index=ignored)
    loss = sk.row_stats(torch.randn(6, classes), targets, ignore_index=ignored, backend="cpp").loss
    assert torch.equal(loss == 0, targets == ignored)


def test_row_stride_and_more_dimensions():
    logits = torch.randn(6, 40)[:, :30]
    targets = torch.randint(0, 30, (6,))
    compare(logits, targets)
    compare(torch.randn(2, 3, 30), targets.reshape(2, 3))
    compare(torch.randn(30), torch.tensor(3))
    compare(torch.randn(6, 30), torch.randint(0, 30, (12,))[::2])


def test_threads_agree_bit_for_bit():
    logits, targets = torch.randn(3001, 300), torch.randint(0, 300, (3001,))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        assert cpp_backend._cpp.max_threads() == threads  # one pool: PyTorch's setting is ours
        results.append(sk.row_stats(logits, targets, outputs=OUTPUTS, backend="cpp"))
    torch.set_num_threads(before)
    for name in OUTPUTS:
        for other in results[1:]:
            assert torch.equal(getattr(results[0], name), getattr(other, name)), name


def test_one_openmp_runtime():
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "gomp" in line or "libiomp" in line}
    ours = {path for path in loaded if "scikit" not in path and "sklearn" not in path}
    assert len(ours) == 1, ours


@pytest.mark.parametrize(("rows", "classes"), [(1, 40_000), (3, 33_333), (2, 16_384), (5, 100_001)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_are_shared_by_all_threads(instruction_set, rows, classes, dtype):
    torch.manual_seed(13)
    logits = (3 * torch.randn(rows, classes)).to(dtype)
    logits[0, 9_000:] = -torch.inf  # a part without a term
    logits[1:][-1:, :9_000] = -torch.inf
    targets = torch.randint(9_000, classes, (rows,))
    targets[0] = 17
    before = torch.get_num_threads()
    settings = {"outputs": OUTPUTS, "label_smoothing": 0.1 * (rows == 3), "softcap": 9.0 * (rows == 2)}
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(sk.row_stats(logits, targets, backend="cpp", **settings))
    compare(logits, targets, label_smoothing=settings["label_smoothing"], softcap=settings["softcap"])
    with pytest.raises(ValueError, match=f"row {rows - 1} "):
        sk.row_stats(logits, torch.where(targets == targets[-1], classes, targets), backend="cpp")
    torch.set_num_threads(before)
    for name in OUTPUTS:
        for other in results[1:]:
            assert torch.equal(getattr(results[0], name), getattr(other, name)), name


@pytest.fixture
def sparse_memory():
    """9 GB of zeros that take memory only where they are written."""
    try:
        memory = mmap.mmap(-1, 9 * 2**30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    except OSError as error:
        pytest.skip(f"no 9 GB of address space: {error}")
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert address
    return torch.frombuffer(memory, dtype=torch.float32)


@pytest.mark.parametrize("where", ["rows", "planes", "classes"])
def test_offsets_above_2_to_the_31(instruction_set, sparse_memory, where):
    """Logits more than 2^31 elements from the first, in a storage of which only their pages are written."""
    torch.manual_seed(14)
    if where == "rows":  # class_stride 1, a row stride of 2^28 and more
        logits = sparse_memory.as_strided((9, 100), (2**28 + 8, 1))
    elif where == "planes":  # N C H W, the images 2^31 apart
        logits = sparse_memory.as_strided((2, 7, 5, 8), (2**31 + 8, 40, 8, 1))
    else:  # classes 2^28 apart, of 24 adjacent rows
        logits = sparse_memory.as_strided((9, 24), (2**28 + 8, 1))
    logits.copy_(3 * torch.randn(logits.shape))
    dim = -1 if where == "rows" else 1 if where == "planes" else 0
    values = logits.clone()
    targets = torch.randint(0, logits.shape[dim], values.select(dim, 0).shape)
    compare(values, targets, dim=dim)
    ours = sk.row_stats(logits, targets, outputs=OUTPUTS, dim=dim, backend="cpp")
    wanted = sk.row_stats(values, targets, outputs=OUTPUTS, dim=dim, backend="cpp")
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(ours, name), getattr(wanted, name), rtol=1e-6, atol=1e-6)
    gradients = []
    for leaf in (logits.detach(), values):
        leaf.requires_grad_()
        stats = sk.row_stats(leaf, targets, dim=dim, backend="cpp")
        gradients.append(backward_of(stats, leaf))
    torch.testing.assert_close(*gradients)


def backward_of(stats, leaf):
    """The gradient from C++ into memory of its own, whatever the strides of the logits."""
    return torch.autograd.grad((stats.loss + 0.5 * stats.entropy).sum(), leaf)[0].contiguous()


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.example([3], 37, 30.0, torch.float64, 0.0, 0.0, "last", torch.int64, 0.3, 0.0, 0.0, 398)
@hypothesis.given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    classes=st.one_of(st.integers(1, 90), st.integers(1, 1500)),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
    masked=st.floats(0, 0.9),
    ignored=st.floats(0, 1),
    layout=st.sampled_from(["last", "first", "middle", "every other", "a part"]),
    targets_dtype=st.sampled_from([torch.int64, torch.int32]),
    temperature=st.sampled_from([1.0, 0.3, 20.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    softcap=st.sampled_from([0.0, 50.0]),
    seed=st.integers(0, 2**31),
)
def test_any_call(
    shape, classes, scale, dtype, masked, ignored, layout, targets_dtype, temperature, label_smoothing, softcap, seed
):
    generator = torch.Generator().manual_seed(seed)
    position = {"first": 0, "middle": len(shape) // 2}.get(layout, len(shape))
    full = [*shape[:position], classes, *shape[position:]]
    if layout == "every other":
        memory = torch.empty([2 * n for n in full])
        logits = memory[tuple(slice(None, None, 2) for _ in full)]
    elif layout == "a part":
        logits = torch.empty([n + 3 for n in full])[tuple(slice(1, n + 1) for n in full)]
    else:
        logits = torch.empty(full)
    logits.copy_(scale * torch.randn(full, generator=generator))
    logits.masked_fill_(torch.rand(full, generator=generator) < masked, -torch.inf)
    # One element into a storage: aligned to 4 bytes or 8, never to a vector.
    count = int(torch.tensor(shape).prod()) if shape else 1
    targets = torch.randint(0, classes, (count + 1,), generator=generator).to(targets_dtype)[1:].reshape(shape)
    targets[torch.rand(shape, generator=generator) < ignored * (ignored > 0.5)] = -100
    compare(
        logits.to(dtype) if dtype is not torch.float32 else logits,
        targets,
        dim=position,
        temperature=temperature,
        label_smoothing=label_smoothing,
        softcap=softcap,
        # A softcapped logit is rounded at its own size, here up to 50: two of them, half an ulp and tanh's own, apart.
        tiny=4e-6 + 2 * softcap / temperature * 2.0**-24,
    )


def test_what_is_not_served_falls_back_or_says_why():
    logits, targets = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    scattered = torch.randn(3, 4, 3, 4, 3, 4, 3, 4, 3, 4, 5)[:, ::2, :, ::2, :, ::2, :, ::2, :, ::2]
    with pytest.raises(sk.BackendUnavailable, match="strides"):
        sk.row_stats(scattered, torch.zeros(scattered.shape[:-1], dtype=torch.int64), backend="cpp")
    with pytest.raises(sk.BackendUnavailable, match="meta"):
        sk.row_stats(logits.to("meta"), targets.to("meta"), backend="cpp")
