"""The kernels of a GPU beside other work: streams, captures, memory that is freed early, processors that are taken."""

import threading

import pytest
import torch

import sparse_kernels as sk
from sparse_kernels import _dispatch
from sparse_kernels.self_check import proof
from sparse_training import Gate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
SLEEP = 50_000_000  # cycles: some 25 ms, longer than the host takes to enqueue


@pytest.fixture(autouse=True)
def kernels():
    """Those of the GPU serve, proved or not: what they do is compared here."""
    with _dispatch.forced("gpu"):
        yield


def batch(rows, classes, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(rows, classes, generator=g, device="cuda")
    return logits, torch.randint(0, classes, (rows,), generator=g, device="cuda")


def step(logits, targets, capacity):
    """Triton's kernels and CUDA's, one after the other."""
    gated = sk.gate_rows(logits, targets, 2.0, weights={"loss": 1.0})
    selection = sk.compact(gated.mask, capacity=capacity)
    return gated.significance, selection.index, selection.count, sk.gather_rows(logits, selection)


def reference(logits, targets, capacity):
    with _dispatch.forced("torch"):
        return step(logits, targets, capacity)


def assert_same(found, right):
    significance, index, count, rows = found
    torch.testing.assert_close(significance, right[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(count, right[2])
    assert torch.equal(index, right[1])
    assert torch.equal(rows, right[3])


def clear(logits, targets):
    """Keep the threshold away from every row, so that rounding decides nothing."""
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    near = (loss - 2.0).abs() < 1e-3
    logits[near] = 0.0  # of equal logits, the loss is log(classes)
    return logits, targets


def test_two_streams_at_once():
    streams, batches = [torch.cuda.Stream() for _ in range(2)], [clear(*batch(70_000, 10, seed)) for seed in (0, 1)]
    step(*batches[0], 30_000)
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(5):
        for stream, given, results in zip(streams, batches, found, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(SLEEP // 10)
                results.append(step(*given, 30_000))
    torch.cuda.synchronize()
    for given, results in zip(batches, found, strict=True):
        for result in results:
            assert_same(result, reference(*given, 30_000))


def test_two_threads_with_a_stream_each():
    batches = [clear(*batch(5000, 100, seed)) for seed in (0, 1, 2)]
    torch.cuda.synchronize()
    found: dict[int, list] = {}

    def work(number):
        with _dispatch.forced("gpu"), torch.cuda.stream(torch.cuda.Stream()):
            found[number] = [step(*batches[number], 2000) for _ in range(10)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results in found.items():
        for result in results:
            assert_same(result, reference(*batches[number], 2000))


def test_inputs_that_are_freed_early_on_a_side_stream():
    """The caller records the stream that reads them, as for any operation; nothing of ours is freed too early."""
    given = clear(*batch(70_000, 10))
    right = reference(*given, 30_000)
    side = torch.cuda.Stream()
    copies = [tensor.clone() for tensor in given]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        found = step(*copies, 30_000)
    for tensor in copies:
        tensor.record_stream(side)
    del copies, tensor
    for _ in range(20):  # what takes the memory that was freed, on the stream that does not wait
        torch.full((70_000, 10), float("nan"), device="cuda")
        torch.full((70_000,), -7, device="cuda")
    torch.cuda.synchronize()
    assert_same(found, right)


def test_scratch_memory_stays_until_its_kernels_have_run():
    """Slices of long rows and the compaction's storage are freed as the host returns."""
    given = clear(*batch(6, 151_936))
    right = reference(*given, 6)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(SLEEP)
        found = step(*given, 6)
        for size in (1 << 10, 1 << 16, 1 << 20, 1 << 22):
            torch.full((size,), -1, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    assert_same(found, right)


@pytest.mark.parametrize(("rows", "classes"), [(512, 10), (4096, 1000), (70_000, 10), (4, 151_936)])
def test_triton_and_cuda_in_one_graph(rows, classes):
    logits, targets = clear(*batch(rows, classes))
    sk.warm_up("cuda", [(rows, classes)], capacity=rows // 2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(logits, targets, rows // 2)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(logits, targets, rows // 2)
    for seed in (1, 2):
        for given, fresh in zip((logits, targets), clear(*batch(rows, classes, seed)), strict=True):
            given.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(found, reference(logits, targets, rows // 2))


def test_a_warmed_gate_is_captured_at_its_first_call():
    rows, classes = 2048, 100
    logits, targets = batch(rows, classes)
    gate = Gate(0.1, capacity=rows // 4).cuda()
    gate(logits, targets)  # the gate's own settings
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = gate(logits, targets)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert 0 < int(kept.count) <= rows // 4
    assert gate.step == 4


def test_nothing_is_checked_within_a_capture(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_KERNELS_CACHE", str(tmp_path))
    for name in ("_known", "_kept", "_spent"):
        monkeypatch.setattr(proof, name, {})
    monkeypatch.setattr(proof, "comparisons", lambda *_, **__: pytest.fail("checked within a capture"))
    logits, targets = batch(64, 10)
    with _dispatch.forced(None):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = sk.row_stats(logits, targets).loss
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))


def test_more_than_2_31_elements():
    """Of which every one is real: the last rows lie beyond what 32 bits count."""
    classes = 131_072
    rows = 2**31 // classes + 5
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * classes:
        pytest.skip("no 13 GB of GPU memory")
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    logits[-3:] = torch.randn(3, classes, device="cuda").bfloat16()
    logits[2**31 // classes - 1 :, 5] = 4.0
    targets = torch.full((rows,), 5, device="cuda")
    tail = slice(rows - 8, rows)
    found = sk.row_stats(logits, targets, outputs=sk.STATISTICS)
    right = sk.row_stats(logits[tail].double().cpu(), targets[tail].cpu(), outputs=sk.STATISTICS, backend="torch")
    for ours, exact in zip(found, right, strict=True):
        torch.testing.assert_close(ours[tail].cpu().to(exact.dtype), exact, rtol=1e-4, atol=1e-4)
    selection = sk.compact(found.loss < found.loss[0] - 1.0)
    assert selection.index.min() >= 2**31 // classes - 1
    assert torch.equal(sk.gather_rows(logits, selection), logits[selection.index])
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(sk.row_stats(logits, targets).loss.sum(), logits)
    some = logits[tail].detach().float().requires_grad_()
    (exact,) = torch.autograd.grad(torch.nn.functional.cross_entropy(some, targets[tail], reduction="sum"), some)
    torch.testing.assert_close(gradient[tail].float(), exact, rtol=0.02, atol=1e-3)


def test_compaction_beside_kernels_that_hold_processors():
    """Blocks that wait for one another must not need processors that another kernel keeps."""
    mask = torch.rand(3_000_000, device="cuda") < 0.3
    with _dispatch.forced("torch"):
        right = sk.compact(mask, capacity=1_000_000)
    sk.compact(mask, capacity=1_000_000)
    holder = torch.cuda.Stream()
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(holder):
        for _ in range(20):  # fills every processor for some milliseconds each
            a @ a
    found = [sk.compact(mask, capacity=1_000_000) for _ in range(5)]
    with torch.cuda.stream(holder):
        torch.cuda._sleep(SLEEP)  # one block, resident for long
    found += [sk.compact(mask, capacity=1_000_000) for _ in range(5)]
    done = torch.cuda.Event()
    done.record()
    done.synchronize()
    torch.cuda.synchronize()
    for selection in found:
        assert torch.equal(selection.index, right.index)
        assert torch.equal(selection.count, right.count)


def test_the_first_use_proves_the_kernels_and_they_serve(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("SPARSE_KERNELS_CACHE", str(tmp_path))
    for name in ("_known", "_kept", "_spent"):
        monkeypatch.setattr(proof, name, {})
    logits, targets = batch(600, 100)
    with _dispatch.forced(None):
        mask = sk.gate_rows(logits, targets, 2.0, weights={"loss": 1.0}).mask
        selection = sk.compact(mask, capacity=300)
        sk.gather_rows(logits, selection)
        info = sk.backend_info("cuda")
    assert info["gate_rows"]["active"] == "triton"
    assert info["compact"]["active"] == info["gather_rows"]["active"] == "cuda"
    assert "proved: float32" in info["gate_rows"]["detail"]
    assert not [record for record in caplog.records if "do not serve" in record.getMessage()]
