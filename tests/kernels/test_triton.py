"""The Triton kernels against the float64 reference: compiled where there is a GPU, else interpreted on the CPU; and
compiled for GPUs that are not here.

A process that interprets cannot compile, so what compiles ahead of time runs in a process of its own.
"""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import sparse_kernels as sk
from sparse_kernels import philox, reference
from sparse_kernels._arguments import GateCall, Settings, StatsCall
from sparse_kernels.backends.triton import backend as triton_backend
from sparse_kernels.backends.triton import launch, plan
from sparse_kernels.types import STATISTICS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, on NaN and inf
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="neither a GPU nor interpreted")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rows: none, one, part of a tile, several tiles. Classes: one, a thread's, a warp's share of several rows, one block
# aligned and not, several blocks and a part.
SHAPES = [(0, 10), (1, 1), (130, 10), (17, 65), (2, 512), (2, 1001), (1, 4097)]


@pytest.fixture(autouse=True)
def tensors_where_kernels_run():
    torch.set_default_device(DEVICE if INTERPRETED or torch.cuda.is_available() else "cpu")
    yield
    torch.set_default_device(None)


def stats_call(logits, targets, outputs=STATISTICS, **settings):
    dim = settings.pop("dim", -1)
    return StatsCall(logits, targets, outputs, dim, Settings(**settings))


def serve(call):
    assert triton_backend.row_stats_unsupported_reason(call) is None
    return triton_backend.row_stats(call)


def compare(logits, targets, outputs=STATISTICS, tiny=2e-6, **settings):
    """The error against float64 is a few roundings of the reference's own in the same precision."""
    call = stats_call(logits, targets, outputs, **settings)
    ours, same = serve(call), reference.row_stats(call)
    exact = reference.row_stats(replace(call, logits=logits.double()))
    if logits.dtype is torch.float64:
        tiny = 1e-14
    for name in outputs:
        found = getattr(ours, name)
        assert found.dtype is getattr(same, name).dtype, name
        a, b, c = (getattr(s, name).double() for s in (ours, exact, same))
        finite = b.isfinite()
        assert torch.equal(a[~finite].isnan(), b[~finite].isnan()), name
        assert torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()), name
        error, allowed = (a - b)[finite].abs(), 2 * (c - b)[finite].abs() + tiny * (1 + b[finite].abs()) / 2
        assert (error <= allowed).all(), f"{name}: {error.max():.3g}, allowed {allowed[error.argmax()]:.3g}"
    for name in set(STATISTICS) - set(outputs):
        assert getattr(ours, name) is None
    return ours


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_rows(shape, dtype):
    torch.manual_seed(0)
    targets = torch.randint(0, shape[1], shape[:1])
    compare((3 * torch.randn(shape)).to(dtype), targets)
    if dtype is torch.float32:
        compare(torch.randn(shape), targets.int(), temperature=0.6)


@runs
@pytest.mark.parametrize("name", STATISTICS)
def test_each_output_alone(name):
    torch.manual_seed(1)
    compare(3 * torch.randn(5, 70), torch.randint(0, 70, (5,)), outputs=[name])


# Half a unit in a float32's last place, relative to the value; the GPU's own exp2 is off by 2 units, 4 of these.
ROUNDING = 2**-24 if INTERPRETED else 5 * 2**-24


