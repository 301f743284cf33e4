"""Terms of significance where rows are tokens or pixels, through the trainer and through the gate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_training import Criterion, Gate, Significance, SparseTrainer, TrainerSettings
from sparse_training.errors import UserError
from sparse_training.gate.terms import Contrast, Difficulty, LossChange, Novelty, Term

WORDS, LENGTH = 30, 12


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def texts(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = 3 + (torch.randint(WORDS - 3, (count, 8, 1), generator=generator) + torch.arange(LENGTH)) % (WORDS - 3)
    return [{"input_ids": each, "labels": each} for each in ids]


class Recorder(Term):
    """Keeps what it was shown."""

    needs = ("embedding", "inputs")

    def __init__(self, embedding: str | None = None) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, context: Any) -> Tensor:
        self.shown = context
        return context.embedding.float().mean(1)


def shown(model: nn.Module, batch: Any, embedding: str | None = None, **options: Any) -> Any:
    """What a trainer shows to a term at its first batch."""
    gate = Gate(0.5, significance=Significance(terms=(Recorder(embedding),)))
    options = {"granularity": "token", **options}
    if "loss" in options:
        del options["granularity"]
    settings = TrainerSettings(channels_last=False)
    trainer = SparseTrainer(model, policy=gate, lr=1e-12, dense_start=0.0, dense_end=0.0, settings=settings, **options)
    trainer.fit([batch], steps=1, progress=False)
    return trainer.policy.gate.terms[0].shown


# --- tokens -------------------------------------------------------------------------------------


def test_a_language_model_trains_on_significant_tokens() -> None:
    data = texts()
    model = gpt2()
    trainer = SparseTrainer(
        model, granularity="token", policy="gate", rate=0.3, significance="language", lr=1e-2, dense_start=0.0,
        dense_end=0.0,
    )  # fmt: skip
    before = trainer.evaluate(data)["loss"]
    log = trainer.fit(data, epochs=12, progress=False)
    assert log.rate == pytest.approx(0.3, abs=0.06)
    assert trainer.evaluate(data)["loss"] < before - 0.2
    (novelty,) = (term for term in trainer.policy.gate.significance.terms if isinstance(term, Novelty))
    assert novelty.seen.shape == (1000, 16)
    assert int(novelty.position) == 12 * 4 * 8 * (LENGTH - 1)  # every token with a target behind it


def test_a_token_is_shown_with_its_own_last_hidden_state() -> None:
    model, batch = gpt2(), texts()[0]
    context = shown(model, batch)
    with torch.no_grad():
        hidden = model.transformer(batch["input_ids"]).last_hidden_state
    torch.testing.assert_close(context.embedding, hidden[:, :-1].reshape(-1, 16))
    assert torch.equal(context.targets, batch["input_ids"][:, 1:].reshape(-1))
    named = shown(gpt2(), batch, "transformer.wte")
    torch.testing.assert_close(named.embedding, model.transformer.wte(batch["input_ids"][:, :-1]).reshape(-1, 16))


class Flat(nn.Module):
    """A model that flattens its tokens before the head, and back behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).flatten(0, 1)).unflatten(0, ids.shape)


def test_a_model_that_flattens_its_tokens_is_read_too() -> None:
    model, ids = Flat(), texts()[0]["input_ids"]
    expected = model.words(ids).detach()
    torch.testing.assert_close(shown(model, (ids, ids)).embedding, expected.flatten(0, 1))
    context = shown(model, (ids, ids), loss=Criterion(granularity="token", shift=True))
    torch.testing.assert_close(context.embedding, expected[:, :-1].reshape(-1, 6))


# --- pixels -------------------------------------------------------------------------------------


def segmenter() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 4, 1))


def photos(height: int = 8, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, height, width, generator=generator)
    return images, (4 * images.mean(1)).long().clamp(max=3)


def test_a_segmentation_model_trains_on_significant_pixels() -> None:
    data = [photos()] * 5
    trainer = SparseTrainer(
        segmenter(), granularity="token", policy="gate:vision", rate=0.4, lr=3e-2, dense_start=0.0, dense_end=0.0
    )
    before = trainer.evaluate(data)["loss"]
    log = trainer.fit(data, epochs=12, progress=False)
    assert log.rate == pytest.approx(0.4, abs=0.08)
    assert trainer.evaluate(data)["loss"] < before - 0.1


def test_a_pixel_is_shown_with_the_features_at_its_place() -> None:
    model, (images, targets) = segmenter(), photos()
    context = shown(model, (images, targets))
    features = model[:2](images).detach()
    torch.testing.assert_close(context.embedding, features.permute(0, 2, 3, 1).reshape(-1, 7))
    assert torch.equal(context.inputs, images)


def test_a_pixel_of_a_coarser_map_is_shown_with_its_cells_features() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 2, stride=2), nn.Conv2d(5, 4, 1), nn.Upsample(scale_factor=2))
    images, targets = photos()
    features = model[0](images).detach().repeat_interleave(2, 2).repeat_interleave(2, 3)
    embedding = shown(model, (images, targets)).embedding
    torch.testing.assert_close(embedding, features.permute(0, 2, 3, 1).reshape(-1, 5))


