"""Every kind of Transformers model under the gate: with a gate that keeps all, the host's own training to rounding."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_training import Gate, Significance
from sparse_training.errors import UserError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from sparse_training.integrations.hugging_face import GatedTrainer  # noqa: E402

V, T, N = 30, 8, 12  # words, tokens, samples
TEXT = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 32,
}  # fmt: skip


def bert(**options):
    return transformers.BertConfig(
        **TEXT, **SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options
    )


def gpt2(**options):
    return transformers.GPT2Config(
        **TEXT, n_positions=32, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        **options,
    )  # fmt: skip


def llama(**options):
    return transformers.LlamaConfig(**TEXT, **SMALL, num_key_value_heads=2, **options)


def mixtral(**options):
    return transformers.MixtralConfig(
        **TEXT, **SMALL, num_key_value_heads=2, num_local_experts=4, output_router_logits=True,
        router_aux_loss_coef=0.5, **options,
    )  # fmt: skip


def t5():
    return transformers.T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=2,
    )  # fmt: skip


def bart():
    return transformers.BartConfig(
        **TEXT, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, dropout=0.0, attention_dropout=0.0,
        decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip


def vit(**options):
    return transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip


def segformer():
    return transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=4,
        classifier_dropout_prob=0.0, drop_path_rate=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return transformers.LlavaConfig(vision_config=vision, text_config=llama(), image_token_id=V - 1)


def wav2vec2(**options):
    return transformers.Wav2Vec2Config(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(4, 2), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0, mask_time_prob=0.0, pad_token_id=0,
        ctc_zero_infinity=True, **options,
    )  # fmt: skip


# --- data: N samples, with different numbers of labels ------------------------------------------


def words(generator, *shape):
    return torch.randint(3, V - 1, shape, generator=generator)


def tokens(generator, *, of_input=False):
    ids = words(generator, N, T)
    labels = ids.clone() if of_input else words(generator, N, T)
    for row, length in enumerate(torch.randint(3, T + 1, (N,), generator=generator).tolist()):
        labels[row, length:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def tagged(generator):
    batch = tokens(generator)
    return {**batch, "labels": torch.where(batch["labels"] < 0, -100, batch["labels"] % 5)}


def sequences(labels):
    return lambda generator: {"input_ids": words(generator, N, T), "labels": labels(generator)}


def questions(generator):
    start = torch.randint(0, T, (N,), generator=generator)
    return {
        "input_ids": words(generator, N, T),
        "start_positions": start,
        "end_positions": start + 2,  # some beyond the text
    }


def choices(generator):
    return {"input_ids": words(generator, N, 3, T), "labels": torch.randint(0, 3, (N,), generator=generator)}


def pictures(generator):
    return {
        "pixel_values": torch.randn(N, 3, 8, 8, generator=generator),
        "labels": torch.randint(0, 5, (N,), generator=generator),
    }


def maps(generator):
    labels = torch.randint(0, 4, (N, 16, 16), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    return {"pixel_values": torch.randn(N, 3, 16, 16, generator=generator), "labels": labels}


def pictures_and_text(generator):
    batch = tokens(generator, of_input=True)
    batch["input_ids"][:, :4] = V - 1  # one for each patch
    batch["labels"][:, :4] = -100
    batch["labels"][:, 4] = batch["input_ids"][:, 4]
    return {**batch, "pixel_values": torch.randn(N, 3, 8, 8, generator=generator)}


def sounds(generator):
    labels = torch.randint(3, V, (N, 4), generator=generator)
    labels[::2, 3:] = -100
    return {"input_values": torch.randn(N, 120, generator=generator), "labels": labels}


def classes(count):
    return lambda generator: torch.randint(0, count, (N,), generator=generator)


TASKS = {
    "causal GPT-2": ("AutoModelForCausalLM", gpt2, lambda g: tokens(g, of_input=True)),
    "causal Llama": ("AutoModelForCausalLM", llama, lambda g: tokens(g, of_input=True)),
    "causal Mixtral, router's loss": ("AutoModelForCausalLM", mixtral, lambda g: tokens(g, of_input=True)),
    "masked": ("AutoModelForMaskedLM", bert, tokens),
    "T5": ("AutoModelForSeq2SeqLM", t5, tokens),
    "BART": ("AutoModelForSeq2SeqLM", bart, tokens),
    "one label": ("AutoModelForSequenceClassification", lambda: bert(num_labels=5), sequences(classes(5))),
    "one label, GPT-2": ("AutoModelForSequenceClassification", lambda: gpt2(num_labels=5), sequences(classes(5))),
    "several labels": (
        "AutoModelForSequenceClassification",
        lambda: bert(num_labels=5, problem_type="multi_label_classification"),
        sequences(lambda g: (torch.rand(N, 5, generator=g) < 0.4).float()),
    ),
    "a number": (
        "AutoModelForSequenceClassification",
        lambda: bert(num_labels=1),
        sequences(lambda g: torch.randn(N, generator=g)),
    ),
    "three numbers": (
        "AutoModelForSequenceClassification",
        lambda: bert(num_labels=3, problem_type="regression"),
        sequences(lambda g: torch.randn(N, 3, generator=g)),
    ),
    "tags": ("AutoModelForTokenClassification", lambda: bert(num_labels=5), tagged),
    "answers": ("AutoModelForQuestionAnswering", bert, questions),
    "choices": ("AutoModelForMultipleChoice", bert, choices),
    "pictures": ("AutoModelForImageClassification", lambda: vit(num_labels=5), pictures),
    "maps": ("AutoModelForSemanticSegmentation", segformer, maps),
    "pictures and text": ("AutoModelForImageTextToText", llava, pictures_and_text),
    "sounds": ("AutoModelForCTC", lambda: wav2vec2(ctc_loss_reduction="mean"), sounds),
    "sounds, summed": ("AutoModelForCTC", lambda: wav2vec2(ctc_loss_reduction="sum"), sounds),
    "classes of sounds": (
        "AutoModelForAudioClassification",
        lambda: wav2vec2(num_labels=5),
        lambda g: {**sounds(g), "labels": classes(5)(g)},
    ),
}
BY_TOKEN = (
    "causal GPT-2", "causal Llama", "causal Mixtral, router's loss", "masked", "T5", "BART", "tags", "maps",
    "pictures and text",
)  # fmt: skip


def make(name):
    kind, config, data = TASKS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind).from_config(config())
    batch = data(torch.Generator().manual_seed(1))
    return model, [{key: value[row] for key, value in batch.items()} for row in range(N)]


class Gated(GatedTrainer, transformers.Trainer):
    """As the documentation has it."""


def train(folder, model, rows, cls=transformers.Trainer, arguments=None, batch=2, **options):
    """Train for two optimizer steps, of three batches each, and return the losses logged and the weights."""
    settings = {
        "max_steps": 2, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 3, "learning_rate": 0.1,
        "optim": "sgd", "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "seed": 0, "max_grad_norm": 0.0,
    }  # fmt: skip
    settings = transformers.TrainingArguments(str(folder), **{**settings, **(arguments or {})})
    trainer = cls(model=model, args=settings, train_dataset=rows, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses, {name: value.clone() for name, value in model.state_dict().items()}


def compare(folder, name, granularity, **options):
    """Train without a gate and with one that keeps all."""
    model, rows = make(name)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    _, losses, weights = train(folder, model, rows, **options)
    model, rows = make(name)
    trainer, gated_losses, gated = train(folder, model, rows, Gated, gate=1.0, granularity=granularity, **options)
    assert gated_losses == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(gated, weights, rtol=1e-4, atol=2e-6)
    assert any(not torch.allclose(weights[key], start[key], atol=1e-5) for key in start)
    return trainer


@pytest.mark.parametrize("name", TASKS)
def test_a_gate_that_keeps_all_samples_is_the_host(tmp_path, name):
    trainer = compare(tmp_path, name, "sample")
    assert int(trainer.gate.step) == 6


@pytest.mark.parametrize("name", BY_TOKEN)
def test_a_gate_that_keeps_all_tokens_is_the_host(tmp_path, name):
    trainer = compare(tmp_path, name, "token")
    assert int(trainer.gate.step) == 6


@pytest.mark.parametrize("name", [name for name in TASKS if name != "answers"])  # one that is cut off has no loss alone
def test_a_gate_that_keeps_some_samples_trains_on_those_of_the_highest_loss(tmp_path, name):
    model, rows = make(name)
    alone = []
    trainer = transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    for row in rows:  # the host's own loss of each sample
        with torch.no_grad():
            alone.append(trainer.compute_loss(model.eval(), transformers.default_data_collator([row])).item())
    highest = [rows[place] for place in sorted(range(N), key=alone.__getitem__)[-2:]]
    seen = []
    model.register_forward_pre_hook(
        lambda module, arguments, inputs: seen.append(inputs) if module.training else None, with_kwargs=True
    )
    gate = Gate(0.5, threshold=1e9, significance=Significance(loss=1.0))  # the two highest, then
    train(
        tmp_path, model, rows, Gated, gate=gate, batch=N, arguments={"max_steps": 1, "gradient_accumulation_steps": 1}
    )
    (trained,) = seen
    key = next(iter(rows[0]))
    for row in highest:
        assert any(torch.equal(row[key], there) for there in trained[key])
    assert len(trained[key]) == 2


LABEL_SMOOTHING = {"label_smoothing_factor": 0.2}


@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("name", ["causal GPT-2", "masked", "BART"])
def test_label_smoothing_is_kept(tmp_path, name, granularity):
    collator = None
    if name == "BART":  # the host needs decoder inputs of its own then

        def collator(rows):
            batch = transformers.default_data_collator(rows)
            return {**batch, "decoder_input_ids": batch["labels"].roll(1, 1).clamp(min=0)}

    compare(tmp_path, name, granularity, arguments=LABEL_SMOOTHING, data_collator=collator)


def own_loss(outputs, labels, num_items_in_batch=None):
    """The next token, as a user would write it."""
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits, labels, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def test_a_loss_function_of_the_users_is_kept(tmp_path):
    compare(tmp_path, "causal GPT-2", "sample", compute_loss_func=own_loss)
    model, rows = make("causal GPT-2")
    with pytest.raises(UserError, match="computes the loss of the kept tokens itself, got compute_loss_func"):
        train(tmp_path, model, rows, Gated, granularity="token", compute_loss_func=own_loss)


# --- models that no list of classes has ---------------------------------------------------------


class Subclass(transformers.GPT2LMHeadModel):
    """A user's own class."""


