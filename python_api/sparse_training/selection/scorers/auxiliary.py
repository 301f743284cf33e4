"""A network trained alongside the model, for scorers that need one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparse_training.arguments import check_positive
from sparse_training.evaluation import evaluation_statistics, forward
from sparse_training.rank_failures import wait_for
from sparse_training.ranks import rank_and_world_size, sum_across_ranks
from sparse_training.selection.scorers.base import Scorer
from sparse_training.selection.types import LossFunction, SelectedBatch


class AuxiliaryNetwork:
    """A network trained alongside the model, by an AdamW of its own.

    Its learning rate follows the model's schedule. It takes a step on the rows that the model was trained on, with
    their weights. The processes of torch.distributed share one network: they start from the first one's weights, take
    the step of all their rows together, and average BatchNorm's running statistics by the number of rows each has.

    Args:
        net: the network.
        lr: initial learning rate, above 0.
        device: device to train on.
    """

    def __init__(self, net: nn.Module, lr: float, device: torch.device) -> None:
        self.net, self.lr = net.to(device), lr
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, fused=device.type in ("cpu", "cuda"))
        self._begun = False

    def learn(self, inputs: Any, kept: SelectedBatch, criterion: LossFunction) -> None:
        """Take one step; all processes must call it.

        Args:
            inputs: inputs of the network, one for each of the kept rows.
            kept: the rows that the model was trained on.
            criterion: maps logits and targets to one loss per row.
        """
        rows, alone = kept.targets.shape[0], rank_and_world_size()[1] == 1
        if rows == 0 and alone:
            return
        if not alone and not self._begun:
            for tensor in (*self.net.parameters(), *self.net.buffers()):
                wait_for(dist.broadcast(tensor.detach(), 0, async_op=True), tensor.device)
        self._begun = True
        self.optimizer.zero_grad(set_to_none=True)
        if rows:
            with evaluation_statistics(self.net, _BatchNorm if rows == 1 else _NoModule):
                losses = criterion(forward(self.net, inputs), kept.targets)
            loss = (losses if kept.weight is None else losses * kept.weight).sum()
            if alone:
                loss = loss / (rows if kept.weight is None else kept.divisor)
            loss.backward()  # type: ignore[no-untyped-call]
        if alone or self._combine(kept):
            self.optimizer.step()

    @torch.no_grad()
    def _combine(self, kept: SelectedBatch) -> bool:
        """Replace gradients and statistics by those of all processes' rows; False where there is certainly no row."""
        parameters = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        device = parameters[0].device
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        own = [
            statistic
            for module in self.net.modules()
            if isinstance(module, _BatchNorm)
            for statistic in (module.running_mean, module.running_var)
            if statistic is not None
        ]
        rows = torch.as_tensor(kept.rows, device=device).float()
        # The divisor of an empty padded batch is no number of rows.
        divisor = rows.clamp(max=1) * (kept.targets.shape[0] if kept.weight is None else kept.divisor)
        statistics = [statistic * rows for statistic in own]
        sum_across_ranks([*gradients, *statistics, rows, divisor])
        if device.type == "cpu" and not divisor:  # elsewhere that would wait for the device
            return False
        torch._foreach_div_(gradients, torch.where(divisor > 0, divisor, 1.0))
        for statistic, total in zip(own, statistics, strict=True):
            statistic.copy_(torch.where(rows > 0, total / rows.clamp(min=1), statistic))
        return True

    def set_learning_rate(self, factor: float) -> None:
        """Set the learning rate to a multiple of the initial one."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor

    def state_dict(self) -> dict[str, Any]:
        """State of the network and of its optimizer."""
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of ``state_dict``."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


class _NoModule(nn.Module):
    """A type that no module has."""


class AuxiliaryScorer(Scorer):
    """The base of scorers that have a network of their own to train.

    The network is made when the first batch is known, from a seed of its own. It is trained on the rows that the model
    is trained on, in the dense phases too.

    Args:
        lr: learning rate of the network, above 0; it follows the model's schedule. Default 1e-3.
        seed: seed of its initial weights. Default 0.
        precision: precision of the scoring pass; None (the default) for the trainer's ``scoring_precision``.

    Attributes:
        auxiliary: the network and its optimizer; None until ``build`` is called.

    Raises:
        UserError: a setting is out of range.
    """

    def __init__(self, *, lr: float = 1e-3, seed: int = 0, precision: str | None = None) -> None:
        super().__init__(precision=precision)
        self.lr, self.seed = check_positive("lr", lr), seed
        self.auxiliary: AuxiliaryNetwork | None = None
        self._made_for: Any = None  # arguments of ``make``

    def make(self, *arguments: Any) -> nn.Module:
        """Make the network, with fresh weights."""
        raise NotImplementedError

    def start(self, *arguments: Any) -> None:
        """Make the network, unless there is one; torch's global generator is left as it is."""
        if self.auxiliary is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.auxiliary = AuxiliaryNetwork(self.make(*arguments), self.lr, self.device)
            self._made_for = arguments

    def require_auxiliary(self) -> AuxiliaryNetwork:
        """The network and its optimizer, which ``build`` made."""
        assert self.auxiliary is not None, "build was not called"
        return self.auxiliary

    def set_learning_rate(self, factor: float) -> None:
        """Set the network's learning rate to a multiple of the initial one."""
        if self.auxiliary is not None:
            self.auxiliary.set_learning_rate(factor)

    def get_extra_state(self) -> dict[str, Any]:
        """State of the network; empty until ``build`` is called."""
        return {} if self.auxiliary is None else {"made_for": self._made_for, **self.auxiliary.state_dict()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of ``get_extra_state``."""
        if state:
            self.start(*state["made_for"])
            self.require_auxiliary().load_state_dict(state)
