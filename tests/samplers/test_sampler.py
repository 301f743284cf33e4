"""The batch sampler in a plain DataLoader: batches, weights, workers, processes and states."""

import copy
import multiprocessing

import pytest
import torch
from torch import distributed as dist
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sparse_training.errors import UserError
from sparse_training.samplers.adaptive_weights import SamplingWeights
from sparse_training.samplers.batch_sampler import METHODS, HistorySampler, Indexed

ROWS = 203


def dataset(rows=ROWS):
    return TensorDataset(torch.arange(rows) * 10.0, torch.arange(rows) % 7)


def score(index, epoch=0):
    """Between 0 and 1, and another in each epoch."""
    return ((index * 37 + epoch * 11) % 101).float() / 101


def logits_of(index, epoch=0):
    """[n, 7]: sure of the right class in most rows, of another one in others."""
    believed = torch.where(score(index, epoch) < 0.2, index * 5 % 7, index % 7)
    return 8.0 * torch.nn.functional.one_hot(believed, 7).float()


def train(sampler, loader, epoch, batches=None):
    """Goes through so many batches of an epoch as training would; their rows and weights."""
    sampler.set_epoch(epoch)
    found = []
    for index, (x, _) in loader:
        assert torch.equal(x, index * 10.0)
        found.append((index.tolist(), sampler.weights(index).tolist()))
        sampler.update(index, score(index, epoch), logits_of(index, epoch))
        if len(found) == batches:
            break
    return found


def loader_of(sampler, workers=0, rows=ROWS):
    return DataLoader(Indexed(dataset(rows)), batch_sampler=sampler, num_workers=workers)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_epoch_is_a_plain_one_in_random_order(method):
    switched = {"denoise": True, "targets": torch.arange(ROWS) % 7} if method == "adaptive" else {}
    sampler = HistorySampler(dataset(), 16, method=method, **switched)
    found = train(sampler, loader_of(sampler), 0)
    assert len(found) == len(sampler) == 13
    rows = [row for index, _ in found for row in index]
    assert sorted(rows) == list(range(ROWS)) != rows
    assert {weight for _, weights in found for weight in weights} == {1.0}


def test_importance_epochs_have_the_share_of_rows_that_was_asked_for():
    sampler = HistorySampler(ROWS, 16, rate=0.3)
    loader = loader_of(sampler)
    assert len(loader) == 4
    for epoch in range(8):
        found = train(sampler, loader, epoch)
        assert [len(index) for index, _ in found] == [16, 16, 16, 13]
    assert sampler.table.seen == ROWS
    assert len({weight for _, weights in found for weight in weights}) > 10


def test_infobatch_epochs_hold_what_is_not_dropped_and_the_last_ones_everything():
    sampler = HistorySampler(ROWS, 16, method="infobatch", epochs=8)
    loader = loader_of(sampler)
    sizes = []
    for epoch in range(8):
        found = train(sampler, loader, epoch)
        assert len(found) == len(sampler)
        rows = [row for index, _ in found for row in index]
        assert len(rows) == len(set(rows))
        sizes.append(len(rows))
        assert [len(index) for index, _ in found[:-1]] == [16] * (len(found) - 1)
        weights = {weight for _, weights in found for weight in weights}
        assert weights == ({1.0} if epoch in (0, 7) else {1.0, 2.0})
    assert sizes[0] == sizes[7] == ROWS  # 0.875 * 8 = 7
    assert all(0.6 * ROWS < size < 0.9 * ROWS for size in sizes[1:7])


def test_a_loader_that_is_gone_through_again_counts_its_own_epochs():
    sampler = HistorySampler(ROWS, 64, method="infobatch")
    for epoch in range(3):
        assert sum(1 for _ in sampler) == len(sampler)
        assert sampler.epoch == epoch
    next(iter(sampler))  # left in its midst: the same again
    next(iter(sampler))
    assert sampler.epoch == 3


