"""Lightning modules as its documentation writes them: language models, other outputs and losses, two processes."""

import json
import os
import textwrap
from pathlib import Path

import fresh
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sparse_training import Criterion, Gate, Significance
from sparse_training.errors import UserError
from sparse_training.integrations.lightning import GatedModule

lightning = pytest.importorskip("lightning")
ROOT = Path(__file__).parents[2]
V, T, N = 30, 8, 12


def fit(folder, model, data, batch_size=N):
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=batch_size))
    return model


class Rows(Dataset):
    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


class Module(lightning.LightningModule):
    """What the modules below share: the rows that the training step was given."""

    def __init__(self, net):
        super().__init__()
        self.net, self.given = net, []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LanguageModel(Module):
    """As in Lightning's own examples of Transformers."""

    def forward(self, **inputs):
        return self.net(**inputs)

    def training_step(self, batch, index):
        self.given.append(batch["input_ids"])
        return self(**batch).loss


class GatedLanguageModel(GatedModule, LanguageModel):
    """The same on the samples that a gate keeps."""


HIGHEST = {"threshold": 1e9, "significance": Significance(loss=1.0)}  # the two of the highest loss


def test_a_language_models_samples_are_judged_by_the_next_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2,
        initializer_range=0.5,
    )  # fmt: skip
    net = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, V, (N, T))
    with torch.no_grad():
        logits = net(input_ids=ids).logits
        losses = F.cross_entropy(logits[:, :-1].movedim(-1, 1), ids[:, 1:], reduction="none").mean(1)
        in_place = F.cross_entropy(logits.movedim(-1, 1), ids, reduction="none").mean(1)
    highest = losses.topk(2).indices.sort().values
    assert not torch.equal(highest, in_place.topk(2).indices.sort().values)
    model = fit(tmp_path, GatedLanguageModel(net, gate=Gate(0.5, **HIGHEST)), Rows(input_ids=ids, labels=ids))
    assert torch.equal(model.given[0], ids[highest])


class Regression(Module):
    def forward(self, inputs):
        return self.net(inputs).squeeze(1)

    def training_step(self, batch, index):
        inputs, targets = batch
        self.given.append(inputs)
        return F.mse_loss(self(inputs), targets)


class GatedRegression(GatedModule, Regression):
    """The same on the samples that a gate keeps."""


def test_targets_that_are_no_classes_need_a_criterion(tmp_path):
    torch.manual_seed(0)
    net, inputs, targets = nn.Linear(4, 1), torch.randn(N, 4), torch.randn(N)
    data = TensorDataset(inputs, targets)
    with pytest.raises(
        UserError, match=r"class indices, got \[12\] for torch.float32 targets of \[12\]; give criterion"
    ):
        fit(tmp_path, GatedRegression(net), data)
    highest = (net(inputs).squeeze(1) - targets).square().topk(2).indices.sort().values
    gate = Gate(0.5, **HIGHEST)
    model = fit(tmp_path, GatedRegression(net, gate=gate, criterion=nn.MSELoss(reduction="none")), data)
    assert torch.equal(model.given[0], inputs[highest])


class Standardised(nn.MSELoss):
    """A loss with statistics of its own."""

    def __init__(self):
        super().__init__(reduction="none")
        self.norm = nn.BatchNorm1d(1, affine=False)

    def forward(self, outputs, targets):
        return super().forward(self.norm(outputs[:, None]).squeeze(1), targets)


def test_selecting_moves_no_statistics_of_a_criterion(tmp_path):
    loss, data = Standardised(), TensorDataset(torch.randn(N, 4), torch.randn(N))
    fit(tmp_path, GatedRegression(nn.Linear(4, 1), gate=0.5, criterion=loss), data)
    assert loss.norm.num_batches_tracked == 0
    loss(torch.randn(8), torch.randn(8))
    assert loss.norm.num_batches_tracked == 1


class Segmentation(Module):
    """As torchvision's models of segmentation: a dict of maps."""

    def forward(self, inputs):
        return {"out": self.net(inputs), "aux": inputs}

    def training_step(self, batch, index):
        self.given.append(batch[0])
        return F.cross_entropy(self(batch[0])["out"], batch[1])


