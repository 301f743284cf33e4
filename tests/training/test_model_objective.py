"""The loss of a model that computes one itself, and outputs that are no tensor, as their libraries have them."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_training import Criterion, SparseTrainer
from sparse_training.errors import UserError

V, T, N = 30, 8, 12
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 32, "vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def hugging_face():
    return pytest.importorskip("transformers")


def gpt2(**options):
    transformers = hugging_face()
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V,
            n_positions=32,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.5,
            **options,
        )
    ).eval()


def bert(kind, **options):
    transformers = hugging_face()
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(**SMALL, **options)).eval()


def words(*shape):
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(1))


def next_token_loss(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


# --- causal language models ---------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss(reduction="none")])
def test_a_causal_language_model_is_trained_on_the_next_tokens(granularity, loss):
    model, ids = gpt2(), words(N, T)
    data = [{"input_ids": ids, "labels": ids}]
    trainer = SparseTrainer(model, loss=loss, granularity=granularity, lr=1e-2, policy="gate", rate=0.5)
    before = trainer.evaluate(data)
    assert before["loss"] == pytest.approx(next_token_loss(model, ids), rel=1e-5)
    with torch.no_grad():
        hits = model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert before["accuracy"] == pytest.approx(hits.float().mean().item())
    trainer.fit(data, steps=30)
    after = trainer.evaluate(data)["loss"]
    assert after == pytest.approx(next_token_loss(model, ids), rel=1e-5)
    assert after < before["loss"] - 0.3


class Wrapped(nn.Module):
    """A user's module around a language model."""

    def __init__(self):
        super().__init__()
        self.inner = gpt2()

    def forward(self, **batch):
        return self.inner(**batch)


@pytest.mark.parametrize("wrap", [lambda: torch.compile(gpt2(), backend="eager"), Wrapped])
def test_wrapped_language_models_are_trained_on_the_next_tokens(wrap):
    ids = words(N, T)
    trainer = SparseTrainer(wrap())
    assert trainer.evaluate([{"input_ids": ids, "labels": ids}])["loss"] == pytest.approx(
        next_token_loss(gpt2(), ids), rel=1e-5
    )


def test_input_ids_alone_and_tuples_are_served():
    ids = words(N, T)
    for model in (gpt2(), gpt2(use_cache=False)):
        assert SparseTrainer(model).evaluate([(ids, ids)])["loss"] == pytest.approx(
            next_token_loss(model, ids), rel=1e-5
        )


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForTokenClassification"])
def test_other_language_models_are_not_shifted(kind):
    model = bert(kind, num_labels=V)
    ids, labels = words(N, T), words(N, T).flip(0)
    labels[:, ::2] = -100
    with torch.no_grad():
        own = model(input_ids=ids, labels=labels).loss.item()
    assert SparseTrainer(model, granularity="token").evaluate([{"input_ids": ids, "labels": labels}])["loss"] == (
        pytest.approx(own, rel=1e-5)
    )


