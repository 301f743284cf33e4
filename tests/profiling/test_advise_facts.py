"""Facts that an advice states about rows and steps, on data where they are known; and what it refuses."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
from trainer_parts import network, resident

from sparse_training import Criterion, TrainerSettings, UserError, advise
from sparse_training.profiling import advise_rows

LOSS = nn.CrossEntropyLoss(reduction="none")


def linear(features=4, classes=3):
    torch.manual_seed(0)
    return nn.Linear(features, classes)


def batches(rows=64, features=4, classes=3, batch_size=16):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, features, generator=generator), torch.randint(0, classes, (rows,), generator=generator)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


class Tagger(nn.Module):
    """Takes what a tokenizer gives, as keywords."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 5)

    def forward(self, input_ids, attention_mask):
        return self.head(self.embed(input_ids) * attention_mask[..., None])


def test_padding_and_ignored_targets_are_counted_apart():
    ids = torch.arange(32).reshape(4, 8) % 20
    mask = torch.ones(4, 8, dtype=torch.int64)
    mask[:, 6:] = 0
    labels = (ids % 5).masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    facts = advise(Tagger(), [batch] * 3, loss=LOSS, steps=6).facts
    assert facts["padded"] == 0.25
    assert facts["ignored"] == 12 / 32
    assert facts["no_gradient"] == 0.0
    by_token = advise(Tagger(), [batch] * 3, loss=Criterion(granularity="token"), steps=6)
    assert by_token.facts["ignored"] == 12 / 32
    assert {bound.method for bound in by_token.methods} <= {"head"}


def test_rows_without_an_upstream_gradient_are_counted():
    def clipped(logits, targets):  # as of a policy's ratio: no gradient beyond the clip
        value = logits[:, 0]
        return torch.where(targets > 0, value.square(), value.detach().square())

    facts = advise(linear(), batches(), loss=clipped, steps=8).facts
    share = sum(int((y == 0).sum()) for _, y in batches()) / 64
    assert facts["no_gradient"] == pytest.approx(share, abs=0.15)
    assert facts["ignored"] == 0.0
    everything = advise(linear(), [tuple(map(torch.cat, zip(*batches(), strict=True)))], loss=clipped, steps=8)
    assert everything.facts["no_gradient"] == share


def test_exact_copies_are_counted_within_a_pass():
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    twice = DataLoader(TensorDataset(torch.cat((x, x)), torch.cat((y, y))), batch_size=80)
    advice = advise(linear(), twice, loss=LOSS, steps=8)
    assert advice.facts["copies"] == 0.5
    assert "50% of the rows are exact copies" in str(advice)
    once = DataLoader(TensorDataset(x, y), batch_size=10)
    assert advise(linear(), once, loss=LOSS, steps=20).facts["copies"] == 0.0  # passes repeat rows, which copies none
    drawn = DataLoader(TensorDataset(x, y), batch_size=10, sampler=WeightedRandomSampler(torch.ones(40), 200))
    assert advise(linear(), drawn, loss=LOSS, steps=20).facts["copies"] is None


def test_copies_of_data_in_memory_are_those_of_all_rows():
    loader = resident()
    loader.images[1:5] = loader.images[0]
    assert advise(network(), loader, steps=6).facts["copies"] == pytest.approx(4 / 44)


def test_losses_and_gradients_are_as_concentrated_as_they_are():
    values = torch.tensor([8.0, *[0.0] * 9])
    held = advise_rows.concentration(values)
    assert (held.top, held.effective) == ({10: 1.0, 25: 1.0, 50: 1.0}, pytest.approx(0.1))
    even = advise_rows.concentration(torch.ones(20))
    assert even.top == pytest.approx({10: 0.1, 25: 0.25, 50: 0.5})
    assert even.effective == pytest.approx(1.0)
    assert advise_rows.concentration(torch.zeros(4)) is None


def test_random_rows_are_as_noisy_as_they_are_few():
    squares = torch.rand(100)
    assert advise_rows.noise(squares, torch.full((100,), 0.25)) == pytest.approx(4.0)


def test_the_noise_is_that_of_gradients_drawn_over_and_over():
    generator = torch.Generator().manual_seed(0)
    norms = torch.rand(200, generator=generator) + 0.01
    losses = torch.rand(200, generator=generator)
    p = 1.0 - 0.5 * (losses < losses.mean())
    draws = (torch.rand(20_000, 200, generator=generator) < p).double() / p * norms
    assert advise_rows.infobatch(losses, norms.square())[1] == pytest.approx(
        float(draws.square().mean() / norms.double().square().mean()), rel=0.02
    )


