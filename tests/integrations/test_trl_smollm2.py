"""TRL's trainers on a real language model, with TRL's head and with ours: the same losses and gradients."""

import copy

import pytest
import torch
from smollm2 import smollm2

from sparse_kernels import count_multiplied_rows
from sparse_training.integrations.trl import head

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
from datasets import Dataset  # noqa: E402

pytestmark = pytest.mark.slow  # the model's weights are unpacked, some 15 s

LINES = [  # of Hamlet
    ("To be, or not to be,", " that is the question:"),
    ("Whether 'tis nobler in the mind to suffer", " the slings and arrows"),
    ("O, that this too too solid flesh would melt,", " thaw"),
    ("Something is rotten", " in the state of Denmark."),
]
STEPS = 2


class Gradients(transformers.TrainerCallback):
    """Keeps each step's gradients of a few parameters: the tied head's, and the first and last layers'."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        layers = model.model.layers
        kept = (model.lm_head.weight, layers[0].self_attn.q_proj.weight, layers[-1].mlp.down_proj.weight)
        self.steps.append([parameter.grad.clone() for parameter in kept])


def trained(kind, folder, data, on, **settings):
    """Losses, gradients and the rows that were multiplied."""
    model, tokenizer = smollm2()
    options = {name: settings.pop(name) for name in ("reward_funcs",) if name in settings}
    arguments = getattr(trl, f"{kind}Config")(
        str(folder), max_steps=STEPS, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1,
        disable_tqdm=True, seed=0, learning_rate=1e-4, optim="sgd", bf16=False, gradient_checkpointing=False,
        max_grad_norm=0.0, **settings,
    )  # fmt: skip
    gradients = Gradients()
    trainer = getattr(trl, f"{kind}Trainer")(
        copy.deepcopy(model), args=arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
        callbacks=[gradients], **options,
    )  # fmt: skip
    if on:
        head.on()
    try:
        with count_multiplied_rows() as rows:
            trainer.train()
    finally:
        head.off()
    logs = [entry for entry in trainer.state.log_history if "entropy" in entry]
    assert len(logs) == len(gradients.steps) == STEPS
    return logs, gradients.steps, rows


def agree(ours, theirs):
    for mine, other in zip(ours[0], theirs[0], strict=True):
        for name in ("loss", "entropy"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    for mine, other in zip(ours[1], theirs[1], strict=True):
        for gradient, expected in zip(mine, other, strict=True):
            assert expected.norm() > 0
            assert (gradient - expected).norm() < 1e-3 * expected.norm()  # rounding, behind 30 layers


def test_sft_learns_the_same_from_the_completions_alone(tmp_path):
    data = [{"prompt": prompt, "completion": completion} for prompt, completion in LINES]
    theirs, ours = (
        trained("SFT", tmp_path, data, on, per_device_train_batch_size=2, shuffle_dataset=False) for on in (False, True)
    )
    agree(ours, theirs)
    _, tokenizer = smollm2()
    scored = sum(
        len(tokenizer(prompt + completion).input_ids) - len(tokenizer(prompt).input_ids) + 1  # and the end
        for prompt, completion in LINES
    )
    assert (ours[2].scored, ours[2].differentiated) == (scored, scored)


def test_grpo_differentiates_a_fifth_of_the_tokens_of_groups_with_an_advantage(tmp_path):
    """One of the two prompts' completions are all worth as much: their advantage is 0, and so are their gradients."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    tasks = reasoning_gym.create_dataset("chain_sum", size=2, seed=0, max_terms=2, max_digits=1)
    data = [{"prompt": entry["question"], "place": place} for place, entry in enumerate(tasks)]
    worth = []

    def reward(completions, place, **_):
        found = [
            tasks.score_answer(text.strip(), tasks[which]) + (sum(map(str.isalpha, text)) if which else 0.0)
            for text, which in zip(completions, place, strict=True)
        ]
        worth.append(torch.tensor(found).view(2, -1))
        return found

    theirs, ours = (
        trained(
            "GRPO", tmp_path, data, on, reward_funcs=reward, per_device_train_batch_size=8, num_generations=4,
            max_completion_length=6, beta=0.0, top_entropy_quantile=0.2,
        )
        for on in (False, True)
    )  # fmt: skip
    agree(ours, theirs)
    assert any((group.std(1) == 0).any() and (group.std(1) > 0).any() for group in worth)
    rows = ours[2]
    assert theirs[2].scored == 0
    assert 0 < rows.differentiated <= 0.25 * rows.scored
    assert rows.scored <= STEPS * 8 * 6  # completions alone, no prompt