def test_drop_last_leaves_out_the_short_batch_unless_it_is_the_only_one():
    assert [len(batch) for batch in HistorySampler(10, 4, drop_last=True)] == [4, 4]
    assert [len(batch) for batch in HistorySampler(3, 4, drop_last=True)] == [3]


def rare_classes(rows=ROWS):
    """int64 [rows]: class 1 is a twentieth, class 2 a tenth."""
    kind = torch.arange(rows) % 20
    return torch.where(kind == 7, 1, torch.where((kind == 3) | (kind == 11), 2, 0))


OPTIONS = {
    "importance": {},
    "infobatch": {},
    # Passes end within epochs, and classes are balanced from the third epoch on.
    "adaptive": {
        "rate": 0.8,
        "epochs": 4,
        "denoise": True,
        "deduplicate": True,
        "balance": True,
        "targets": rare_classes(),
        "duplicate_counts": 1 + (torch.arange(ROWS) < 50).long(),
    },
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("workers", "stop"), [(0, 5), (0, 13), (2, 5), (2, 12)])
@pytest.mark.parametrize("place", [{}, {"rank": 1, "num_replicas": 2}], ids=["alone", "of two"])
def test_a_state_goes_on_bit_for_bit(method, workers, stop, place):
    """With workers, batches are drawn ahead: the state holds them, and they are not drawn again."""
    if place and method == "infobatch":
        pytest.skip("its processes agree on the batches of an epoch")
    options = {"method": method, "seed": 3, **OPTIONS[method], **place}

    def epochs(sampler, first, last):
        loader = loader_of(sampler, workers)
        return [train(sampler, loader, epoch) for epoch in range(first, last)]

    whole = HistorySampler(ROWS, 16, **options)
    expected = epochs(whole, 0, 4)

    part = HistorySampler(ROWS, 16, **options)
    epochs(part, 0, 1)
    stop = min(stop, len(expected[1]))
    head = train(part, loader_of(part, workers), 1, batches=stop)
    state = copy.deepcopy(part.state_dict())
    resumed = HistorySampler(ROWS, 16, **options)
    resumed.load_state_dict(state)
    assert resumed.epoch == 1
    assert head == expected[1][:stop]
    rest = epochs(resumed, 1, 4)
    if stop == len(expected[1]):  # all of it was done: nothing of the epoch is left
        assert rest[0] == []
    assert head + rest[0] == expected[1]
    assert rest[1:] == expected[2:]
    if method == "adaptive":
        assert resumed.sampler.balanced
        for name, value in whole.sampler.state_dict().items():
            assert torch.equal(torch.as_tensor(resumed.sampler.state_dict()[name]), torch.as_tensor(value)), name
    else:
        assert torch.equal(resumed.table.scores, whole.table.scores)


def test_weights_are_those_of_the_draw():
    sampler = HistorySampler(ROWS, 16)
    sampler.update(torch.arange(ROWS), score(torch.arange(ROWS)))
    batches = iter(sampler)
    first, second = (torch.tensor(next(batches)) for _ in range(2))
    weights = sampler.weights(second).clone()
    assert weights.dtype == torch.float32
    sampler.update(first, torch.full((16,), 50.0))  # other probabilities from now on
    assert torch.equal(sampler.weights(second), weights)
    sampler.update(second, torch.ones(16))
    with pytest.raises(UserError, match="not under way"):
        sampler.weights(second)


def drawn(sampler, epochs):
    """How often each row of the data set comes in an epoch, for each of so many more; nothing is learned of them."""
    found = []
    for epoch in range(sampler.epoch, sampler.epoch + epochs):
        sampler.set_epoch(epoch)
        found.append(torch.bincount(torch.tensor([row for batch in sampler for row in batch]), minlength=sampler.size))
    return found


