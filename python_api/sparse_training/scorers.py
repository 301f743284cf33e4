"""Cheaper judges of rows than the whole model, and relative ones.

A dense step costs about three forward passes, so a gate at rate r whose scorer costs s of them is at most 3/(s+3r)
times as fast. The whole model has s = 1 (less in reduced precision); here are an early layer of it (s = its share of
the forward), a small model trained beside (s = its size), a table of past losses (s = 0), and what is left of a loss
when another model's is taken from it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from sparse_training.errors import UserError
from sparse_training.loader import Batch
from sparse_training.models import build_model
from sparse_training.ranks import add_up, place
from sparse_training.scoring import Criterion, Scorer, Scores, SelfScorer, evaluation_statistics, forward

if TYPE_CHECKING:
    from sparse_training.policies import Kept

GRID = 4  # features of an image are means over a grid of so many cells a side


class Beside:
    """A network trained beside the model, by an AdamW of its own.

    Its learning rate follows the model's schedule. A step is taken on the rows that the model was trained on, with
    their weights. Processes of torch.distributed have one network: they start from the first one's, take the step of
    all their rows together, and average BatchNorm's running statistics by the rows each has.
    """

    def __init__(self, net: nn.Module, lr: float, device: torch.device) -> None:
        self.net, self.lr = net.to(device), lr
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, fused=device.type in ("cpu", "cuda"))
        self._begun = False

    def learn(self, inputs: Any, kept: Kept, criterion: Criterion) -> None:
        """One step; ``inputs`` are the net's, one for each of the kept rows. To be called by all processes."""
        rows, alone = kept.targets.shape[0], place()[1] == 1
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
    def _together(self, kept: Kept) -> bool:
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
        add_up([*gradients, *statistics, rows, divisor])
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


class TrainedBeside(Scorer):
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
        self.beside: Beside | None = None
        self._made_for: Any = None  # arguments of ``make``

    def make(self, *arguments: Any) -> nn.Module:
        """The network, with fresh weights."""
        raise NotImplementedError

    def start(self, *arguments: Any) -> None:
        """Make the network, if it is not there; torch's global generator is left as it is."""
        if self.beside is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.beside = Beside(self.make(*arguments), self.lr, self.device)
            self._made_for = arguments

    def trained(self) -> Beside:
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


