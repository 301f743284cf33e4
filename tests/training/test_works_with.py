"""The trainer with pixels and tokens as rows, soft targets, accumulation, averages, compiled models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from trainer_parts import Fixed, network, resident, same, weights
from trainers import make_trainer

from sparse_training.criterion import Criterion
from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.gate.significance import Significance
from sparse_training.selection.types import SelectedBatch
from sparse_training.trainer import SparseTrainer
from sparse_training.training.clock import Clock, Costs
from sparse_training.training.settings import TrainerSettings

BACKGROUND, CLASSES = 10, 11


def digits(rows=512):
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:rows], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels[:rows])


def batches(*tensors, size=64):
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


def segmentation():
    """Images and a class for each pixel: the digit where there is ink, the frame of the image ignored."""
    images, labels = digits()
    pixels = torch.where(images[:, 0] > 0.3, labels[:, None, None], BACKGROUND)
    pixels[:, 0], pixels[:, -1] = -100, -100
    return images, pixels


def segmenter():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, CLASSES, 1),
    )  # fmt: skip


# --- pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["sample", "token"])
@pytest.mark.parametrize("policy", ["dense", "random", "gate", "topk"])
def test_a_segmentation_network_learns(policy, rows):
    data = batches(*segmentation())
    trainer = make_trainer(
        segmenter(), policy=policy, granularity=rows, rate=0.4, lr=1e-2, dense_start=0.1, dense_end=0.1
    )
    before = trainer.evaluate(data)
    history = trainer.fit(data, epochs=5, evaluate=data, evaluations=2)
    after = history.evals[-1]
    assert after["loss"] < (0.95 if policy == "topk" else 0.8) * before["loss"]  # the hardest alone teach slowly
    assert after["accuracy"] > before["accuracy"]
    valid = 48 if rows == "token" else 1  # of a sample's 64 pixels
    assert history.to_dict()["rows_seen"] == 5 * 512 * valid
    if policy != "dense":
        assert history.rate == pytest.approx(0.4, abs=0.08)
    else:
        assert int(history.rows_trained) == history.rows_seen


def test_pixels_trained_densely_are_a_plain_loop():
    data = batches(*segmentation())
    model, plain = segmenter(), segmenter()
    options = {"optimizer": torch.optim.SGD, "lr": 0.1, "schedule": lambda progress: 1.0, "channels_last": False}
    make_trainer(model, policy="dense", granularity="token", **options).fit(data, steps=5)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for x, y in data[:5]:
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()  # the mean over the pixels that are not ignored
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(plain))


def test_only_the_hard_pixels_have_a_gradient():
    images, pixels = segmentation()
    model = segmenter().eval()
    gate = Gate(0.2, significance=Significance(loss=1.0), threshold=2.3)
    trainer = SparseTrainer(
        model,
        policy=gate,
        granularity="token",
        optimizer=torch.optim.SGD,
        lr=1.0,
        settings=TrainerSettings(channels_last=False),
    )
    logits = model(images[:64])
    losses = F.cross_entropy(logits, pixels[:64], reduction="none")
    hard = losses > 2.3
    assert 0 < hard.sum() < hard.numel()
    (gradient,) = torch.autograd.grad(losses[hard].mean(), [model[5].bias])
    before = model[5].bias.detach().clone()
    model.train()
    for module in model.modules():
        module.training = False  # so that BatchNorm gives what it gave above
    batch, kept = trainer.step(trainer.policy, trainer.loader([(images[:64], pixels[:64])]), (images[:64], pixels[:64]))
    assert len(kept.targets) == int(hard.sum())
    assert int(batch.counted) == 64 * 48
    torch.testing.assert_close(model[5].bias.detach(), before - gradient, rtol=1e-4, atol=1e-6)


def test_unbiased_draws_of_pixels_estimate_the_mean_over_those_that_count():
    images, pixels = segmentation()
    model = segmenter()
    plain = copy.deepcopy(model)
    wanted = torch.autograd.grad(F.cross_entropy(plain(images), pixels), [plain[5].bias])[0]
    gate = Gate(0.5, temperature=1.0, threshold=2.4, seed=3)
    trainer = SparseTrainer(
        model,
        policy=gate,
        granularity="token",
        optimizer=torch.optim.SGD,
        lr=1.0,
        settings=TrainerSettings(channels_last=False),
    )
    before = model[5].bias.detach().clone()
    trainer.step(trainer.policy, trainer.loader([]), (images, pixels))
    torch.testing.assert_close(before - model[5].bias.detach(), wanted, rtol=0.2, atol=0.01)


def test_a_gate_over_samples_goes_by_the_mean_of_their_pixels():
    images, pixels = segmentation()
    model = segmenter()
    gate = Gate(0.2, significance=Significance(loss=1.0), threshold=2.4)
    trainer = SparseTrainer(model, policy=gate, settings=TrainerSettings(channels_last=False))
    with torch.no_grad():
        losses = F.cross_entropy(copy.deepcopy(model).eval()(images), pixels, reduction="none")
    means = losses.sum((1, 2)) / 48
    _, kept = trainer.step(trainer.policy, trainer.loader([]), (images, pixels))
    assert 0 < len(kept.positions) < 512
    assert kept.positions.tolist() == (means > 2.4).nonzero().flatten().tolist()


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["sample", "token"])
def test_a_token_classifier_learns_from_dict_batches(rows):
    """A Transformers model from its configuration; pixels as tokens, each to say how bright the one below is."""
    transformers = pytest.importorskip("transformers")
    images, _ = digits()
    tokens = (images.reshape(-1, 64) * 16).long()[:, :32]
    labels = torch.where(tokens > 0, 1, 0).roll(-1, 1)
    labels[:, 28:] = -100
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    model = transformers.BertForTokenClassification(config)
    names = ("input_ids", "attention_mask", "labels")
    data = [dict(zip(names, parts, strict=True)) for parts in batches(tokens, torch.ones_like(tokens), labels)]
    trainer = SparseTrainer(
        model, policy="gate", rate=0.4, granularity=rows, lr=1e-2, settings=TrainerSettings(clip_norm=1.0)
    )
    history = trainer.fit(data, epochs=6, evaluate=data, evaluations=1)
    assert history.evals[-1]["accuracy"] > 0.75
    assert history.rate == pytest.approx(0.4, abs=0.08)


def test_what_shapes_leave_open_is_asked_for():
    logits, targets = torch.randn(2, 5, 5), torch.randint(0, 5, (2, 5))
    with pytest.raises(UserError, match=r"give class_dim=1 or class_dim=-1"):
        Criterion()(logits, targets)
    for dim in (1, -1):
        wanted = F.cross_entropy(logits.movedim(dim, 1), targets, reduction="none").mean(1)
        torch.testing.assert_close(Criterion(class_dim=dim)(logits, targets), wanted)
    with pytest.raises(UserError, match=r"targets of shape \[2, 4\] for logits \[2, 5, 5\]"):
        Criterion()(logits, targets[:, :4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "pixels"}, "`granularity` must be one of sample, token, got 'pixels'"),
        ({"loss": {"class_dim": 2}}, "`class_dim` must be .*, got 2"),
        ({"granularity": "token", "scorer": "proxy"}, 'scorer proxy cannot be used with granularity="token"'),
        ({"accumulate": 0}, "`accumulate` must be .*, got 0"),
        ({"ema": 1.0}, "`ema` must be .*, got 1.0"),
        ({"schedule": "linear"}, "must be a scheduler, a callable or one of cosine, constant, got 'linear'"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_trainer(network(), **{name: Criterion(**v) if name == "loss" else v for name, v in options.items()})


def test_tokens_refuse_what_they_cannot_be():
    images, pixels = segmentation()
    soft = F.one_hot(pixels.clamp(min=0), CLASSES).movedim(-1, 1).float()
    with pytest.raises(UserError, match="needs one class index per token"):
        SparseTrainer(segmenter(), granularity="token").fit(batches(images, soft), steps=1)
    with pytest.raises(UserError, match="asks for rows by their number"):
        SparseTrainer(segmenter(), granularity="token", policy="adaptive+deduplicate").fit(
            batches(images, pixels), steps=1
        )
    costs = Costs({"load": ((1,), (1.0,)), "train": ((1,), (1.0,))}, {}, 1)
    with pytest.raises(UserError, match="a calibrated clock cannot be used with granularity"):
        SparseTrainer(segmenter(), granularity="token").fit(batches(images, pixels), seconds=1.0, clock=Clock(costs))


def test_seconds_of_tokens_are_raw_and_end_with_an_evaluation():
    data = batches(*segmentation())
    history = SparseTrainer(segmenter(), granularity="token").fit(data, seconds=0.3, evaluate=data, evaluations=2)
    assert history.seconds >= 0.3
    assert history.evals[-1]["step"] == history.steps


# --- targets and losses -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["dense", "random", "gate", "topk"])
def test_soft_targets(policy):
    images, labels = digits()
    soft = 0.9 * F.one_hot(labels, 10) + 0.01
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    data = batches(images, soft)
    trainer = make_trainer(model, policy=policy, rate=0.4, lr=1e-2)
    history = trainer.fit(data, epochs=8, evaluate=data, evaluations=1)
    assert history.evals[-1]["accuracy"] > 0.8
    if policy != "dense":
        assert history.rate == pytest.approx(0.4, abs=0.08)


def test_any_loss_a_sample_regression_among_them():
    images, labels = digits()
    wanted = torch.stack([labels.float() / 10, images.mean((1, 2, 3))], 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    data = batches(images, wanted)
    trainer = SparseTrainer(model, loss=nn.MSELoss(reduction="none"), policy="gate", rate=0.5, lr=1e-2)
    before = trainer.evaluate(data)
    history = trainer.fit(data, epochs=8, evaluate=data, evaluations=1)
    assert set(before) == {"loss"}
    assert history.evals[-1]["loss"] < 0.3 * before["loss"]


# --- accumulation and averages ------------------------------------------------------------------


def plain_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


@pytest.mark.parametrize("amp", [None, "float16"])
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_batches_accumulated_are_one_large_batch(clip_norm, amp):
    """Batches that keep 3, 0, 16 and 1 rows have the gradient of the 20 together."""
    images, labels = digits(64)
    parts = [torch.tensor(rows, dtype=torch.int64) for rows in ([1, 5, 7], [], range(32, 48), [60])]
    found = []
    for accumulate, sets in ((4, parts), (1, [torch.cat(parts)])):
        trainer = SparseTrainer(
            plain_network(),
            optimizer=torch.optim.SGD,
            lr=0.5,
            settings=TrainerSettings(accumulate=accumulate, clip_norm=clip_norm, amp=amp),
        )
        before = weights(trainer.model)
        for rows in sets:
            trainer.learn(SelectedBatch(images[rows], labels[rows], len(rows)))
        found.append({name: value - before[name] for name, value in weights(trainer.model).items()})
        assert any(value.abs().sum() > 0 for value in found[-1].values())
    loose = {"rtol": 0.05, "atol": 2e-3} if amp else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(*found, **loose)


def test_accumulated_weights_and_padding():
    images, labels = digits(64)
    empty = torch.zeros(4)
    trainer = SparseTrainer(plain_network(), optimizer=torch.optim.SGD, lr=0.5, settings=TrainerSettings(accumulate=3))
    plain = plain_network()
    weight = torch.tensor([2.0, 4.0, 0.0, 0.0])
    for rows, some, count in ((slice(0, 4), weight, 2), (slice(4, 8), empty, 0), (slice(8, 12), weight, 2)):
        count = torch.tensor(count)
        trainer.learn(SelectedBatch(images[rows], labels[rows], count, None, some, count.clamp(min=1)))
    rows = [0, 1, 8, 9]
    losses = F.cross_entropy(plain(images[rows]), labels[rows], reduction="none")
    ((losses * weight[[0, 1, 0, 1]]).sum() / 4).backward()
    for new, old in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.5 * old.grad)


def test_what_is_left_over_at_the_end_is_one_more_step():
    trainer = SparseTrainer(network(), policy="dense", settings=TrainerSettings(accumulate=4))
    trainer.fit(resident(), steps=10)
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {3}


def test_the_average_is_what_is_evaluated_and_pytorchs():
    trainer = SparseTrainer(network(), policy="dense", lr=1e-2, settings=TrainerSettings(ema=0.8))
    wanted = AveragedModel(copy.deepcopy(trainer.model), multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    seen = []
    history = trainer.fit(
        resident(), steps=6, progress=lambda status: wanted.update_parameters(trainer.model),
        evaluate=lambda model: seen.append(model) or {"accuracy": 0.0}, evaluations=1,
    )  # fmt: skip
    assert history.steps == 6
    same(weights(trainer.update.evaluated), weights(wanted.module))
    assert seen[0] is trainer.update.ema.module
    trained = copy.deepcopy(trainer)
    trained.update.ema = None
    assert trainer.evaluate(resident())["loss"] != trained.evaluate(resident())["loss"]


@pytest.mark.parametrize(("stop_at", "rows"), [(1, "sample"), (5, "sample"), (8, "token")])
def test_a_run_stopped_within_a_step_goes_on_bit_for_bit(tmp_path, stop_at, rows):
    data = batches(*segmentation())

    def run(name, stop_at=None, resume=False):
        trainer = SparseTrainer(
            segmenter(),
            granularity=rows,
            lr=1e-2,
            settings=TrainerSettings(accumulate=3, ema=0.9, clip_norm=1.0, amp="float16"),
        )
        steps = iter(range(1, 100))
        history = trainer.fit(
            data, steps=11, checkpoint=tmp_path / name, resume=resume, stop=lambda: next(steps) == stop_at
        )
        return weights(trainer.model), weights(trainer.update.evaluated), trainer.update.state_dict(), history

    whole = run("whole")
    assert run("part", stop_at=stop_at)[3].interrupted
    resumed = run("part", resume=True)
    same(resumed[:3], whole[:3])
    for name in ("rows_seen", "rows_trained", "rate", "flops"):
        assert resumed[3].to_dict()[name] == whole[3].to_dict()[name]


# --- schedules and compiled models --------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"steps": 6}, {"rows": 96}, {"epochs": 2}])
def test_a_schedule_of_ones_own_follows_the_budget(budget):
    """By rows the short last batch of an epoch counts for what it holds."""
    trainer = SparseTrainer(network(), policy="dense", lr=0.5, schedule=lambda progress: 1.0 - progress)
    rates = []
    trainer.fit(resident(), progress=lambda status: rates.append(trainer.optimizer.param_groups[0]["lr"]), **budget)
    done = [0, 16, 32, 44, 60, 76, 88] if "rows" in budget else range(7)
    whole = 96 if "rows" in budget else 6
    assert rates == [pytest.approx(0.5 * (1 - x / whole)) for x in done if x < whole]


def test_no_number_of_rows_is_compiled_anew():
    import torch._dynamo.utils as dynamo

    torch._dynamo.reset()
    dynamo.counters.clear()
    trainer = SparseTrainer(
        network(),
        policy="gate",
        rate=0.4,
        dense_start=0.1,
        dense_end=0.1,
        settings=TrainerSettings(compile="aot_eager"),
    )
    loader = resident()
    trainer.fit(loader, steps=12, evaluate=loader, evaluations=1)

    def train(*numbers):
        for rows in numbers:
            policy = Fixed(list(range(rows)))
            trainer.attach(policy)
            trainer.step(policy, loader, torch.arange(16))

    train(1, 2)
    graphs = dynamo.counters["stats"]["unique_graphs"]
    assert 3 <= graphs <= 6  # training, scoring, evaluation, and one row, whose BatchNorm does as in evaluation
    train(5, 9, 4, 13, 16, 1, 7, 2, 11, 3, 15)
    assert dynamo.counters["stats"]["unique_graphs"] == graphs
    assert not dynamo.counters["graph_break"]


@pytest.mark.parametrize("policy", ["dense", "gate", "importance"])
def test_a_compiled_model_trains_as_it_does_without(policy):
    found = []
    for compiled in (False, "aot_eager"):
        torch.manual_seed(0)
        model = network()
        model[4].p = 0.0
        trainer = make_trainer(model, policy=policy, rate=0.5, compile=compiled, ema=0.9)
        trainer.fit(resident(), steps=6)
        assert set(trainer.model.state_dict()) == set(network().state_dict())  # no prefix of a compiler's
        found.append(weights(trainer.update.evaluated))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
