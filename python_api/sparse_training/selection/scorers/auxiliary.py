"""A network trained beside the model, for scorers that need one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparse_training.errors import UserError
from sparse_training.evaluation import evaluation_statistics, forward
from sparse_training.ranks import rank_and_world_size, sum_across_ranks
from sparse_training.selection.scorers.base import Scorer
from sparse_training.selection.types import LossFunction, SelectedBatch


class AuxiliaryNetwork:
    """A network trained beside the model, by an AdamW of its own.

    Its learning rate follows the model's schedule. A step is taken on the rows that the model was trained on, with
    their weights. Processes of torch.distributed have one network: they start from the first one's, take the step of
    all their rows together, and average BatchNorm's running statistics by the rows each has.
    """

    def __init__(self, net: nn.Module, lr: float, device: torch.device) -> None:
        self.net, self.lr = net.to(device), lr
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, fused=device.type in ("cpu", "cuda"))
        self._begun = False

    def learn(self, inputs: Any, kept: SelectedBatch, criterion: LossFunction) -> None:
        """One step; ``inputs`` are the net's, one for each of the kept rows. To be called by all processes."""
        rows, alone = kept.targets.shape[0], rank_and_world_size()[1] == 1
        if rows == 0 and alone:
            return
        if not alone and not self._begun:
            for tensor in (*self.net.parameters(), *self.net.buffers()):
                dist.broadcast(tensor.detach(), 0)
        self._begun = True
        self.optimizer.zero_grad(set_to_none=True)
        if rows:
            with evaluation_statistics(self.net, _BatchNorm if rows == 1 else _Nothing):
                losses = criterion(forward(self.net, inputs), kept.targets)
            loss = (losses if kept.weight is None else losses * kept.weight).sum()
            if alone:
                loss = loss / (rows if kept.weight is None else kept.divisor)
            loss.backward()  # type: ignore[no-untyped-call]
        if alone or self._together(kept):
            self.optimizer.step()

    @torch.no_grad()
    def _together(self, kept: SelectedBatch) -> bool:
        """Gradients and statistics of all processes' rows in place of this one's; False if it is known of no row."""
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
        # Of an empty padded batch the divisor is no number of rows.
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
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor

    def state_dict(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


class _Nothing(nn.Module):
    """No module is one."""


class AuxiliaryScorer(Scorer):
    """The base of scorers that have a network of their own to train.

    It is made when the first batch is known, from a seed of its own, and trained on the rows that the model is
    trained on, in the dense phases too.

    Args:
        lr: its learning rate; follows the model's schedule.
        seed: of its first weights.
    """

    def __init__(self, *, lr: float = 1e-3, seed: int = 0, precision: str | None = None) -> None:
        super().__init__(precision=precision)
        if not 0.0 < lr < math.inf:
            raise UserError(f"lr {lr}: wanted more than 0")
        self.lr, self.seed = lr, seed
        self.beside: AuxiliaryNetwork | None = None
        self._made_for: Any = None  # arguments of ``make``

    def make(self, *arguments: Any) -> nn.Module:
        """The network, with fresh weights."""
        raise NotImplementedError

    def start(self, *arguments: Any) -> None:
        """Make the network, if it is not there; torch's global generator is left as it is."""
        if self.beside is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.beside = AuxiliaryNetwork(self.make(*arguments), self.lr, self.device)
            self._made_for = arguments

    def trained(self) -> AuxiliaryNetwork:
        assert self.beside is not None, "build was not called"
        return self.beside

    def set_learning_rate(self, factor: float) -> None:
        if self.beside is not None:
            self.beside.set_learning_rate(factor)

    def get_extra_state(self) -> dict[str, Any]:
        return {} if self.beside is None else {"made_for": self._made_for, **self.beside.state_dict()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        if state:
            self.start(*state["made_for"])
            self.trained().load_state_dict(state)
