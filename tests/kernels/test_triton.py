"""The Triton kernels: interpreted on the CPU against the float64 reference, and compiled for GPUs that are not here.

A process that interprets cannot compile, so what compiles runs in a process of its own (``AHEAD_OF_TIME``).
"""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
pytest.importorskip("triton")

import sparse_kernels as sk
from sparse_kernels import philox, reference, triton_backend
from sparse_kernels.calls import GateCall, StatsCall
from sparse_kernels.triton_kernels import launch
from sparse_kernels.types import STATISTICS

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, on NaN and inf
interpreted = pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="TRITON_INTERPRET is not 1")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rows: none, one, part of a tile, several tiles. Classes: one, a tile's width and not, one block of
# columns (4,096) and one more, two blocks and a part.
SHAPES = [(0, 10), (1, 1), (5, 2), (130, 10), (17, 65), (3, 1000), (2, 4096), (2, 4097), (2, 9001)]


def stats_call(logits, targets, outputs=STATISTICS, **settings):
    defaults = {"dim": -1, "temperature": 1.0, "softcap": 0.0, "label_smoothing": 0.0, "ignore_index": -100}
    return StatsCall(logits, targets, outputs, **(defaults | settings))


def serve(call):
    assert triton_backend.refuse_row_stats(call) is None
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


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_rows(shape, dtype):
    torch.manual_seed(0)
    targets = torch.randint(0, shape[1], shape[:1])
    for scale in (0.1, 3.0, 100.0) if dtype is torch.float32 else (3.0,):
        compare((scale * torch.randn(shape)).to(dtype), targets)
    compare(torch.zeros(shape, dtype=dtype), targets)
    compare(torch.randn(shape).to(dtype), targets.int(), temperature=0.6)


@interpreted
@pytest.mark.parametrize("name", STATISTICS)
def test_each_output_alone(name):
    torch.manual_seed(1)
    compare(3 * torch.randn(5, 70), torch.randint(0, 70, (5,)), outputs=[name])


@interpreted
@pytest.mark.parametrize("classes", [10, 1000, 9000])
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_shifted_rows(classes, shift):
    torch.manual_seed(1)
    compare(torch.randn(3, classes) + shift, torch.randint(0, classes, (3,)))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "settings", [{"softcap": 5.0}, {"label_smoothing": 0.1}, {"softcap": 30.0, "temperature": 3.0}]
)
def test_softcap_and_smoothing(settings, dtype):
    torch.manual_seed(2)
    for classes in (10, 4500):
        logits = torch.randn(6, classes, dtype=dtype) * torch.tensor([0.01, 1, 3, 10, 40, 500.0])[:, None]
        # argmax follows which of two logits rounds above the other near the cap.
        compare(logits, torch.randint(0, classes, (6,)), outputs=[n for n in STATISTICS if n != "argmax"], **settings)


@interpreted
@pytest.mark.parametrize("classes", [3, 65, 5000])
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


@interpreted
@pytest.mark.parametrize("classes", [12, 1000, 9000])
def test_masked_and_ignored_rows(classes):
    torch.manual_seed(2)
    logits, targets = torch.randn(12, classes), torch.randint(0, classes, (12,))
    logits[0, ::2] = -torch.inf
    logits[1, : classes - 1] = -torch.inf  # all but one, whole blocks of -inf: probability exactly 1
    targets[1] = classes - 1
    logits[2, 1:] = -torch.inf
    targets[2] = 1  # a masked target: the loss is inf
    targets[3] = targets[8] = -100
    logits[3] = torch.nan
    stats = compare(logits, targets)
    compare(logits, targets, label_smoothing=0.1)
    assert stats.entropy[1] == 0
    assert stats.loss[1] == 0
    assert stats.loss[2] == torch.inf
    assert all(getattr(stats, name)[3] == 0 for name in STATISTICS)


@interpreted
@pytest.mark.parametrize("classes", [12, 1000, 9000])
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
    for gate_temperature in (0.0, 0.5):
        gated = serve_gate(logits, targets, torch.tensor([-1e30]), gate_temperature=gate_temperature, p_min=0.5)[0]
        assert gated.significance.isnan().all()
        assert all(getattr(gated.stats, name).isnan().all() for name in STATISTICS if name != "argmax")
        assert (gated.stats.argmax == -1).all()
        assert not gated.mask.any()
        assert gated.invalid == logits.shape[0]


