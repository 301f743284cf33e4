"""Transformers' causal language models with their loss taken over selected tokens: by hand, and under the Trainer."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_kernels import TopFraction, count_multiplied_rows
from sparse_training import Gate
from sparse_training.errors import UserError
from sparse_training.integrations.transformers_loss import TokenLoss

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip
ALL = TopFraction(1.0, of="loss")


def llama(seed=0, **options):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **options}))


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)  # its head is tied to the embedding


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.3
    )
    return transformers.MixtralForCausalLM(config)


def gemma2():
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0))


MODELS = [llama, gpt2, mixtral, gemma2]


def batch(rows=3):
    tokens = torch.randint(3, 40, (rows, 12), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, :5] = -100
    return {"input_ids": tokens, "labels": labels}


def found(model, inputs):
    """Loss and gradients in training mode."""
    model.train().zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def by_hand(model, inputs, keeps, divisor=None):
    """The mean loss of the tokens that ``keeps`` says, from the dense logits of a model whose loss is only that."""
    model.train().zero_grad()
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].float()
    targets = inputs["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    mask = keeps(logits.detach(), losses.detach()) & (targets != -100)
    loss = (losses * mask).sum() / (mask.sum() if divisor is None else divisor)
    loss.backward()
    return (loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}), mask


def top(values, valid, keep):
    return values >= values[valid].quantile(1 - keep)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# --- all tokens: the model's own loss -----------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("reduction", ["mean_kept", "mean_valid"])
@pytest.mark.parametrize("items", [None, 50, torch.tensor(50)])
def test_with_all_tokens_kept_the_loss_is_the_models_own(make, reduction, items):
    """A router's auxiliary loss and a softcap are the model's own affair."""
    model = make()
    inputs = batch() if items is None else {**batch(), "num_items_in_batch": items}
    theirs = found(model, inputs)
    for fused in (False, True) if make is not gemma2 else (False,):
        with TokenLoss(model, ALL, reduction=reduction, fused_head=fused) as loss:
            same(found(model, inputs), theirs)
        assert loss.mask.sum() == 7 + 11 + 11
    same(found(model, inputs), theirs)


def test_shifted_labels_and_labels_that_do_not_count_are_as_the_models_own():
    model, inputs = llama(), batch()
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    inputs["shift_labels"] = shifted.roll(3, 0)
    theirs = found(model, inputs)
    with TokenLoss(model, ALL):
        same(found(model, inputs), theirs)
    inputs = {**batch(), "labels": torch.full((3, 12), -100)}
    for fused in (False, True):
        with TokenLoss(model, ALL, fused_head=fused):
            loss, gradients = found(model, inputs)
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients.values())


def test_a_model_in_bfloat16_has_the_models_own_loss():
    model, inputs = llama().bfloat16(), batch()
    theirs = found(model, inputs)
    for fused in (False, True):
        with TokenLoss(model, ALL, fused_head=fused):
            torch.testing.assert_close(found(model, inputs), theirs, rtol=5e-2, atol=2e-2)


# --- a selection --------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("of", ["loss", "entropy"])
def test_the_top_fraction_is_that_of_the_dense_loss(of, fused):
    model, inputs = llama(), batch()
    valid = inputs["labels"][:, 1:] != -100

    def keeps(logits, losses):
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        return top(losses if of == "loss" else entropy, valid, 0.3)

    expected, mask = by_hand(model, inputs, keeps)
    with TokenLoss(model, TopFraction(0.3, of=of), fused_head=fused) as loss:
        same(found(model, inputs), expected)
    assert torch.equal(loss.mask[:, :-1], mask)
    expected, _ = by_hand(model, inputs, keeps, divisor=int(valid.sum()))
    with TokenLoss(model, TopFraction(0.3, of=of), fused_head=fused, reduction="mean_valid"):
        same(found(model, inputs), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_a_reference_selects_by_the_loss_that_exceeds_its_own(fused):
    model, reference, inputs = llama(), llama(seed=1, hidden_size=8), batch()
    inputs["attention_mask"] = torch.ones(3, 12, dtype=torch.long)
    inputs["attention_mask"][1, :2] = 0
    reference.train()
    reference.model.layers[0].self_attn.attention_dropout = 0.9  # it is asked in evaluation mode
    with torch.no_grad():
        reference.eval()
        logits = reference(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        reference.train()
    irreducible = F.cross_entropy(logits.transpose(1, 2), inputs["labels"][:, 1:], reduction="none")
    valid = inputs["labels"][:, 1:] != -100
    full = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    losses = F.cross_entropy(full.transpose(1, 2), inputs["labels"][:, 1:], reduction="none").detach()
    with TokenLoss(model, TopFraction(0.3, of="loss"), reference=reference, fused_head=fused) as loss:
        value, _ = found(model, inputs)
    kept = top(losses - irreducible, valid, 0.3) & valid
    assert torch.equal(loss.mask[:, :-1], kept)
    same(value, losses[kept].mean())
    assert reference.training
    assert all(p.grad is None for p in reference.parameters())
    assert reference(input_ids=inputs["input_ids"]).logits.shape == (3, 12, 40)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gate_selects_and_learns_its_threshold(fused):
    model, gate, inputs = llama(), Gate(0.25), batch(8)
    with TokenLoss(model, gate, fused_head=fused) as loss:
        rates = []
        for _ in range(60):
            found(model, inputs)
            rates.append(float(loss.mask.sum()) / int((inputs["labels"][:, 1:] != -100).sum()))
    assert int(gate.step) == 60
    assert sum(rates[30:]) / 30 == pytest.approx(0.25, abs=0.05)


def test_a_fused_head_multiplies_the_kept_rows_alone_and_makes_no_logits():
    model, inputs = llama(), batch()
    with TokenLoss(model, TopFraction(0.25, of="entropy"), fused_head=True) as loss, count_multiplied_rows() as rows:
        out = model.train()(**inputs)
        out.loss.backward()
        with torch.no_grad():
            assert model(input_ids=inputs["input_ids"]).logits.shape == (3, 12, 40)  # as generate() asks
    assert out.logits is None
    assert (rows.scored, rows.differentiated) == (29, int(loss.mask.sum()))
    assert int(loss.mask.sum()) == 8
    output = model(**inputs, return_dict=False)
    with TokenLoss(model, ALL, fused_head=True):
        ours = model(**inputs, return_dict=False)
    same(ours[0], output[0])
    assert ours[1] is None


@pytest.mark.parametrize("reduction", ["mean_kept", "mean_valid"])
@pytest.mark.parametrize("select", [ALL, TopFraction(1.0), Gate(0.3, threshold=4.0)], ids=["loss", "entropy", "gate"])
def test_tokens_known_beforehand_are_multiplied_three_times_in_all(select, reduction):
    """As often as the model's own head does; a selection that needs the whole batch's statistics costs a fourth."""
    model = llama()
    inputs = {**batch(), "num_items_in_batch": 40}
    with TokenLoss(model, select, reduction=reduction, fused_head=True) as loss, count_multiplied_rows() as rows:
        model.train()(**inputs).loss.backward()
    kept = int(loss.mask.sum())
    assert kept == 29 if isinstance(select, TopFraction) else 0 < kept < 29
    assert (rows.scored, rows.recomputed, rows.differentiated) == (29, 0, kept)


# --- on and off ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_off_restores_the_model_as_it_was(fused):
    model, inputs = llama(), batch()
    before, head, keys = dict(vars(model)), dict(vars(model.lm_head)), list(model.state_dict())
    theirs = found(model, inputs)
    loss = TokenLoss(model, TopFraction(0.1, of="loss"), fused_head=fused)
    loss.off()
    loss.on()
    loss.on()
    assert found(model, inputs)[0] > theirs[0]
    assert list(model.state_dict()) == keys
    with loss:
        pass
    assert loss.is_on
    loss.off()
    same(found(model, inputs), theirs)
    assert vars(model).keys() == before.keys()
    assert vars(model.lm_head).keys() == head.keys()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_evaluation_is_of_all_tokens():
    model, inputs = llama().eval(), batch()
    theirs = model(**inputs)
    for fused in (False, True):
        with TokenLoss(model, TopFraction(0.1, of="loss"), fused_head=fused):
            same(model(**inputs).loss, theirs.loss)
            same(model(**inputs).logits, theirs.logits)


def test_a_model_inside_wrappers_is_found():
    peft = pytest.importorskip("peft")
    inputs = batch()
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    theirs = wrapped.train()(**inputs).loss
    compiled = torch.compile(llama(), backend="eager")
    for model in (wrapped, compiled):
        with TokenLoss(model, ALL, fused_head=True), count_multiplied_rows() as rows:
            same(model.train()(**inputs).loss, theirs)
        assert rows.scored == 29


# --- the Trainer --------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Sequences of which the first tokens are a prompt, of a length of its own."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        tokens = torch.randint(3, 40, (12,), generator=torch.Generator().manual_seed(index))
        labels = tokens.clone()
        labels[: index % 9] = -100
        return {"input_ids": tokens, "labels": labels}


def trainer_of(folder, model, **options):
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=options.pop("batch", 4), learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0, optim="sgd",
        gradient_accumulation_steps=options.pop("accumulate", 1), **options,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("reduction", ["mean_kept", "mean_valid"])
def test_with_all_tokens_kept_the_trainer_learns_what_it_learned(tmp_path, fused, reduction):
    """Under accumulation, over parts with different numbers of labels."""
    weights, logs = [], []
    for ours in (False, True):
        model = llama()
        trainer = trainer_of(tmp_path, model, accumulate=2)
        loss = TokenLoss(model, ALL, reduction=reduction, fused_head=fused)
        if ours:
            loss.on()
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        logs[-1].append(trainer.evaluate()["eval_loss"])
        loss.off()
        weights.append(model.state_dict())
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)


def test_parts_of_an_accumulated_batch_add_up_to_the_mean_of_what_they_keep():
    """Each part is weighed by its share of the labels; "mean_valid" divides by all of them."""
    model, inputs = llama(), batch(6)
    parts = [{name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 2), slice(2, 6))]
    items = (inputs["labels"][:, 1:] != -100).sum()
    for fused in (False, True):
        with TokenLoss(model, TopFraction(0.5, of="loss"), reduction="mean_valid", fused_head=fused) as loss:
            kept, total = 0.0, 0.0
            for part in parts:
                total += found(model, {**part, "num_items_in_batch": items})[0]
                with torch.no_grad():
                    logits = model.eval()(input_ids=part["input_ids"]).logits
                losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), part["labels"][:, 1:], reduction="none")
                kept += losses[loss.mask[:, :-1]].sum()
            same(total, kept / items)
        with TokenLoss(model, TopFraction(0.5, of="loss"), fused_head=fused):
            alone = [found(model, part)[0] for part in parts]
            share = [found(model, {**part, "num_items_in_batch": items})[0] for part in parts]
        labels = [(part["labels"][:, 1:] != -100).sum() for part in parts]
        same(sum(share), sum(a * n for a, n in zip(alone, labels, strict=True)) / items)


# --- what cannot be served ----------------------------------------------------------------------


def refused(message):
    return pytest.raises(UserError, match=message)


def test_arguments_that_do_not_fit_are_refused():
    model = llama()
    with refused("`select` must be a TopFraction or a Gate, got float"):
        TokenLoss(model, 0.2)
    with refused("`reduction` must be one of mean_kept, mean_valid, got 'sum'"):
        TokenLoss(model, ALL, reduction="sum")
    with refused("must have label_smoothing=0 and ignore_index=-100, got 0.1 and -100"):
        TokenLoss(model, Gate(0.5, label_smoothing=0.1))
    for select in (TopFraction(0.5), Gate(0.5)):
        with refused(r'with a reference, `select` must be TopFraction\(..., of="loss"\), got'):
            TokenLoss(model, select, reference=llama())
    with refused("`reference` must be another model than `model`, got the same"):
        TokenLoss(model, ALL, reference=model)
    with refused("`reference` must have the model's vocabulary of 40, got 41"):
        TokenLoss(model, ALL, reference=llama(vocab_size=41))
    model.lm_head = nn.Sequential(model.lm_head)
    with refused(r"fused_head=True needs a head that is an nn\.Linear, got Sequential"):
        TokenLoss(model, ALL, fused_head=True)


def test_a_model_with_another_loss_is_refused():
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with refused("must be Transformers' ForCausalLMLoss, got ForSequenceClassificationLoss of LlamaForSequence"):
        TokenLoss(transformers.LlamaForSequenceClassification(llama().config), ALL).on()
    with refused("must be Transformers' ForCausalLMLoss, got ForMaskedLMLoss of BertForMaskedLM"):
        TokenLoss(transformers.BertForMaskedLM(config), ALL).on()
    with refused("got NoneType of Linear"):
        TokenLoss(nn.Linear(2, 2), ALL).on()
    model = llama()
    model.loss_function = lambda **_: None
    with refused("got <lambda> of LlamaForCausalLM"):
        TokenLoss(model, ALL).on()


class OwnLoss(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **options):
        out = super().forward(input_ids=input_ids, **options)
        out.loss = F.cross_entropy(out.logits[:, :-1].transpose(1, 2), labels[:, 1:])
        return out


def test_a_model_that_does_not_ask_its_loss_function_is_refused():
    model = OwnLoss(llama().config)
    with TokenLoss(model, ALL), refused("OwnLoss computes its loss without loss_function"):
        found(model, batch())


def test_a_fused_head_behind_which_logits_are_changed_is_refused():
    model = gemma2()
    with TokenLoss(model, ALL, fused_head=True), refused("Gemma2ForCausalLM changes its logits after the head"):
        found(model, batch())
    same(found(gemma2(), batch()), found(model, batch()))


def test_a_batch_without_labels_is_refused_in_training(tmp_path):
    model = llama()
    with TokenLoss(model, ALL), refused("needs labels to select tokens, got none"):
        model.train()(input_ids=batch()["input_ids"])
    with TokenLoss(model, ALL), refused("a Trainer's label_smoothing_factor and compute_loss_func take the loss out"):
        trainer_of(tmp_path, model, label_smoothing_factor=0.1).train()


def test_a_reference_without_tokens_is_refused():
    model = llama()
    inputs = {"inputs_embeds": torch.randn(3, 12, 16), "labels": batch()["labels"]}
    with TokenLoss(model, ALL, reference=llama(1)), refused("a reference needs input_ids, got inputs_embeds, labels"):
        found(model, inputs)


def test_replicas_of_data_parallel_are_refused():
    model = llama()
    with TokenLoss(model, ALL), refused(r"nn\.DataParallel is not served"):
        model._is_replica = True  # as nn.parallel.replicate marks them
        found(model, batch())


def test_what_another_set_since_is_not_overwritten():
    model = llama()
    loss = TokenLoss(model, ALL, fused_head=True)
    loss.on()
    ours = model.loss_function
    model.loss_function = another = lambda **_: None
    with refused(r"must be the one set by on\(\), got <function"):
        loss.off()
    assert model.loss_function is another
    model.loss_function = ours
    loss.off()
    with refused("whose forward is nn.Linear's, got one that was replaced"):
        model.lm_head.forward = lambda x: x
        loss.on()
    assert not loss.is_on
    assert not model._forward_hooks
