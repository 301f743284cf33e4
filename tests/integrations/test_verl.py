"""verl's functions, its fused head and its FSDP engine, from the real wheel, with ours and without."""

import sys
from types import SimpleNamespace

import host_files
import pytest
import torch

from sparse_kernels import count_multiplied_rows
from sparse_training.errors import UserError
from sparse_training.integrations.verl import head

CLASSES, HIDDEN, LENGTHS = 37, 8, (5, 2, 4)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture
def functional():
    with host_files.verl():
        from verl.utils import torch_functional

        yield torch_functional
        head.off()


@pytest.fixture
def fused(functional):
    from verl.utils.experimental import torch_functional

    return torch_functional


def logits(dtype=torch.float32, shape=(3, 7), rounded=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(*shape, CLASSES, generator=generator)).to(rounded).to(dtype).requires_grad_()


def labels(shape=(3, 7)):
    return torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(1))


def both(call):
    """Results and gradients of one call, theirs and ours."""
    found = []
    for ours in (False, True):
        x = logits(**call.get("logits", {}))
        if ours:
            head.on()
        y = call["function"](x)
        gradient = torch.autograd.grad((y * torch.arange(1.0, y.numel() + 1).view_as(y)).sum(), x)[0]
        found.append((y.detach(), gradient, x.detach()))
        head.off()
    return found