def serve_gate(logits, targets, threshold, **settings):
    call = GateCall(
        logits, targets, STATISTICS, -1, 1.0, 0.0, 0.0, -100, threshold,
        **({"weights": {"loss": 0.7, "entropy": 0.3}, "offset": None, "gate_temperature": 0.0, "p_min": 0.0,
            "seed": 0, "step": 0} | settings),
    )  # fmt: skip
    assert triton_backend.refuse_gate_rows(call) is None
    return triton_backend.gate_rows(call), call


@interpreted
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


@interpreted
def test_random_numbers_are_the_reference_numbers():
    # p = p_min = 1/2 everywhere and the same weight: the mask is the random number's first bit.
    for seed, step in ((0, 0), (2**64 - 1, 2**63 - 1), (2**31, 2**40 + 3)):
        ours, _ = serve_gate(
            torch.zeros(200, 2), torch.zeros(200, dtype=torch.int64), torch.tensor(1e9),
            gate_temperature=1.0, p_min=0.5, seed=seed, step=step,
        )  # fmt: skip
        wanted = philox.uniform(200, seed=seed, step=step, device=torch.device("cpu")) < 0.5
        assert torch.equal(ours.mask, wanted)


@interpreted
@pytest.mark.parametrize("ignored", [0, 3, -1])
def test_ignore_index_may_be_a_class(ignored):
    targets = torch.tensor([0, 3, 5, 3, 0, 1]) if ignored >= 0 else torch.tensor([0, -1, 5, 3, -1, 1])
    stats = compare(torch.randn(6, 6), targets, ignore_index=ignored)
    assert torch.equal(stats.loss == 0, targets == ignored)


@interpreted
def test_a_bad_target_says_where():
    for target in (6, -1, 2**40):
        with pytest.raises(ValueError, match=f"target {target} in row 1 "):
            serve(stats_call(torch.randn(3, 6), torch.tensor([0, target, 2])))


@interpreted
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


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    torch.manual_seed(5)
    logits = LAYOUTS[layout]()
    targets = torch.randint(0, 30, (*logits.shape[:-1], 2))[..., 0]  # strided as well
    compare(logits, targets)


@interpreted
@pytest.mark.parametrize("classes", [1, 3, 21])
def test_classes_in_dim_1(classes):
    torch.manual_seed(6)
    targets = torch.randint(0, classes, (2, 5, 33))
    logits = torch.randn(2, classes, 5, 33)
    compare(logits, targets, dim=1)
    compare(logits.to(memory_format=torch.channels_last), targets, dim=1)
    compare(torch.randn(2, classes + 1, 5, 33)[:, 1:], targets, dim=1)
    compare(torch.randn(2, classes, 7), targets[:, 0, :7], dim=1)
    compare(torch.randn(classes, 2, 7), targets[:, 0, :7], dim=0)


