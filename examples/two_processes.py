"""Two processes that train one model; each holds half of the rows. Start it with

    torchrun --standalone --nproc-per-node 2 examples/two_processes.py

Host: torchrun with gloo (CPU) or NCCL (GPU), sparse_training's own trainer.
Hardware: 2 CPU cores.
Minutes: 0.3
Expected output:
    2 processes, 11496 rows seen, accuracy 0.90
"""

import os

import torch
import torch.distributed as dist

from sparse_training import ResidentLoader, SparseTrainer, build_model, load_data

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
torch.manual_seed(0)  # the same weights everywhere
data = load_data("digits")
model = build_model("cnn-tiny", shape=data.shape, classes=len(data.classes))
facts = {"mean": data.mean, "std": data.std, "device": device}
train = ResidentLoader(data.train, batch_size=32, **facts)  # this process's rows
test = ResidentLoader(data.test, batch_size=64, shuffle=False, **facts)
trainer = SparseTrainer(model, policy="gate", rate=0.5, lr=1e-2, device=device)
log = trainer.fit(train, epochs=8)
accuracy = trainer.evaluate(test)["accuracy"]
if dist.get_rank() == 0:
    print(f"{dist.get_world_size()} processes, {int(log.rows_seen)} rows seen, accuracy {accuracy:.2f}")
assert accuracy > 0.8
dist.destroy_process_group()