@pytest.mark.parametrize("known", [True, False])
def test_adaptive_rows_whose_labels_the_model_denies_come_seldom(known):
    """Where it may: a switch that is off changes nothing."""
    rows, classes = 4000, 7
    generator = torch.Generator().manual_seed(1)
    right = torch.arange(rows) % classes
    wrong = torch.rand(rows, generator=generator) < 0.2
    given = torch.where(wrong, (right + torch.randint(1, classes, (rows,), generator=generator)) % classes, right)
    switches = {"denoise": known, "balance": True}
    sampler = HistorySampler(rows, 100, method="adaptive", targets=given.tolist(), epochs=9, **switches)
    assert (drawn(sampler, 1)[0] == 1).all()
    logits = 4.0 * torch.nn.functional.one_hot(right, classes).float()
    losses = torch.nn.functional.cross_entropy(logits, given, reduction="none")
    for index in torch.randperm(rows, generator=generator).split(100):
        sampler.update(index, losses[index], logits[index])
    sampler.set_epoch(1)
    (counts,) = drawn(sampler, 1)
    assert counts[wrong].float().mean() == pytest.approx(0.1 if known else 1.0, abs=0.03)
    assert counts[~wrong].float().mean() > 0.95
    index = torch.tensor(next(iter(sampler)))
    assert torch.equal(sampler.weights(index), torch.ones(100))


def test_adaptive_copies_share_the_draws_of_one_row():
    copies = torch.where(torch.arange(1000) < 600, 6, 1)
    (counts,) = drawn(HistorySampler(1000, 50, method="adaptive", deduplicate=True, duplicate_counts=copies), 1)
    assert counts[:600].sum() == pytest.approx(200, abs=10)
    assert counts[600:].float().mean() == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("balance", [True, False])
def test_adaptive_classes_are_balanced_in_the_last_two_fifths_of_the_epochs(balance):
    targets = rare_classes(2000)
    switches = {"denoise": not balance, "balance": balance}
    sampler = HistorySampler(2000, 50, method="adaptive", targets=targets, epochs=5, **switches)
    shares = [torch.bincount(targets, weights=counts.double()) / 2000 for counts in drawn(sampler, 5)]
    for epoch, share in enumerate(shares):
        balanced = balance and epoch >= 3
        wanted = [1 / 3, 1 / 3, 1 / 3] if balanced else [0.85, 0.05, 0.1]
        assert share.tolist() == pytest.approx(wanted, abs=0.02)


