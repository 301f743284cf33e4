"""Stand-ins for hosts that cannot be installed beside one another: the functions that are served, in plain PyTorch.

An example takes its host itself where it is installed. Tests run the real files of the hosts' wheels: ``make hosts``.
"""

import importlib
import sys
import types

import torch
import torch.nn.functional as F


def host_or_stand_in(name, package, version, modules):
    """Import a module of a host; where the host is not installed, make it and its neighbours first.

    Args:
        name: module to return, such as "verl.utils.torch_functional".
        package: the host's package.
        version: version that the stand-in has.
        modules: contents by the modules' names.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{package} is not installed: a stand-in with its functions in plain PyTorch", file=sys.stderr)
    for dotted, contents in modules.items():
        parts = dotted.split(".")
        for length in range(1, len(parts) + 1):
            full = ".".join(parts[:length])
            if full not in sys.modules:
                sys.modules[full] = types.ModuleType(full)
                sys.modules[full].__path__ = []
                if length > 1:
                    setattr(sys.modules[".".join(parts[: length - 1])], parts[length - 1], sys.modules[full])
        vars(sys.modules[dotted]).update(contents)
    sys.modules[package].__version__ = version
    return sys.modules[name]


def log_probs(logits, labels, *_):
    """Log-probability of each label."""
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def divided_log_probs(logits, labels, temperature=1.0):
    """OpenRLHF's way: the caller's logits are divided in place."""
    return log_probs(logits.div_(temperature), labels)


def log_probs_and_entropy(logits, labels, *, return_entropy=False):
    """torchtitan's way: all in float32, and an entropy without gradient."""
    logits = logits.float()
    found = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return (found, entropy(logits.detach())) if return_entropy else found


def entropy(logits, *_):
    """Entropy of each row."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def sum_of_squares(logits):
    """Sum of squared probabilities of each row."""
    return logits.softmax(-1).square().sum(-1)


class FusedFunction:
    """verl's fused head; this one holds all logits."""

    @staticmethod
    def apply(hidden, weight, tokens, temperature=1.0, chunk_size=512):
        """Log-probability and entropy of each token."""
        logits = hidden @ weight.T / temperature
        return log_probs(logits, tokens), entropy(logits)


class FusedHead(torch.nn.Module):
    """verl's module around it."""

    def __init__(self, chunk_size=512, impl_backend="torch"):
        super().__init__()
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(self, hidden, weight, tokens, temperature=1.0):
        """Log-probability and entropy of each token."""
        return FusedFunction.apply(hidden, weight, tokens, temperature, self.chunk_size)


class Engine:
    """verl's engine, as far as it is looked at."""

    def prepare_model_outputs(self, *given):
        """Not called by the example."""


def top_20_loss(outputs, labels, num_items_in_batch=None, alpha=1.0, k=20):
    """EAFT with the entropy of the top 20 logits."""
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    weight = entropy(logits.detach().topk(k).values) ** alpha
    return (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / (num_items_in_batch or len(labels))


class HardPixels:
    """mmseg's sampler of hard pixels, with a threshold."""

    def __init__(self, context, thresh=None, min_kept=100000):
        self.context, self.thresh, self.min_kept = context, thresh, min_kept

    def sample(self, seg_logit, seg_label):
        """1 for each hard pixel."""
        valid = (seg_label != self.context.ignore_index).squeeze(1)
        label = seg_label.masked_fill(~valid.unsqueeze(1), 0)
        p = seg_logit.softmax(1).gather(1, label).squeeze(1)
        ordered = p[valid].sort().values
        limit = max(float(ordered[min(self.min_kept * len(p), len(ordered) - 1)]), self.thresh)
        return ((p < limit) & valid).to(seg_logit.dtype)
