"""Bad input of the head: one line each, that says what was given and what was expected."""

import pytest
import torch
from torch import nn

from sparse_kernels import (
    gate_rows,
    initial_state,
    linear_row_stats,
    row_stats,
    select,
    selective_linear_cross_entropy,
)
from sparse_kernels.ops import gate_step

X, W = torch.randn(6, 4), torch.randn(9, 4)
Y = torch.randint(0, 9, (6,))


class Sharded(torch.Tensor):
    """Stands for every tensor that is more than its bytes."""


BAD = {
    "hidden sizes": (
        {"linear_weight": torch.randn(9, 5)},
        ValueError,
        r"input.*\(6, 4\).*linear_weight.*\(9, 5\).*got 4 and 5",
    ),
    "weight of one dimension": (
        {"linear_weight": torch.randn(4)},
        ValueError,
        r"linear_weight.*\[classes, hidden\].*\(4,\)",
    ),
    "weight of three": ({"linear_weight": torch.randn(2, 9, 4)}, ValueError, r"linear_weight.*\[classes, hidden\]"),
    "no classes": ({"linear_weight": torch.randn(0, 4)}, ValueError, "no classes"),
    "input without dimensions": ({"input": torch.tensor(1.0)}, ValueError, r"input.*\[..., hidden\]"),
    "rows of the target": ({"target": Y[:5]}, ValueError, r"target.*\(6,\).*got \(5,\)"),
    "target of another shape": ({"target": Y.view(2, 3)}, ValueError, r"target.*\(6,\).*got \(2, 3\)"),
    "target of probabilities": ({"target": torch.rand(6, 9)}, TypeError, "class indices, got probabilities"),
    "floating target": ({"target": Y.float()}, TypeError, "target.*int64 or int32.*float32"),
    "target of text": ({"target": "labels"}, TypeError, "target.*Tensor.*str"),
    "target too large": ({"target": Y.clone().fill_(9)}, ValueError, r"target 9 in row 0.*\[0, 8\].*-100"),
    "negative target": ({"target": torch.tensor([0, 1, -1, 2, 3, 4])}, ValueError, "target -1 in row 2"),
    "weight's dtype": ({"linear_weight": W.double()}, TypeError, "linear_weight.*float32 as `input`.*float64"),
    "bias's dtype": ({"linear_bias": torch.zeros(9).bfloat16()}, TypeError, "linear_bias.*float32.*bfloat16"),
    "integer input": ({"input": X.long(), "linear_weight": W.long()}, TypeError, "input.*float32.*int64"),
    "complex input": ({"input": X + 0j, "linear_weight": W + 0j}, TypeError, "input.*float32.*complex64"),
    "bias's shape": ({"linear_bias": torch.zeros(4)}, ValueError, r"linear_bias.*\(9,\).*\(4,\)"),
    "bias of a number": ({"linear_bias": 1.0}, TypeError, "linear_bias.*Tensor.*float"),
    "mask's shape": ({"row_mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"row_mask.*bool.*\(6,\).*\(5,\)"),
    "mask's dtype": ({"row_mask": torch.ones(6)}, ValueError, "row_mask.*bool.*float32"),
    "chunk of 0": ({"chunk": 0}, ValueError, "chunk.*at least 1 row, got 0"),
    "negative chunk": ({"chunk": -3}, ValueError, "chunk.*got -3"),
    "chunk of a half": ({"chunk": 0.5}, TypeError, "chunk.*int.*0.5"),
    "weight on another device": ({"linear_weight": W.to("meta")}, ValueError, "linear_weight.*cpu.*meta"),
    "target on another device": ({"target": Y.to("meta")}, ValueError, "target.*cpu.*meta"),
    "mask on another device": (
        {"row_mask": torch.ones(6, dtype=torch.bool, device="meta")},
        ValueError,
        "row_mask.*cpu.*meta",
    ),
    "bias on another device": ({"linear_bias": torch.zeros(9, device="meta")}, ValueError, "linear_bias.*cpu.*meta"),
    "sparse weight": ({"linear_weight": W.to_sparse()}, TypeError, "linear_weight.*dense"),
    "a subclass": ({"linear_weight": W.as_subclass(Sharded)}, TypeError, "plain tensors.*Sharded"),
    "an unknown statistic": ({"outputs": ("loss", "accuracy")}, ValueError, "outputs.*mean_logits.*accuracy"),
    "temperature of 0": ({"temperature": 0.0}, ValueError, "temperature.*above 0.*0.0"),
    "negative softcap": ({"softcap": -1.0}, ValueError, "softcap.*-1"),
    "scale of 0": ({"logit_scale": 0.0}, ValueError, "logit_scale.*above 0.*0.0"),
    "scale of text": ({"logit_scale": "2"}, TypeError, "logit_scale.*number.*'2'"),
    "smoothing of 2": ({"label_smoothing": 2.0}, ValueError, r"label_smoothing.*\[0, 1\].*2"),
}


@pytest.mark.parametrize(("bad", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_line(bad, kind, message):
    arguments = {"input": X, "linear_weight": W, "target": Y} | bad
    with pytest.raises(kind, match=message) as caught:
        linear_row_stats(arguments.pop("input"), arguments.pop("linear_weight"), arguments.pop("target"), **arguments)
    assert "\n" not in str(caught.value)


def test_a_module_in_place_of_its_weight_is_refused():
    with pytest.raises(TypeError, match=r"linear_weight.*torch.Tensor.*Linear"):
        linear_row_stats(X, nn.Linear(4, 9), Y)


CALLS = {
    "row_stats": lambda **options: row_stats(X, Y % 4, **options),
    "gate_rows": lambda **options: gate_rows(X, Y % 4, 0.0, weights={"loss": 1.0}, **options),
    "gate_step": lambda **options: gate_step(
        X, Y % 4, initial_state(), torch.tensor(0.5), weights={"loss": 1.0}, **options
    ),
    "select": lambda **options: select(X, Y % 4, 0.0, weights={"loss": 1.0}, **options),
    "linear_row_stats": lambda **options: linear_row_stats(X, W, Y, **options),
    "selective_linear_cross_entropy": lambda **options: selective_linear_cross_entropy(X, W, Y, select=None, **options),
}
UNSERVED = {
    "weight": (
        torch.ones(9),
        r"`weight`, got torch.float32 of shape \(9,\): multiply each row's loss by the weight of",
    ),
    "size_average": (True, r"`size_average`, got bool True: reduce the rows' losses"),
    "reduce": (False, r"`reduce`, got bool False: reduce the rows' losses"),
    "bias": (torch.zeros(9), r"`bias`, got torch.float32 of shape \(9,\): give a head's bias as `linear_bias`"),
    "options": (None, r"`options`, got NoneType: give a head's number of rows at once as `chunk`"),
    "temprature": (2.0, r"`temprature`, got float 2.0: it takes .*label_smoothing, ignore_index"),
}


@pytest.mark.parametrize(("name", "given", "message"), [(name, *rest) for name, rest in UNSERVED.items()], ids=UNSERVED)
@pytest.mark.parametrize("function", CALLS)
def test_a_keyword_of_pytorchs_is_refused_with_what_to_do_instead(function, name, given, message):
    with pytest.raises(TypeError, match=f"^{function} has no argument {message}") as caught:
        CALLS[function](**{name: given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", ["row_stats", "linear_row_stats"])
def test_a_reduction_of_rows_is_refused(function):
    with pytest.raises(
        TypeError, match=f"^{function} has no argument `reduction`, got str 'mean': reduce the rows' lo"
    ):
        CALLS[function](reduction="mean")