def test_adaptive_processes_draw_their_own_rows_by_their_own_classes_and_copies():
    targets, copies = rare_classes(), torch.where(torch.arange(ROWS) < 90, 3, 1)
    samplers = [
        HistorySampler(
            ROWS,
            8,
            method="adaptive",
            epochs=4,
            seed=7,
            deduplicate=True,
            balance=True,
            targets=targets,
            duplicate_counts=copies,
            rank=rank,
            num_replicas=2,
        )
        for rank in range(2)
    ]
    for rank, sampler in enumerate(samplers):
        own = torch.arange(rank, ROWS, 2)
        own_weights = SamplingWeights(len(own), targets[own], copies[own], balance_from=0.6, seed=2 * 7 + rank)
        for epoch in range(4):  # balanced from the midst of the third on
            sampler.set_epoch(epoch)
            batches = 0
            for index, _ in loader_of(sampler):
                rows = own[
                    own_weights.draw(min(8, 102 - 8 * batches), (epoch + batches / 13) / 4)
                ]  # both have 102 an epoch
                assert index.tolist() == rows.tolist()
                assert torch.equal(sampler.weights(index), torch.ones(len(index)))
                sampler.update(index, score(index, epoch), logits_of(index, epoch))
                own_weights.update(index // 2, score(index, epoch), logits_of(index, epoch))
                batches += 1
            assert batches == len(sampler) == 13
        assert own_weights.balanced
    with pytest.raises(UserError, match="rows of another process"):
        samplers[0].update(torch.tensor([1]), torch.ones(1))


@pytest.mark.parametrize("replicas", [2, 3])
def test_processes_share_the_rows_out_and_stay_unbiased_together(replicas):
    samplers = [HistorySampler(ROWS, 8, rank=rank, num_replicas=replicas, uniform=0.3) for rank in range(replicas)]
    batches = [list(sampler) for sampler in samplers]
    assert len({len(found) for found in batches}) == 1
    assert {len(found[0]) for found in batches} == {8}
    for rank, found in enumerate(batches):
        assert {row % replicas for batch in found for row in batch} == {rank}
    assert sorted({row for found in batches for batch in found for row in batch}) == list(range(ROWS))
    # A mean of means counts a row of a smaller shard more: the weights take it back.
    for sampler, found in zip(samplers, batches, strict=True):
        shard = len(range(sampler.rank, ROWS, replicas))
        assert sampler.weights(torch.tensor(found[0]))[0].item() == pytest.approx(shard * replicas / ROWS)
    value = score(torch.arange(ROWS), 5)
    for sampler in samplers:
        own = torch.arange(sampler.rank, ROWS, replicas)
        sampler.update(own, score(own) + (own == 101 + sampler.rank) * 30)
    means = []
    for _ in range(40):
        for found in zip(*samplers, strict=True):  # a step of all processes, averaged as DistributedDataParallel does
            steps = [(torch.tensor(rows), sampler) for rows, sampler in zip(found, samplers, strict=True)]
            means.append(sum((sampler.weights(rows) * value[rows]).mean() for rows, sampler in steps) / replicas)
    means = torch.stack(means).double()
    assert abs(means.mean() - value.mean()) < 4 * means.std() / len(means) ** 0.5
    with pytest.raises(UserError, match="rows of another process"):
        samplers[0].update(torch.tensor([1]), torch.ones(1))


def epochs_of_a_process(rank, folder, results):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    sampler = HistorySampler(101, 8, method="infobatch")
    counts = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        sizes, owners = {len(batch) for batch in batches}, {row % 2 for batch in batches for row in batch}
        counts.append((len(batches), sizes, owners))
        own = torch.arange(rank, 101, 2)
        # Rank 0 has one hard row and so few kept ones, rank 1 few easy rows.
        sampler.update(own, (own == 50).float() if rank == 0 else 1.0 - (own == 51).float())
    sampler = HistorySampler(101, 8, method="adaptive", balance=True, targets=torch.arange(101) % 3, epochs=3)
    for _ in range(3):
        batches = list(sampler)
        owners = {row % 2 for batch in batches for row in batch}
        counts.append((len(batches), {len(batch) for batch in batches[:-1]}, owners))
    results.put((rank, counts))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")
def test_two_processes_agree_on_the_batches_of_an_epoch(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=epochs_of_a_process, args=(rank, tmp_path, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=240) for _ in processes)
    for process in processes:
        process.join()
    for first, second in zip(found[0], found[1], strict=True):
        assert first[0] == second[0]
        assert first[1] == second[1] == {8}
        assert (first[2], second[2]) == ({0}, {1})
    assert found[0][1][0] > 101 / 2 / 8 * 0.8  # as many as rank 1 keeps: rank 0 alone would have half


# --- refusals -----------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


@pytest.mark.parametrize("make", [Indexed, lambda data: HistorySampler(data, 4)])
def test_an_iterable_data_set_is_refused_with_the_reason(make):
    with pytest.raises(UserError, match=r"Stream is an IterableDataset: its rows .* cannot be asked for by number"):
        make(Stream())
    with pytest.raises(UserError, match="use a map-style data set"):
        make(iter([1, 2]))


ADAPTIVE = {"method": "adaptive"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "`batch_size` must be a whole number, at least 1, got 0"),
        ({"method": "best"}, "must be one of importance, infobatch, adaptive"),
        ({"epochs": 0}, "`epochs` must be .*, got 0"),
        ({**ADAPTIVE, "denoise": True, "targets": [0] * 9}, "`targets` must have one entry for each of 10 rows, got 9"),
        ({**ADAPTIVE, "deduplicate": True, "duplicate_counts": torch.ones(11)}, "`duplicate_counts` must .*, got 11"),
        ({"targets": [0] * 10}, "`targets` needs method=\"adaptive\", got method='importance'"),
        ({"balance": True}, "`balance` needs method=\"adaptive\", got method='importance'"),
        (ADAPTIVE, "at least one of its switches denoise, deduplicate, balance, each once, got none"),
        ({**ADAPTIVE, "denoise": True}, "`denoise` needs `targets`, got none"),
        ({**ADAPTIVE, "balance": True, "targets": [0, 1] * 5}, "`balance` needs `epochs`, got none"),
        ({**ADAPTIVE, "deduplicate": True}, "`deduplicate` needs `duplicate_counts`, got none"),
        (
            {**ADAPTIVE, "denoise": True, "targets": [0, 1, 2, 0, 1] * 2, "duplicate_counts": [1] * 10},
            "`duplicate_counts` needs deduplicate switched on, got denoise",
        ),
        ({**ADAPTIVE, "denoise": True, "targets": [0, 1] * 5}, "`denoise` needs at least 3 classes .*, got 2 classes"),
        (
            {**ADAPTIVE, "denoise": True, "targets": [0.5] * 10},
            r"needs the class of each of the 10 rows, .* got torch\.float32",
        ),
        ({"rate": 0.0}, "`rate` must be .*, got 0.0"),
        ({"uniform": 0.0}, "`uniform` must be .*, got 0.0"),
        ({"rank": 2, "num_replicas": 2}, "rank 2 of 2"),
        ({"dataset": 1, "rank": 0, "num_replicas": 2}, "each process must have a row"),
        ({"method": "infobatch", "rank": 0, "num_replicas": 2}, r"needs torch\.distributed"),
    ],
)
def test_settings_out_of_range_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        HistorySampler(**{"dataset": 10, "batch_size": 4, **options})


