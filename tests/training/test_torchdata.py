"""torchdata's StatefulDataLoader: a run that was stopped goes on bit for bit, with workers and without."""

import pytest
import torch
from torch import nn

from sparse_training import SparseTrainer
from sparse_training.errors import UserError


class Noisy(torch.utils.data.Dataset):
    """Augments its rows at random."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        clean = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return clean + 0.5 * torch.randn(6), index % 3


def make(workers, **options):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    loader = loaders.StatefulDataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=workers, **options)
    return SparseTrainer(model, policy="gate", rate=0.5), model, loader


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_data_loader_resumes_bit_for_bit(tmp_path, workers):
    trainer, whole, loader = make(workers)
    torch.manual_seed(5)
    trainer.fit(loader, steps=20, checkpoint=tmp_path / "whole")

    trainer, _, loader = make(workers)
    torch.manual_seed(5)
    steps = iter(range(1, 100))
    trainer.fit(loader, steps=20, checkpoint=tmp_path / "part", stop=lambda: next(steps) >= 11)
    trainer, resumed, loader = make(workers)
    torch.manual_seed(77)
    trainer.fit(loader, steps=20, checkpoint=tmp_path / "part", resume=True)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_persistent_workers_are_refused(tmp_path):
    trainer, _, loader = make(2, persistent_workers=True)
    with pytest.raises(UserError, match="needs a DataLoader with persistent_workers=False"):
        trainer.fit(loader, steps=2, checkpoint=tmp_path)
