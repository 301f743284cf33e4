"""The terms of a gate, what they need of a batch, and their weighted sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sparse_kernels import row_stats
from sparse_training import ranks
from sparse_training.errors import UserError
from sparse_training.gate.checks import check_row_numbers
from sparse_training.gate.schedules import Follow, Weight
from sparse_training.gate.significance import Significance, weight_at
from sparse_training.gate.terms.base import Term
from sparse_training.gate.terms.context import Context
from sparse_training.gate.terms.feedback import check_feedback


class Terms(nn.Module):
    """Terms of a gate's significance, which is the gate's own copy, and the schedules of its weights.

    Args:
        significance: the significance.
        schedule: schedule of the gate's rate; None for none.
        ignore_index: target of the rows that do not count.
        label_smoothing: label smoothing of the loss.
        dim: class dimension of the logits.

    Attributes:
        asks: True if a batch must be described by a ``Context``.
        scheduled: True if a weight follows a schedule.
        statistics: names of the logits' statistics that the terms ask for.
        needs: fields of ``Context`` that the terms ask for.
        embedding: name of the submodule that embeds the rows; None for the default.
        current: weights of the statistics of the fused pass, as ``weights`` last returned them.
    """

    def __init__(
        self, significance: Significance, schedule: Weight | None, ignore_index: int, label_smoothing: float, dim: int
    ) -> None:
        super().__init__()
        for number, term in enumerate(significance.terms):
            self.add_module(str(number), term)
        self.significance, self.dim = significance, dim
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        scheduled = significance.schedules
        self.schedules = nn.ModuleDict({name: one for name, one in scheduled.items() if isinstance(one, nn.Module)})
        self.scheduled = bool(scheduled) or any(callable(term.weight) for term in significance.terms)
        followers = [part for part in self.modules() if isinstance(part, Follow)]
        self._followers = (*followers, *([schedule] if isinstance(schedule, Follow) else []))
        follows_loss = any(one.signal == "loss" for one in self._followers)
        asked = [name for term in significance.terms for name in term.statistics]
        self.statistics = tuple(dict.fromkeys([*asked, *(["loss"] if follows_loss else [])]))
        self.needs = frozenset(need for term in significance.terms for need in term.needs)
        named = {term.embedding: None for term in significance.terms if "embedding" in term.needs}
        if len(named) > 1:
            raise UserError(f"the terms must use one `embedding`, got {', '.join(map(repr, named))}")
        self.embedding = next(iter(named), None)
        self.asks = bool(significance.terms) or follows_loss
        self.current: dict[str, float] = {}
        self._term_weights: tuple[float, ...] = ()

    def __getitem__(self, number: int) -> Term:
        """Return a term by its place in ``Significance.terms``."""
        return self.significance.terms[number]

    def weights(self, progress: float) -> dict[str, float]:
        """Set the terms' weights, and return those of the statistics of the fused pass.

        Args:
            progress: fraction of the run that is done, 0 to 1.
        """
        terms = self.significance.terms
        self._term_weights = tuple(weight_at(term.weight, progress, type(term).__name__) for term in terms)
        self.current = self.significance.at(progress) or {"loss": 0.0}  # the pass needs one
        return self.current

    def observe(self, signal: str, loss: Tensor) -> None:
        """Pass a loss to the schedules that follow it.

        Args:
            signal: "loss" or "validation".
            loss: float scalar, on the device.
        """
        for follower in self._followers:
            if follower.signal == signal:
                follower.observe(loss)

    @torch.no_grad()
    def context(
        self,
        logits: Tensor,
        targets: Tensor,
        group: Any,
        index: Tensor | None,
        inputs: Any,
        embedding: Tensor | None,
        feedback: Tensor | None,
    ) -> Context:
        """Describe a batch of class logits; the terms' statistics take one pass over them.

        Args:
            logits: class logits.
            targets: class indices, of the logits' shape without the class dimension.
            group: group of processes that share the gate; None for one process.
            index: row numbers, int64 or int32, one per target; None for none.
            inputs: the model's inputs; None for none.
            embedding: embeddings [rows, width], or of the targets' shape and the width behind it; None for none.
            feedback: numbers [rows]; None for none.
        """
        found: dict[str, Tensor] = {}
        if self.statistics:
            stats = row_stats(
                logits, targets, outputs=self.statistics, dim=self.dim, label_smoothing=self.label_smoothing,
                ignore_index=self.ignore_index,
            )  # fmt: skip
            found = {name: getattr(stats, name).flatten() for name in self.statistics}
        flat = targets.flatten()
        index = None if index is None else check_row_numbers(index)
        if embedding is not None and targets.ndim > 1 and embedding.shape[:-1] == targets.shape:
            embedding = embedding.flatten(0, -2)
        return self.described(
            flat, flat != self.ignore_index, found, group, classes=logits.shape[self.dim], index=index, inputs=inputs,
            embedding=embedding, feedback=feedback,
        )  # fmt: skip

    def described(
        self, targets: Tensor, valid: Tensor, statistics: dict[str, Tensor], group: Any, **known: Any
    ) -> Context:
        """Describe a batch by statistics that are at hand.

        Args:
            targets: targets, [rows, ...].
            valid: bool [rows], the rows that count.
            statistics: statistics by name, [rows].
            group: group of processes that share the gate; None for one process.
            known: further fields of ``Context``.

        Raises:
            UserError: a term lacks what it needs, or processes cannot share it.
        """
        for term in self.significance.terms:
            self._check(term, valid.shape[0], group, known)
        context = Context(targets, valid, statistics, **{n: _detached(value) for n, value in known.items()})
        if group is None:
            return context
        resolved = ranks.resolve_process_group(group)

        def total(sums: Tensor) -> Tensor:
            dist.all_reduce(sums, group=resolved)
            return sums

        return Context(**{**vars(context), "total": total})

    @staticmethod
    def _check(term: Term, rows: int, group: Any, known: dict[str, Any]) -> None:
        name = type(term).__name__
        if group is not None and term.per_process:
            raise UserError(
                f"the term {name} keeps what one process saw, so processes cannot share its gate; "
                "use process_group=None, or a term without a history or memory"
            )
        for need in term.needs:
            if known.get(need) is None:
                raise UserError(f"the term {name} needs `{need}` of the rows, {_SOURCES.get(need, 'got none')}")
        index, feedback = known.get("index"), known.get("feedback")
        if index is not None and "index" in term.needs and index.shape != (rows,):
            raise UserError(
                f"the term {name} needs `index` of shape [{rows}], one per row, got {list(index.shape)}; tokens and "
                "pixels have no row numbers"
            )
        if feedback is not None:
            check_feedback("`feedback`", feedback, rows)

    def check_feedback_is_used(self) -> None:
        """Refuse feedback that no term reads.

        Raises:
            UserError: no term does.
        """
        if not any(term.takes_feedback or "feedback" in term.needs for term in self.significance.terms):
            raise UserError(
                "`feedback` is given, and no term of the gate's significance reads it; add the term Feedback, or leave "
                "it out; a term of your own says that it reads it by takes_feedback=True"
            )

    def check(self, context: Context) -> None:
        """Check that every term can serve a batch, before any changes.

        Args:
            context: the batch.

        Raises:
            UserError: a term cannot.
        """
        for term in self.significance.terms:
            term.check(context)

    @torch.no_grad()
    def added_to(self, offset: Tensor | None, context: Context, targets: Tensor) -> Tensor | None:
        """Add the terms' weighted sum to an offset, of the targets' shape; ignored rows get 0.

        Args:
            offset: the offset so far; None for 0.
            context: the batch.
            targets: targets of the gate's call.

        Raises:
            UserError: a term returned something else than a number for each row.
        """
        self.check(context)
        if "loss" in context.statistics and self._followers:
            self.observe("loss", context.mean(context.statistics["loss"])[0])
        for term, weight in zip(self.significance.terms, self._term_weights, strict=True):
            values = term(context)
            if not isinstance(values, Tensor) or values.shape != context.valid.shape:
                shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise UserError(f"the term {type(term).__name__} must return shape [{context.rows}], got {shape}")
            part = torch.where(context.valid, weight * values.float(), 0.0).reshape(targets.shape)
            offset = part if offset is None else offset + part
        return offset


_SOURCES = {
    "index": "got none; data whose rows have numbers give them, or gate(..., index=); tokens and pixels have none",
    "inputs": "got none; give gate(..., inputs=)",
    "embedding": "got none; give gate(..., embedding=), or train by SparseTrainer, which reads the model's",
}


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
