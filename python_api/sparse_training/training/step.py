"""One training step: load, score, select, train; for any module, batch structure and per-row loss."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from sparse_kernels.trees import map_rows, rows_at
from sparse_training import devices
from sparse_training.criterion import Criterion
from sparse_training.data.loader import Loader
from sparse_training.data.stream import StreamLoader
from sparse_training.errors import UserError
from sparse_training.evaluation import evaluation_statistics, forward
from sparse_training.objective import check_inputs, settle
from sparse_training.padding import zero_row_like
from sparse_training.rank_failures import together
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.policies.gate import GatePolicy
from sparse_training.selection.scorers.base import Scorer
from sparse_training.selection.scorers.model import SelfScorer
from sparse_training.selection.types import Batch, CandidateIndices, Scores, SelectedBatch, WeightedIndices
from sparse_training.training.checks import check_accumulation, check_batches, check_model, check_optimizer
from sparse_training.training.distributed import Ranks, is_sharded, settle_exchange, split_wrapper, tensor_shapes
from sparse_training.training.flops import Operations
from sparse_training.training.learning_rates import LearningRates
from sparse_training.training.modes import OptimizerModes
from sparse_training.training.optimizer_step import OptimizerStep
from sparse_training.training.optimizers import learning_rate, resolve_optimizer, unused_rate
from sparse_training.training.running_statistics import SavedStatistics
from sparse_training.training.settings import TrainerSettings
from sparse_training.user_code import described, explained

OptimizerFactory = Callable[..., torch.optim.Optimizer]


class ForwardResult(NamedTuple):
    """Losses and outputs of the rows trained on, from before the optimizer step; without gradient.

    Attributes:
        losses: loss of each row, [n].
        logits: the model's output.
    """

    losses: Tensor
    logits: Any


class TrainingStep:
    """A model with its policy, loss and optimizer, which takes one step at a time.

    The run is the loop's: its length, clock, checkpoints and callbacks. Calibration and cost budgets work on deep
    copies of this object.

    Args:
        model: any module; wrapped in DistributedDataParallel where several processes train it and nothing wraps it.
        criterion: loss of each row.
        policy: policy that selects the rows of the sparse steps.
        optimizer: an optimizer, or a factory called with (parameters, lr=lr); None for AdamW.
        lr: learning rate of an optimizer made here, above 0; None for the default.
        settings: precision, accumulation and other settings of the step.
        device: PyTorch device to train on; None for the model's.
        ranks: the processes that train together. Default: all of torch.distributed's.

    Attributes:
        policy: the policy of the sparse steps.
        dense: the policy of the dense steps.
        update: accumulates gradients and takes the optimizer steps.
        rates: learning rates of the optimizer's groups.
        modes: mode of an optimizer that has several.
        operations: floating-point operations counted so far.

    Raises:
        UserError: a learning rate out of range, or a scorer with granularity "token".
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        criterion: Criterion,
        policy: Policy,
        optimizer: OptimizerFactory | torch.optim.Optimizer | None,
        lr: float | None,
        settings: TrainerSettings,
        device: torch.device | str | None,
        ranks: Ranks | None = None,
    ) -> None:
        check_model(model)
        rate = learning_rate(lr, optimizer)
        if optimizer is not None and (isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer)):
            check_optimizer(optimizer, model)
        if criterion.granularity == "token" and policy.uses_scores and type(policy.scorer) is not SelfScorer:
            raise UserError(
                f'the scorer {policy.scorer.name} cannot be used with granularity="token", which judges the training '
                "forward's own logits; give no scorer"
            )
        # A copy: what the model's own loss says of its outputs is of this model alone.
        self.criterion, self.policy, self.dense = copy.copy(criterion), policy, Policy()
        self.settings, self.amp, self.precision = settings, settings.amp_dtype, settings.scoring_precision
        self.device = devices.find(device) if device is not None else _device_of(model)
        self.ranks = ranks or Ranks()
        model, wrapped = split_wrapper(model)
        if settings.ema is not None and is_sharded(model):
            raise UserError("`ema` cannot average a model that FSDP shards; give no ema")
        self.model: nn.Module = model.to(self.device)
        channels_last = settings.channels_last
        if channels_last is None:
            channels_last = any(isinstance(module, nn.Conv2d) for module in model.modules())
        if channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.attach(self.policy)
        self.optimizer = resolve_optimizer(optimizer, self.model, rate, self.device)
        if lr is not None and (unused := unused_rate(self.optimizer, rate)) is not None:
            warnings.warn(unused, stacklevel=3)
        check_accumulation(self.optimizer, settings.accumulate)
        self.rates, self.modes = LearningRates(self.optimizer), OptimizerModes(self.optimizer)
        self.update = OptimizerStep(self.model, self.optimizer, settings, device=self.device, ranks=self.ranks)
        self.operations = Operations()
        self.ranks.agree(tensor_shapes(self.model))
        # Training passes alone go through it: a scoring pass has no gradient to average.
        if wrapped is None:
            wrapped = self.model if self.ranks.alone else DistributedDataParallel(self.model)
        self.parallel = wrapped
        ddp = getattr(self.parallel, "_orig_mod", self.parallel)
        self._ddp = ddp if isinstance(ddp, DistributedDataParallel) else None
        self.update.defers = self._ddp is not None
        self.compile()
        self._norms = [module for module in self.model.modules() if isinstance(module, _NormBase)]
        self._checked, self._settled, self._exchange_settled = False, False, False

    def compile(self) -> None:
        """Compile the model where the settings say so; to be called again on a deep copy, which is not compiled."""
        if not self.settings.compile:
            return
        model, backend = self.model, "inductor" if self.settings.compile is True else self.settings.compile

        def call(*arguments: Any, **named: Any) -> Any:
            return model._call_impl(*arguments, **named)  # type: ignore[no-untyped-call]

        # Not Module.compile(), which compiles nothing of PyTorch's own containers. Static shapes would be compiled
        # again for every number of rows.
        with explained(lambda: f"`compile` names no backend of torch.compile, {backend!r}"):
            model._compiled_call_impl = torch.compile(call, dynamic=True, backend=backend)

    def attach(self, policy: Policy) -> Policy:
        """Move a policy to the device and give its scorer the model and the loss."""
        policy.to(self.device)
        policy.scorer.attach(self.model, self.criterion, device=self.device, precision=self.precision)
        return policy

    @property
    def scorer(self) -> Scorer:
        """Scorer of the policy of the sparse steps."""
        return self.policy.scorer

    # --- a step ---------------------------------------------------------------------------------

    def step(self, policy: Policy, loader: Loader, item: Any) -> tuple[Batch, SelectedBatch]:
        """Load, score, select and train on one item of the loader.

        Args:
            policy: policy of this step, ``self.policy`` or ``self.dense``.
            loader: loader that the item is from.
            item: an item that iterating over the loader yields.

        Returns:
            The batch and its selected rows.
        """
        with self.criterion.learning(learns=False):  # but for the losses that are trained on
            return self._step(policy, loader, item)

    def _step(self, policy: Policy, loader: Loader, item: Any) -> tuple[Batch, SelectedBatch]:
        if self.criterion.granularity == "token":
            samples = loader.load(item)
            with self.operations.of("train", samples.rows):
                return self._step_on_tokens(policy, samples)
        batch = loader.load(item, loader.choose(item, policy.choose))
        if not self._checked and batch.rows:
            self.check(batch)
        self._settle_exchange(batch)
        self._settle(self.model, batch)
        with self.operations.of("score", batch.rows, policy.name):
            kept = policy.select(policy.score(batch), batch)
        with self.operations.of("train", kept.targets.shape[0]):
            self.report(self.policy, batch, kept, self.learn(kept, idle_together=policy.idle_together))
        return batch, kept

    def _step_on_tokens(self, policy: Policy, samples: Batch) -> tuple[Batch, SelectedBatch]:
        """Run one forward pass of all samples; their logits, one row per token, are the policy's batch."""
        if not self._checked and samples.rows:
            self.check(samples)
        self._settle_exchange(samples)
        self._settle(self.model, samples)
        if samples.rows == 0 and not self.ranks.alone:
            inputs, targets = zero_row_like((samples.inputs, samples.targets))
            samples = samples._replace(inputs=inputs, targets=targets.fill_(self.criterion.ignore_index))
        before = SavedStatistics(self._norms)
        self.ranks.meet(self.device)
        with self._exchange(), self._statistics(samples.rows), self._autocast():
            with policy.read_elements() if isinstance(policy, GatePolicy) else nullcontext() as reader:
                output = forward(self.parallel, samples.inputs, self.criterion)
            rows = self.criterion.tokens(output, samples.targets)
            counts = rows[1] != self.criterion.ignore_index
            loader = StreamLoader((), device=self.device)
            if (not policy.uses_scores and not policy.before_loading) or isinstance(policy, GatePolicy):
                batch = loader.load(rows)._replace(weight=counts.float(), counted=counts.sum())
            else:  # these policies choose, or rank, among the tokens that count
                offer = CandidateIndices(counts.nonzero().squeeze(1).cpu(), 0)
                chosen = policy.choose(offer) or WeightedIndices(offer.ids)
                batch = loader.load(rows, chosen)._replace(offered=len(offer.ids))
            scores = None
            if policy.uses_scores and not policy.before_loading:
                scores = Scores(batch.targets, self.criterion, logits=batch.inputs.detach())
                if isinstance(policy, GatePolicy):
                    policy.describe_elements(scores, samples, reader, bool(self.criterion.shift))
            kept = policy.select(scores, batch)
            if self.update.is_empty(kept) and self.ranks.alone:
                self.update.skip()
                return batch, kept
            self.update.sum_rows(kept)
            losses = self.criterion.learn(kept.inputs, kept.targets)
        with self._exchange():
            before.restore_where(self.update.add(losses, kept))
        return batch, kept

    def report(self, policy: Policy, batch: Batch, kept: SelectedBatch, result: ForwardResult | None) -> None:
        """Pass the policy the rows' losses, where rows have indices, and train the scorer's own network, if any.

        Args:
            policy: policy that keeps the losses.
            batch: the batch.
            kept: its selected rows.
            result: losses and outputs of those rows; None if there were none.
        """
        if self.update.rejected:
            return
        if result is not None or not self.ranks.alone:  # all ranks train one auxiliary network
            policy.scorer.learn(kept)
        if result is not None and batch.ids is not None:
            policy.observe(batch.ids if kept.positions is None else batch.ids[kept.positions], *result)

    def learn(self, kept: SelectedBatch, *, idle_together: bool = False) -> ForwardResult | None:
        """Train on the selected rows.

        Args:
            kept: the rows.
            idle_together: True if no process has rows where this one has none. Default False.

        Returns:
            Their losses and outputs; None if there are none.
        """
        if nothing := self.update.is_empty(kept):
            if self.ranks.alone or idle_together:
                self.update.skip()
                return None
            # The other ranks wait for a backward pass. Zeros: the batch may be empty, or its rows not finite.
            inputs, targets = zero_row_like((kept.inputs, kept.targets))
            kept = SelectedBatch(inputs, targets, 0, None, torch.zeros(1, device=self.device), 0)
        self.update.sum_rows(kept)
        before = SavedStatistics(self._norms)
        with self._exchange(), self._statistics(kept.targets.shape[0]), self._autocast(), self.scorer.watch():
            logits = forward(self.parallel, kept.inputs, self.criterion)
            losses = self.criterion.learn(logits, kept.targets)
        with self._exchange():
            before.restore_where(self.update.add(losses, kept))
        if nothing:
            return None
        return ForwardResult(losses.detach(), pytree.tree_map_only(Tensor, Tensor.detach, logits))

    def _exchange(self) -> AbstractContextManager[None]:
        """Let ranks exchange gradients in the passes of a batch that completes an optimizer step, and no others."""
        if self._ddp is None or self.update.completes:
            return nullcontext()
        no_sync: AbstractContextManager[None] = self._ddp.no_sync()
        return no_sync

    def _statistics(self, rows: int) -> AbstractContextManager[None]:
        """Let BatchNorm use its running statistics for a single row, whose variance is 0 or an error."""
        return evaluation_statistics(self.model, _BatchNorm) if rows == 1 else nullcontext()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def check(self, batch: Batch) -> None:
        """Try the model and the loss on a batch, and build the scorer; the model and the generators do not change.

        Args:
            batch: a batch of the training data.

        Raises:
            UserError: a tensor whose dim 0 does not count the rows, a loss not of shape [B], or a loss that is not the
                model's own where no loss was given.
        """
        for tensor in pytree.tree_leaves(batch.inputs):
            if isinstance(tensor, Tensor) and (tensor.ndim == 0 or tensor.size(0) != batch.rows):
                raise UserError(
                    f"inputs and targets must have the same number of rows in dim 0, got an input "
                    f"{described(tensor)} and {batch.rows} targets"
                )
        check_inputs(self.model, batch.inputs)
        if self.policy.selects(numbered=batch.ids is not None):
            nothing = torch.zeros(0, dtype=torch.int64, device=self.device)
            with explained(lambda: f"rows of a batch of {described(batch.inputs)} cannot be selected"):
                rows_at((batch.inputs, batch.targets), nothing, batch.rows)
        with torch.no_grad():
            self._settle(self.model, batch)
            logits, _ = self._try(self.model, batch)
        self._settle_exchange(batch)
        if self.criterion.granularity == "sample":
            self.scorer.build(batch, logits)
        self._checked = True

    def _settle_exchange(self, batch: Batch) -> None:
        """Take all ranks through a first pass of DistributedDataParallel, one without rows too."""
        if self._ddp is None or self._exchange_settled:
            return
        self._exchange_settled = True
        if not batch.rows:
            inputs, targets = zero_row_like((batch.inputs, batch.targets))
            batch = batch._replace(inputs=inputs, targets=targets)
        self.ranks.meet(self.device)
        settle_exchange(self._ddp, lambda: self._try(self.parallel, batch)[1].sum(), self.device)

    @torch.no_grad()
    def _settle(self, model: nn.Module, batch: Batch) -> None:
        """Pair outputs and targets as the model's own loss does, where nothing else is said."""
        if not self._settled and batch.rows:
            with evaluation_statistics(model), self._autocast():
                self._settled = settle(self.criterion, model, batch.inputs, batch.targets)

    def _try(self, model: nn.Module, batch: Batch) -> tuple[Any, Tensor]:
        """Return the model's output for a batch, with evaluation statistics, and its losses."""
        with evaluation_statistics(self.model), self._autocast():
            if self.criterion.granularity == "sample":
                logits = forward(model, batch.inputs, self.criterion)
                return logits, self.criterion(logits, batch.targets)
            policy = self.policy if isinstance(self.policy, GatePolicy) else None
            with nullcontext() if policy is None else policy.read_elements() as reader:
                output = forward(model, batch.inputs, self.criterion)
            logits, targets = self.criterion.tokens(output, batch.targets)
            if policy is not None:
                scores = Scores(targets, self.criterion, logits=logits)
                policy.describe_elements(scores, batch, reader, bool(self.criterion.shift))
                policy.check(scores)
            return output, self.criterion(logits, targets)

    def head(self, batch: Batch, rows: int) -> SelectedBatch:
        """Select the first rows of a batch."""
        parts = (batch.inputs, batch.targets, batch.weight)
        inputs, targets, weight = map_rows(parts, operator.itemgetter(slice(rows)), batch.rows)
        positions = None if rows == batch.rows else torch.arange(rows, device=batch.targets.device)
        return SelectedBatch(inputs, targets, rows, positions, weight, rows)

    def set_learning_rate(self, factor: float) -> None:
        """Set the learning rate of each parameter group to a multiple of its first one."""
        if self.update.scheduler is None:
            self.rates.set(factor)
        else:  # the model's is the scheduler's; what is trained beside it follows
            factor = self.rates.relative()
        self.scorer.set_learning_rate(factor)

    # --- evaluation -----------------------------------------------------------------------------

    @together()
    @torch.no_grad()
    def evaluate(self, data: Iterable[Any]) -> dict[str, float]:
        """Measure the mean loss of a row, and the accuracy where targets are classes, over one pass.

        The average of the weights is evaluated where there is one. Several processes evaluate their parts of the
        data together. Nothing of the model or the generators changes.

        Args:
            data: a loader, or any iterable of batches.

        Returns:
            "loss" and, with classes, "accuracy", a fraction.
        """
        loader, model = self.loader(data), self.update.evaluated
        total = torch.zeros(4, dtype=torch.float64, device=self.device)  # losses, rows, correct, tokens
        classes = False
        still = self.criterion.learning(learns=False)
        with torch.random.fork_rng(devices=[]), evaluation_statistics(model), still, self.modes.during(training=False):
            for item in loader:
                batch = loader.load(item)
                self._settle(model, batch)
                logits, targets = forward(model, batch.inputs, self.criterion), batch.targets
                rows: int | Tensor = batch.rows
                if self.criterion.granularity == "token":
                    logits, targets = self.criterion.tokens(logits, targets)
                    counts = targets != self.criterion.ignore_index
                    logits, targets, rows = logits[counts], targets[counts], counts.sum()
                elif self.criterion.classes and (known := self.criterion.counting(targets)) is not None:
                    rows = known.reshape(len(known), -1).any(1).sum()  # a sample may count as little as a token
                total[0] += self.criterion(logits, targets).sum()
                total[1] += rows
                if (correct := self.criterion.count_correct(logits, targets)) is not None:
                    classes = True
                    total[2] += correct[0]
                    total[3] += correct[1]
                devices.end_step(self.device)
        loss, rows, correct_rows, tokens = self.ranks.sum_later(total)().tolist()
        accuracy = {"accuracy": correct_rows / max(tokens, 1)} if classes or tokens else {}
        return {**accuracy, "loss": loss / max(rows, 1)}

    def loader(self, data: Iterable[Any]) -> Loader:
        """Return the data as a Loader: as it is, or wrapped as a stream of batches."""
        if isinstance(data, Loader):
            return data
        check_batches(data)
        return StreamLoader(data, device=self.device, inputs=self.settings.inputs, targets=self.settings.targets)


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")
