"""Sequences with zero advantage are left out before the model runs, and the loss is that of the whole batch."""

import numpy as np
import pytest
import torch

from sparse_training.errors import UserError
from sparse_training.nn import drop_zero_sequences

SEQUENCES, TOKENS, CLASSES = 8, 12, 50


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=CLASSES, n_positions=TOKENS, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def rollout(zero=(0, 2, 3, 6), per_token=False):
    """A group's completions, padded on the right; some have an advantage of 0, and prompt and padding do not count."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, CLASSES, (SEQUENCES, TOKENS), generator=generator)
    lengths = torch.randint(7, TOKENS + 1, (SEQUENCES, 1), generator=generator)
    position = torch.arange(TOKENS)
    batch = {
        "input_ids": ids,
        "attention_mask": (position < lengths).long(),
        "old": -3 - torch.rand(SEQUENCES, TOKENS - 1, generator=generator, dtype=torch.float64),
        "task": np.arange(SEQUENCES),
    }
    mask = ((position >= 4) & (position < lengths))[:, 1:]
    advantages = torch.randn(SEQUENCES, generator=generator, dtype=torch.float64)
    advantages[list(zero)] = 0.0
    if per_token:
        advantages = advantages.unsqueeze(1).repeat(1, TOKENS - 1)
        advantages[:, :3] = 5.0  # of the prompt, which does not count
    return batch, advantages, mask


def clipped(model, batch, advantages):
    """PPO's loss of each token."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    log_p = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    ratio = (log_p - batch["old"]).exp()
    above = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
    return -torch.min(ratio * above, ratio.clamp(0.8, 1.2) * above)


REDUCTIONS = {  # of the whole batch; of what is kept, by the numbers of the whole; by shares
    "tokens": (
        lambda losses, mask: (losses * mask).sum() / mask.sum(),
        lambda losses, kept: (losses * kept.mask).sum() / kept.tokens,
        lambda losses, kept: (losses * kept.mask).sum() / kept.mask.sum() * kept.token_share,
    ),
    "sequences": (
        lambda losses, mask: ((losses * mask).sum(1) / mask.sum(1)).mean(),
        lambda losses, kept: ((losses * kept.mask).sum(1) / kept.mask.sum(1)).sum() / kept.sequences,
        lambda losses, kept: ((losses * kept.mask).sum(1) / kept.mask.sum(1)).mean() * kept.sequence_share,
    ),
}


def gradients(model, loss):
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_and_gradients_are_those_of_the_whole_batch(reduction, per_token):
    model, (batch, advantages, mask) = gpt2(), rollout(per_token=per_token)
    dense, *others = REDUCTIONS[reduction]
    whole = dense(clipped(model, batch, advantages), mask)
    right = gradients(model, whole)
    ran = []
    model.transformer.register_forward_pre_hook(
        lambda module, given, options: ran.append(len(given[0] if given else options["input_ids"])), with_kwargs=True
    )
    for reduce in others:
        kept = drop_zero_sequences(batch, advantages, mask, other_terms={"kl": 0.0})
        loss = reduce(clipped(model, kept.batch, kept.advantages), kept)
        torch.testing.assert_close(loss, whole)
        for one, other in zip(gradients(model, loss), right, strict=True):
            torch.testing.assert_close(one, other)
    assert ran == [4, 4]
    assert kept.index.tolist() == [1, 4, 5, 7]
    assert kept.batch["task"].tolist() == [1, 4, 5, 7]


def test_what_is_saved_is_printed():
    batch, advantages, mask = rollout()
    kept = drop_zero_sequences(batch, advantages, mask, other_terms={})
    tokens = int(mask[[1, 4, 5, 7]].sum())
    assert str(kept) == (
        f"4 of 8 sequences run, {tokens} of {int(mask.sum())} tokens of the loss: 50.0% of forward and backward saved"
    )


def test_without_a_loss_one_sequence_runs_and_every_gradient_is_zero():
    model, (batch, advantages, mask) = gpt2(), rollout(zero=range(SEQUENCES))
    kept = drop_zero_sequences(batch, advantages, mask, other_terms={})
    assert kept.index.tolist() == [0]
    loss = (clipped(model, kept.batch, kept.advantages) * kept.mask).sum() / kept.tokens
    assert loss == 0.0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients(model, loss))


def test_sequences_without_a_token_that_counts_are_left_out_and_nan_is_kept():
    batch, advantages, mask = rollout()
    mask[4] = False  # cut off: filtered by the mask
    advantages[2] = torch.nan
    kept = drop_zero_sequences(batch, advantages, mask.long(), other_terms={})
    assert kept.index.tolist() == [1, 2, 5, 7]
    assert kept.tokens == int(mask.sum())
    empty = drop_zero_sequences(batch, advantages, torch.zeros_like(mask), other_terms={})
    assert (empty.index.tolist(), empty.token_share) == ([0], 0.0)


def test_no_sequence_is_copied_into_the_callers_memory():
    batch, advantages, mask = rollout()
    before = {name: value.clone() for name, value in batch.items() if torch.is_tensor(value)}
    drop_zero_sequences(batch, advantages, mask, other_terms={})
    assert all(torch.equal(batch[name], value) for name, value in before.items())


A, M = torch.ones(3), torch.ones(3, 5)
BAD = {
    "a term": ({"other_terms": {"entropy": 0.0, "kl": 0.04}}, r"coefficient of 'kl' must be 0, got 0\.04"),
    "a negative term": ({"other_terms": {"entropy": -0.01}}, "coefficient of 'entropy' must be 0"),
    "a term of text": ({"other_terms": {"kl": "0"}}, "coefficient of 'kl' must be 0, got '0'"),
    "a term of NaN": ({"other_terms": {"kl": float("nan")}}, "coefficient of 'kl' must be 0, got nan"),
    "terms of a list": ({"other_terms": ["kl"]}, "`other_terms` must map names to coefficients, got list"),
    "advantages' shape": ({"advantages": torch.ones(4)}, r"`advantages`.*\(3,\) or \(3, 5\).*\(4,\)"),
    "integer advantages": ({"advantages": A.long()}, "`advantages` must be floating.*int64"),
    "advantages of a list": ({"advantages": [1.0, 0.0, 0.0]}, "`advantages` must be a torch.Tensor, got list"),
    "mask of one dimension": ({"mask": A}, r"`mask` must have shape \[sequences, tokens\].*\(3,\)"),
    "no sequences": ({"mask": torch.ones(0, 5), "advantages": torch.ones(0)}, r"a sequence at least, got \(0, 5\)"),
    "devices": ({"advantages": A.to("meta")}, "`advantages` must be on the device of `mask`, cpu, got meta"),
    "rows of the batch": ({"batch": {"input_ids": torch.ones(4, 5)}}, "3 rows|4"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_line(bad, message):
    given = {"batch": {"input_ids": M.long()}, "advantages": A, "mask": M, "other_terms": {}} | bad
    kind = ValueError if "batch" in bad else UserError
    with pytest.raises(kind, match=message) as caught:
        drop_zero_sequences(given.pop("batch"), given.pop("advantages"), given.pop("mask"), **given)
    assert "\n" not in str(caught.value)
