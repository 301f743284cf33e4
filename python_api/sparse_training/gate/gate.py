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
from sparse_training import ranks
from sparse_training.arguments import check_choice, check_fraction, check_integer, check_number
from sparse_training.errors import UserError
from sparse_training.gate.checks import check_capacity, check_combination, check_progress, check_set_point
from sparse_training.gate.controller import PIController
from sparse_training.gate.exchange import Exchange
from sparse_training.gate.presets import own_significance
from sparse_training.gate.ranking import certain_rows, rank
from sparse_training.gate.significance import Significance
from sparse_training.gate.terms.context import Context
from sparse_training.gate.weighing import Terms

SetPoint = Callable[[float], float]  # maps the fraction of the run that is done, 0 to 1, to a set-point


class Gate(nn.Module):
    """Selects the rows that are worth training on, from a model's logits.

    It keeps about ``rate`` of the rows, or the fewest that hold the share ``grad_norm_fraction`` of the batch's
    gradient norm. With a capacity nothing waits for the device. All state is in buffers: it moves with the module, and
    a run resumes exactly from ``state_dict()``. Each call changes that state without a lock: give each thread a gate of
    its own, or let one thread call it at a time.

    With a ``process_group`` each rank's call launches one gathering of 15 numbers and goes on. ``settle`` waits for it,
    and whatever needs the result calls ``settle``: the next call, ``divisor``, ``threshold``, ``state_dict``. So all
    ranks must call the gate equally often; nothing is one step late. The state is the same on every rank and fits any
    number of them. Only draws differ, because each rank has a seed of its own. A floor, ties and the k of "topk" apply
    to each rank's own rows. With decision="topk" and a capacity of ceil(rate * rows of a rank's batch) the ranks are
    balanced: all train on equally many rows, and none waits for another.

    Args:
        rate: fraction of the valid rows to keep, in (0, 1]; 1 keeps all of them. A callable of the fraction of the run
            that is done, such as ``Ramp(1.0, 0.1)``, is followed by calls of ``set_progress``. None (the default) for
            0.1, or with ``grad_norm_fraction``.
        grad_norm_fraction: in place of a rate, the share of the rows' summed gradient norms that the kept rows are to
            hold, in (0, 1], or such a callable: the fewest rows if the significance is grad_norm alone. Default None.
        significance: weights of the statistics and terms that rank the rows, or the name of a preset: "vision",
            "language", "audio" or "robot", see ``preset``. None (the default) for
            ``Significance(loss=0.7, entropy=0.3)``, and with ``grad_norm_fraction`` for
            ``Significance(grad_norm=1.0)``.
        decision: "threshold" (the default) keeps the rows above the controller's threshold, or draws them where there
            is a temperature. "topk" keeps the ceil(rate * valid rows) most significant of each batch, an exact count;
            its controller runs and decides nothing. Both are biased towards significant rows, except for draws with
            their weights.
        ties: "equal" (the default) treats equal rows alike: all above the threshold, or none. "random" puts them in an
            order drawn for this seed and step, so that a rate is met even if all rows are equal: each row gains up to
            2^-14 of the batch's mean significance. It costs some 100 small operations.
        capacity: number of slots of a selection, whatever the batch holds, at least 1. Rows beyond it are dropped and
            counted in the selection's ``overflow`` and, except for the first batch of an automatic start, in the
            gate's. None (the default) for as many slots as rows kept, which waits for an accelerator.
        temperature: 0 (the default) keeps what is above the threshold. Above 0, in units of significance, a row is
            drawn with probability p = sigmoid((significance - threshold) / temperature) and weighted 1/p. Weighted
            sums over the kept rows are then unbiased estimates of sums over all, and ties are broken.
        p_min: least such p, in [0, 1) and below ``rate``, so that no weight exceeds 1/p_min. Default 0, at which
            draws are unbiased too and weights are at most 2^32; above it their variance is smaller.
        floor: least fraction of the valid rows to keep, in [0, 1] and at most ``rate``. Where fewer are above the
            threshold, the most significant are added. The controller never sees the added rows. Default 0.
        seed: seed of the draws, with the step and the row's number. Default 0.
        threshold: initial threshold, finite. None (the default) keeps the first batch whole and starts from its rows.
        process_group: group of ranks that share one threshold, moved by all of their rows: "world" for the default
            group of torch.distributed, or a group. None (the default) for this process alone.
        ignore_index: target of the rows that do not count. Default -100.
        label_smoothing: label smoothing of the loss, in [0, 1]. Default 0.
        dim: class dimension of the logits. Default -1.

    Attributes:
        setpoint: current rate or grad-norm fraction.
        last: the ``GatedRows`` of the last call, as decided; not part of the state.

    Raises:
        UserError: a setting is out of range, or settings do not fit one another.

    Example:
        >>> gate = Gate(rate=0.1, capacity=128)
        >>> kept = gate(logits, targets)
        >>> inputs, targets = kept.take((inputs, targets))
    """

    _version = 2

    def __init__(
        self,
        rate: float | SetPoint | None = None,
        *,
        grad_norm_fraction: float | SetPoint | None = None,
        significance: Significance | str | None = None,
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
        self.temperature = check_number("temperature", temperature, "at least 0, finite", lambda x: 0 <= x < math.inf)
        self.p_min = check_number("p_min", p_min, "in [0, 1)", lambda x: 0 <= x < 1)
        self.floor = check_number("floor", floor, "in [0, 1]", lambda x: 0 <= x <= 1)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, "in [0, 1]", lambda x: 0 <= x <= 1)
        if rate is not None and grad_norm_fraction is not None:
            raise UserError(f"give `rate` or `grad_norm_fraction`, got both: {rate} and {grad_norm_fraction}")
        self.by_grad_norm = grad_norm_fraction is not None
        target = grad_norm_fraction if grad_norm_fraction is not None else 0.1 if rate is None else rate
        self.schedule = copy.deepcopy(target) if callable(target) else None  # its state is this gate's own
        self.setpoint = check_fraction(self._target_name, target(0.0) if callable(target) else target)
        self.controller = PIController(
            self.setpoint, threshold=threshold, temperature=self.temperature, p_min=self.p_min
        )
        self.seed = check_integer("seed", seed)
        self.ignore_index = check_integer("ignore_index", ignore_index)
        self.dim = check_integer("dim", dim)
        self.capacity = check_capacity(capacity)
        check_set_point(self._target_name, self.setpoint, self.floor, self.p_min)
        self.decision = check_choice("decision", decision, ("threshold", "topk"))
        self.ties = check_choice("ties", ties, ("equal", "random"))
        check_combination(
            temperature=self.temperature, p_min=self.p_min, floor=self.floor,
            decision=decision, ties=ties, by_grad_norm=self.by_grad_norm,
        )  # fmt: skip
        self.significance = own_significance(significance, by_grad_norm=self.by_grad_norm)
        self.terms = Terms(self.significance, self.schedule, self.ignore_index, self.label_smoothing, self.dim)
        self._weights = self.terms.weights(0.0)
        self._asks = self.terms.asks
        self._ranks_rows = bool(self.floor) or decision == "topk" or ties == "random"
        self.last: GatedRows | None = None
        self.process_group = ranks.check_process_group(process_group)
        self._exchange: Exchange | None = None  # of the last batch, not yet in the state
        self._divisor: Tensor | None = None
        self._own: tuple[Tensor, Tensor] | None = None  # rows kept and labels of the last batch, without ranks

    @property
    def _target_name(self) -> str:
        return "grad_norm_fraction" if self.by_grad_norm else "rate"

    def set_target_rate(self, setpoint: float) -> None:
        """Set the rate, or the grad-norm fraction, from the next call on; nothing waits for the device.

        Args:
            setpoint: rate or grad-norm fraction, in (0, 1], such as ``Budget.rate()``.

        Raises:
            UserError: it is out of range, below the floor, or not above ``p_min``.
        """
        if setpoint == self.setpoint:
            return
        check_fraction(self._target_name, setpoint)
        check_set_point(self._target_name, setpoint, self.floor, self.p_min)
        self.controller.set_target(setpoint)
        self.setpoint = setpoint

    def set_progress(self, progress: float) -> None:
        """Follow the schedules of the rate and of the weights; no effect without one.

        Args:
            progress: fraction of the run that is done, 0 to 1.

        Raises:
            UserError: it is no such fraction, such as a number of steps.
        """
        progress = check_progress(progress)
        if self.schedule is not None:
            self.set_target_rate(self.schedule(progress))
        if self.terms.scheduled:
            self._weights = self.terms.weights(progress)

    def observe_validation(self, loss: float) -> None:
        """Pass on a validation loss, for schedules such as ``Follow("validation", 1.0, 0.1)``.

        Args:
            loss: the loss; one that is not finite is left out.
        """
        self.terms.observe("validation", torch.tensor(float(loss), device=self.threshold.device))

    @property
    def rate(self) -> float:
        """Target rate; 1 with ``grad_norm_fraction``, which may need any number of rows."""
        return 1.0 if self.by_grad_norm else self.setpoint

    @property
    def biased(self) -> bool:
        """True if sums over the kept rows favour significant rows.

        False for draws, whose 1/p weights make the sums estimates of those over all rows (as long as no row overflows
        a capacity), and where every row is kept.
        """
        return self.temperature == 0.0 and self.setpoint < 1.0

    def settle(self) -> None:
        """Wait for the other ranks' sums of the last batch and move the threshold; no effect if none is under way."""
        if self._exchange is not None:
            kept, valid = self._exchange.finish()
            self._exchange, self._divisor = None, valid if self.temperature else kept

    def divisor(self) -> Tensor:
        """Number to divide the sum of this rank's weighted losses by: float32, one element, at least 1 / ranks.

        Averaged over the ranks, as DistributedDataParallel and FSDP average gradients, the loss is then the mean over
        the rows that all of them kept. With a temperature it is the estimate of the mean over all valid rows. Either
        has the gradient that one process with all the rows has. So the divisor is that number of rows divided by the
        number of ranks; 1 where it would be 0. Call it after the forward pass of the kept rows, which the exchange
        between the ranks overlaps.

        Raises:
            UserError: the gate has not been called yet.
        """
        self.settle()
        count = self._divisor
        if self.process_group is None and self._own is not None and self.last is not None:
            kept, labels = self._own
            valid = (labels.flatten() != self.ignore_index) & ~self.last.significance.flatten().isnan()
            count = (valid.sum() if self.temperature else kept).float()
        if count is None:
            raise UserError("divisor() was called before the first batch; call the gate first")
        return torch.where(count > 0, count, 1.0)  # where no rank kept a row, every sum is 0

    def _settled(self) -> PIController:
        self.settle()
        return self.controller

    @property
    def threshold(self) -> Tensor:
        """Threshold of the next call: float32, one element."""
        return self._settled().threshold

    @property
    def known_threshold(self) -> Tensor | None:
        """Threshold that alone decides the next call; None if its rows are ranked, drawn or may overflow a capacity."""
        by_rows = self._asks or self._ranks_rows or self.temperature or self.capacity is not None
        return None if by_rows else self.threshold

    @property
    def step(self) -> Tensor:
        """Number of calls: int64, one element."""
        return self._settled().steps

    @property
    def invalid(self) -> Tensor:
        """Number of rows with NaN or +inf logits: int64, one element."""
        return self._settled().state().counter("invalid")

    @property
    def overflow(self) -> Tensor:
        """Number of rows selected beyond the capacity: int64, one element."""
        return self._settled().state().counter("overflow")

    @property
    def rate_observed(self) -> Tensor:
        """Smoothed fraction of rows, or of gradient norm, above the threshold, without floor or capacity."""
        return self._settled().rate

    @property
    def saturated(self) -> Tensor:
        """Number of calls at which the target was out of reach: int64, one element; see ``PIController.saturation``."""
        return self._settled().saturated

    def forward(
        self, logits: Tensor, targets: Tensor, *, index: Tensor | None = None, offset: Tensor | None = None,
        inputs: Any = None, embedding: Tensor | None = None, feedback: Tensor | None = None,
    ) -> Selection:  # fmt: skip
        """Select among the rows of one batch, and move the threshold.

        Args:
            logits: class logits, floating [rows, classes], or any shape with the classes in ``dim``: rows are then
                numbered in the order of the targets. They are detached, for a selection has no gradient.
            targets: classes, int64 or int32, of the logits' shape without ``dim``.
            index: row numbers in the data set, int64 or int32 [samples], for terms with a history. Default: none.
            offset: number added to each row's significance, floating, of the targets' shape. None (the default) for 0.
            inputs: the model's inputs, for terms such as ``Contrast``. None (the default) for none.
            embedding: for ``Novelty``, floating [rows, width] or [B, T, width]. None (the default) for none.
            feedback: numbers for ``Feedback``, floating [rows]. None (the default) for none.

        Returns:
            The selection. Weights are 1, or 1/p with a temperature.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: tensors do not fit one another, as in ``sparse_kernels.gate_rows``.
            UserError: a term lacks what it needs, or is given it in the wrong shape; or no term reads the feedback.
        """
        if index is not None and index.shape != (expected := targets.shape[:1]):
            raise UserError(f"`index` must have shape {tuple(expected)}, one per sample, got {tuple(index.shape)}")
        if feedback is not None:
            self.terms.check_feedback_is_used()
        if isinstance(logits, Tensor) and logits.requires_grad:  # what is no tensor, the operation refuses by name
            logits = logits.detach()
        if offset is not None:
            offset = offset.detach()
        if self._asks:
            context = self.terms.context(logits, targets, self.process_group, index, inputs, embedding, feedback)
            offset = self.terms.added_to(offset, context, targets)
        return self._decide(logits, targets, offset)

    def _decide(self, logits: Tensor, targets: Tensor, offset: Tensor | None) -> Selection:
        if self.process_group is not None:
            return self._step_across_ranks(logits, targets, offset)
        # Not self.controller.values: each look-up through a module costs as much as 16 rows.
        controller: Any = self._modules["controller"]
        buffers = controller._buffers
        state, setpoint = ControlState(buffers["values"], buffers["counters"]), buffers["target"]
        if self._ranks_rows:
            gated, selection = self._select(logits, targets, offset, state, self.seed)
            significance, norms, labels = self._observed(gated, targets)
            # The controller counts significance above the threshold itself, so a floor cannot reach it.
            control(
                state, significance, setpoint,
                labels=labels, ignore_index=self.ignore_index, mass=norms, overflow=selection.overflow,
            )  # fmt: skip
        else:
            gated, selection, _ = gate_step(
                logits, targets, state, setpoint,
                weights=self._weights, capacity=self.capacity, offset=offset, by_mass=self.by_grad_norm, dim=self.dim,
                label_smoothing=self.label_smoothing, ignore_index=self.ignore_index,
                gate_temperature=self.temperature, p_min=self.p_min, seed=self.seed,
            )  # fmt: skip
        # Module.__setattr__ looks for parameters first, which takes time.
        object.__setattr__(self, "_own", (selection.count, targets))
        object.__setattr__(self, "last", gated)
        return selection

    def by(self, significance: Tensor, context: Context | None = None, *, valid: Tensor | None = None) -> Selection:
        """Select as ``forward`` does, by a given significance, such as a loss without classes.

        Args:
            significance: significance of the rows, floating [rows], at least 0; NaN is never selected, and counted.
            context: the rows, for a gate with terms, whose sum is added. None (the default) for a gate without.
            valid: bool [rows]; False for rows that do not count. None (the default) if all do.

        Returns:
            The selection. Weights are 1, or 1/p with a temperature.

        Raises:
            UserError: the gate has a grad-norm fraction, which needs logits, or terms and no context.
        """
        if self.by_grad_norm:
            raise UserError(f"grad_norm_fraction={self.setpoint} needs logits, got a significance; use a rate")
        logits, targets = certain_rows(significance, self.ignore_index)
        if valid is not None:
            targets = torch.where(valid, targets, self.ignore_index)
        offset: Tensor | None = significance.float()
        if self._asks:
            if context is None:
                raise UserError("a gate whose significance has terms needs logits, got a significance alone")
            offset = self.terms.added_to(offset, context, targets)
        return self._decide(logits, targets, offset)

    def _step_across_ranks(self, logits: Tensor, targets: Tensor, offset: Tensor | None) -> Selection:
        """Select; the threshold moves once the other ranks' sums are there, see ``settle``."""
        assert self.process_group is not None
        self.settle()
        group = ranks.resolve_process_group(self.process_group)
        state = self.controller.state()
        gated, selection = self._select(
            logits, targets, offset, state, ranks.rank_seed(self.seed, dist.get_rank(group))
        )
        significance, norms, labels = self._observed(gated, targets)
        self._exchange = Exchange(
            group, state, significance, labels != self.ignore_index, norms, self.controller.target,
            selection.count, selection.overflow, self.temperature, self.p_min,
        )  # fmt: skip
        if torch.compiler.is_compiling():  # an exchange under way cannot leave a graph
            self.settle()
        self.last = gated
        return selection

    def _observed(self, gated: GatedRows, targets: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Significance, gradient norm and label of each row, for the controller."""
        norms = gated.stats.grad_norm if self.by_grad_norm else None
        return gated.significance.flatten(), None if norms is None else norms.flatten(), targets.flatten()

    def _select(
        self, logits: Tensor, targets: Tensor, offset: Tensor | None, state: ControlState, seed: int
    ) -> tuple[GatedRows, Selection]:
        """Score the rows, decide, and pack the indices."""
        threshold, step = state.values[0], state.counters[0]
        gated = gate_rows(
            logits, targets, threshold,
            weights=self._weights, offset=offset, outputs=("grad_norm",) if self.by_grad_norm else (), dim=self.dim,
            label_smoothing=self.label_smoothing, ignore_index=self.ignore_index,
            gate_temperature=self.temperature, p_min=self.p_min, seed=seed, step=step,
        )  # fmt: skip
        if self._ranks_rows:
            gated = rank(
                gated, targets != self.ignore_index, threshold, ties=self.ties, decision=self.decision, rate=self.rate,
                floor=self.floor, seed=seed, step=step,
            )  # fmt: skip
        weight = None if gated.weight is None else gated.weight.flatten()
        return gated, compact(gated.mask.flatten(), weight=weight, capacity=self.capacity)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        self.settle()  # an exchange refers to the tensors that are about to be moved
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        """Copy the gate; the process group is a handle and is shared."""
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        self.settle()  # an exchange under way belongs to this process
        return self.__dict__

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.process_group not in (None, "world"):
            raise UserError(
                "a gate with a process group cannot be pickled, because the group belongs to this process; "
                'use its state_dict(), or process_group="world"'
            )
        return super().__reduce_ex__(protocol)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.settle()  # an exchange under way would move the loaded state
        # Version 1 kept counters of its own; the controller packs them.
        for old, new in (("step", "steps"), ("invalid", "invalid"), ("overflow", "overflow")):
            if f"{prefix}{old}" in state_dict:
                state_dict[f"{prefix}controller.{new}"] = state_dict.pop(f"{prefix}{old}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Settings to print."""
        weights = ", ".join(f"{name}={weight}" for name, weight in self.significance.settings.items())
        target = f"{self._target_name}={self.setpoint:g}"
        return f"{target}, significance=({weights}), capacity={self.capacity}, biased={self.biased}"