class Remote(transformers.PreTrainedModel):
    """A model with code of its own: a hidden language model, and a loss that it computes."""

    config_class = transformers.GPT2Config

    def __init__(self, config):
        super().__init__(config)
        self.inner = transformers.GPT2LMHeadModel(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("kind", [Subclass, Remote])
def test_models_of_other_classes_are_judged_by_their_own_loss(tmp_path, kind, granularity):
    rows, found = make("causal GPT-2")[1], []
    for options in ({}, {"cls": Gated, "gate": 1.0, "granularity": granularity}):
        torch.manual_seed(0)
        found.append(train(tmp_path, kind(gpt2()), rows, **options)[1:])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_peft_models_are_judged_by_their_own_loss(tmp_path, granularity):
    peft = pytest.importorskip("peft")
    found = []
    for options in ({}, {"cls": Gated, "gate": 1.0, "granularity": granularity}):
        model, rows = make("causal Llama")
        torch.manual_seed(0)
        model = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        )
        found.append(train(tmp_path, model, rows, **options)[1:])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=2e-6)


# --- what is refused, in one line ---------------------------------------------------------------


class Weighted(transformers.Trainer):
    """A loss as the documentation of Trainer has it, with weights of classes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weight = torch.arange(1.0, 6.0)
        loss = nn.CrossEntropyLoss(weight=weight)(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class GatedWeighted(GatedTrainer, Weighted):
    """Both."""


def test_a_loss_of_no_known_kind_is_refused_with_both_numbers_or_told(tmp_path):
    model, rows = make("one label")
    with pytest.raises(
        UserError, match=r"own loss of the batch is \d.\d{4}, .* \(own_targets \d.\d{4}\); give losses="
    ):
        train(tmp_path, model, rows, GatedWeighted)

    def losses(outputs, inputs):
        return torch.arange(1.0, 6.0)[inputs["labels"]] * F.cross_entropy(
            outputs.logits, inputs["labels"], reduction="none"
        )

    found = []
    for options in ({"cls": Weighted}, {"cls": GatedWeighted, "gate": 1.0, "losses": losses}):
        model, rows = make("one label")
        found.append(train(tmp_path, model, rows, **options)[1:])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=2e-6)


def test_tokens_need_classes(tmp_path):
    model, rows = make("a number")
    with pytest.raises(UserError, match=r'granularity="token" needs labels that are classes of tokens, got labels of'):
        train(tmp_path, model, rows, Gated, granularity="token")
    model, rows = make("answers")
    with pytest.raises(UserError, match=r'granularity="token" needs labels that are classes of tokens, got labels of'):
        train(tmp_path, model, rows, Gated, granularity="token")


def test_inputs_without_a_row_for_each_sample_are_refused(tmp_path):
    """As patches of pictures of any size, which some models take in one tensor."""

    def collator(rows):
        batch = transformers.default_data_collator(rows)
        return {**batch, "head_mask": torch.ones(5)}

    model, rows = make("causal GPT-2")
    model.forward = lambda head_mask=None, _forward=model.forward, **inputs: _forward(**inputs)
    with pytest.raises(UserError, match="needs a row of every input for each of 2 samples, got 5 of head_mask"):
        train(tmp_path, model, rows, Gated, data_collator=collator, arguments={"remove_unused_columns": False})