def test_gradients_of_a_regression_are_seen():
    x = torch.randn(64, 4)
    loader = DataLoader(TensorDataset(x, x @ torch.tensor([1.0, -2.0, 0.5, 0.0])), batch_size=16)
    model = nn.Sequential(linear(4, 1), nn.Flatten(0))
    advice = advise(model, loader, loss=nn.MSELoss(reduction="none"), steps=20)
    assert advice.gradients is not None
    assert advice.facts["below_mean"] > 0.5


@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_pixels_with_classes_in_dim_1(granularity):
    model = nn.Conv2d(3, 4, 3, padding=1)
    images = [(torch.randn(4, 3, 6, 6), torch.randint(0, 4, (4, 6, 6)))] * 3
    loss = Criterion(granularity=granularity, class_dim=1)
    advice = advise(model, images, loss=loss, steps=6)
    assert advice.gradients is not None
    assert advice.rows == (4 if granularity == "sample" else 144) * 2


def test_a_model_in_evaluation_mode_or_compiled_or_in_bfloat16_is_measured():
    model = network().eval()
    assert advise(model, resident(), steps=6).times.total > 0.0
    assert not model.training
    compiled = torch.compile(linear(), backend="eager")
    assert advise(compiled, batches(), loss=LOSS, steps=6).times.forward > 0.0
    settings = TrainerSettings(amp="bfloat16", accumulate=2)
    advice = advise(linear(), batches(), loss=LOSS, settings=settings, optimizer=torch.optim.SGD, steps=12)
    assert "loss=loss, optimizer=optimizer, settings=settings" in advice.code


def test_a_budget_of_seconds_ends():
    advice = advise(linear(), batches(), loss=LOSS, seconds=0.3)
    assert advice.steps >= 6


def test_batches_of_another_structure_are_taken_apart_as_in_training():
    settings = TrainerSettings(inputs=lambda batch: batch["x"], targets=lambda batch: batch["kind"])
    loader = [{"x": x, "kind": y} for x, y in batches()]
    assert advise(linear(), loader, loss=LOSS, settings=settings, steps=6).rows == 32


def test_rows_with_a_loss_that_is_not_finite_are_left_out_and_told():
    *sound, bad = batches()
    bad[0][0] = float("nan")
    advice = advise(linear(), [*sound, bad], loss=LOSS, steps=8)
    assert advice.rows == 32
    assert "Rows whose loss is not finite: 1." in advice.notes[-1]
    assert advice.gradients is not None


SOUND = {"loss": LOSS, "steps": 6}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "`model` must be a torch.nn.Module, got int"),
        ({"model": nn.Flatten()}, "`model` must have a parameter that requires a gradient, got none"),
        ({"loader": 5}, "`loader` must be an iterable of batches, got int"),
        (
            {"loader": iter(batches())},
            "`loader` must be an iterable that can be iterated again, got a one-shot iterator",
        ),
        ({"loader": []}, "`loader` must yield at least one batch"),
        ({"loader": [3]}, r"a batch must be \(inputs, targets\) or a mapping, got int"),
        ({"loss": nn.CrossEntropyLoss()}, 'must not reduce over rows, got reduction="mean"'),
        ({"loss": 3}, "`loss` must be a function of logits and targets, or a Criterion, got int"),
        (
            {"loss": lambda logits, targets: torch.full((16,), float("nan"), requires_grad=True)},
            "`loss` must be finite",
        ),
        ({"loss": lambda logits, targets: torch.ones(16)}, "the loss must depend on the model's output"),
        ({"optimizer": torch.optim.SGD(linear().parameters())}, "`optimizer` must be of the model's parameters"),
        ({"optimizer": 3}, "`optimizer` must be an optimizer or a factory of one, got int"),
        ({"lr": 0.0}, "`lr` must be above 0, got 0.0"),
        ({"steps": 5}, "`steps` must be an integer of at least 6, got 5"),
        ({"steps": 6.5}, "`steps` must be an integer of at least 6, got 6.5"),
        ({"seconds": 0.0}, "`seconds` must be above 0 and finite, got 0.0"),
        ({"seconds": float("nan")}, "`seconds` must be above 0 and finite, got nan"),
        ({"epochs": -1}, "`epochs` must be above 0 and finite, got -1"),
        ({"settings": TrainerSettings(compile=True)}, "`settings.compile` must be False"),
        ({"settings": {"amp": "bfloat16"}}, "`settings` must be TrainerSettings, got dict"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_bad_input_is_one_line(arguments, message):
    given = {"model": linear(), "loader": batches(), **SOUND, **arguments}
    with pytest.raises(UserError, match=message) as refused:
        advise(given.pop("model"), given.pop("loader"), **given)
    assert len(str(refused.value).splitlines()) == 1


def test_a_model_that_has_no_copy_is_refused():
    model = linear()
    model.held = batches()[0][0].requires_grad_() * 2  # not a leaf
    with pytest.raises(UserError, match=r"must be copyable by copy\.deepcopy"):
        advise(model, batches(), **SOUND)
