"""Terms of significance: what each ranks, state that resumes, and refusals before anything changes."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import nn

from sparse_training import Gate, ResidentLoader, Significance, SparseTrainer, build_model, load_data
from sparse_training.errors import UserError
from sparse_training.gate import Follow, Transition, preset
from sparse_training.gate.presets import SIGNIFICANCES
from sparse_training.gate.terms import (
    Constant,
    Contrast,
    Difficulty,
    Feedback,
    LearningValue,
    LossChange,
    Novelty,
    Term,
    Uncertainty,
)

ROWS, CLASSES, WIDTH = 64, 5, 8


def batch(seed: int = 0, rows: int = ROWS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "logits": 2 * torch.randn(rows, CLASSES, generator=generator),
        "targets": torch.randint(CLASSES, (rows,), generator=generator),
        "index": torch.randperm(ROWS, generator=generator)[:rows],
        "embedding": torch.randn(rows, WIDTH, generator=generator),
        "inputs": torch.rand(rows, 1, 4, 4, generator=generator),
    }


def of(term: Term, **options: object) -> Gate:
    """A gate whose significance is one term, so that ``gate.last.significance`` is its values."""
    return Gate(0.25, significance=Significance(terms=(term,)), **options)


def values(gate: Gate, **given: torch.Tensor) -> torch.Tensor:
    gate(**given)
    assert gate.last is not None
    return gate.last.significance


def test_each_term_of_the_logits_ranks_as_its_statistic() -> None:
    given = batch()
    p = given["logits"].softmax(-1)
    loss = nn.functional.cross_entropy(given["logits"], given["targets"], reduction="none")
    entropy = -(p * p.log()).sum(-1)
    norm = (p - nn.functional.one_hot(given["targets"], CLASSES)).norm(dim=1)
    torch.testing.assert_close(values(of(LearningValue()), **given), norm / math.sqrt(2))
    torch.testing.assert_close(values(of(Difficulty()), **given), loss / (loss + loss.mean()))
    torch.testing.assert_close(values(of(Uncertainty()), **given), entropy / (entropy + entropy.mean()))
    torch.testing.assert_close(values(of(Feedback()), **given), 1 - p.gather(1, given["targets"][:, None])[:, 0])
    contrast = given["inputs"].flatten(1).std(1, correction=0)
    torch.testing.assert_close(values(of(Contrast()), **given), contrast / (contrast + contrast.mean()))


def test_terms_add_to_the_statistics_with_their_weights() -> None:
    given = batch()
    loss = nn.functional.cross_entropy(given["logits"], given["targets"], reduction="none")
    reward = torch.linspace(-1, 1, ROWS)
    gate = Gate(0.25, significance=Significance(loss=0.5, terms=(Feedback(2.0), Constant(-3.0))))
    gate(given["logits"], given["targets"], feedback=reward)
    torch.testing.assert_close(gate.last.significance, 0.5 * loss + 2 * reward - 3)


def test_loss_change_is_against_the_same_row_wherever_it_stands_in_its_batch() -> None:
    given = batch()
    gate = of(LossChange(rows=ROWS))
    assert (values(gate, **given) == 0.5).all()  # nothing is known yet
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    shuffled = {name: tensor[order] for name, tensor in given.items()}
    row = 7
    place = int((order == row).nonzero())
    shuffled["logits"] = shuffled["logits"].clone()
    shuffled["logits"][place] += 9 * nn.functional.one_hot(shuffled["targets"][place], CLASSES)
    changed = values(gate, **shuffled)
    assert changed.argmax() == place
    assert (changed.sum() - changed[place]).abs() < 1e-3  # all others have the loss that they had


def test_novelty_falls_for_what_was_seen_and_stays_for_what_was_not() -> None:
    for term in (Novelty(), Novelty(memory=100)):
        gate, given = of(term), batch()
        axis = torch.zeros(ROWS, WIDTH)
        axis[:, 0] = 1.0
        assert (values(gate, **{**given, "embedding": axis}) == 1.0).all()
        axis[-1] = torch.eye(WIDTH)[1]
        after = values(gate, **{**given, "embedding": axis})
        assert after[:-1].abs().max() < 1e-6
        torch.testing.assert_close(after[-1], torch.tensor(0.5))


def test_a_memory_keeps_the_latest_embeddings() -> None:
    gate, given = of(Novelty(memory=3)), batch(rows=5)
    values(gate, **{**given, "embedding": torch.eye(WIDTH)[:5]})
    assert {int(row.argmax()) for row in gate.terms[0].seen} == {1, 3, 4}  # three of five, evenly spaced
    values(gate, **{**batch(rows=1), "embedding": torch.eye(WIDTH)[6:7]})
    assert {int(row.argmax()) for row in gate.terms[0].seen} == {3, 4, 6}


def test_ignored_rows_and_rows_that_are_not_finite_reach_no_state() -> None:
    given = batch()
    gate = Gate(0.25, significance=Significance(terms=(Difficulty(), Novelty(), LossChange(rows=ROWS))))
    bad = copy.deepcopy(given)
    bad["targets"][0] = -100
    bad["logits"][1] = math.nan
    bad["embedding"][2] = math.nan
    gate(**bad)
    assert all(buffer.isfinite().all() for name, buffer in gate.named_buffers() if "last" not in name)
    assert gate.last.significance[0] == 0
    assert not gate.last.mask[:3].any()
    assert gate.terms[2].last[given["index"][:2]].isnan().all()


@pytest.mark.parametrize("name", ["default", *SIGNIFICANCES])
def test_every_preset_resumes_bit_for_bit(name: str) -> None:
    def made() -> Gate:
        gate = Gate(0.25, significance=name)
        for term in gate.significance.terms:
            term.prepare(ROWS)
        return gate

    whole, part = made(), made()
    data = [batch(seed) for seed in range(10)]
    for given in data[:5]:
        whole(**given)
        part(**given)
    resumed = made()
    resumed.load_state_dict(part.state_dict())
    for given in data[5:]:
        assert torch.equal(whole(**given).index, resumed(**given).index)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))  # noqa: B905


def test_gates_share_no_state() -> None:
    shared = Significance(terms=(Difficulty(Follow("loss", 1.0, 2.0)),))
    one, other = Gate(significance=shared), Gate(significance=shared)
    one(**batch())
    assert one.terms[0].mean > 0
    assert other.terms[0].mean == 0
    assert shared.terms[0].mean == 0


def test_weights_follow_a_schedule_from_easy_to_hard() -> None:
    given = batch()
    loss = nn.functional.cross_entropy(given["logits"], given["targets"], reduction="none")
    gate = of(Difficulty(Transition(-1.0, 1.0)))
    assert values(gate, **given).argmax() == loss.argmin()
    gate.set_progress(1.0)
    assert values(gate, **given).argmax() == loss.argmax()
    gate = Gate(0.25, significance=Significance(loss=Transition(-1.0, 1.0)))
    assert values(gate, **given).argmax() == loss.argmin()
    gate.set_progress(1.0)
    assert values(gate, **given).argmax() == loss.argmax()


def test_a_rate_follows_the_smoothed_loss_down_and_up_again() -> None:
    gate = Gate(Follow("loss", 1.0, 0.1, memory=0.0, interval=1))
    given, rates = batch(), []
    right = nn.functional.one_hot(given["targets"], CLASSES).float()
    for scale in (0.0, 2.0, 20.0, 20.0, 0.0):
        gate(scale * right, given["targets"])
        gate.set_progress(0.0)
        rates.append(gate.rate)
    assert rates[0] == 1.0
    assert 0.1 < rates[1] < 1.0
    assert rates[2] == rates[3] == pytest.approx(0.1)
    assert rates[4] == 1.0


def test_a_rate_follows_the_trainers_validation_loss() -> None:
    data = load_data("digits")
    torch.manual_seed(0)
    gate = Gate(Follow("validation", 1.0, 0.2))
    trainer = SparseTrainer(build_model("cnn-tiny", shape=data.shape, classes=10), policy=gate)
    test = ResidentLoader(data.test, batch_size=200, mean=data.mean, std=data.std)
    trainer.fit(
        ResidentLoader(data.train, batch_size=128, mean=data.mean, std=data.std),
        epochs=10, evaluate=test, progress=False,
    )  # fmt: skip
    assert trainer.policy.rate < 0.9


@pytest.mark.parametrize("name", ["vision", "loss-change", "none"])
def test_trains_by_name_and_meets_its_rate(name: str) -> None:
    data = load_data("digits")
    torch.manual_seed(0)
    trainer = SparseTrainer(
        build_model("cnn-tiny", shape=data.shape, classes=10), policy=f"gate:{name}", rate=0.3, dense_start=0.0
    )
    log = trainer.fit(
        ResidentLoader(data.train, batch_size=128, mean=data.mean, std=data.std), epochs=8, progress=False
    )
    assert log.rate == pytest.approx(0.3, abs=0.05)


MODEL = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))


@pytest.mark.parametrize(
    ("term", "change", "message"),
    [
        (LossChange(rows=ROWS), {"index": None}, "LossChange needs `index` of the rows"),
        (LossChange(), {}, "needs the number of rows"),
        (LossChange(rows=10), {}, "row numbers from 0 to 9, got 0 to 63"),
        (Novelty(), {"embedding": None}, "Novelty needs `embedding`"),
        (Novelty(), {"embedding": torch.zeros(3, WIDTH)}, r"shape \[64, width\], got .* of shape \[3, 8\]"),
        (Novelty(), {"embedding": torch.ones(ROWS, WIDTH).long()}, r"floating of shape .*, got torch.int64 of"),
        (Novelty(memory=9), {"embedding": torch.ones(ROWS, WIDTH).bool()}, r"floating of shape .*, got torch.bool of"),
        (
            LossChange(rows=ROWS),
            {"index": torch.arange(ROWS).float()},
            "row numbers, int64 or int32, got torch.float32",
        ),
        (LossChange(rows=ROWS), {"index": torch.ones(ROWS).bool()}, "row numbers, int64 or int32, got torch.bool"),
        (
            Feedback(),
            {"feedback": torch.ones(ROWS) + 1j},
            "must be real numbers, or bool, got torch.complex64",
        ),
        (Contrast(), {"inputs": torch.zeros(ROWS, 3)}, r"needs images, float \[B, C, H, W\]"),
        (
            Feedback(),
            {"feedback": torch.zeros(3)},
            r"`feedback` must be a tensor of shape \[64\], one per row, got \[3\]",
        ),
        (Feedback(), {"feedback": torch.full((ROWS,), math.nan)}, "`feedback` must be finite, got 64 entries"),
    ],
)
def test_a_batch_that_a_term_cannot_serve_is_refused_before_anything_changes(
    term: Term, change: dict[str, torch.Tensor | None], message: str
) -> None:
    gate = Gate(0.25, significance=Significance(terms=(Difficulty(), term)))
    before = copy.deepcopy(gate.state_dict())
    with pytest.raises(UserError, match=message) as caught:
        gate(**{**batch(), **change})
    assert "\n" not in str(caught.value)
    assert str(before) == str(gate.state_dict())


def test_numbers_of_any_real_dtype_are_served() -> None:
    given = batch()
    failed = torch.arange(ROWS) % 3 == 0
    found = [of(Feedback())(**{**given, "feedback": failed.to(dtype)}) for dtype in (torch.float32, torch.bool)]
    assert torch.equal(found[0].index, found[1].index)
    rows = given["index"]
    found = [of(LossChange(rows=ROWS))(**{**given, "index": rows.to(dtype)}) for dtype in (torch.int64, torch.int32)]
    assert torch.equal(found[0].index, found[1].index)
    with pytest.raises(UserError, match="must be real numbers, got torch"):
        Gate(0.25).by(torch.ones(ROWS) + 1j)
    found = [Gate(0.25).by(failed.to(dtype)) for dtype in (torch.float32, torch.bool)]
    assert torch.equal(found[0].index, found[1].index)


def test_an_embedding_of_another_width_is_refused() -> None:
    gate = of(Novelty())
    gate(**batch())
    with pytest.raises(UserError, match="must have width 8 and 5 classes, as the batches before it, got width 3"):
        gate(**{**batch(), "embedding": torch.zeros(ROWS, 3)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gate(significance="visoin"), "`significance` must be one of default, vision"),
        (lambda: preset(""), "got ''"),
        (lambda: Gate(significance=0.7), "must be a Significance or its name, got 0.7"),
        (lambda: Difficulty(0.0), "finite number other than 0"),
        (lambda: Novelty(memory=0), "`memory` must be an integer of at least 1"),
        (lambda: Feedback(table=torch.tensor([1.0, math.nan])), "must be finite, got 1 entries"),
        (lambda: Significance(terms=("novelty",)), "`terms` must be terms such as Novelty"),
        (lambda: Follow("accuracy", 1.0, 0.1), "`signal` must be loss or validation"),
        (lambda: SparseTrainer(MODEL, policy="gate:visoin"), "`significance` must be one of"),
        (lambda: SparseTrainer(MODEL, policy="gate:vision", significance="audio"), "give one"),
        (lambda: SparseTrainer(MODEL, policy="random", significance="audio"), "the policy random has the options none"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(make: object, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make()


def test_a_stream_without_row_numbers_has_no_history() -> None:
    trainer = SparseTrainer(nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), policy="gate:loss-change", dense_start=0.0)
    stream = [(given["inputs"], given["targets"]) for given in map(batch, range(4))]
    with pytest.raises(
        UserError, match=r"LossChange needs `index` of the rows, got none; data whose rows have numbers"
    ):
        trainer.fit(stream, epochs=1, progress=False)