def test_what_is_not_served_says_why():
    call = stats_call(torch.randn(2, 6, 9, 5)[:, :3, :4], torch.zeros(2, 3, 4, dtype=torch.int64))
    assert "two nested loops" in triton_backend.refuse_row_stats(call)
    call = stats_call(torch.randn(2, 5, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta"))
    assert "tensors are on meta" in triton_backend.refuse_row_stats(call)


def test_a_call_that_names_no_backend_never_comes_here(monkeypatch):
    """On a CPU the interpreter is for tests; on a GPU the kernels are used by name."""
    monkeypatch.setattr(triton_backend, "row_stats", lambda call: pytest.fail("served by default"))
    sk.row_stats(torch.randn(2, 5), torch.tensor([0, 1]))
    assert all("triton" not in order for order in sk.backends.ORDER.values())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("class_stride", [1, 100])
def test_launches_fit_triton(double, class_stride):
    for classes in (1, 2, 10, 16, 17, 1000, 2049, 200_000):
        tile = launch.choose(classes, class_stride, double)
        for size in (tile.rows, tile.columns, tile.warps):
            assert size & (size - 1) == 0
            assert size > 0
        assert tile.rows * tile.columns <= 4096


# Runs without the interpreter. ptxas reports spills in the log that Triton prints when asked to.
AHEAD_OF_TIME = """
import inspect, json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from sparse_kernels import triton_backend
from sparse_kernels.triton_kernels import launch, row_stats as kernels
from sparse_kernels.types import STATISTICS

def build(kernel, arch, dtype, pointers, constants, classes, class_stride):
    tile = launch.choose(classes, class_stride, dtype == "fp64")
    constants |= {"DOUBLE": dtype == "fp64", "BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    if class_stride == 1:
        constants |= {"class_stride": 1, "gradient_class_stride": 1}
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in pointers:
            signature[name], attrs[(i,)] = "*" + pointers[name], [["tt.divisibility", 16]]
        elif name in constants or name.endswith("_ptr"):
            signature[name], constexprs[name] = "constexpr", constants.get(name)
        else:
            signature[name] = kernel.params[i].annotation_type or "i64"
    print("BUILD", arch, dtype, classes, kernel.__name__, len(pointers), flush=True)
    source = ASTSource(kernel, signature, constexprs, attrs)
    triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": tile.warps})

def forward(arch, dtype, outputs, gated, classes, class_stride):
    acc = "fp64" if dtype == "fp64" else "fp32"
    pointers = {f"{name}_ptr": "i64" if name == "argmax" else acc for name in outputs}
    pointers |= {"logits_ptr": dtype, "targets_ptr": "i64"}
    if gated:
        pointers |= {"mask_ptr": "i8", "significance_ptr": acc, "weight_ptr": "fp32", "threshold_ptr": "fp32",
                     "invalid_ptr": "i32", "step_ptr": "i64"}
    flags = triton_backend.flags(outputs, ("loss", "entropy") if gated else ())
    build(kernels.row_stats_kernel, arch, dtype, pointers, flags, classes, class_stride)

def backward(arch, dtype, classes, class_stride):
    pointers = dict.fromkeys(
        (f"{name}_ptr" for name in ("maximum", "log_sum", "entropy", "loss_gradient", "entropy_gradient")), "fp32")
    pointers |= {"logits_ptr": dtype, "gradient_ptr": dtype, "targets_ptr": "i64"}
    build(kernels.row_stats_backward_kernel, arch, dtype, pointers, {}, classes, class_stride)

def compile_all(arch):
    forward(arch, "fp32", ("loss", "entropy"), False, 50_000, 1)
    forward(arch, "bf16", STATISTICS, True, 1000, 1)
    forward(arch, "fp16", ("loss", "entropy"), True, 10, 1)
    forward(arch, "fp32", ("loss", "entropy"), False, 21, 4096)
    backward(arch, "bf16", 50_000, 1)

def keys():
    # What Triton would look a compilation up by, for calls that differ in values alone.
    kernel = kernels.row_stats_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    found = set()
    class Kernel:
        def __getitem__(self, grid):
            return self
        def __call__(self, **arguments):
            arguments.pop("num_warps")
            found.add(str(bind(**arguments)[1]))
    triton_backend._kernels = lambda: type("K", (), {"row_stats_kernel": Kernel(), "scalar": staticmethod(int)})
    from sparse_kernels.calls import GateCall
    def ask(rows=48, temperature=1.0, softcap=0.0, smoothing=0.0, ignore=-100, weight=1.0, gate=1.0, p=0.0,
            seed=0, step=0):
        logits, targets = torch.zeros(rows, 1000), torch.zeros(rows, dtype=torch.int64)
        call = GateCall(logits, targets, ("loss",), -1, temperature, softcap, smoothing, ignore, torch.zeros(()),
            {"loss": weight}, torch.zeros(rows), gate, p, seed, step)
        triton_backend.gate_rows(call)
    ask(); ask(rows=1); ask(rows=33); ask(temperature=0.7); ask(softcap=30); ask(smoothing=1); ask(ignore=1)
    ask(ignore=-2**40); ask(weight=2); ask(gate=3); ask(p=0.25); ask(seed=1); ask(seed=2**64 - 1)
    ask(step=16); ask(step=2**40)
    print("KEYS", len(found), *found, sep="\\n")

keys() if sys.argv[1] == "keys" else compile_all(int(sys.argv[1]))
"""


def ahead_of_time(what, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "NVPTX_ENABLE_DUMP": "0"}
    environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET")
    done = subprocess.run(
        [sys.executable, "-c", AHEAD_OF_TIME, str(what)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("arch", [75, 80, 90, 100])
def test_compiles_for_gpus_and_fits_registers(arch, tmp_path):
    log = ahead_of_time(arch, tmp_path)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log)]
    assert log.count("BUILD") == len(registers) == len(spilled) == 5, log
    # A few bytes are ptxas' own bargain for one more resident block, far below 255 registers.
    assert max(spilled) <= 16, log
    # 65,536 registers: loss and entropy leave room for 512 threads and more, all eight and the gate for 384.
    for found, bound in zip(registers, (128, 168, 128, 128, 128), strict=True):
        assert found <= bound, log


def test_values_do_not_compile_anew(tmp_path):
    assert "KEYS\n1\n" in ahead_of_time("keys", tmp_path)


@interpreted
@pytest.mark.parametrize("settings", [{}, {"softcap": 4.0, "temperature": 1.5}, {"label_smoothing": 0.2}])
@pytest.mark.parametrize("shape", [(11, 9), (3, 5000), (2, 9, 40)])
def test_gradient_is_the_reference_gradient(shape, settings):
    torch.manual_seed(7)
    dim = -1 if len(shape) == 2 else 1
    base = 2 * torch.randn(shape) + (0 if "softcap" in settings else 1e3)
    targets = torch.randint(5, shape[dim], shape[:1] + shape[2:])
    if not settings:
        base[2 % shape[0], 3:5] = -torch.inf
    targets[1] = -100
    if "softcap" not in settings:  # where the reference's own gradient of an ignored NaN is NaN
        base[1] = torch.nan
    gradients = []
    for backend, exact in (("triton", False), ("torch", True)):
        logits = (base.double() if exact else base.clone()).requires_grad_()
        outputs = ["entropy", "loss", "grad_norm"]
        stats = sk.row_stats(logits, targets, outputs=outputs, dim=dim, backend=backend, **settings)
        assert not stats.grad_norm.requires_grad
        weight = torch.arange(float(stats.loss.numel())).reshape(stats.loss.shape)
        (stats.loss * weight + 0.3 * stats.entropy).sum().backward()
        gradients.append(logits.grad.float())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert (gradients[0][1] == 0).all()


@interpreted
def test_gradient_of_one_output_and_of_strided_logits():
    targets = torch.tensor([1, 2, -100, 0])
    for dtype in (torch.float64, torch.bfloat16):
        for names in (["loss"], ["entropy"], ["entropy", "loss"]):
            gradients = []
            for backend in ("triton", "torch"):
                torch.manual_seed(8)
                whole = torch.randn(4, 40, dtype=dtype, requires_grad=True)
                stats = sk.row_stats(whole[:, 3:24], targets, outputs=names, backend=backend)
                sum(getattr(stats, name).sum() for name in names).backward()
                gradients.append(whole.grad)
            tolerance = 1e-12 if dtype is torch.float64 else 1e-2
            torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance / 10)


@interpreted
def test_gradcheck_and_second_derivative():
    torch.manual_seed(9)
    base, targets = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 4, 2])

    def both(logits):
        stats = sk.row_stats(logits, targets, temperature=0.7, backend="triton")
        return stats.loss, stats.entropy

    assert torch.autograd.gradcheck(both, base.requires_grad_())
    assert torch.autograd.gradgradcheck(both, base)


@interpreted
@pytest.mark.parametrize(("shape", "dim"), [((5, 9), -1), ((2, 4100), -1), ((2, 9, 40), 1)])
def test_gradient_in_the_memory_of_the_logits(shape, dim):
    torch.manual_seed(10)
    base, targets = torch.randn(shape), torch.randint(0, shape[dim], shape[:1] + shape[2:])
    targets[0] = -100
    gradients = []
    for inplace in (False, True):
        leaf = base.clone().requires_grad_()
        logits = leaf * 1
        stats = sk.row_stats(logits, targets, dim=dim, softcap=5.0, inplace_backward=inplace, backend="triton")
        (stats.loss + 0.3 * stats.entropy).sum().backward()
        gradients.append(leaf.grad)
        assert torch.equal(logits, base) != inplace
    assert torch.equal(*gradients)