class Plain(nn.Sequential):
    """A language model of one's own, which computes no loss."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Embedding(V, 16), nn.Linear(16, V))


@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("in_front", [False, True])
def test_shift_is_the_users_word_for_plain_modules(granularity, in_front):
    class Model(Plain):
        def forward(self, ids):
            return super().forward(ids).movedim(-1, 1) if in_front else super().forward(ids)

    ids, model = words(N, T), Model()
    for shift in (None, False, True):
        trainer = SparseTrainer(model, loss=Criterion(granularity=granularity, shift=shift))
        logits, labels = Plain.forward(model, ids), ids
        if shift:
            logits, labels = logits[:, :-1], ids[:, 1:]
        own = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
        assert trainer.evaluate([(ids, ids)])["loss"] == pytest.approx(own, rel=1e-5)


def test_the_criterion_of_the_caller_stays_as_it_was():
    criterion, ids = Criterion(), words(N, T)
    SparseTrainer(gpt2(), loss=criterion).evaluate([(ids, ids)])
    assert criterion.shift is None


def test_a_loss_of_the_users_for_next_tokens_must_say_who_shifts():
    def focal(logits, targets):
        losses = F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none")
        return (1 - (-losses).exp()) * losses

    ids, model = words(N, T), gpt2()
    with pytest.raises(UserError, match=r"own loss, \d+\.\d{4}, compares each token's output with the next token"):
        SparseTrainer(model, loss=focal).fit([(ids, ids)], steps=1)
    shifted = SparseTrainer(model, loss=Criterion(focal, shift=True)).evaluate([(ids, ids)])["loss"]
    aligned = SparseTrainer(model, loss=Criterion(focal, shift=False)).evaluate([(ids, ids)])["loss"]
    logits = model(ids).logits
    assert shifted == pytest.approx(focal(logits[:, :-1], ids[:, 1:]).mean().item(), rel=1e-5)
    assert aligned == pytest.approx(focal(logits, ids).mean().item(), rel=1e-5)


# --- a model's own loss that is another ---------------------------------------------------------


def test_another_loss_of_the_models_is_refused_with_both_numbers():
    ids = words(N, T)
    cases = {
        "cannot be computed": (bert("BertForSequenceClassification", num_labels=1), torch.randn(N)),
        r"is \d+\.\d{4}": (
            bert("BertForSequenceClassification", num_labels=4, problem_type="multi_label_classification"),
            (torch.rand(N, 4) < 0.5).float(),
        ),
        r"is 0\.0000": (bert("BertForSequenceClassification", num_labels=1), torch.zeros(N, dtype=torch.int64)),
    }
    for said, (model, labels) in cases.items():
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = SparseTrainer(model)
        for run in (trainer.evaluate, lambda data, trainer=trainer: trainer.fit(data, steps=1)):
            with pytest.raises(UserError, match=rf"own loss of the first batch is \d+\.\d{{4}}, and .* {said}; give"):
                run([{"input_ids": ids, "labels": labels}])
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    model, labels = cases[r"is \d+\.\d{4}"]
    trainer = SparseTrainer(model, loss=nn.BCEWithLogitsLoss(reduction="none"))
    own = model(input_ids=ids, labels=labels).loss.item()
    assert trainer.evaluate([{"input_ids": ids, "labels": labels}])["loss"] == pytest.approx(own, rel=1e-5)


def test_a_term_for_the_router_is_refused():
    transformers = hugging_face()
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5
    )
    ids = words(N, T)
    with pytest.raises(UserError, match=r"own loss of the first batch is \d\.\d{4}, and .* with the next tokens; give"):
        SparseTrainer(transformers.MixtralForCausalLM(config)).fit([{"input_ids": ids, "labels": ids}], steps=1)


def test_an_encoder_decoder_model_needs_the_collator_of_its_library():
    transformers = hugging_face()
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    ).eval()
    batch = {"input_ids": words(N, T), "labels": words(N, 5)}
    with pytest.raises(UserError, match=r"must have decoder_input_ids, got input_ids; DataCollatorForSeq2Seq"):
        SparseTrainer(model).fit([batch], steps=1)
    own = model(**batch).loss.item()
    batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    assert SparseTrainer(model).evaluate([batch])["loss"] == pytest.approx(own, rel=1e-5)


def test_a_first_batch_without_targets_says_nothing():
    ids, model = words(N, T), gpt2()
    nothing = torch.full_like(ids, -100)
    data = [{"input_ids": ids, "labels": labels} for labels in (nothing, ids)]
    found = SparseTrainer(model, granularity="token").evaluate(data)["loss"]
    assert found == pytest.approx(next_token_loss(model, ids), rel=1e-5)


# --- outputs that are no tensor -----------------------------------------------------------------


class Logits(nn.Module):
    """Returns its logits in the structure given."""

    def __init__(self, structure):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.structure = nn.Linear(6, 3), structure

    def forward(self, inputs):
        return self.structure(self.layer(inputs))


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


Pair = namedtuple("Pair", ["logits", "hidden"])
DATA = [(torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3)]
POLICIES = [None, "dense", "gate", "topk", "masked", "random"]


@pytest.mark.parametrize("structure", [lambda z: Output(z, z), lambda z: Pair(z, z), lambda z: {"logits": z, "h": z}])
def test_logits_are_found_where_an_output_names_them(structure):
    plain = SparseTrainer(Logits(lambda z: z)).evaluate(DATA)
    trainer = SparseTrainer(Logits(structure), policy="gate")
    assert trainer.evaluate(DATA) == plain
    trainer.fit(DATA, steps=8)


STRUCTURES = {
    "a tuple of 2": (lambda z: (z, z), lambda output: output[0]),
    "a dict of out, aux": (lambda z: {"out": z, "aux": z}, lambda output: output["out"]),  # as torchvision's DeepLab
    "a list of 1": (lambda z: [z], lambda output: output[0]),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_other_outputs_are_refused_by_type_or_opened_as_told(name):
    structure, find = STRUCTURES[name]
    for granularity in ("sample", "token"):
        with pytest.raises(UserError, match=rf"must be a tensor of logits or have `logits`, got {name}; give loss="):
            SparseTrainer(Logits(structure), granularity=granularity).fit(DATA, steps=1)
    plain = SparseTrainer(Logits(lambda z: z)).evaluate(DATA)
    for policy in POLICIES:
        trainer = SparseTrainer(Logits(structure), loss=Criterion(outputs=find), policy=policy)
        assert trainer.evaluate(DATA) == plain
        trainer.fit(DATA, steps=8)
        assert trainer.evaluate(DATA)["loss"] < plain["loss"]


class Inception(nn.Module):
    """As torchvision's: a named tuple in training, a tensor in evaluation."""

    Outputs = namedtuple("InceptionOutputs", ["logits", "aux_logits"])

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.auxiliary = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, inputs):
        logits = self.layer(inputs)
        return self.Outputs(logits, self.auxiliary(inputs)) if self.training else logits


