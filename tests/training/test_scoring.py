"""The scoring pass leaves the model as it was."""

import pytest
import torch
from torch import nn

from sparse_training.errors import UserError
from sparse_training.evaluation import evaluation_statistics, forward
from sparse_training.precision import scoring_dtype
from sparse_training.selection.scorers.model import SelfScorer
from sparse_training.selection.types import Batch

CPU = torch.device("cpu")


def scorer_of(model, **options):
    scorer = SelfScorer(**options)
    scorer.attach(model, nn.CrossEntropyLoss(reduction="none"), device=CPU)
    return scorer


def batch(inputs):
    rows = len(inputs)
    return Batch(inputs, torch.zeros(rows, dtype=torch.int64), None, rows)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def test_buffers_generators_gradients_and_flags_stay():
    model = network()
    model[1].eval()  # frozen by hand: must be frozen afterwards too
    model[1].running_mean += 0.3
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    flags = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    logits = scorer_of(model)(batch(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))).logits
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not logits.requires_grad


def test_statistics_are_those_of_evaluation():
    model, x = network(), torch.randn(5, 4)
    scored = scorer_of(model, precision="float32")(batch(x))
    assert torch.equal(scored.logits, model.eval()(x))


def test_flags_come_back_after_an_exception():
    model = network()

    def fail():
        with evaluation_statistics(model):
            assert not any(module.training for module in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(module.training for module in model.modules())


def test_one_kind_of_module_can_be_named():
    model = network()
    with evaluation_statistics(model, nn.BatchNorm1d):
        assert [module.training for module in model] == [True, False, True, True]


def test_precision_by_name():
    assert scoring_dtype("float32", CPU) is None
    assert scoring_dtype("bfloat16", CPU) is torch.bfloat16
    assert scoring_dtype("float16", CPU) is torch.float16
    assert scorer_of(network(), precision="bfloat16")(batch(torch.randn(2, 4))).logits.dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"precision must be one of auto, float32.*, got 'int8'"):
        scoring_dtype("int8", CPU)


@pytest.mark.parametrize(
    ("mkldnn", "avx512", "amx", "expected"),
    [(True, True, False, torch.bfloat16), (True, False, True, torch.bfloat16), (True, False, False, None)],
)
def test_auto_takes_bfloat16_only_where_the_cpu_multiplies_it(monkeypatch, mkldnn, avx512, amx, expected):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: mkldnn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert scoring_dtype("auto", CPU) is expected


def test_inputs_and_outputs_of_any_structure():
    class Model(nn.Module):
        def forward(self, a, b):
            return type("Output", (), {"logits": a - b})()

    a, b = torch.tensor([3.0]), torch.tensor([1.0])
    assert forward(Model(), (a, b)).item() == 2.0
    assert forward(Model(), {"b": a, "a": b}).item() == -2.0
    assert torch.equal(forward(nn.Identity(), a), a)
