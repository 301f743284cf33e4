"""axolotl's EAFT loss with the exact entropy in place of that of the top 20 logits.

Host: axolotl 0.19; a stand-in with its functions in plain PyTorch where it is not installed. LLaMA-Factory is alike.
Hardware: 2 CPU cores.
Minutes: 0.2
Expected output:
    20 classes: theirs 7.359, ours 7.359
    5,000 classes: theirs 30.9, ours 73.2, by the definition 73.2
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from stand_ins import host_or_stand_in, top_20_loss

from sparse_training.integrations.eaft import axolotl_loss

host = host_or_stand_in(
    "axolotl.monkeypatch.loss.eaft", "axolotl", "0.19.0", {"axolotl.monkeypatch.loss.eaft": {"eaft_loss": top_20_loss}}
)
found = {}
for classes in (20, 5000):
    torch.manual_seed(0)
    outputs = SimpleNamespace(logits=2 * torch.randn(2, 17, classes))
    labels = torch.randint(0, classes, (2, 17))
    theirs = float(host.eaft_loss(outputs, labels))
    with axolotl_loss:  # before the trainer is built: axolotl_loss.on()
        ours = float(host.eaft_loss(outputs, labels))
    found[classes] = theirs, ours
log_p = outputs.logits[:, :-1].flatten(0, 1).log_softmax(-1)
exact = F.nll_loss(log_p, labels[:, 1:].flatten(), reduction="none") * -(log_p.exp() * log_p).sum(-1)
print("20 classes: theirs {:.3f}, ours {:.3f}".format(*found[20]))
print("5,000 classes: theirs {:.1f}, ours {:.1f}, by the definition {:.1f}".format(*found[5000], exact.mean()))
assert abs(found[20][0] - found[20][1]) < 1e-4
assert abs(found[5000][1] - exact.mean()) < 1e-3