@runs
@pytest.mark.parametrize("classes", [2, 3, 10, 1000, 151_936])
def test_error_is_no_larger_than_that_of_plain_pytorch(classes):
    """The largest error over some rows of a kind is at most the larger of the errors of what people write in float32
    and of the reference in float32, and one rounding of the largest value.

    With two exceptions: entropy, as every form of it, has the rounding of S >= 1, the sum of exponentials, before its
    logarithm, so one rounding of 1 where that is larger; and sum_squares has S squared, so two roundings.
    """
    torch.manual_seed(1)
    rows = {2: 100, 3: 100, 10: 100, 1000: 2}.get(classes, 1)
    random = torch.randn(rows, classes)
    confident, masked, lowest = random.clone(), random.clone(), random.clone()
    confident[:, 0] = 30.0
    masked[:, 1:-1:2] = -torch.inf
    lowest[:, 1:] = torch.finfo(torch.float32).min
    kinds = {"10": 10 * random, "confident": confident}
    if classes < 100_000:
        kinds |= {"0.1": 0.1 * random, "1": random, "100": 100 * random, "+1e4": random + 1e4, "-1e4": random - 1e4}
        kinds |= {"masked": masked, "lowest": lowest, "equal": torch.zeros(1, classes)}
        kinds["all lowest"] = torch.full((1, classes), torch.finfo(torch.float32).min)
    for kind, logits in kinds.items():
        targets = torch.randint(0, classes, (len(logits),))
        targets[0], targets[-1] = 0, classes - 1
        call = stats_call(logits, targets)
        ours, same = serve(call), reference.row_stats(call)
        exact = reference.row_stats(replace(call, logits=logits.double()))
        for name, plain in plain_statistics(logits, targets).items():
            right = getattr(exact, name)
            finite = right.isfinite()
            assert torch.equal(getattr(ours, name).double()[~finite], right[~finite]), (kind, name)
            error, *theirs = (
                (found.double() - right)[finite].abs().max().item()
                for found in (getattr(ours, name), plain, getattr(same, name))
            )
            largest = right[finite].abs().max().item()
            roundings = {"entropy": max(1.0, largest), "sum_squares": 2 * largest}.get(name, largest)
            assert error <= max(theirs) + ROUNDING * roundings, (kind, name, error, theirs, largest)
        assert torch.equal(ours.argmax, exact.argmax), kind


def plain_statistics(logits, targets):
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    top = p.topk(2, -1).values
    wanted = torch.nn.functional.one_hot(targets, logits.shape[-1])
    return {
        "loss": torch.nn.functional.cross_entropy(logits, targets, reduction="none"),
        "entropy": -torch.where(p == 0, 0.0, p * log_p).sum(-1),
        "grad_norm": (p - wanted).norm(dim=-1),
        "sum_squares": p.square().sum(-1),
        "max_prob": top[..., 0],
        "margin": top[..., 0] - top[..., 1],
        "logsumexp": logits.logsumexp(-1),
    }


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "settings", [{"softcap": 5.0}, {"label_smoothing": 0.1}, {"softcap": 30.0, "temperature": 3.0}]
)
def test_softcap_and_smoothing(settings, dtype):
    torch.manual_seed(2)
    for classes in (10, 600):
        logits = torch.randn(6, classes, dtype=dtype) * torch.tensor([0.01, 1, 3, 10, 40, 500.0])[:, None]
        # argmax follows which of two logits rounds above the other near the cap.
        compare(logits, torch.randint(0, classes, (6,)), outputs=[n for n in STATISTICS if n != "argmax"], **settings)


@runs
@pytest.mark.parametrize("classes", [2, 3, 65, 600])
def test_confident_rows(classes):
    logits = torch.zeros(8, classes)
    targets = torch.tensor([0, classes - 1] * 4)
    for row, logit in enumerate((5.0, 20.0, 50.0, 500.0)):
        logits[2 * row : 2 * row + 2, 0] = logit  # right in the even rows, wrong in the odd
    ours = compare(logits, targets)
    exact = reference.row_stats(stats_call(logits.double(), targets))
    # Relative accuracy where the class is right and sure, which summing the target in would lose.
    for name in ("loss", "entropy", "grad_norm"):
        torch.testing.assert_close(
            getattr(ours, name)[[0, 2]], getattr(exact, name)[[0, 2]].float(), rtol=2e-6, atol=0, msg=name
        )
    assert ours.loss[6] == 0
    assert ours.entropy[6] == 0
    if classes == 2:  # and where it is wrong and sure, but for the other classes' share of the sum
        torch.testing.assert_close(ours.entropy[:4], exact.entropy[:4].float(), rtol=2e-6, atol=0)