class EarlyScorer(TrainedBeside):
    """A linear head on a layer of the model: the layers behind it run on the kept rows alone.

    Scoring runs the model up to the layer on every row, without gradient, with evaluation statistics and in reduced
    precision; the kept rows then go through the whole model. s is the early layers' share of the forward. To keep the
    early pass and its graph instead would save running the kept rows through those layers again, r s, but its backward
    would go through the early layers with every row, 2 s: dearer at any rate below two thirds. So BatchNorm, early or
    late, sees the kept rows alone in training, and scoring leaves its statistics as they were.

    The head learns from the features of the rows that are trained on, read in passing as they are trained on; nothing
    flows back from it into the model.

    Args:
        layer: name of a submodule, as in ``model.get_submodule``, whose output is one tensor.
        pool: from the output [B, ...] to features [B, F]; by default images are averaged over a grid of 4 x 4 cells,
            tokens [B, T, D] over all tokens.
        lr, seed: of the head. precision: of the early pass.

    Raises:
        UserError: with ``attach`` no such layer; with ``build`` one that is not run, or gives no tensor.
    """

    name = "early"

    def __init__(
        self,
        layer: str,
        *,
        pool: Callable[[Tensor], Tensor] | None = None,
        lr: float = 1e-3,
        seed: int = 0,
        precision: str | None = None,
    ) -> None:
        super().__init__(lr=lr, seed=seed, precision=precision)
        self.layer, self.pool = layer, pool or pooled
        self._seen: list[Tensor] = []  # features, float32, of the rows in training

    def attach(self, model: nn.Module, criterion: Criterion, *, device: torch.device, precision: str = "auto") -> None:
        super().attach(model, criterion, device=device, precision=precision)
        names = [name for name, _ in bare(model).named_modules() if name]
        if self.layer not in names:
            raise UserError(f"the model has no layer {self.layer!r}: wanted one of {', '.join(names)}")

    def build(self, batch: Batch, logits: Any) -> None:
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise UserError(f"the scorer {self.name} has a head of classes: wanted a model with logits [B, classes]")
        with torch.no_grad():
            self.start(self.features(batch.inputs).shape[1], logits.shape[1])

    def make(self, features: int, classes: int) -> nn.Module:
        head = nn.Linear(features, classes)
        nn.init.zeros_(head.weight)  # to start as no opinion at all
        return nn.Sequential(nn.BatchNorm1d(features, affine=False), head)  # layers differ in scale

    def features(self, inputs: Any) -> Tensor:
        """float32 [B, F], with evaluation statistics; the model stops behind the layer."""
        found = []

        def stop(module: nn.Module, arguments: Any, output: Any) -> None:
            found.append(output)
            raise _Reached

        model = bare(self.model)
        handle = model.get_submodule(self.layer).register_forward_hook(stop)
        try:
            with evaluation_statistics(model):
                forward(model, inputs)
        except _Reached:
            return self._pool(found[0])
        finally:
            handle.remove()
        raise UserError(f"the layer {self.layer!r} is not run in the model's forward pass")

    def _pool(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise UserError(f"the layer {self.layer!r} gives a {type(output).__name__}: wanted one tensor")
        return self.pool(output).float()

    def logits(self, inputs: Any) -> Tensor:
        features, head = self.features(inputs), self.trained().net
        with evaluation_statistics(head), torch.autocast(self.device.type, enabled=False):
            logits: Tensor = head(features)
        return logits

    @contextmanager
    def watch(self) -> Iterator[None]:
        self._seen = []

        def read(module: nn.Module, arguments: Any, output: Any) -> None:
            self._seen.append(self._pool(output.detach()))

        handle = bare(self.model).get_submodule(self.layer).register_forward_hook(read)
        try:
            yield
        finally:
            handle.remove()

    def learn(self, kept: Kept) -> None:
        rows = kept.targets.shape[0]
        # A compiled forward runs no hooks, and one of no row was of another in its place.
        if rows and sum(map(len, self._seen)) != rows:
            with torch.no_grad():
                self._seen = [self.features(kept.inputs)]
        self.trained().learn(torch.cat(self._seen) if rows else None, kept, self.criterion)
        self._seen = []

    def extra_repr(self) -> str:
        return f"layer={self.layer}"


class _Reached(Exception):
    """The layer has run."""


def pooled(output: Tensor) -> Tensor:
    """[B, F]: of images [B, C, H, W] the means over a grid of cells, of tokens [B, T, D] the mean; else flattened."""
    if output.ndim == 4:
        cells = [-(-side // GRID) for side in output.shape[2:]]
        return F.avg_pool2d(output, cells, ceil_mode=True, count_include_pad=False).flatten(1)
    return output.mean(1) if output.ndim == 3 else output.flatten(1)


def bare(model: nn.Module) -> nn.Module:
    """The module inside what wraps it for compilation or for several ranks."""
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        model = inner
    return model


class ProxyScorer(TrainedBeside):
    """A small model trained beside, on the rows that the model is trained on.

    Its scoring, of all rows, and its training, of the kept ones, are both in the step's cost.

    Args:
        model: a module with the model's inputs and outputs, or a name for ``build_model``.
        lr, seed: of its training. precision: of its scoring pass.
    """

    name = "proxy"

    def __init__(
        self,
        model: nn.Module | str = "cnn-tiny",
        *,
        lr: float = 1e-3,
        seed: int = 0,
        precision: str | None = None,
    ) -> None:
        super().__init__(lr=lr, seed=seed, precision=precision)
        self._given = (model,)  # in a tuple: what is trained is a copy

    def build(self, batch: Batch, logits: Any) -> None:
        (model,) = self._given
        if isinstance(model, nn.Module):
            self.start()
        elif isinstance(batch.inputs, Tensor) and batch.inputs.ndim == 4 and isinstance(logits, Tensor):
            self.start(tuple(batch.inputs.shape[1:]), logits.shape[1])
        else:
            raise UserError(f"the proxy {model!r} is for images, [B, C, H, W]: wanted a module made for these inputs")

    def make(self, shape: tuple[int, int, int] | None = None, classes: int = 0) -> nn.Module:
        (model,) = self._given
        if isinstance(model, nn.Module):
            return copy.deepcopy(model)
        assert shape is not None
        return build_model(model, shape=shape, classes=classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def logits(self, inputs: Any) -> Any:
        net = self.trained().net
        with evaluation_statistics(net):
            return forward(net, inputs)

    def learn(self, kept: Kept) -> None:
        self.trained().learn(kept.inputs, kept, self.criterion)

    def extra_repr(self) -> str:
        (model,) = self._given
        return f"model={model if isinstance(model, str) else type(model).__name__}"


class ReferenceScorer(Scorer):
    """The loss minus that of a fixed model, trained on other data: what can be learned and is not yet.

    (RHO-loss; Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet
    Learnt", ICML 2022.) Noise is hard for both models, and what both know is easy for both.

    Args:
        reference: the fixed model; or a file with the state of one built as the trained model is, or with such a
            state under "model".
        of: who scores for the model that is trained: a scorer, or its name.

    Where rows have numbers the reference runs once on each row, and its losses are kept: s is then that of ``of``.
    """

    name = "reference"

    def __init__(self, reference: nn.Module | str | Path, *, of: Scorer | str = "self") -> None:
        super().__init__()
        self.of = make_scorer(of)
        if self.of.before_loading:
            raise UserError(f"a reference for the scorer {self.of.name}: wanted one that scores batches")
        self._reference: nn.Module | str | Path
        self.__dict__["_reference"] = reference  # not a part of the state
        self.table: Tensor | None = None  # float32 [rows of the data set], NaN where not yet run

    def attach(self, model: nn.Module, criterion: Criterion, *, device: torch.device, precision: str = "auto") -> None:
        super().attach(model, criterion, device=device, precision=precision)
        self.of.attach(model, criterion, device=device, precision=precision)
        self.dtype = self.of.dtype
        if not isinstance(self._reference, nn.Module):
            self.__dict__["_reference"] = load_reference(self._reference, bare(model))
        self._reference.to(device).requires_grad_(False).eval()  # type: ignore[union-attr]

    def prepare(self, rows: int | None) -> None:
        self.of.prepare(rows)
        if rows is not None and self.table is None:
            self.table = torch.full((rows,), torch.nan, device=self.device)

    def build(self, batch: Batch, logits: Any) -> None:
        self.of.build(batch, logits)

    def forward(self, batch: Batch) -> Scores:
        scores: Scores = self.of(batch)
        scores.offset = -self.losses(batch)
        return scores

    def losses(self, batch: Batch) -> Tensor:
        """float32 [B]: the reference's."""
        if self.table is None or batch.ids is None:
            return self._run(batch.inputs, batch.targets)
        found = self.table[batch.ids]
        new = found.isnan()
        if new.any():  # waits for an accelerator, which once every row was met it need not
            index = new.nonzero().squeeze(1)
            parts = pytree.tree_map_only(Tensor, lambda tensor: tensor[index], (batch.inputs, batch.targets))
            found[index] = self._run(*parts)
            self.table[batch.ids] = found
        return found

    @torch.no_grad()
    def _run(self, inputs: Any, targets: Tensor) -> Tensor:
        assert isinstance(self._reference, nn.Module)
        # A loss that is not finite would be asked for again and again.
        return self.criterion(forward(self._reference, inputs), targets).float().nan_to_num(0.0, 0.0, 0.0)

    def watch(self) -> Any:
        return self.of.watch()

    def learn(self, kept: Kept) -> None:
        self.of.learn(kept)

    def set_learning_rate(self, factor: float) -> None:
        self.of.set_learning_rate(factor)

    def get_extra_state(self) -> dict[str, Any]:
        return {} if self.table is None else {"table": self.table}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        if state:
            self.table = state["table"].to(self.device)


def load_reference(path: str | Path, model: nn.Module) -> nn.Module:
    """A copy of the model with the state in a file.

    Raises:
        UserError: no such file, or not a state of such a model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"the reference {path}: there is no such file") from None
    except Exception as error:  # a pickle's errors are of every kind
        raise UserError(f"the reference {path} cannot be read: {str(error).splitlines()[0]}") from None
    reference = copy.deepcopy(model)
    try:
        reference.load_state_dict(state.get("model", state))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"the reference {path} is no state of the model: {' '.join(str(error).split())}") from None
    return reference


class HistoryScorer(Scorer):
    """Each row's loss when it was last trained on: s = 0, and rows left out are neither loaded nor run.

    Rows that were never trained on come before all others. A policy that takes the largest never looks again at what
    it left out, and by these losses that is for ever, but for the dense phases: what draws with weights does not.
    """

    name = "history"
    before_loading = True

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None  # float32 [rows], on the CPU; NaN before a row's first loss
        self._observed: tuple[Tensor, Tensor] | None = None  # not yet in the table

    def prepare(self, rows: int | None) -> None:
        if rows is None:
            raise UserError(
                "the scorer history asks for rows by their number: wanted data held in memory (ResidentLoader); "
                "for a DataLoader there is HistorySampler"
            )
        if self.table is None:
            self.table = torch.full((rows,), torch.nan)
        elif len(self.table) != rows:
            raise UserError(f"the scorer history has a table of {len(self.table)} rows: wanted one of {rows}")

    def observe(self, ids: Tensor, losses: Tensor) -> None:
        self._enter()
        self._observed = ids, losses

    def _enter(self) -> Tensor:
        assert self.table is not None, "prepare was not called"
        if self._observed is not None:
            ids, losses = (part.cpu() for part in self._observed)  # waits for the step before
            self.table[ids] = torch.where(losses.isfinite(), losses.float(), self.table[ids])
            self._observed = None
        return self.table

    def recall(self, ids: Tensor) -> Scores:
        losses = self._enter()[ids]
        largest = losses.nan_to_num(0.0).max() if len(losses) else 0.0
        return Scores(None, self.criterion, losses=torch.where(losses.isnan(), largest, losses))

    def get_extra_state(self) -> dict[str, Any]:
        return {} if self.table is None else {"table": self._enter()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self._observed = None
        if state:
            self.table = state["table"].cpu()


SCORERS: dict[str, type[Scorer]] = {
    kind.name: kind for kind in (SelfScorer, EarlyScorer, ProxyScorer, ReferenceScorer, HistoryScorer)
}
FORMS = "self, self:SCALE, early:LAYER, proxy, proxy:MODEL, reference:FILE, history"


def make_scorer(scorer: str | Scorer) -> Scorer:
    """A scorer from its name, or as it is. What follows a colon is the scale of the images that the model itself
    scores, the layer, the proxy's name, or the file of the reference.

    Raises:
        UserError: an unknown name, or an argument that is missing or wrong.
    """
    if isinstance(scorer, Scorer):
        return scorer
    name, colon, argument = scorer.partition(":")
    if name not in SCORERS or bool(argument) != bool(colon):
        raise UserError(f"scorer {scorer!r}: wanted one of {FORMS}")
    if name == "self" and argument:
        try:
            return SelfScorer(resolution=float(argument))
        except ValueError:
            raise UserError(f"scorer {scorer!r}: wanted a scale, such as self:0.5") from None
    if (name in ("early", "reference")) != bool(argument) and name != "proxy":
        raise UserError(f"scorer {scorer!r}: wanted one of {FORMS}")
    return SCORERS[name](*[argument] if argument else [])
