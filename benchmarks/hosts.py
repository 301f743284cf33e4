"""Functions of hosts beside what the integrations put in their place: ``python benchmarks/hosts.py [--small]``.

The hosts' functions are those of their real wheels (``make hosts``), their fallbacks for a CPU. Forward and backward
where there is a gradient; the sides take turns in one process. Trainers that are hosts themselves train for some steps
(``host_trainers.py``). Writes benchmarks/results/hosts-DATE.json. Three minutes; ``--only TEXT`` for some cases.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timing import Cpu, Row, interleave, ratios, record_path, write_record
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

import host_files
import host_trainers

from sparse_kernels import TopFraction
from sparse_training.integrations import eaft, mmseg, openrlhf, swift, torchtitan, verl
from sparse_training.integrations.transformers_loss import TokenLoss

Functions = dict[str, Callable[..., Any]]  # "host" and "ours"


def pair(switch: Any, place: str) -> Functions:
    """Both functions of a name; the switch is off afterwards."""
    with switch:
        return {"ours": switch.replacements[place], "host": switch.original(place)}


def with_gradient(call: Callable[[Tensor], Tensor], logits: Tensor) -> Callable[[], list[Tensor]]:
    def side() -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        result = call(leaf)
        return [result.detach(), *torch.autograd.grad(result, leaf)]

    return side


def of_logits(rows: int, classes: int) -> Iterator[tuple[str, dict[str, Callable[[], list[Tensor]]]]]:
    """Log-probabilities and entropies from logits, and the losses made of them."""
    labels = torch.randint(0, classes, (2, rows // 2))
    logits = {dtype: (3 * torch.randn(2, rows // 2, classes)).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    advantages = torch.randn(2, rows // 2)

    def sides(scores: Callable[[str], Callable[[Tensor], Tensor]], dtype: torch.dtype) -> dict[str, Any]:
        return {side: with_gradient(scores(side), logits[dtype]) for side in ("ours", "host")}

    def policy(log_probs: Functions, entropy: Functions) -> Callable[[str], Callable[[Tensor], Tensor]]:
        return lambda side: lambda x: (log_probs[side](x, labels) * advantages).sum() + 0.01 * entropy[side](x).sum()

    for name, files, host, place, function in (
        ("verl", host_files.verl, verl, "verl.utils.torch_functional:", "logprobs_from_logits"),
        ("swift", host_files.swift, swift, "swift.rlhf_trainers.grpo_trainer:", "selective_log_softmax"),
    ):
        with files():
            log_probs, entropy = pair(host.head, place + function), pair(host.head, place + "entropy_from_logits")
            for dtype in logits:
                yield f"{name}-{str(dtype)[6:]}-{rows}x{classes}", sides(policy(log_probs, entropy), dtype)
    with host_files.openrlhf():
        place = "openrlhf.models.utils:log_probs_from_logits"
        actor = pair(openrlhf.head, place)
        yield (
            f"openrlhf-float32-{rows}x{classes}",
            sides(lambda side: lambda x: (actor[side](x, labels) * advantages).sum(), torch.float32),
        )
    with host_files.torchtitan():
        titan = pair(torchtitan.head, "torchtitan.components.loss:compute_logprobs")

        def dapo(side: str) -> Callable[[Tensor], Tensor]:
            return lambda x: (titan[side](x, labels, return_entropy=True)[0] * advantages).sum()

        yield f"torchtitan-bfloat16-{rows}x{classes}", sides(dapo, torch.bfloat16)
    with host_files.axolotl():
        loss = pair(eaft.axolotl_loss, "axolotl.monkeypatch.loss.eaft:eaft_loss")

        def weighted(side: str) -> Callable[[Tensor], Tensor]:
            return lambda x: loss[side](SimpleNamespace(logits=x), labels)

        yield f"axolotl-eaft-bfloat16-{rows}x{classes}", sides(weighted, torch.bfloat16)


def of_a_model(small: bool) -> Iterator[tuple[str, dict[str, Callable[[], list[Tensor]]]]]:
    """A causal language model's own loss and that of every token by TokenLoss, which must be equal; then a fifth.

    With the gradients that training takes, those of all parameters; the head is tied to the embedding as SmolLM2's is.
    """
    import transformers

    rows, hidden, classes = (32, 16, 200) if small else (512, 576, 49152)
    config = transformers.LlamaConfig(
        vocab_size=classes, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    tokens = torch.randint(0, classes, (2, rows // 2))
    for dtype in (torch.float32, torch.bfloat16):
        model = transformers.LlamaForCausalLM(config).to(dtype).train()

        def step(select: Any, model: Any = model) -> Callable[[], list[Tensor]]:
            def call() -> list[Tensor]:
                with contextlib.nullcontext() if select is None else TokenLoss(model, select, fused_head=True):
                    loss = model(input_ids=tokens, labels=tokens).loss
                    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

            return call

        for share, name in ((1.0, "all"), (0.2, "fifth")):
            case = f"transformers-{name}-{str(dtype)[6:]}-{rows}x{hidden}x{classes}"
            yield case, {"ours": step(TopFraction(share, of="entropy")), "host": step(None)}


def others(small: bool) -> Iterator[tuple[str, dict[str, Callable[[], list[Tensor]]]]]:
    """verl's fused head with a fifth of the tokens in its backward, and mmseg's sampler."""
    rows, hidden, classes = (32, 16, 200) if small else (512, 576, 49152)
    inputs, tokens = torch.randn(rows, hidden), torch.randint(0, classes, (rows,))
    weight = 0.05 * torch.randn(classes, hidden)
    advantages = torch.randn(rows) * (torch.arange(rows) % 5 == 0)
    with host_files.verl():
        place = "verl.utils.experimental.torch_functional:FusedLinearForPPOFunction"
        fused = pair(verl.head, place)

        def step(side: str) -> Callable[[], list[Tensor]]:
            def call() -> list[Tensor]:
                leaves = [inputs.detach().requires_grad_(), weight.detach().requires_grad_()]
                log_probs, _ = fused[side].apply(*leaves, tokens, 1.0, 512)  # type: ignore[attr-defined]
                return [log_probs.detach(), *torch.autograd.grad((log_probs * advantages).sum(), leaves)]

            return call

        yield f"verl-fused-float32-{rows}x{hidden}x{classes}-20%", {side: step(side) for side in ("ours", "host")}
    size = (1, 19, 32, 32) if small else (2, 19, 512, 512)
    label = torch.randint(0, 19, (size[0], 1, *size[2:]))
    logits = torch.randn(size).scatter_add(1, label, torch.full(label.shape, 4.0))
    with host_files.mmseg():
        place = "mmseg.structures.sampler.ohem_pixel_sampler:OHEMPixelSampler.sample"
        sample = pair(mmseg.ohem, place)
        sampler = SimpleNamespace(context=SimpleNamespace(ignore_index=255), thresh=0.7, min_kept=1000)
        case = "mmseg-ohem-float32-" + "x".join(str(n) for n in size)
        yield case, {side: (lambda side=side: [sample[side](sampler, logits, label)]) for side in ("ours", "host")}


def check(case: str, ours: Tensor, theirs: Tensor) -> None:
    """Raise where the results differ by more than rounding; of a sampler's pixels a few next to its limit may."""
    if case.startswith("mmseg"):
        assert (ours != theirs).sum() <= 1e-5 * ours.numel(), case
    else:
        assert (ours - theirs).abs().max() <= 0.03 * (1 + theirs.abs().max()), case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny shapes, nothing recorded")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds it")
    options = parser.parse_args()
    small, rounds = options.small, 3 if options.small else 9
    torch.manual_seed(0)
    found = []

    def record(case: str, seconds: dict[str, dict[str, float]]) -> None:
        found.append(Row(case, seconds, ratios(seconds), {}, {"threads": torch.get_num_threads()}))
        print("\n".join(found[-1].lines()), flush=True)

    for cases in (of_logits(*((16, 200) if small else (512, 32000))), others(small), of_a_model(small)):
        for case, sides in cases:
            if options.only not in case:
                continue
            if "eaft" not in case and "fifth" not in case:  # which differ from their hosts on purpose
                for one, other in zip(sides["ours"](), sides["host"](), strict=True):
                    check(case, one.float(), other.float())
            record(case, interleave(Cpu(), sides, rounds=rounds, budget=4.0))
    for case, fits in host_trainers.cases(small):
        if options.only in case:
            record(case, host_trainers.seconds_in_turn(fits, 1 if small else 3))
    if not small:
        machine = {"processor": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        write_record(record_path("hosts"), machine, found)


if __name__ == "__main__":
    main()