def test_contrast_of_pixels_is_that_of_their_neighbours() -> None:
    images, targets = photos()
    images = images + 1000  # whose squares would swamp the differences
    gate = Gate(0.5, significance=Significance(terms=(Contrast(),)))
    gate(torch.zeros(4, 8, 6, 5), targets, inputs=images)
    expected = torch.stack([
        image[:, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].double().std(correction=0)
        for image in images for y in range(8) for x in range(6)
    ]).float()  # fmt: skip
    scaled = expected / (expected + expected.mean())
    torch.testing.assert_close(gate.last.significance.flatten(), scaled, rtol=1e-3, atol=1e-3)


def test_a_linear_layer_over_channels_last_has_its_width_last() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(images.movedim(1, -1)).mean((1, 2))

    images, targets = photos()
    context = shown(Last(), (images, targets[:, 0, 0]), granularity="sample")
    torch.testing.assert_close(context.embedding, images.mean((2, 3)))


# --- a loop of one's own ------------------------------------------------------------------------


def test_a_gate_takes_embeddings_of_the_targets_shape() -> None:
    logits, targets, hidden = torch.randn(3, 5, 9), torch.randint(9, (3, 5)), torch.randn(3, 5, 4)
    one, other = (Gate(0.5, significance=Significance(terms=(Novelty(memory=8),))) for _ in range(2))
    one(logits, targets, embedding=hidden)
    other(logits.flatten(0, 1), targets.flatten(), embedding=hidden.flatten(0, 1))
    assert torch.equal(one.terms[0].seen, other.terms[0].seen)
    assert one.terms[0].seen.any(1).all()


def test_a_memory_takes_evenly_spaced_rows_of_a_batch_larger_than_it() -> None:
    gate = Gate(0.5, significance=Significance(terms=(Novelty(memory=4),)))
    targets = torch.zeros(16, dtype=torch.int64)
    targets[::4] = -100  # 12 count
    gate(torch.randn(16, 3), targets, embedding=torch.eye(16))
    assert sorted(gate.terms[0].seen.argmax(1).tolist()) == [3, 7, 11, 15]
    assert int(gate.terms[0].position) == 4


@pytest.mark.parametrize("term", [Novelty(), Novelty(memory=40)])
def test_a_product_made_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch, term: Novelty) -> None:
    found = []
    for limit in (2**24, 200):
        monkeypatch.setattr("sparse_training.gate.terms.novelty.PRODUCT", limit)
        gate, generator = Gate(0.5, significance=Significance(terms=(term,))), torch.Generator().manual_seed(0)
        for _ in range(3):
            gate(
                torch.randn(64, 5, generator=generator), torch.randint(5, (64,), generator=generator),
                embedding=torch.randn(64, 6, generator=generator),
            )  # fmt: skip
        found.append((gate.last.significance, gate.terms[0].seen))
    torch.testing.assert_close(found[0], found[1])


# --- refusals -----------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A model whose only linear layer sees whole samples."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.gain = nn.Embedding(WORDS, WORDS), nn.Linear(WORDS, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        words = self.words(ids)
        return words + self.gain(words.mean(1))[:, None]


IDS = texts()[0]["input_ids"]
PICTURES = photos()


@pytest.mark.parametrize(
    ("model", "batch", "options", "message"),
    [
        (nn.Embedding(WORDS, WORDS), (IDS, IDS), {}, "the model has no linear or convolutional layer whose input"),
        (Pooled(), (IDS, IDS), {}, r"of 30 numbers at \[8\] does not fit targets \[8, 12\]; name a submodule"),
        (Flat(), (IDS, IDS), {"significance": "vision"}, "Contrast needs images"),
        (segmenter(), PICTURES, {"significance": "loss-change"}, "tokens and pixels have none"),
        (Flat(), (IDS, IDS), {"settings": TrainerSettings(compile="eager")}, "'head', which a compiled model hides"),
        (
            nn.Sequential(nn.Embedding(WORDS, 4), nn.Linear(4, 4097)),
            (IDS, IDS),
            {"significance": "five"},
            r"centroids of at most 4096 classes, got 4097; use Novelty\(memory=1000\)",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_trained(
    model: nn.Module, batch: Any, options: dict[str, Any], message: str
) -> None:
    model = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    options = {"significance": "language", **options}
    trainer = SparseTrainer(model, granularity="token", policy="gate", dense_start=0.5, **options)
    with pytest.raises(UserError, match=message) as caught:
        trainer.fit([batch] * 4, epochs=1, progress=False)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_row_numbers_of_samples_are_not_taken_for_those_of_tokens() -> None:
    gate = Gate(0.5, significance=Significance(terms=(Difficulty(), LossChange(rows=3))))
    with pytest.raises(UserError, match=r"needs `index` of shape \[15\].*got \[3\]; tokens and pixels have no row"):
        gate(torch.randn(3, 5, 9), torch.randint(9, (3, 5)), index=torch.arange(3))
    assert not gate.terms[0].seen


def test_contrast_of_a_target_for_each_patch_is_refused() -> None:
    gate = Gate(0.5, significance=Significance(terms=(Contrast(),)))
    with pytest.raises(UserError, match=r"for each of its pixels, got 8 for images of shape \[2, 3, 8, 8\]"):
        gate(torch.randn(2, 4, 5), torch.randint(5, (2, 4)), inputs=torch.rand(2, 3, 8, 8))