@runs
@pytest.mark.parametrize("classes", [12, 100, 1300])
def test_masked_and_ignored_rows(classes):
    torch.manual_seed(2)
    logits, targets = torch.randn(5, classes), torch.randint(0, classes, (5,))
    logits[0, ::2] = -torch.inf
    logits[1, : classes - 1] = -torch.inf  # all but one, whole blocks of -inf: probability exactly 1
    targets[1] = classes - 1
    logits[2, 1:] = -torch.inf
    targets[2] = 1  # a masked target: the loss is inf
    targets[3] = targets[4] = -100
    logits[3] = torch.nan
    stats = compare(logits, targets)
    compare(logits, targets, label_smoothing=0.1)
    assert stats.entropy[1] == 0
    assert stats.loss[1] == 0
    assert stats.loss[2] == torch.inf
    assert all(getattr(stats, name)[3] == 0 for name in STATISTICS)


@runs
@pytest.mark.parametrize("classes", [12, 100, 1300])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_bad_logit_anywhere_is_never_lost(classes, bad):
    torch.manual_seed(3)
    columns = sorted({0, 1, classes // 2, classes - 1})
    logits = torch.randn(2 * len(columns) + 1, classes)
    targets = torch.full((logits.shape[0],), 5)
    for i, column in enumerate(columns):
        logits[i, column] = bad
        logits[len(columns) + i, column] = bad
        targets[len(columns) + i] = column
    logits[-1] = -torch.inf
    for gate_temperature in (0.0, 0.5)[: 1 + (classes == 12)]:
        gated = serve_gate(logits, targets, torch.tensor([-1e30]), gate_temperature=gate_temperature, p_min=0.5)[0]
        assert gated.significance.isnan().all()
        assert all(getattr(gated.stats, name).isnan().all() for name in STATISTICS if name != "argmax")
        assert (gated.stats.argmax == -1).all()
        assert not gated.mask.any()
        assert gated.invalid == logits.shape[0]


def serve_gate(logits, targets, threshold, **settings):
    weights = settings.pop("weights", {"loss": 0.7, "entropy": 0.3})
    offset = settings.pop("offset", None)
    call = GateCall(logits, targets, STATISTICS, -1, Settings(**settings), threshold, weights, offset)
    assert triton_backend.gate_rows_unsupported_reason(call) is None
    return triton_backend.gate_rows(call), call


@runs
@pytest.mark.parametrize("gate_temperature", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(140, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("step", [2**33 + 1, torch.tensor(2**33 + 1), torch.tensor(7, dtype=torch.int32)])
def test_gate_is_the_reference_gate(shape, gate_temperature, dtype, step):
    torch.manual_seed(4)
    logits, targets = 3 * torch.randn(shape, dtype=dtype), torch.randint(0, shape[1], shape[:1])
    targets[::7] = -100
    threshold = torch.tensor([5.0])
    ours, call = serve_gate(
        logits,
        targets,
        threshold,
        weights=dict.fromkeys([n for n in STATISTICS if n != "argmax"], 0.3) | {"grad_norm": -0.1},
        offset=torch.randn(shape[0]),
        gate_temperature=gate_temperature,
        p_min=0.1,
        seed=2**63 + 12345,
        step=step,
    )
    wanted = reference.gate_rows(call)
    torch.testing.assert_close(ours.significance, wanted.significance, rtol=1e-5, atol=1e-5)
    near = (wanted.significance - threshold).abs() < 1e-4  # rounding may fall on either side
    assert torch.equal(ours.mask[~near], wanted.mask[~near])
    assert not ours.mask[::7].any()
    assert (ours.significance[::7] == 0).all()
    assert ours.invalid == 0
    assert 0 < ours.mask.sum() < shape[0]
    if gate_temperature:
        torch.testing.assert_close(ours.weight[~near], wanted.weight[~near], rtol=1e-4, atol=1e-5)
    else:
        assert ours.weight is None


@runs
def test_random_numbers_are_the_reference_numbers():
    # p = p_min = 1/2 everywhere and the same weight: the mask is the random number's first bit.
    for seed, step in ((0, 0), (2**64 - 1, 2**63 - 1), (2**31, 2**40 + 3)):
        ours, _ = serve_gate(
            torch.zeros(200, 2), torch.zeros(200, dtype=torch.int64), torch.tensor(1e9),
            gate_temperature=1.0, p_min=0.5, seed=seed, step=step,
        )  # fmt: skip
        wanted = philox.uniform(200, seed=seed, step=step, device=torch.device(DEVICE)) < 0.5
        assert torch.equal(ours.mask, wanted)


@runs
@pytest.mark.parametrize("ignored", [0, 3, -1])
def test_ignore_index_may_be_a_class(ignored):
    targets = torch.tensor([0, 3, 5, 3, 0, 1]) if ignored >= 0 else torch.tensor([0, -1, 5, 3, -1, 1])
    stats = compare(torch.randn(6, 6), targets, ignore_index=ignored)
    assert torch.equal(stats.loss == 0, targets == ignored)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU is not waited for")
def test_a_bad_target_says_where():
    for target in (6, -1, 2**40):
        with pytest.raises(ValueError, match=f"target {target} in row 1 "):
            serve(stats_call(torch.randn(3, 6), torch.tensor([0, target, 2])))


@runs
def test_a_bad_target_is_counted_where_the_device_would_have_to_be_waited_for(monkeypatch):
    monkeypatch.setattr(reference, "check_targets", lambda call: None)
    gated, _ = serve_gate(torch.randn(4, 6), torch.tensor([0, 6, -1, -100]), torch.tensor(-1e9))
    assert gated.significance.isnan().tolist() == [False, True, True, False]
    assert gated.stats.argmax.tolist()[1:] == [-1, -1, 0]
    assert gated.mask.tolist() == [True, False, False, False]
    assert gated.invalid == 2


LAYOUTS = {
    "row stride": lambda: torch.randn(6, 40)[:, :30],
    "unaligned": lambda: torch.randn(6 * 31 + 1)[1:].reshape(6, 31)[:, 1:],
    "more dimensions": lambda: torch.randn(2, 3, 30),
    "two loops": lambda: torch.randn(2, 5, 30)[:, :3],
    "one row": lambda: torch.randn(30),
    "class stride": lambda: torch.randn(30, 6).t(),
    "every other class": lambda: torch.randn(6, 60)[:, ::2],
    "one row repeated": lambda: torch.randn(1, 30).expand(6, 30),
}


@runs
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    torch.manual_seed(5)
    logits = LAYOUTS[layout]()
    targets = torch.randint(0, 30, (*logits.shape[:-1], 2))[..., 0]  # strided as well
    compare(logits, targets)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_from_any_address(dtype):
    """The interpreter checks what is claimed of it (conftest.py); a GPU traps."""
    for offset in (1, 3):
        whole = torch.randn(2 * 1037 + offset).to(dtype)
        compare(whole[offset:].reshape(2, 1037), torch.tensor([0, 1036]), outputs=["loss"])


@runs
@pytest.mark.parametrize("classes", [1, 21])
def test_classes_in_dim_1(classes):
    torch.manual_seed(6)
    targets = torch.randint(0, classes, (2, 5, 33))
    logits = torch.randn(2, classes, 5, 33)
    compare(logits, targets, dim=1)
    compare(logits.to(memory_format=torch.channels_last), targets, dim=1)
    compare(torch.randn(2, classes + 1, 5, 33)[:, 1:], targets, dim=1)
    compare(torch.randn(2, classes, 5, 32), targets[..., :32].contiguous(), dim=1)  # whole words of several pixels
    compare(torch.randn(2, classes, 7), targets[:, 0, :7], dim=1)
    compare(torch.randn(classes, 2, 7), targets[:, 0, :7], dim=0)


def test_what_is_not_served_says_why():
    call = stats_call(torch.randn(2, 6, 9, 5)[:, :3, :4], torch.zeros(2, 3, 4, dtype=torch.int64))
    assert "two nested loops" in triton_backend.row_stats_unsupported_reason(call)
    call = stats_call(torch.randn(2, 5, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta"))
    assert "tensors are on meta" in triton_backend.row_stats_unsupported_reason(call)


def test_a_call_that_names_no_backend_never_comes_here(monkeypatch):
    """On a CPU the interpreter is for tests."""
    monkeypatch.setattr(triton_backend, "row_stats", lambda call: pytest.fail("served by default"))
    sk.row_stats(torch.randn(2, 5), torch.tensor([0, 1]))
    servers = [server for servers in sk._dispatch.TABLE.values() for server in servers if server.backend == "triton"]
    assert {server.kinds for server in servers} == {("cuda",)}


@runs
def test_slices_of_rows(many_processors, monkeypatch):
    grids, launched = [], plan.KeptLaunch.compile_and_run

    def seen(self, *arguments):
        grids.append(self.grid[1])
        launched(self, *arguments)

    monkeypatch.setattr(plan.KeptLaunch, "compile_and_run", seen)
    torch.manual_seed(10)
    logits = 3 * torch.randn(6, 1101)
    targets = torch.tensor([0, 1100, 1024, -100, 5, 1099])
    logits[1, 100:] = -torch.inf  # whole slices
    logits[2, ::2] = torch.finfo(torch.float32).min
    logits[2, 900:] = torch.finfo(torch.float32).min
    logits[4, 1030:1040] = 50.0  # the largest, several times, in one slice
    logits[5, [10, 800]] = 60.0  # and in two
    targets[1] = 50
    stats = compare(logits, targets)
    assert stats.argmax[5] == 10
    assert grids[0] > 2
    assert grids[1] == 1
    if not INTERPRETED:  # which runs one program after the other
        again = serve(stats_call(logits, targets))
        assert all(torch.equal(getattr(stats, name), getattr(again, name)) for name in STATISTICS)
    compare(logits[:3], targets[:3], label_smoothing=0.1, outputs=["loss"])
    compare(torch.randn(1, 601, dtype=torch.float64), targets[:1])
    compare(3 * torch.randn(1, 40, 5), torch.randint(0, 40, (1, 5)), dim=1)
    for row, column in enumerate((0, 600, 1100)):
        logits[row, column] = torch.nan
    gated, _ = serve_gate(logits, targets, torch.tensor(-1e30))
    assert gated.mask.tolist() == [False, False, False, False, True, True]
    assert gated.invalid == 3


@runs
def test_many_short_rows_are_finished_apart(monkeypatch):
    monkeypatch.setattr(triton_backend, "_cached_plan", plan.Plan)  # none is found, none is kept
    monkeypatch.setattr(launch, "MANY_ROWS", 5)
    monkeypatch.setattr(launch, "MANY_REPETITIONS", 5)
    torch.manual_seed(11)
    logits, targets = 3 * torch.randn(7, 100), torch.randint(0, 100, (7,))
    targets[2] = -100
    monkeypatch.setattr(plan, "merged", lambda *arguments: merges.append(made := launch.merged(*arguments)) or made)
    merges = []
    compare(logits, targets)
    assert merges[-1] is not None


@runs
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_layout_dtype_and_mask(data):
    draw = data.draw
    rows, classes = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 7, 16, 17, 33, 100, 513, 1031]))
    offset, padding = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    torch.manual_seed(draw(st.integers(0, 99)))
    whole = draw(st.sampled_from([0.1, 3.0, 30.0])) * torch.randn(rows * (classes + padding) + offset)
    whole = whole.to(draw(st.sampled_from(DTYPES)))
    logits = whole[offset:].reshape(rows, classes + padding)[:, :classes]
    if draw(st.booleans()):
        logits[torch.rand(rows, classes) < 0.5] = draw(st.sampled_from([-torch.inf, -6e4]))
        logits[:, draw(st.integers(0, classes - 1))] = 1.0  # one that is not
    targets = torch.randint(0, classes, (rows,))
    targets[torch.rand(rows) < 0.2] = -100
    if draw(st.booleans()):
        logits = logits.t().contiguous().t()
    compare(logits, targets, temperature=draw(st.sampled_from([1.0, 0.5, 2.0])))
