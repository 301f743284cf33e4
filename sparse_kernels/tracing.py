"""What may stand between a call and its kernel: a compiler, a dispatch mode, a transform, a tensor with no memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

# Tuples: PyTorch 2.6's compiler cannot look a class up in a set.
_PLAIN = (Tensor, torch.nn.Parameter)
# What a tracer shows in a tensor's place: the metadata of one, and no memory.
_TRACED = (FakeTensor, FunctionalTensor)

# Private, and so perhaps gone in another release: then the type of the tensors still tells most of it.
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 0)
_transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_included = getattr(torch._C, "_dispatch_tls_is_dispatch_key_included", lambda key: False)
_PRE_DISPATCH = getattr(torch._C.DispatchKey, "PreDispatch", None)


def observed(*tensors: Tensor) -> bool:
    """Whether something must see the operators of a call on these tensors: a compiler, a tracer, a dispatch mode."""
    if torch.compiler.is_dynamo_compiling() or _modes():
        return True
    if _function_modes() and _included(_PRE_DISPATCH):  # make_fx(pre_dispatch=True) keeps its mode elsewhere
        return True
    for tensor in tensors:  # noqa: SIM110  a generator costs as much as the rest
        if type(tensor) not in _PLAIN:
            return True
    return False


def transformed() -> bool:
    """Whether values stand for others: torch.func (vmap, grad, jvp), forward-mode differentiation."""
    return _transforms() or forward_ad._current_level >= 0


def unwatched() -> bool:
    """Whether a call on plain tensors is between the caller and the kernel alone: neither watched nor transformed."""
    return not (observed() or transformed())


def values_readable(tensor: Tensor) -> bool:
    """Whether the host may look at this tensor's values and decide by them, without waiting for a device."""
    return tensor.device.type == "cpu" and not (observed(tensor) or transformed())


def is_noted_zeros(tensor: Tensor) -> bool:
    """Whether PyTorch keeps these zeros without memory. No compiler can ask, nor needs to: operators get memory."""
    return not torch.compiler.is_dynamo_compiling() and bool(tensor._is_zerotensor())


def is_noted_negative(tensor: Tensor) -> bool:
    """Whether the values are the bytes negated, which is only noted; as ``is_noted_zeros`` of compilers."""
    return not torch.compiler.is_dynamo_compiling() and tensor.is_neg()


def refuse_tensor(tensor: Tensor) -> str | None:
    """Why no kernel can take this tensor, wherever it is; or None. By metadata alone."""
    if type(tensor) not in _PLAIN and type(tensor) not in _TRACED:
        return f"a {type(tensor).__name__} has no address"
    if is_noted_zeros(tensor):
        return "zeros that PyTorch notes without giving them memory"
    if transformed():
        return "inside a transform (torch.func, forward-mode differentiation), where only the reference composes"
    return None