class GatedSegmentation(GatedModule, Segmentation):
    """The same on the samples that a gate keeps."""


def test_an_output_without_logits_needs_a_function_that_finds_them(tmp_path):
    torch.manual_seed(0)
    net, inputs, targets = nn.Conv2d(3, 4, 1), torch.randn(N, 3, 5, 5), torch.randint(0, 4, (N, 5, 5))
    data = TensorDataset(inputs, targets)
    with pytest.raises(UserError, match=r"must return logits .*, got a dict of out, aux for .* give criterion="):
        fit(tmp_path, GatedSegmentation(net), data)
    highest = F.cross_entropy(net(inputs), targets, reduction="none").mean((1, 2)).topk(2).indices.sort().values
    find = Criterion(outputs=lambda output: output["out"])
    model = fit(tmp_path, GatedSegmentation(net, gate=Gate(0.5, **HIGHEST), criterion=find), data)
    assert torch.equal(model.given[0], inputs[highest])


def test_batches_of_a_tokenizer_are_gated(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    net = transformers.BertForSequenceClassification(config)
    rows = Rows(input_ids=torch.randint(0, V, (N, T)), labels=torch.arange(N) % 3)
    gate = Gate(0.5, **HIGHEST)
    model = GatedLanguageModel(net, gate=gate)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip

    def collate(samples):
        return transformers.BatchEncoding(torch.utils.data.default_collate(samples))

    trainer.fit(model, DataLoader(rows, batch_size=N, collate_fn=collate))
    assert model.given[0].shape == (2, T)


# --- two processes ------------------------------------------------------------------------------

SCRIPT = """
    import json, os, sys
    import lightning, torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from sparse_training import HistorySampler, Indexed

    class Model(lightning.LightningModule):
        def __init__(self, sampler=None):
            super().__init__()
            self.net, self.sampler, self.seen = nn.Linear(4, 3), sampler, []

        def train_dataloader(self):
            more = {} if sys.argv[2] == "infobatch" else {"rate": 0.5}
            more |= {"deduplicate": True, "duplicate_counts": torch.ones(64)} if sys.argv[2] == "adaptive" else {}
            self.sampler = self.sampler or HistorySampler(64, batch_size=8, method=sys.argv[2], **more)
            return DataLoader(Indexed(data), batch_sampler=self.sampler)

        def training_step(self, batch, index):
            rows, (inputs, labels) = batch
            losses = F.cross_entropy(self.net(inputs), labels, reduction="none")
            loss = (losses * self.sampler.weights(rows)).mean()
            self.sampler.update(rows, losses.detach())
            self.seen.append([self.current_epoch, rows.tolist()])
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 4), torch.arange(64) % 3)

    if __name__ == "__main__":
        early = HistorySampler(64, batch_size=8, rate=0.5, method=sys.argv[2]) if "early" in sys.argv else None
        model = Model(early)
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
        )
        trainer.fit(model)
        weight = model.net.weight.tolist()
        with open(f"{sys.argv[1]}/{trainer.global_rank}.json", "w") as file:
            json.dump({"seen": model.seen, "weight": weight}, file)
"""


def run(folder, *arguments):
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python_api'}", "OMP_NUM_THREADS": "1"}
    return fresh.run(str(script), str(folder), *arguments, environment=environment, imports=["lightning"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["importance", "infobatch", "adaptive"])
def test_two_processes_draw_their_own_rows(tmp_path, method):
    done = run(tmp_path, method)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    torch.testing.assert_close(*(torch.tensor(rank["weight"]) for rank in ranks), rtol=0, atol=0)
    for number, rank in enumerate(ranks):
        assert {row % 2 for _, rows in rank["seen"] for row in rows} == {number}
    batches = [[sum(1 for epoch, _ in rank["seen"] if epoch == at) for at in range(3)] for rank in ranks]
    assert batches[0] == batches[1]
    assert min(batches[0]) > 0


@pytest.mark.slow
def test_a_sampler_made_before_the_processes_is_refused(tmp_path):
    done = run(tmp_path, "importance", "early")
    assert done.returncode != 0
    assert "made for 1 process(es), and torch.distributed now has 2" in done.stderr
