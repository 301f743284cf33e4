"""No CPU kernel reads past the end of its operands: these end where a page ends, and the next may not be touched.

Processors read whole vectors, and an allocation seldom ends at a page: a read beyond it would go unnoticed elsewhere.
Prefetches may go there, since they never fault.
"""

import os

import fresh
import pytest
from emulated import each, forced

# A process of its own, which a wrong read ends; it names each case before.
SCRIPT = """
import ctypes, mmap, numpy as np, torch, sparse_kernels as sk
torch.set_num_threads(1)
PROTECT = ctypes.CDLL(None, use_errno=True).mprotect

class Guarded:
    '''Memory of some pages, and one behind it that nothing may touch.'''
    def __init__(self, pages):
        self.size = pages * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.size + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        assert PROTECT(ctypes.c_void_p(address + self.size), mmap.PAGESIZE, 0) == 0

    def last(self, values):
        '''The values, such that the last of them ends the memory.'''
        size = values.numel() * values.element_size()
        raw = torch.frombuffer(self.memory, dtype=torch.uint8, count=size, offset=self.size - size)
        return raw.view(values.dtype).view(values.shape).copy_(values)

of_logits, of_targets, of_gradient = Guarded(64), Guarded(4), Guarded(2)
torch.manual_seed(0)

def check(shape, dim, dtype, integer):
    classes = shape[dim]
    logits = of_logits.last((3 * torch.randn(shape)).to(dtype))
    targets = of_targets.last(torch.randint(0, classes, shape[:dim] + shape[dim + 1:]).to(integer))
    print(shape, dim, dtype, integer, flush=True)
    for outputs in (("loss", "entropy"), ("loss", "grad_norm", "margin", "argmax")):
        ours = sk.row_stats(logits, targets, dim=dim, outputs=outputs, backend="cpp")
        wanted = sk.row_stats(logits, targets, dim=dim, outputs=outputs, backend="torch")
        for name in outputs:
            torch.testing.assert_close(getattr(ours, name), getattr(wanted, name), rtol=1e-3, atol=1e-3)
    gated = sk.gate_rows(logits, targets, torch.tensor([1.0]), weights={"loss": 1.0}, dim=dim, backend="cpp")
    assert not gated.significance.isnan().any()
    leaf = logits.requires_grad_()
    stats = sk.row_stats(leaf, targets, dim=dim, outputs=("loss", "entropy"), backend="cpp")
    upstream = of_gradient.last(torch.rand_like(stats.loss))
    torch.autograd.backward([stats.loss, stats.entropy], [upstream, upstream.clone()])
    assert not leaf.grad.isnan().any()

for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for classes in (1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 21, 31, 32, 33, 47, 63, 65, 100, 127):
        for rows in (1, 3, 16, 17, 33, 70):
            check((rows, classes), 1, dtype, torch.int32 if rows % 2 else torch.int64)
    for classes in (1023, 1024, 1025, 1039, 1041, 2049, 8191, 16_391):
        check((1, classes), 1, dtype, torch.int64)
    for pixels in (1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 100, 255, 256, 257, 300):
        for classes in (2, 5, 21):
            check((1, classes, pixels), 1, dtype, torch.int64 if pixels % 2 else torch.int32)
print("done", flush=True)
import os; os._exit(0)
"""


@pytest.mark.parametrize("name", each(("portable", "avx2", "avx512")))
def test_nothing_is_read_past_the_end_of_the_operands(name):
    with forced(name):  # skips where it is absent
        environment = {**os.environ, "SPARSE_KERNELS_CPU": name}
    done = fresh.run("-c", SCRIPT, environment=environment)
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"died with {done.returncode} in {last}: {done.stderr[-500:]}"
    assert last == ["done"]