def close(ours, theirs, dtype):
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(ours, theirs, **tolerance)  # dtype and shape too


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["logprobs_from_logits", "entropy_from_logits", "entropy_from_logits_with_chunking",
             "calculate_sum_pi_squared_from_logits"]
)  # fmt: skip
def test_functions_are_the_hosts(functional, name, dtype):
    shape = (21,) if "chunking" in name else (3, 7)
    rest = (labels(shape),) if "logprobs" in name else ()
    call = {"function": lambda x: getattr(functional, name)(x, *rest), "logits": {"dtype": dtype, "shape": shape}}
    theirs, ours = both(call)
    right, _ = both({**call, "logits": {"dtype": torch.float64, "shape": shape, "rounded": dtype}})
    for one, other, exact in zip(ours[:2], theirs[:2], right[:2], strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if dtype is torch.bfloat16:  # theirs rounds each intermediate result to it
            close(one, exact.to(one.dtype), dtype)
            assert (one - exact).abs().max() <= max((other - exact).abs().max(), 1e-5)
        else:
            close(one, other, torch.float32)
    assert torch.equal(ours[2], logits(dtype, shape).detach())  # nothing is written to them


def test_sums_without_a_gradient_are_read_once(functional):
    x = logits()
    theirs = functional.calculate_sum_pi_squared_from_logits(x).detach()
    with head, torch.no_grad():
        ours = functional.calculate_sum_pi_squared_from_logits(x)
    torch.testing.assert_close(ours, theirs)


def test_flash_attentions_dtype_is_kept(functional, monkeypatch):
    """With it, verl's log-probabilities are float32 whatever the logits, unless the environment forbids its kernel."""
    monkeypatch.setattr(functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    x = logits(torch.bfloat16)
    right = functional.logprobs_from_logits_naive(x.double(), labels())
    with head:
        torch.testing.assert_close(functional.logprobs_from_logits(x, labels()), right.float())
        monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
        assert functional.logprobs_from_logits(x, labels()).dtype is torch.bfloat16


@pytest.mark.parametrize("shape", [(10,), (2, 5)])
@pytest.mark.parametrize("backend", ["torch", "liger"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_head_is_the_hosts_and_skips_rows_without_a_gradient(fused, dtype, backend, shape):
    found = []
    advantage = torch.linspace(-1, 1, 10).view(shape) * (torch.arange(10).view(shape) % 2)
    for ours in (False, True):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(*shape, HIDDEN, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(CLASSES, HIDDEN, generator=generator).to(dtype).requires_grad_()
        if ours:
            head.on()
        module = fused.FusedLinearForPPO(impl_backend="torch" if not ours else backend)
        with count_multiplied_rows() as rows:
            log_probs, entropy = module.forward(hidden, weight, labels(shape), temperature=0.7)
            ((log_probs * advantage).sum() + 0.1 * (entropy * (advantage != 0)).sum()).backward()
        found.append((log_probs.detach(), entropy.detach(), hidden.grad, weight.grad))
        head.off()
    for one, other in zip(*reversed(found), strict=True):
        close(one, other, torch.bfloat16 if dtype is torch.bfloat16 else dtype)
    assert rows.scored == 10
    assert rows.differentiated == int((advantage != 0).sum()) < 10


def test_the_fused_function_itself_is_served(fused):
    hidden, weight = torch.randn(4, HIDDEN), torch.randn(CLASSES, HIDDEN)
    theirs = fused.FusedLinearForPPOFunction.apply(hidden, weight, labels((4,)), 1.5, 2)
    with head, count_multiplied_rows() as rows:
        ours = fused.FusedLinearForPPOFunction.apply(hidden, weight, labels((4,)), 1.5, 2)
    assert rows.scored == 4
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


BAD = {
    "hidden of one dimension": ((torch.randn(8), torch.randn(9, 8), torch.tensor(1)), r"2 or 3 dimensions.*\(8,\)"),
    "hidden sizes": ((torch.randn(4, 8), torch.randn(9, 7), torch.zeros(4)), "same hidden size, got 8 and 7"),
    "rows": ((torch.randn(4, 8), torch.randn(9, 8), torch.zeros(3)), r"`target`.*\(4,\).*\(3,\)"),
    "a token out of range": ((torch.randn(2, 8), torch.randn(9, 8), torch.tensor([0, 9])), "target 9 in row 1"),
    "a device": ((torch.randn(2, 8), torch.randn(9, 8, device="meta"), torch.tensor([0, 1])), "linear_weight.*meta"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_the_fused_head_refuses_in_one_line(fused, given, message):
    with head, pytest.raises(ValueError, match=message) as caught:
        fused.FusedLinearForPPO().forward(*given)
    assert "\n" not in str(caught.value)


def test_a_temperature_of_0_is_refused(fused):
    with head, pytest.raises(ValueError, match=r"`temperature` must be above 0"):
        fused.FusedLinearForPPO().forward(torch.randn(2, 8), torch.randn(9, 8), torch.tensor([0, 1]), temperature=0.0)


# --- the engine ---------------------------------------------------------------------------------


class Case:
    """A micro-batch of three sequences as verl's FSDP engine lays it out, and an engine without anything else."""

    def __init__(self, packed, **flags):
        from tensordict import TensorDict
        from verl.utils import tensordict_utils as tu
        from verl.workers.engine.fsdp import transformer_impl

        self.kind = transformer_impl.FSDPEngineWithLMHead
        self.packed = packed
        total, longest = sum(LENGTHS), max(LENGTHS)
        generator = torch.Generator().manual_seed(0)
        shape = (1, total) if packed else (len(LENGTHS), longest)
        self.hidden = torch.randn(*shape, HIDDEN, generator=generator)
        self.weight = torch.randn(CLASSES, HIDDEN, generator=generator)
        self.tokens = labels(shape)
        ids = torch.nested.nested_tensor([torch.arange(n) for n in LENGTHS], layout=torch.jagged)
        self.batch = TensorDict({"input_ids": ids}, batch_size=[len(LENGTHS)])
        tu.assign_non_tensor(self.batch, use_remove_padding=packed, pad_mode=transformer_impl.DatasetPadMode.NO_PADDING)
        tu.assign_non_tensor(self.batch, **flags)

    def outputs(self, output):
        engine = SimpleNamespace(
            use_ulysses_sp=False,
            compute_entropy_from_logits=sys.modules["verl.utils.torch_functional"].entropy_from_logits,
            engine_config=SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False),
        )
        engine._gather_and_unpad_packed = self.kind._gather_and_unpad_packed.__get__(engine)
        packed_tokens = (
            torch.cat([row[:n] for row, n in zip(self.tokens, LENGTHS, strict=True)]) if not self.packed else 0
        )
        arguments = {
            "input_ids_rmpad_rolled": self.tokens[0] if self.packed else packed_tokens,
            "temperature_rmpad": torch.ones(sum(LENGTHS)), "temperature": torch.ones(len(LENGTHS)),
            "temperature_is_one": True, "pad_size": 0,
        }  # fmt: skip
        return self.kind.prepare_model_outputs(engine, output, arguments, self.batch, None)

    def fused(self):
        from verl.utils.experimental import torch_functional

        log_probs, entropy = torch_functional.FusedLinearForPPO().forward(self.hidden, self.weight, self.tokens)
        return SimpleNamespace(log_probs=log_probs, entropy=entropy)

    def dense(self):
        return SimpleNamespace(logits=self.hidden @ self.weight.T)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
def test_the_engine_serves_sums_of_squared_probabilities_beside_the_fused_head(functional, packed, entropy):
    """Equal to what verl computes from whole logits; verl itself refuses them beside the fused head."""
    flags = {"calculate_sum_pi_squared": True, "calculate_entropy": entropy}
    unfused = Case(packed, use_fused_kernels=False, **flags)
    theirs = unfused.outputs(unfused.dense())
    case = Case(packed, use_fused_kernels=True, **flags)
    with pytest.raises(NotImplementedError, match="use_fused_kernels"):
        case.outputs(case.fused())
    with head, torch.no_grad():
        ours = case.outputs(case.fused())
    assert ours.keys() == theirs.keys() == {"log_probs", "sum_pi_squared"} | ({"entropy"} if entropy else set())
    for name in theirs:
        assert ours[name].offsets().tolist() == theirs[name].offsets().tolist()
        torch.testing.assert_close(ours[name].values(), theirs[name].values(), rtol=1e-5, atol=1e-5)
    assert case.batch["calculate_sum_pi_squared"] is True  # the micro-batch is the caller's


@pytest.mark.parametrize("packed", [True, False])
def test_the_engine_without_the_fused_head_is_the_hosts(functional, packed):
    case = Case(packed, use_fused_kernels=False, calculate_sum_pi_squared=True, calculate_entropy=True)
    theirs = case.outputs(case.dense())
    with head:
        ours = case.outputs(case.dense())
    for name in theirs:
        torch.testing.assert_close(ours[name].values(), theirs[name].values(), rtol=1e-5, atol=1e-5)


def test_what_carries_no_sums_is_still_refused_by_the_engine(functional):
    """Another fused backend's log-probabilities, and ours in training, where the sums would lack their gradient."""
    case = Case(True, use_fused_kernels=True, calculate_sum_pi_squared=True)
    with head:
        with pytest.raises(NotImplementedError, match="use_fused_kernels"):
            case.outputs(SimpleNamespace(log_probs=torch.zeros(1, sum(LENGTHS)), entropy=None))
        case.weight.requires_grad_()
        with pytest.raises(NotImplementedError, match="use_fused_kernels"):
            case.outputs(case.fused())


def test_entropy_compiles_as_the_engine_compiles_it(functional):
    x = logits(shape=(5,))
    with head:
        compiled = torch.compile(functional.entropy_from_logits, dynamic=True, fullgraph=True, backend="aot_eager")
        ours = compiled(x)
    torch.testing.assert_close(ours, functional.entropy_from_logits(x))


# --- on, off and versions -----------------------------------------------------------------------


def test_on_and_off_leave_nothing_behind(functional, fused):
    from verl.workers.engine.fsdp import transformer_impl

    before = functional.logprobs_from_logits, fused.FusedLinearForPPO.forward, fused.FusedLinearForPPOFunction
    with head:
        assert transformer_impl.logprobs_from_logits is functional.logprobs_from_logits is not before[0]
    after = functional.logprobs_from_logits, fused.FusedLinearForPPO.forward, fused.FusedLinearForPPOFunction
    assert before == after
    assert transformer_impl.logprobs_from_logits is before[0]


def test_another_version_is_refused(functional):
    sys.modules["verl"].__version__ = "0.8.3"
    with pytest.raises(UserError, match=r"verl from 0\.9 up to, but not including, 0\.10, got 0\.8\.3"):
        head.on()