def with_auxiliary(output, targets):
    if isinstance(output, torch.Tensor):
        return F.cross_entropy(output, targets, reduction="none")
    main, auxiliary = (F.cross_entropy(logits, targets, reduction="none") for logits in output)
    return main + 0.4 * auxiliary


def test_auxiliary_classifiers_are_refused_or_trained_as_told():
    with pytest.raises(
        UserError, match=r"a InceptionOutputs, has aux_logits beside the logits, which no loss would see"
    ):
        SparseTrainer(Inception()).fit(DATA, steps=1)
    model = Inception()
    before = model.auxiliary.weight.clone()
    trainer = SparseTrainer(model, loss=Criterion(with_auxiliary, outputs=lambda output: output), lr=1e-2)
    first = trainer.evaluate(DATA)["loss"]
    trainer.fit(DATA, steps=8)
    assert trainer.evaluate(DATA)["loss"] < first
    assert not torch.equal(model.auxiliary.weight, before)


def test_a_loss_that_takes_any_output_has_it():
    def loss(output, targets):
        return F.cross_entropy(output[0], targets, reduction="none") + output[1].square().mean(1)

    trainer = SparseTrainer(Logits(lambda z: (z, z)), loss=loss)
    first = trainer.evaluate(DATA)["loss"]
    trainer.fit(DATA, steps=8)
    assert trainer.evaluate(DATA)["loss"] < first


def test_targets_that_are_no_tensor_are_refused():
    """As of torchvision's detection models."""
    images = [torch.rand(3, 8, 8) for _ in range(2)]
    boxes = [{"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([1])} for _ in range(2)]
    with pytest.raises(UserError, match=r"the targets of a batch must be one tensor, got a list; give TrainerSettings"):
        SparseTrainer(Logits(lambda z: z)).fit([(images, boxes)], steps=1)


def test_settings_of_a_criterion_are_checked():
    with pytest.raises(UserError, match="`shift` must be True, False or None"):
        Criterion(shift=2)
    with pytest.raises(UserError, match="`outputs` must be a function of the model's output, or None, got 'out'"):
        Criterion(outputs="out")


# --- batches as a tokenizer makes them ----------------------------------------------------------


class OnDevice(torch.Tensor):
    """Counts the moves to a device."""

    moves = 0

    def to(self, *arguments, **options):
        OnDevice.moves += 1
        return super().to(*arguments, **options)


def test_batches_of_a_tokenizer_are_moved_and_gathered():
    transformers = hugging_face()
    ids = words(N, T)
    labels = torch.arange(N) % 3
    for batch in (
        lambda part: transformers.BatchEncoding({"input_ids": part(ids), "labels": labels}),
        lambda part: UserDict({"input_ids": part(ids), "labels": labels}),
        lambda part: (transformers.BatchEncoding({"input_ids": part(ids)}), labels),
        lambda part: ({"inner": UserDict({"input_ids": part(ids)})}["inner"], labels),
    ):
        OnDevice.moves = 0
        model = bert("BertForSequenceClassification", num_labels=3)
        own = model(input_ids=ids, labels=labels).loss.item()
        trainer = SparseTrainer(model, policy="gate", rate=0.5, dense_start=0, dense_end=0)
        assert trainer.evaluate([batch(lambda part: part)])["loss"] == pytest.approx(own, rel=1e-5)
        log = trainer.fit([batch(lambda part: part)], steps=4)
        assert log.rate < 1.0
        trainer.evaluate([batch(lambda part: part.as_subclass(OnDevice))])
        assert OnDevice.moves > 0
