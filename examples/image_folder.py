"""Train on a folder of images, a third of the rows in each epoch; goes on with any number of processes. Start it with

    torchrun --standalone --nproc-per-node 8 examples/image_folder.py --images imagenet/train --size 224 --model vit-s

Host: torchrun with gloo (CPU) or NCCL (GPU), or no torchrun; PyTorch's DataLoader and DistributedDataParallel.
Hardware: 2 CPU cores, for the small images that it makes where none are given.
Minutes: 0.2
Expected output:
    rank 0 of 1: 240 of 240 rows have a score, 0 images unreadable
    epochs 0 to 8, last loss 0.24
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from sparse_training import HistorySampler, ImageFiles, Indexed, RandomCropAndFlip, build_model

parser = argparse.ArgumentParser()
parser.add_argument("--images", type=Path, help="folder with a folder of images for each class")
parser.add_argument("--folder", type=Path, default=Path("run"), help="folder of checkpoints, one of each epoch")
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--model", default="cnn-bn")
parser.add_argument("--batch-size", type=int, default=16, help="of a process")
parser.add_argument("--epochs", type=int, default=9)
parser.add_argument("--workers", type=int, default=0)
options = parser.parse_args()

if "RANK" in os.environ:  # torchrun
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
local = int(os.environ.get("LOCAL_RANK", 0))
device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")

if options.images is None:
    options.images = options.folder / "images"
    for number in range(240 if rank == 0 else 0):
        path = options.images / f"class{number % 3}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(0, 100, (48, 64, 3), generator=torch.Generator().manual_seed(number))
        noise[..., number % 3] += 100
        Image.fromarray(noise.to(torch.uint8).numpy()).save(path)
    if ranks > 1:
        dist.barrier()

train = ImageFiles(options.images, RandomCropAndFlip(options.size))
sampler = HistorySampler(train, options.batch_size, rate=1 / 3)  # this process's rows
torch.manual_seed(0)  # the same weights everywhere
module = build_model(options.model, shape=(3, options.size, options.size), classes=len(train.classes)).to(device)
model: nn.Module = DistributedDataParallel(module) if ranks > 1 else module
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

first = 0
if saved := sorted(options.folder.glob("epoch-*.done")):
    folder = saved[-1].with_suffix("")
    first = int(folder.name.removeprefix("epoch-")) + 1
    state = torch.load(folder / "model.pt", map_location=device)
    module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    sampler.load_rank_states([torch.load(path) for path in folder.glob("sampler-*.pt")])  # of however many

loader = DataLoader(Indexed(train), batch_sampler=sampler, num_workers=options.workers)
loss = torch.zeros(())
for epoch in range(first, options.epochs):
    train.set_epoch(epoch)
    for index, (inputs, targets) in loader:
        losses = F.cross_entropy(model(inputs.to(device)), targets.to(device), reduction="none")
        loss = (losses * sampler.weights(index).to(device)).mean()  # an unbiased estimate of the mean over all rows
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sampler.update(index, losses)
    folder = options.folder / f"epoch-{epoch:03}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(sampler.state_dict(), folder / f"sampler-{rank}.pt")
    if rank == 0:
        torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, folder / "model.pt")
    if ranks > 1:
        dist.barrier()
    folder.with_suffix(".done").touch()

table, lost = sampler.table, len(train.unreadable)
line = f"rank {rank} of {ranks}: {table.seen} of {table.rows} rows have a score, {lost} images unreadable\n"
print(line, end="", flush=True)  # in one piece, beside those of other ranks
if rank == 0:
    print(f"epochs {first} to {options.epochs - 1}, last loss {loss.item():.2f}")
if dist.is_initialized():
    dist.destroy_process_group()
