"""Real trainers of other packages on tiny models, with the gate and without; each skips where its package is not."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.integrations.sample_gate import SampleGate

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


@pytest.mark.parametrize("decision", [{}, {"threshold": 1e9}])
def test_two_samples_are_always_kept(decision):
    select = SampleGate(Gate(0.01, **{"threshold": 5.0, **decision}))
    logits, targets = torch.randn(8, 4), torch.randint(0, 4, (8,))
    logits[0, targets[0]] -= 20.0 if not decision else 0.0
    kept = select(logits, targets)
    significance = select.gate.last.significance
    assert kept.index.tolist() == sorted(significance.topk(2).indices.tolist())
    assert len(kept.take(targets)) == int(kept.count) == 2
    assert len(select(logits[:1], targets[:1]).index) == 1
    for options in ({"temperature": 0.1}, {"capacity": 3}):
        with pytest.raises(UserError, match="must have temperature=0 and no capacity"):
            SampleGate(Gate(0.1, **options))


# --- Hugging Face -------------------------------------------------------------------------------


def hugging_face():
    pytest.importorskip("accelerate")
    return pytest.importorskip("transformers")


def bert(kind, **options):
    """A model of some thousand parameters, from its configuration alone."""
    transformers = hugging_face()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def digit_tokens():
    """Images as 64 tokens, their brightness; a sample's class is its digit, a token's that of the pixel below."""
    images, labels = digits()
    tokens = (images * 16).long()
    below = torch.cat([tokens[:, 8:], torch.full((len(tokens), 8), -100)], 1)
    return tokens, labels, below


class Rows(torch.utils.data.Dataset):
    def __init__(self, tokens, labels):
        self.tokens, self.labels = tokens, labels

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def gated_trainer(folder, model, data, seen=None, **options):
    transformers = hugging_face()
    from sparse_training.integrations.hugging_face import GatedTrainer

    class Trainer(GatedTrainer, transformers.Trainer):
        pass

    if seen is not None:
        model.register_forward_hook(lambda module, inputs, output: seen.append((module.training, len(output.logits))))
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=options.pop("max_steps", 30), per_device_train_batch_size=32, learning_rate=1e-2,
        report_to=[], use_cpu=True, save_steps=10, logging_steps=5, disable_tqdm=True, seed=0,
        gradient_accumulation_steps=options.pop("accumulate", 1), **options.pop("arguments", {}),
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, **options)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_hugging_face_trains_on_the_samples_kept(tmp_path):
    tokens, labels, _ = digit_tokens()
    seen = []
    model = bert("BertForSequenceClassification", num_labels=10)
    trainer = gated_trainer(tmp_path, model, Rows(tokens, labels), seen, gate=0.25)
    trainer.train()
    assert [rows for training, rows in seen if not training] == [32] * 30  # scored
    trained = [rows for training, rows in seen if training]
    assert trained[0] == 32  # to start from
    assert 4 <= sum(trained[5:]) / len(trained[5:]) <= 12
    assert min(trained) >= 2
    assert int(trainer.gate.step) == 30
    assert all(math.isfinite(loss) for loss in losses(trainer))
    saved = torch.load(tmp_path / "checkpoint-30" / "gate.pt", weights_only=True)
    torch.testing.assert_close(saved, dict(trainer.gate.state_dict()), rtol=0, atol=0)


def test_a_gate_that_keeps_all_leaves_hugging_face_as_it_was(tmp_path):
    transformers = hugging_face()
    tokens, labels, below = digit_tokens()
    for kind, targets, granularity in (
        ("BertForSequenceClassification", labels, "sample"),
        ("BertForTokenClassification", below, "sample"),
        ("BertForTokenClassification", below, "token"),
    ):
        found = []
        for gated in (False, True):
            model = bert(kind, num_labels=17 if targets is below else 10)
            options = {"gate": 1.0, "granularity": granularity} if gated else {}
            trainer = gated_trainer(tmp_path, model, Rows(tokens, targets), max_steps=3, **options)
            if not gated:
                trainer = transformers.Trainer(model, trainer.args, train_dataset=trainer.train_dataset)
            trainer.train()
            found.append({name: value.clone() for name, value in model.state_dict().items()})
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_hugging_face_trains_on_the_tokens_kept(tmp_path):
    tokens, _, below = digit_tokens()
    seen = []
    model = bert("BertForTokenClassification", num_labels=17)
    trainer = gated_trainer(
        tmp_path, model, Rows(tokens, below), seen, gate=Gate(0.3), granularity="token", accumulate=2
    )
    trainer.train()
    assert [training for training, _ in seen].index(True) == 1  # the first batch says what is predicted
    assert {training for training, _ in seen[1:]} == {True}  # no scoring pass
    assert int(trainer.gate.step) == 59  # an epoch has 57 batches, the last step of it one
    assert float(trainer.gate.rate_observed) == pytest.approx(0.3, abs=0.05)
    assert losses(trainer)[-1] < losses(trainer)[0]
    mask = trainer.gate.last.mask.reshape(-1, 64)
    assert not mask[:, 56:].any()  # no label, never kept


def test_a_language_models_tokens_are_judged_by_the_next(tmp_path):
    transformers = hugging_face()
    tokens, _, _ = digit_tokens()
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    trainer = gated_trainer(tmp_path, model, Rows(tokens, tokens), max_steps=2, gate=1.0, granularity="token")
    batch = {"input_ids": tokens[:4], "labels": tokens[:4]}
    with torch.no_grad():
        wanted = model.eval()(**batch).loss
        model.train()
        for module in model.modules():
            module.training = isinstance(module, transformers.GPT2LMHeadModel)  # no dropout
        assert float(trainer.compute_loss(model, batch)) == pytest.approx(float(wanted), rel=1e-5)
    trainer.train()


def test_a_resumed_hugging_face_trainer_goes_on_with_its_gate(tmp_path):
    tokens, labels, _ = digit_tokens()

    def make(name, steps):
        model = bert("BertForSequenceClassification", num_labels=10)
        return gated_trainer(tmp_path / name, model, Rows(tokens, labels), max_steps=steps, gate=0.25,
                             arguments={"lr_scheduler_type": "constant"})  # fmt: skip

    whole, part = make("whole", 20), make("part", 10)
    whole.train()
    part.train()
    resumed = make("part", 20)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-10"))
    torch.testing.assert_close(dict(resumed.gate.state_dict()), dict(whole.gate.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


# --- Lightning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, 0.25])
def test_lightning_trains_on_the_rows_kept(tmp_path, gate):
    lightning = pytest.importorskip("lightning")
    from sparse_training.integrations.lightning import GatedModule

    class Plain(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
            self.trained, self.validated, self.losses = [], [], []

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            x, y = batch
            loss = F.cross_entropy(self(x), y)
            self.trained.append(len(y))
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch, index):
            self.validated.append(len(batch[1]))
            self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    class Gated(GatedModule, Plain):
        pass

    model = Plain() if gate is None else Gated(gate=gate)
    x, y = digits()
    train = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True, drop_last=True)
    test = DataLoader(TensorDataset(x[1400:], y[1400:]), batch_size=128)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, train, test)
    assert float(trainer.callback_metrics["accuracy"]) > 0.7
    assert set(model.validated) <= {128, 13}  # never gated
    if gate is None:
        assert set(model.trained) == {64}
        return
    assert model.trained[0] == 64
    assert 8 <= sum(model.trained[5:]) / len(model.trained[5:]) <= 24
    assert int(model.gate.step) == len(model.trained) == 42
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(state["gate.controller.counters"], model.gate.controller.counters)
    assert sum(name.endswith("counters") for name in state) == 1
