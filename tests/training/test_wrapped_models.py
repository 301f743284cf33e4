"""Models that their user has wrapped for several processes, batches that are invalid on one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sparse_training import SparseTrainer, TrainerSettings
from sparse_training.errors import UserError

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="a PyTorch without torch.distributed and gloo"
)

PLAIN = {"dense_start": 0, "dense_end": 0, "optimizer": torch.optim.SGD, "lr": 0.1, "schedule": lambda progress: 1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    processes = Processes(tmp_path_factory.mktemp("ranks"), 2)
    yield lambda check, *arguments: processes.run(check, 2, *arguments)
    processes.stop()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()


def rows(count: int = 48) -> TensorDataset:
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorDataset(inputs, inputs.argmax(1))


def loader() -> DataLoader[Any]:
    data = rows()
    return DataLoader(data, batch_size=6, sampler=DistributedSampler(data, shuffle=False))


def weights(model: nn.Module) -> list[Any]:
    return [getattr(value, "full_tensor", lambda value=value: value)().tolist() for value in model.parameters()]


def wrapped(rank: int, ranks: int, group: Any, how: str, options: dict[str, Any]) -> Any:
    model = network()
    given: nn.Module = model
    if how == "ddp":
        given = DistributedDataParallel(model)
    if how == "compiled ddp":
        given = torch.compile(DistributedDataParallel(model), backend="eager")  # type: ignore[assignment]
    if how == "fully_shard":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (ranks,))
        fully_shard(model[0], mesh=mesh)  # type: ignore[index]
        fully_shard(model, mesh=mesh)
    settings = TrainerSettings(**options.pop("settings", {}))
    trainer = SparseTrainer(given, settings=settings, **options, **PLAIN)
    assert sum(isinstance(module, DistributedDataParallel) for module in trainer.parallel.modules()) == (
        how != "fully_shard"
    )
    log = trainer.fit(loader(), steps=8, evaluate=loader(), evaluations=2)
    return weights(trainer.model), [found["loss"] for found in log.evals]


@pytest.mark.parametrize(
    "options",
    [{"policy": "dense"}, {"policy": "gate", "rate": 0.5}, {"policy": "dense", "settings": {"clip_norm": 0.1}},
     {"policy": "dense", "settings": {"accumulate": 3}}],
    ids=["dense", "gate", "clipped", "accumulated"],
)  # fmt: skip
def test_a_wrapped_model_is_not_wrapped_again(run: Callable[..., list[Any]], options: dict[str, Any]) -> None:
    """And trains as the model that is given bare."""
    expected = run(wrapped, "bare", options)
    for how in ("ddp", "compiled ddp", "fully_shard"):
        found = run(wrapped, how, options)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine[1] == pytest.approx(theirs[1], rel=1e-9)
            for some, others in zip(mine[0], theirs[0], strict=True):
                torch.testing.assert_close(torch.tensor(some), torch.tensor(others), rtol=1e-9, atol=1e-12)


def refused(rank: int, ranks: int, group: Any, folder: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = []
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (ranks,)))
    part = nn.Sequential(DistributedDataParallel(network()), nn.Linear(6, 6))
    shard = nn.Sequential(fully_shard(network(), mesh=init_device_mesh("cpu", (ranks,))), nn.Linear(6, 6))
    for call in (
        lambda: SparseTrainer(model, policy="dense").fit(loader(), steps=1, checkpoint=folder),
        lambda: SparseTrainer(model, policy="dense", settings=TrainerSettings(ema=0.9)),
        lambda: SparseTrainer(part, policy="dense"),
        lambda: SparseTrainer(shard, policy="dense"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        found.append(str(caught.value))
    return found


def test_what_cannot_be_done_with_a_wrapped_model_is_said(run: Callable[..., list[Any]], tmp_path: Any) -> None:
    expected = (
        "`checkpoint` cannot",
        "`ema` cannot",
        "DistributedDataParallel must wrap the whole model",
        "fully_shard must be called on the whole model too",
    )
    for found in run(refused, str(tmp_path / "run")):
        assert [message[: len(words)] for message, words in zip(found, expected, strict=True)] == list(expected)


def exchanges(rank: int, ranks: int, group: Any, granularity: str) -> int:
    model, calls = DistributedDataParallel(network()), 0

    def hook(state: Any, bucket: Any) -> Any:
        nonlocal calls
        calls += 1
        return default_hooks.allreduce_hook(None, bucket)

    hook.__annotations__ = {}
    model.register_comm_hook(None, hook)
    settings = TrainerSettings(accumulate=4)
    SparseTrainer(model, policy="dense", granularity=granularity, settings=settings, **PLAIN).fit(loader(), steps=8)
    return calls


@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_gradients_are_exchanged_once_an_optimizer_step(run: Callable[..., list[Any]], granularity: str) -> None:
    assert run(exchanges, granularity) == [2, 2]


def invalid(rank: int, ranks: int, group: Any, bad: list[int], settings: dict[str, Any], left_out: bool) -> Any:
    """On the second rank alone some batches are not finite; or none is, and both ranks leave these out."""
    data: list[tuple[Tensor, Tensor]] = [(inputs.clone(), targets) for inputs, targets in loader()]
    if left_out:
        data = [batch for number, batch in enumerate(data) if number not in bad]
    elif rank == 1:
        for number in bad:
            data[number][0][0, 0] = math.nan
    trainer = SparseTrainer(network(), policy="dense", settings=TrainerSettings(**settings), **PLAIN)
    log = trainer.fit(data, steps=len(data))
    return weights(trainer.model), int(log.invalid)


@pytest.mark.parametrize("settings", [{}, {"accumulate": 4}], ids=["", "accumulated"])
@pytest.mark.parametrize("bad", [[1], [0, 3]], ids=str)
def test_a_batch_that_is_invalid_on_one_rank_is_skipped_on_all(
    run: Callable[..., list[Any]], settings: dict[str, Any], bad: list[int]
) -> None:
    found, expected = run(invalid, bad, settings, False), run(invalid, bad, settings, True)
    for (mine, count), (theirs, none) in zip(found, expected, strict=True):
        assert (count, none) == (len(bad), 0)
        for some, others in zip(mine, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(some), torch.tensor(others), rtol=1e-12, atol=1e-14)
