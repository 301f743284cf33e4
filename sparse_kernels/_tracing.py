"""Detection of what may stand between a call and its kernel: a compiler, a dispatch mode, a transform, fake tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

# Tuples: PyTorch 2.6's compiler cannot look a class up in a set.
_PLAIN = (Tensor, torch.nn.Parameter)
# Stand-ins that a tracer uses for tensors: metadata without memory.
_TRACED = (FakeTensor, FunctionalTensor)

# Private, and so perhaps gone in another release: then the type of the tensors still reveals most of it.
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 0)
_transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_included = getattr(torch._C, "_dispatch_tls_is_dispatch_key_included", lambda key: False)
_PRE_DISPATCH = getattr(torch._C.DispatchKey, "PreDispatch", None)
_increment_versions = getattr(torch._C, "_increment_version", increment_version)  # the public one takes twice as long
dynamo_compiling = torch.compiler.is_dynamo_compiling
_STRIDED = torch.strided


def observed(*tensors: Tensor) -> bool:
    """Return True if a compiler, a tracer or a dispatch mode must see the operators of a call.

    Args:
        *tensors: the tensors of the call.
    """
    if dynamo_compiling() or _modes():
        return True
    if _function_modes() and _included(_PRE_DISPATCH):  # make_fx(pre_dispatch=True) keeps its mode elsewhere
        return True
    for tensor in tensors:  # noqa: SIM110  a generator costs as much as the rest
        if type(tensor) not in _PLAIN:
            return True
    return False


def transformed() -> bool:
    """Return True if a transform is active: torch.func (vmap, grad, jvp) or forward-mode differentiation."""
    return _transforms() or forward_ad._current_level >= 0


def unwatched() -> bool:
    """Return True if nothing observes or transforms a call on plain tensors: it may go straight to the kernel."""
    return not (  # observed() and transformed() written out: their calls cost more than they do
        dynamo_compiling()
        or _modes()
        or (_function_modes() and _included(_PRE_DISPATCH))
        or _transforms()
        or forward_ad._current_level >= 0
    )


def values_readable(tensor: Tensor) -> bool:
    """Return True if the host may branch on this tensor's values without waiting for a device.

    Args:
        tensor: the tensor to read.
    """
    return tensor.device.type == "cpu" and not (observed(tensor) or transformed())


def mark_changed(tensors: tuple[Tensor, ...]) -> None:
    """Raise the versions of tensors that a kernel has written: autograd then refuses what it had saved of them.

    Args:
        tensors: what the kernel has written.
    """
    try:
        _increment_versions(tensors)
    except (RuntimeError, TypeError):  # an older release takes one at a time, and none without a version
        for tensor in tensors:
            if not tensor.is_inference():
                increment_version(tensor)


def is_lazy_zeros(tensor: Tensor) -> bool:
    """Return True if these zeros have no memory (PyTorch's efficient zero tensors).

    False under a compiler: it cannot ask, and its operators get memory.

    Args:
        tensor: the tensor to look at.
    """
    return not dynamo_compiling() and bool(tensor._is_zerotensor())


def is_lazy_negative(tensor: Tensor) -> bool:
    """Return True if the values are the negated bytes (PyTorch's negative bit). False under a compiler, as above.

    Args:
        tensor: the tensor to look at.
    """
    return not dynamo_compiling() and tensor.is_neg()


def tensors_unsupported_reason(tensors: Iterable[Tensor]) -> str | None:
    """Return why no kernel can take one of these tensors on any device, or None. Looks at metadata alone.

    Args:
        tensors: every operand of the call.
    """
    compiling = dynamo_compiling()  # a compiler cannot ask for zeros without memory: its operators get memory
    for tensor in tensors:
        if type(tensor) not in _PLAIN and type(tensor) not in _TRACED:
            return f"a {type(tensor).__name__} has no address"
        if tensor.layout is not _STRIDED:
            return f"a {tensor.layout} tensor has no rows of bytes"
        if tensor.is_quantized:
            return "a quantised tensor's bytes are not its values"
        if not compiling and tensor._is_zerotensor():
            return "zeros without memory (an efficient zero tensor)"
    if _transforms() or forward_ad._current_level >= 0:
        return "inside a transform (torch.func, forward-mode differentiation) only the reference composes"
    return None


def tensor_unsupported_reason(tensor: Tensor) -> str | None:
    """Return why no kernel can take this tensor on any device, or None.

    Args:
        tensor: an operand of the call.
    """
    return tensors_unsupported_reason((tensor,))