def test_what_an_adaptive_sampler_is_given_must_fit():
    sampler = HistorySampler(10, 4, method="adaptive", denoise=True, targets=torch.arange(10) % 3)
    with pytest.raises(UserError, match="3 scores for 4 rows"):
        sampler.update(torch.arange(4), torch.ones(3))
    with pytest.raises(UserError, match="one row for each of 4 rows, got 5"):
        sampler.update(torch.arange(4), torch.ones(4), torch.zeros(5, 3))
    for row in (-1, 10):
        with pytest.raises(IndexError, match="must be in 0 to 9"):
            sampler.update(torch.tensor([row]), torch.ones(1), torch.zeros(1, 3))
    with pytest.raises(UserError, match=r"`denoise` needs class logits \[rows, 3 or more\], got NoneType"):
        sampler.update(torch.arange(4), torch.ones(4))
    with pytest.raises(UserError, match="has no table"):
        _ = sampler.table


def test_a_state_of_other_settings_is_refused():
    state = HistorySampler(10, 4, seed=1).state_dict()
    with pytest.raises(UserError, match="seed 1 is now 2"):
        HistorySampler(10, 4, seed=2).load_state_dict(state)
    with pytest.raises(UserError, match="rank 0 is now 1"):
        HistorySampler(10, 4, seed=1, rank=1, num_replicas=2).load_state_dict(state)


def test_items_fetched_as_a_batch_keep_their_numbers():
    class Batched(TensorDataset):
        def __getitems__(self, indices):
            return [("batched", index) for index in indices]

    assert Indexed(Batched(torch.arange(9))).__getitems__([4, 2]) == [(4, ("batched", 4)), (2, ("batched", 2))]
    assert Indexed(dataset())[3][0] == 3
