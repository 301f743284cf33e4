"""Collective operations of the processes that train one model together."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from sparse_training.errors import UserError
from sparse_training.generators import rng_state, set_rng_state
from sparse_training.rank_failures import SharedError, check_exchanged, wait_for
from sparse_training.ranks import rank_and_world_size

SAID = 3  # differences that an error lists


def split_wrapper(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """Tell a model from what wraps it for several processes.

    Args:
        model: a module; or one in DistributedDataParallel, compiled or not; or one that FSDP shards.

    Returns:
        The model itself, and the module that training passes go through; None where nothing wraps the model.

    Raises:
        UserError: a wrapped or sharded part within a model that is not, whose other gradients nothing would average.
    """
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(inner, DistributedDataParallel):
        return inner.module, model
    if is_sharded(inner):
        return model, model
    if inside := [name for name, module in model.named_modules() if isinstance(module, DistributedDataParallel)]:
        raise UserError(f"DistributedDataParallel must wrap the whole model or none of it, got its {inside[0]}")
    if sharded := [name for name, module in model.named_modules() if _is_shard(module)]:
        raise UserError(
            f"fully_shard must be called on the whole model too, after its parts, got its {sharded[0]} alone"
        )
    return model, None


def is_sharded(model: nn.Module) -> bool:
    """Tell whether FSDP shards a model: ``fully_shard``, or the older wrapper; compiled or not."""
    return _is_shard(getattr(model, "_orig_mod", model))


def _is_shard(module: nn.Module) -> bool:
    if not dist.is_available():
        return False
    from torch.distributed import fsdp

    return isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))


def tensor_shapes(model: nn.Module) -> dict[str, str]:
    """Return shape and type of a model's parameters and buffers, by name; of a part that is not there yet, its kind."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {
        name: type(tensor).__name__ if is_lazy(tensor) else f"{list(tensor.shape)} {tensor.dtype}"
        for name, tensor in tensors
    }


def settle_exchange(ddp: DistributedDataParallel, loss: Callable[[], Tensor], device: torch.device) -> None:
    """Fix the order in which DistributedDataParallel exchanges gradients, before the first step.

    It reorders them after its first backward pass. With three ranks or more the order of a sum depends on where an
    element lies, so a run that begins in the first order differs in the last bit from one that has gone on for a while.
    The pass is made here, and its gradients are thrown away. Not where the user registered a communication hook.

    Args:
        ddp: the wrapped model; its gradients, buffers and the random generators stay as they are.
        loss: runs a forward pass through it and returns a loss.
        device: PyTorch device of the model.
    """
    keeps_order = ddp.find_unused_parameters and not ddp.static_graph
    if keeps_order or getattr(ddp, "_comm_hooks", None):  # a hook of the user's may learn from the gradients
        return
    parameters, buffers, state = list(ddp.parameters()), list(ddp.buffers()), rng_state(device)
    gradients, values = [parameter.grad for parameter in parameters], [buffer.clone() for buffer in buffers]
    for parameter in parameters:
        parameter.grad = None
    loss().backward()  # type: ignore[no-untyped-call]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    with torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)
    set_rng_state(state, device)


class Ranks:
    """Processes that train one model together: all of torch.distributed's, or this one alone.

    All of them call every method, in the same order; a process alone gets its own value back. Values of the host
    are exchanged through gloo, so that they wait for no accelerator. A rank that waits here for one that failed raises
    a ``SharedError``.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.size = rank_and_world_size()
        self._group: Any = None
        if self.size > 1 and "gloo" not in dist.get_backend():
            self._group = dist.new_group(backend="gloo")

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # process groups cannot be copied, and a copy uses the same

    @property
    def alone(self) -> bool:
        """True where one process trains the model."""
        return self.size == 1

    def sum_later(self, values: Tensor) -> Callable[[], Tensor]:
        """Start to sum a tensor over the ranks, in place on its device; the returned function waits for the sum."""
        if self.alone:
            return lambda: values
        work = dist.all_reduce(values, async_op=True)

        def wait() -> Tensor:
            wait_for(work, values.device)
            return values

        return wait

    def meet(self, device: torch.device) -> None:
        """Wait for all ranks where they train on the CPU, before PyTorch itself waits for one that may have failed."""
        if device.type == "cpu":
            self.total(0.0)

    def total(self, number: float) -> float:
        """Return the sum of the ranks' numbers."""
        if self.alone:
            return number
        total = torch.tensor(number, dtype=torch.float64, device="cpu")
        wait_for(dist.all_reduce(total, group=self._group, async_op=True), total.device)
        return total.item()

    def first(self, number: float) -> float:
        """Return rank 0's number."""
        return self.total(number if self.rank == 0 else 0.0)

    def all(self, value: Any) -> list[Any]:
        """Return every rank's value, in order of the ranks; any value that can be pickled."""
        if self.alone:
            return [value]
        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        lengths = [int(length) for length in self._gather(torch.tensor([own.numel()], device="cpu"))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
        padded[: own.numel()] = own
        parts = zip(self._gather(padded), lengths)  # noqa: B905  # one of each for each rank
        return [pickle.loads(part[:length].numpy().tobytes()) for part, length in parts]

    def _gather(self, values: Tensor) -> list[Tensor]:
        """Return every rank's tensor, all of one shape on the CPU."""
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        wait_for(dist.all_gather(gathered, values, group=self._group, async_op=True), values.device)
        return gathered

    def agree(self, values: Mapping[str, Any]) -> None:
        """Compare what the ranks were given, and refuse differences on all of them.

        Args:
            values: values by name, whose ``repr`` says all that must be equal.

        Raises:
            SharedError: names, their values, and which ranks have which; or a rank failed before it came here.
        """
        own = {name: repr(value) for name, value in values.items()}
        digests = self.all(hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest())
        check_exchanged(digests)
        if len(set(digests)) == 1:
            return
        of_ranks = self.all(own)
        names = dict.fromkeys(name for given in of_ranks for name in given)
        differing = [name for name in names if len({given.get(name) for given in of_ranks}) > 1]
        said = [f"{name} is {_by_rank([given.get(name, 'absent') for given in of_ranks])}" for name in differing[:SAID]]
        more = f"; and {len(differing) - SAID} more" if len(differing) > SAID else ""
        raise SharedError(f"all ranks must be given the same, but {'; '.join(said)}{more}")


def _by_rank(values: Sequence[str]) -> str:
    """Say which ranks have which of their values."""
    ranks = {value: [str(rank) for rank, other in enumerate(values) if other == value] for value in values}
    return " and ".join(
        f"{value} on rank{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}" for value, numbers in ranks.items()
    )
