"""Terms of a gate that 2 gloo processes share: the same scales and centroids as one process with all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from torch import Tensor

from sparse_training import Gate, Significance, UserError
from sparse_training.gate.terms import Difficulty, LossChange, Novelty, Uncertainty

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="a PyTorch without torch.distributed and gloo"
)

RANKS, CLASSES = 2, 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    processes = Processes(tmp_path_factory.mktemp("ranks"), RANKS)
    yield processes.run
    processes.stop()


def parts(step: int) -> list[dict[str, Tensor]]:
    """A batch of texts for each rank: of different sizes and difficulty, with ignored tokens, or none at all."""
    g = torch.Generator().manual_seed(step)
    found = []
    for rank in range(RANKS):
        texts = 0 if step % 4 == 2 and rank == 0 else 2 + 3 * rank
        targets = torch.randint(CLASSES, (texts, 6), generator=g)
        targets[:, 4:] = -100
        found.append({
            "logits": (1 + 4 * rank) * torch.randn(texts, 6, CLASSES, generator=g),
            "targets": targets,
            "embedding": torch.randn(texts, 6, 8, generator=g),
        })  # fmt: skip
    return found


def share(rank: int, ranks: int, group: Any) -> dict[str, list[Any]]:
    terms = (Difficulty(0.5), Uncertainty(0.2), Novelty(0.3))
    gate = Gate(0.3, significance=Significance(terms=terms), process_group=group)
    for step in range(8):
        both = parts(step)
        gate(**(both[rank] if ranks > 1 else {name: torch.cat([part[name] for part in both]) for name in both[0]}))
    return {name: value.tolist() for name, value in gate.state_dict().items()}


def test_processes_share_one_scale_and_the_centroids(run: Callable[..., list[Any]]) -> None:
    first, second = run(share, RANKS)
    assert first == second
    alone = share(0, 1, None)
    for name, value in alone.items():
        torch.testing.assert_close(torch.tensor(first[name]), torch.tensor(value), rtol=1e-4, atol=1e-5)
    assert alone["terms.0.mean"] > 1


def refused(rank: int, ranks: int, group: Any) -> list[str]:
    found = []
    for term in (LossChange(rows=9), Novelty(memory=9)):
        gate = Gate(0.3, significance=Significance(terms=(Difficulty(), term)), process_group=group)
        with pytest.raises(UserError) as caught:
            gate(**parts(0)[rank])
        found.append(f"{caught.value} {float(gate.terms[0].seen)}")
    return found


def test_a_history_or_a_memory_of_one_process_is_refused(run: Callable[..., list[Any]]) -> None:
    for found in run(refused, RANKS):
        assert [message.split(", so")[0].split()[2] for message in found] == ["LossChange", "Novelty"]
        assert all("processes cannot share its gate" in message and message.endswith(" 0.0") for message in found)
