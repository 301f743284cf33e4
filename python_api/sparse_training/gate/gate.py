"""The gate: scores a batch's rows, keeps those above a threshold, and moves the threshold to its target rate."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sparse_kernels import ControlState, GatedRows, Selection, compact, control, gate_rows
from sparse_kernels.ops import gate_step
from sparse_kernels.philox import uniform
from sparse_training import ranks
from sparse_training.errors import UserError
from sparse_training.gate.checks import _integer, _number, _one_of
from sparse_training.gate.controller import PIController
from sparse_training.gate.exchange import Exchange
from sparse_training.gate.significance import Significance

SetPoint = Callable[[float], float]  # of the run's progress, 0 to 1


class Gate(nn.Module):
    """Selects the rows that are worth training on from a model's logits: about ``rate`` of them, or the
    fewest that hold a share ``grad_norm_fraction`` of the batch's gradient norm.

        gate = Gate(rate=0.1, capacity=128)
        kept = gate(logits, targets)
        inputs, targets = kept.take((inputs, targets))

    With a capacity nothing waits for the device. All state is in buffers: it moves with the module and
    resumes exactly from ``state_dict()``.

    Args:
        rate: fraction of the valid rows to keep, in (0, 1], 0.1 by default; 1 keeps all of them. A callable
            of the run's progress, such as ``Ramp(1.0, 0.1)``, is followed by calls of ``set_progress``.
        grad_norm_fraction: instead of a rate, the share, in (0, 1], of the sum of the rows' grad_norm that the
            rows kept are to hold; or such a callable. They are the fewest where significance is grad_norm alone.
        significance: what ranks the rows; ``Significance(loss=0.7, entropy=0.3)`` by default, with a mass
            ``Significance(grad_norm=1.0)``.
        decision: "threshold" keeps the rows above the controller's threshold, or draws them where there is a
            temperature. "topk" keeps the ceil(rate * valid rows) most significant of each batch, an exact
            count; its controller runs beside it and decides nothing. Both are biased towards significant
            rows, but for the draws with their weights.
        ties: "equal" treats equal rows alike: above the threshold or not, together. "random" puts them in
            an order drawn for this seed and step, so that a rate is held though all are equal: each row
            gains up to 2^-14 of the batch's mean significance. It costs some 100 small operations.
        capacity: slots of a selection, whatever the batch holds; rows beyond it are dropped and counted
            in the selection's ``overflow`` and, but for the batch an automatic start keeps whole, in the
            gate's. None: as many slots as rows kept, which waits for an accelerator.
        temperature: 0 keeps what is above the threshold. Above 0, in units of significance, a row is
            drawn with probability p = sigmoid((significance - threshold) / temperature) and weighs 1/p:
            weighted sums over the kept rows are unbiased estimates of sums over all, and ties break.
        p_min: least such p, so that no weight exceeds 1/p_min; below ``rate``.
        floor: least fraction of the valid rows kept: where the threshold passes fewer, the most
            significant make up the number. At most ``rate``. The controller never sees these rows.
        seed: of the draws, with the step and the row's number.
        threshold: where to start; None keeps the first batch whole and starts from what it holds.
        process_group: of the ranks that share one threshold, moved by all of their rows: "world" for the
            default group of torch.distributed, or a group. Each rank's call launches one gathering of 15
            numbers and goes on; ``settle`` waits for it, and whatever needs it calls ``settle``: the next
            call, ``divisor``, ``threshold``, ``state_dict``. So all ranks must call the gate equally often;
            nothing is one step late. The state is the same on every rank and fits any number of them. Only
            draws differ: a rank has a seed of its own. A floor, ties and the k of "topk" are of each rank's
            own rows. The balanced form, in which no rank has more rows to train on than another and so
            none waits: decision="topk" with a capacity of ceil(rate * rows of a rank's batch).
            None: this process alone.
        ignore_index, label_smoothing, dim: as in ``sparse_kernels.gate_rows``.

    Attributes:
        step: int64, calls made. invalid, overflow: int64, rows counted since the start: with NaN or +inf
            logits; selected beyond the capacity. Views of the controller's state.
        last: the ``GatedRows`` of the last call, as decided; not in the state.

    Raises:
        UserError: a setting out of its range.
    """

    _version = 2

    def __init__(
        self,
        rate: float | SetPoint | None = None,
        *,
        grad_norm_fraction: float | SetPoint | None = None,
        significance: Significance | None = None,
        decision: str = "threshold",
        ties: str = "equal",
        capacity: int | None = None,
        temperature: float = 0.0,
        p_min: float = 0.0,
        floor: float = 0.0,
        seed: int = 0,
        threshold: float | None = None,
        process_group: Any = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        dim: int = -1,
    ) -> None:
        super().__init__()
        self.temperature = _number("temperature", temperature, "0 or above", lambda x: 0 <= x < math.inf)
        self.p_min = _number("p_min", p_min, "a probability, at least 0 and below 1", lambda x: 0 <= x < 1)
        self.floor = _number("floor", floor, "a fraction, at least 0 and at most 1", lambda x: 0 <= x <= 1)
        self.label_smoothing = _number("label_smoothing", label_smoothing, "in [0, 1]", lambda x: 0 <= x <= 1)
        if rate is not None and grad_norm_fraction is not None:
            raise UserError(f"rate={rate} and grad_norm_fraction={grad_norm_fraction}; wanted one of them")
        self.by_grad_norm = grad_norm_fraction is not None
        wanted = grad_norm_fraction if grad_norm_fraction is not None else 0.1 if rate is None else rate
        self.schedule = wanted if callable(wanted) else None
        first = wanted(0.0) if callable(wanted) else wanted
        if self.by_grad_norm:
            _number("grad_norm_fraction", first, "a share above 0 and at most 1", lambda x: 0 < x <= 1)
        self.controller = PIController(first, threshold=threshold, temperature=self.temperature, p_min=self.p_min)
        self.setpoint = float(first)
        self.seed = _integer("seed", seed)
        self.ignore_index = _integer("ignore_index", ignore_index)
        self.dim = _integer("dim", dim)
        self.capacity = None if capacity is None else _integer("capacity", capacity)
        if self.capacity is not None and self.capacity < 1:
            raise UserError(f"capacity={capacity}; wanted None or a number of rows, at least 1")
        self._check_setpoint()
        if self.p_min and not self.temperature:
            raise UserError(f"p_min={p_min} without a temperature; wanted p_min=0, or a temperature above 0")
        if self.floor and self.temperature:
            raise UserError(
                f"floor={floor} with temperature={temperature}; wanted one of them (rows put in by a floor have "
                "no probability to be weighted by; p_min is the floor of a drawn selection)"
            )
        self.decision = _one_of("decision", decision, ("threshold", "topk"))
        self.ties = _one_of("ties", ties, ("equal", "random"))
        if self.temperature and (decision == "topk" or ties == "random"):
            raise UserError(
                f"temperature={temperature} with decision={decision!r}, ties={ties!r}; wanted temperature=0, for what "
                "is drawn is not ranked; or neither of them"
            )
        if self.by_grad_norm and (decision == "topk" or self.floor):
            raise UserError(
                f"grad_norm_fraction={grad_norm_fraction} with decision={decision!r}, floor={floor}; "
                "wanted a rate: those count rows"
            )
        if significance is None:
            significance = Significance(grad_norm=1.0) if self.by_grad_norm else Significance(loss=0.7, entropy=0.3)
        elif not isinstance(significance, Significance):
            raise UserError(f"significance={significance!r}; wanted a Significance, such as Significance(loss=1.0)")
        self.significance = significance
        self._weights = significance.weights
        self._orders = bool(self.floor) or decision == "topk" or ties == "random"
        self.last: GatedRows | None = None
        self.process_group = process_group
        self._exchange: Exchange | None = None  # of the last batch, not yet in the state
        self._divisor: Tensor | None = None
        self._own: tuple[Tensor, Tensor] | None = None  # rows kept and labels of the last batch, without ranks

    def _check_setpoint(self) -> None:
        name = "grad_norm_fraction" if self.by_grad_norm else "rate"
        if self.floor > self.setpoint:
            raise UserError(
                f"floor={self.floor} is above {name}={self.setpoint}; "
                f"wanted at most the {name}, or it could never be met"
            )
        if self.p_min >= self.setpoint:
            raise UserError(
                f"p_min={self.p_min} is not below {name}={self.setpoint}; wanted less, or the {name} could never be met"
            )

    def set_target_rate(self, setpoint: float) -> None:
        """Another rate (or share of mass) from the next call on: a ``Budget``'s, say. Waits for no device.

        Raises:
            UserError: out of range, or not above the floor or p_min.
        """
        if setpoint == self.setpoint:
            return
        before, self.setpoint = self.setpoint, setpoint
        try:
            self._check_setpoint()
            self.controller.set_target(setpoint)
        except UserError:
            self.setpoint = before
            raise

    def set_progress(self, progress: float) -> None:
        """Aims where the schedule says, ``progress`` in [0, 1] of the run; nothing without a schedule."""
        if self.schedule is not None:
            self.set_target_rate(self.schedule(progress))

    @property
    def rate(self) -> float:
        """The rate wanted now; with a mass, which wants none, 1: as many rows as it takes."""
        return 1.0 if self.by_grad_norm else self.setpoint

    @property
    def biased(self) -> bool:
        """Whether sums over the rows kept favour significant rows: False for draws, whose 1/p weights make them
        estimates of sums over all rows (as long as none overflows a capacity), and where every row is kept."""
        return self.temperature == 0.0 and self.setpoint < 1.0

    def settle(self) -> None:
        """Waits for the other ranks' share of the last batch and moves the threshold; nothing without one."""
        if self._exchange is not None:
            kept, valid = self._exchange.finish()
            self._exchange, self._divisor = None, valid if self.temperature else kept

    def divisor(self) -> Tensor:
        """float32, one element: what the sum of this rank's weighted losses is to be divided by.

            loss = (kept.weight * losses).sum() / gate.divisor()

        Averaged over the ranks, as DistributedDataParallel and FSDP average gradients, this is the mean over
        the rows that all of them kept or, with a temperature, the estimate of the mean over all valid rows:
        the gradient that one process with all the rows has. So it is that number of rows divided by the
        number of ranks, though never nought. Call it after the forward pass of the rows kept, which the
        exchange between the ranks overlaps; a loss that is divided by another number overlaps its backward
        pass too.

        Raises:
            UserError: before the first call of the gate.
        """
        self.settle()
        found = self._divisor
        if self.process_group is None and self._own is not None and self.last is not None:
            kept, labels = self._own
            valid = (labels.flatten() != self.ignore_index) & ~self.last.significance.flatten().isnan()
            found = (valid.sum() if self.temperature else kept).float()
        if found is None:
            raise UserError("divisor() before the first batch; wanted a call of the gate before it")
        # Where no rank kept a row every sum is 0, whatever divides it.
        return torch.where(found > 0, found, 1.0)

    def _settled(self) -> PIController:
        self.settle()
        return self.controller

    @property
    def threshold(self) -> Tensor:
        """float32, one element: the threshold of the next call."""
        return self._settled().threshold

    @property
    def step(self) -> Tensor:
        """int64, one element: calls made."""
        return self._settled().steps

    @property
    def invalid(self) -> Tensor:
        """int64, one element: rows with NaN or +inf logits."""
        return self._settled().state().counter("invalid")

    @property
    def overflow(self) -> Tensor:
        """int64, one element: rows selected beyond the capacity."""
        return self._settled().state().counter("overflow")

    @property
    def rate_observed(self) -> Tensor:
        """float32, one element: smoothed fraction (with a mass, its share) above the threshold, before floor
        and capacity; NaN before a call."""
        return self._settled().rate

    @property
    def saturated(self) -> Tensor:
        """int64, one element: calls at which the rate was out of reach; see ``PIController.saturation``."""
        return self._settled().saturated

    def forward(
        self, logits: Tensor, targets: Tensor, *, index: Tensor | None = None, offset: Tensor | None = None
    ) -> Selection:
        """Selects among the rows of one batch and moves the threshold.

        Args:
            logits: floating [rows, classes], or any shape with the classes in ``dim``: the rows are then
                numbered in the order of the targets. Detached: a selection has no gradient.
            targets: int64 or int32, the logits' shape without ``dim``.
            index: [samples], their places in the data set; only checked, for this gate keeps no history.
            offset: floating, the targets' shape, added to the significance.

        Returns:
            Selection. Weights are 1, or 1/p with a temperature.

        Raises:
            TypeError, ValueError: tensors that do not fit together, as ``sparse_kernels.gate_rows``.
        """
        if index is not None and index.shape != targets.shape[:1]:
            raise UserError(f"index has shape {tuple(index.shape)}; wanted {tuple(targets.shape[:1])}, one a sample")
        if logits.requires_grad:
            logits = logits.detach()
        if offset is not None:
            offset = offset.detach()
        if self.process_group is not None:
            return self._step_across_ranks(logits, targets, offset)
        # Not self.controller.values: each look-up through a module takes as long as 16 rows.
        controller: Any = self._modules["controller"]
        buffers = controller._buffers
        state, setpoint = ControlState(buffers["values"], buffers["counters"]), buffers["target"]
        if self._orders:
            gated, selection = self._select(logits, targets, offset, state, self.seed)
            significance, mass, labels = self._observed(gated, targets)
            # The controller counts significance above the threshold itself, so a floor cannot reach it.
            control(
                state, significance, setpoint,
                labels=labels, ignore_index=self.ignore_index, mass=mass, overflow=selection.overflow,
            )  # fmt: skip
        else:
            gated, selection, _ = gate_step(
                logits, targets, state, setpoint,
                weights=self._weights, capacity=self.capacity, offset=offset, by_mass=self.by_grad_norm, dim=self.dim,
                label_smoothing=self.label_smoothing, ignore_index=self.ignore_index,
                gate_temperature=self.temperature, p_min=self.p_min, seed=self.seed,
            )  # fmt: skip
        # Module's own assignment looks for parameters first.
        object.__setattr__(self, "_own", (selection.count, targets))
        object.__setattr__(self, "last", gated)
        return selection

    def by(self, significance: Tensor) -> Selection:
        """Selects as ``forward`` does, by a significance found elsewhere: a loss without classes, say.

        Args:
            significance: floating [rows], 0 or more; NaN is never selected, and counted.

        Raises:
            UserError: a gate with a mass, which is a share of what the logits say.
        """
        if self.by_grad_norm:
            raise UserError(f"grad_norm_fraction={self.setpoint} with a significance that is given; wanted a rate")
        # One class tells nothing: its loss and entropy are 0, and what is added to them decides. Where that class
        # is to be ignored it is the second, and as good as certain.
        label = 1 if self.ignore_index == 0 else 0
        logits = torch.zeros(significance.shape[0], label + 1, device=significance.device)
        logits[:, :label] = -30.0
        targets = torch.full(significance.shape, label, device=significance.device)
        selection: Selection = self(logits, targets, offset=significance.float())
        return selection

    def _step_across_ranks(self, logits: Tensor, targets: Tensor, offset: Tensor | None) -> Selection:
        """As ``forward``, but that the threshold moves when the other ranks' rows are known: see ``settle``."""
        assert self.process_group is not None
        self.settle()
        group = ranks.resolve_process_group(self.process_group)
        state = self.controller.state()
        gated, selection = self._select(
            logits, targets, offset, state, ranks.rank_seed(self.seed, dist.get_rank(group))
        )
        significance, mass, labels = self._observed(gated, targets)
        self._exchange = Exchange(
            group, state, significance, labels != self.ignore_index, mass, self.controller.target,
            selection.count, selection.overflow, self.temperature, self.p_min,
        )  # fmt: skip
        if torch.compiler.is_compiling():  # what is under way cannot leave a graph
            self.settle()
        self.last = gated
        return selection

    def _observed(self, gated: GatedRows, targets: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Significance, mass and labels, one a row: what the controller sees of a batch."""
        mass = gated.stats.grad_norm if self.by_grad_norm else None
        return gated.significance.flatten(), None if mass is None else mass.flatten(), targets.flatten()

    def _select(
        self, logits: Tensor, targets: Tensor, offset: Tensor | None, state: ControlState, seed: int
    ) -> tuple[GatedRows, Selection]:
        """Score, decide, pack."""
        threshold, step = state.values[0], state.counters[0]
        gated = gate_rows(
            logits, targets, threshold,
            weights=self._weights, offset=offset, outputs=("grad_norm",) if self.by_grad_norm else (), dim=self.dim,
            label_smoothing=self.label_smoothing, ignore_index=self.ignore_index,
            gate_temperature=self.temperature, p_min=self.p_min, seed=seed, step=step,
        )  # fmt: skip
        if self._orders:
            gated = self._rank(gated, targets != self.ignore_index, threshold, seed, step)
        weight = None if gated.weight is None else gated.weight.flatten()
        return gated, compact(gated.mask.flatten(), weight=weight, capacity=self.capacity)

    def _rank(self, gated: GatedRows, valid: Tensor, threshold: Tensor, seed: int, step: int | Tensor) -> GatedRows:
        """The decisions that the comparison with a threshold is not all of."""
        mask, significance = gated.mask, gated.significance
        valid = valid & ~significance.isnan()
        if self.ties == "random":
            size = torch.where(valid & significance.isfinite(), significance, 0).abs().sum() / valid.sum().clamp(min=1)
            u = uniform(mask.numel(), seed=seed, step=step, device=mask.device).reshape(mask.shape)
            # Equal rows of 0 have no size of their own.
            significance = torch.where(valid, significance + u * (2.0**-14 * size.clamp(min=1e-20)), significance)
            mask = (significance > threshold) & valid
        if self.decision == "topk":
            mask = self._at_least(self.rate, torch.zeros_like(mask), significance, valid)
        elif self.floor:
            mask = self._at_least(self.floor, mask, significance, valid)
        return gated._replace(mask=mask, significance=significance)

    @staticmethod
    def _at_least(share: float, mask: Tensor, significance: Tensor, valid: Tensor) -> Tensor:
        """``mask``, or the most significant ``share`` of the valid rows where it keeps fewer."""
        # 1e-4 of a row: 0.1 of 30 rows is 3, not the 4 of a rounded-up product.
        wanted = torch.ceil(share * valid.sum() - 1e-4)
        most = math.ceil(share * mask.numel() - 1e-4)
        ranked = torch.topk(significance.masked_fill(~valid, -math.inf).flatten(), most).indices
        taken = torch.arange(most, device=mask.device) < wanted
        top = torch.zeros_like(mask).flatten().scatter(0, ranked, taken).reshape(mask.shape) & valid
        return mask | top  # where enough is kept, the top rows are among them

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        self.settle()  # of the tensors that are about to be moved
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        """A gate of the same ranks: their group is a handle, of which there are no copies. Settles first."""
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        self.settle()  # what is under way belongs to this process
        return self.__dict__

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.process_group not in (None, "world"):
            raise UserError(
                "a gate with a process group of its own cannot be pickled, for the group is of this process; "
                'wanted its state_dict(), or process_group="world"'
            )
        return super().__reduce_ex__(protocol)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.settle()  # or the batch before would move what is loaded
        # Version 1 kept its own counters; the controller's were there before its packed ones.
        for old, new in (("step", "steps"), ("invalid", "invalid"), ("overflow", "overflow")):
            if f"{prefix}{old}" in state_dict:
                state_dict[f"{prefix}controller.{new}"] = state_dict.pop(f"{prefix}{old}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}={weight:g}" for name, weight in self.significance.weights.items())
        name = "grad_norm_fraction" if self.by_grad_norm else "rate"
        return f"{name}={self.setpoint:g}, significance=({weights}), capacity={self.capacity}, biased={self.biased}"
