"""Hugging Face's Trainer on fewer samples: the expected gradient is its own, and rows left out are not read."""

import copy

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from sparse_training.errors import UserError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from sparse_training.integrations.hugging_face_pruning import PrunedTrainer  # noqa: E402

ROWS, LENGTH = 48, 6


class Texts(Dataset):
    """Tokenised texts with labels of a task; counts the reads of each row."""

    def __init__(self, task):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 20, (ROWS, LENGTH), generator=generator)
        self.labels = {
            "classes": self.ids[:, 0] % 3,
            "values": self.ids[:, 0] / 10.0,
            "tokens": torch.where(torch.rand(ROWS, LENGTH, generator=generator) < 0.4, -100, self.ids % 3),
            "next": torch.where(torch.rand(ROWS, LENGTH, generator=generator) < 0.4, -100, self.ids),
        }[task]
        self.reads = [0] * ROWS

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        self.reads[row] += 1
        return {"input_ids": self.ids[row], "labels": self.labels[row]}


def make_model(task):
    torch.manual_seed(0)
    if task == "next":
        config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        return transformers.GPT2LMHeadModel(config)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=1 if task == "values" else 3,
    )  # fmt: skip
    kind = "Token" if task == "tokens" else "Sequence"
    return getattr(transformers, f"BertFor{kind}Classification")(config)


class Pruned(PrunedTrainer, transformers.Trainer):
    pass


def train(kind, model, data, folder, *, epochs, lr=1e-4, callbacks=(), **options):
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, **options}
    pruning = {name: options.pop(name) for name in ("prune", "delta") if name in options}
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=epochs, learning_rate=lr, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=0.0, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
        **options,
    )  # fmt: skip
    trainer = kind(model, arguments, train_dataset=data, callbacks=list(callbacks), **pruning)
    trainer.train()
    return trainer


def moved(kind, task, folder, **options):
    model = make_model(task)
    before = copy.deepcopy(model)
    trainer = train(kind, model, Texts(task), folder, **options)
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    change = torch.cat([(a.double() - b.double()).detach().flatten() for a, b in pairs])
    return change / trainer.state.global_step, trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "accumulate"), [("classes", 1), ("values", 1), ("tokens", 1), ("tokens", 2), ("next", 1), ("next", 2)]
)
def test_the_expected_gradient_is_the_trainers_own(task, accumulate, tmp_path):
    options = {"epochs": 40, "gradient_accumulation_steps": accumulate, "lr": 1e-3}
    own, _ = moved(transformers.Trainer, task, tmp_path, **options)
    pruned, trainer = moved(Pruned, task, tmp_path, delta=1.0, **options)
    reads = trainer.train_dataset.reads
    assert sum(reads) < 0.9 * 40 * ROWS
    # Along the gradient: a quarter and more where weights or divisors are wrong. Elsewhere it is noise of 40 passes.
    assert float(pruned @ own / (own @ own)) == pytest.approx(1.0, abs=0.08)
    assert (pruned - own).norm() / own.norm() < 0.3


@pytest.mark.parametrize("task", ["classes", "tokens", "next"])
def test_a_run_in_which_nothing_is_left_out_is_the_trainers_own(task, tmp_path):
    own, _ = moved(transformers.Trainer, task, tmp_path, epochs=2, lr=0.1, gradient_accumulation_steps=2)
    kept, trainer = moved(Pruned, task, tmp_path, epochs=2, lr=0.1, gradient_accumulation_steps=2, prune=0.0)
    torch.testing.assert_close(kept, own, rtol=1e-4, atol=1e-7)
    assert trainer.state.global_step == 6


def test_the_end_of_the_run_has_every_row(tmp_path):
    _, trainer = moved(Pruned, "classes", tmp_path, epochs=8, delta=0.5)
    assert 4 * ROWS + 4 * 0.6 * ROWS < sum(trainer.train_dataset.reads) - 16 < 8 * ROWS


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Texts("classes"))


def test_what_cannot_be_served_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"PrunedTrainer asks for rows by their number, and .* use the Trainer itself"):
        train(Pruned, make_model("classes"), Stream(), tmp_path, epochs=1, max_steps=3)
    with pytest.raises(UserError, match=r"`prune` must be in \[0, 1\), got 1.0"):
        train(Pruned, make_model("classes"), Texts("classes"), tmp_path, epochs=1, prune=1.0)
    with pytest.raises(UserError, match=r"`delta` must be in \[0, 1\], got 2.0"):
        train(Pruned, make_model("classes"), Texts("classes"), tmp_path, epochs=1, delta=2.0)


def test_a_checkpoint_keeps_the_losses(tmp_path):
    model = make_model("classes")
    data = Texts("classes")
    trainer = train(Pruned, model, data, tmp_path, epochs=3)
    trainer._save_checkpoint(trainer.model, trial=None)
    folder = tmp_path / f"checkpoint-{trainer.state.global_step}"
    again = Pruned(make_model("classes"), trainer.args, train_dataset=data)
    again.args.num_train_epochs = 5
    again.train(resume_from_checkpoint=str(folder))
    assert again.state.global_step == 30
    trainer.policy.flush()
    assert again.policy.table.seen == ROWS
