"""A history sampler's run that goes on with another number of processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sparse_training import HistorySampler
from sparse_training.errors import UserError

ROWS = 103


def loss_of(index: torch.Tensor) -> torch.Tensor:
    return (index.float() * 0.37).sin().abs() + 0.01


def samplers(ranks: int, method: str = "importance", **options: Any) -> list[HistorySampler]:
    given = {"batch_size": 4, "seed": 5, "method": method, **options}
    return [HistorySampler(ROWS, rank=rank, num_replicas=ranks, **given) for rank in range(ranks)]


def train(processes: list[HistorySampler], batches: int | None = None) -> list[int]:
    """One epoch of all processes, or its first batches; return the rows."""
    rows = []
    for sampler in processes:
        for number, batch in enumerate(sampler):
            if number == batches:
                break
            index = torch.tensor(batch)
            sampler.update(index, loss_of(index))
            rows += batch
    return rows


def resumed(former: list[HistorySampler], ranks: int, **options: Any) -> list[HistorySampler]:
    states = copy.deepcopy([sampler.state_dict() for sampler in former])
    now = samplers(ranks, former[0].method, **options)
    for sampler in now:
        sampler.load_rank_states(states[::-1])  # in any order
    return now


@pytest.mark.parametrize(("before", "after"), [(2, 3), (2, 1), (3, 2), (1, 4), (4, 6), (6, 4), (1, 1)])
def test_every_score_goes_to_the_process_that_has_its_row(before: int, after: int) -> None:
    former = samplers(before)
    train(former, 3)
    scores = torch.full((ROWS,), torch.nan)
    for sampler in former:
        scores[sampler.rank :: before] = sampler.table.scores
    assert 0 < int(scores.isnan().sum()) < ROWS
    for sampler in resumed(former, after):
        torch.testing.assert_close(sampler.table.scores, scores[sampler.rank :: after], equal_nan=True, rtol=0, atol=0)
        assert sampler.table.seen == int((~sampler.table.scores.isnan()).sum())


@pytest.mark.parametrize("after", [1, 3])
def test_the_first_pass_goes_on(after: int) -> None:
    """Half an epoch on two processes, the rest on another number: rows that have no score come before all others."""
    former = samplers(2)
    first = train(former, 7)
    now = resumed(former, after)
    rest = train(now)
    assert len(first) == len({*first}) == 56
    assert abs(len(first) + len(rest) - ROWS) <= 4 * after
    for sampler in now:
        own = [row for row in rest if row % after == sampler.rank]
        unseen = [row for row in range(sampler.rank, ROWS, after) if row not in first]
        count = min(len(own), len(unseen))
        assert len({*own[:count]} & {*unseen}) == count
        assert sampler.epoch == 0
    train(now)
    assert {sampler.epoch for sampler in now} == {1}
    assert all(sampler.table.seen == sampler.rows for sampler in now)


def test_batches_that_were_drawn_ahead_are_not_lost() -> None:
    """Rows that a prefetching loader had drawn and that were not trained on come again."""
    former = samplers(2)
    for sampler in former:
        ahead = iter(sampler)
        index = torch.tensor(next(ahead))
        sampler.update(index, loss_of(index))
        next(ahead), next(ahead)
    seen = [row for sampler in former for row in (sampler.table.scores == sampler.table.scores).nonzero().tolist()]
    assert len(seen) == 8
    now = resumed(former, 1)
    rest = train(now)
    assert len(set(rest)) >= ROWS - 8


def test_an_epoch_that_has_ended_is_not_repeated() -> None:
    former = samplers(2)
    train(former)
    now = resumed(former, 3)
    train(now)
    assert {sampler.epoch for sampler in now} == {1}


@pytest.mark.parametrize("after", [1, 3])
def test_draws_stay_unbiased(after: int) -> None:
    """The weighted mean over draws of all processes estimates the mean over all rows."""
    former = samplers(2)
    for _ in range(2):
        train(former)
    now = resumed(former, after)
    values = (torch.arange(ROWS).double() * 0.9).cos()
    estimates = []
    for _ in range(300):
        means = []
        for sampler in now:
            batch = torch.tensor(next(iter(sampler._batches())))
            means.append((sampler.weights(batch) * values[batch]).mean())
            sampler.update(batch, loss_of(batch))
            if sampler._drawn >= len(sampler):
                sampler.set_epoch(sampler.epoch + 1)
        estimates.append(torch.stack(means).mean())
    found = torch.stack(estimates)
    assert abs(float(found.mean() - values.mean())) < 4 * float(found.std()) / 300**0.5


def test_infobatch_goes_on_at_the_end_of_an_epoch() -> None:
    former = samplers(1, "infobatch", prune=0.5)
    train(former)
    now = HistorySampler(ROWS, batch_size=4, seed=5, method="infobatch", rank=0, num_replicas=1)
    now.load_rank_states([former[0].state_dict()])
    assert torch.equal(now.table.scores, former[0].table.scores)


def test_what_cannot_be_dealt_out_is_refused_before_anything_is_changed() -> None:
    former = samplers(2)
    train(former, 3)
    states = [sampler.state_dict() for sampler in former]
    other = samplers(2, seed=6)[1].state_dict()
    (now,) = samplers(1)
    later = copy.deepcopy(states)
    later[1]["drawn"] += 1
    cases = [
        ([], "one state for each process of the run, got none"),
        (states[:1], "one state for each of 2 processes, got those of ranks 0"),
        ([states[0], states[0]], "got those of ranks 0, 0"),
        ([states[0], other], "different runs or moments"),
        (later, "different runs or moments"),
    ]
    for given, words in cases:
        with pytest.raises(UserError, match=words):
            now.load_rank_states(given)
    for options, words in (({"rate": 0.5}, "rate 1.0 is now 0.5"), ({"batch_size": 5}, "batch size 4 is now 5")):
        with pytest.raises(UserError, match=words):
            samplers(1, **options)[0].load_rank_states(states)
    assert now.table.seen == 0
    started = samplers(1, "infobatch")
    train(started, 3)
    state = started[0].state_dict()
    state["settings"] = {**state["settings"], "processes": 1}
    from sparse_training.samplers.resharding import resharded

    with pytest.raises(UserError, match="an epoch of infobatch cannot go on with another number of processes, 2"):
        resharded([state], 0, 2)
    targets = torch.arange(ROWS) % 3
    adaptive = samplers(2, "adaptive", denoise=True, targets=targets)
    (alone,) = samplers(1, "adaptive", denoise=True, targets=targets)
    with pytest.raises(UserError, match="a state of adaptive is of 2 processes and cannot be dealt out to 1"):
        alone.load_rank_states([sampler.state_dict() for sampler in adaptive])


def test_a_process_holds_its_own_part_of_the_table() -> None:
    """Four bytes a row of its own."""
    assert [sampler.table.scores.nbytes for sampler in samplers(4)] == [104, 104, 104, 100]
