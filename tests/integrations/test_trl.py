"""TRL's head, served with its own and with ours: values, gradients, dtypes, and the rows that are multiplied."""

import os

import pytest
import torch

from sparse_kernels import count_multiplied_rows
from sparse_training.errors import UserError
from sparse_training.integrations.trl import FIELDS, HeadFunction, head, serve

os.environ.setdefault("HF_HUB_OFFLINE", "1")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
from datasets import Dataset  # noqa: E402
from trl.kernels import ChunkedLogProbFunction  # noqa: E402
from trl.trainer import utils  # noqa: E402

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WORDS = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(37))]


@pytest.fixture(autouse=True)
def off():
    yield
    head.off()


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.3
    )
    return transformers.MixtralForCausalLM(config)


# --- the function of the head -------------------------------------------------------------------


def operands(dtype=torch.float32, bias=True, rows=33, classes=70):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, 8, generator=generator), torch.randn(classes, 8, generator=generator)
    of_class = torch.randn(classes, generator=generator)
    targets = torch.randint(0, classes, (rows,), generator=generator)
    given = [x.to(dtype).requires_grad_() for x in (hidden, weight, *([of_class] if bias else []))]
    return given, targets


def outcome(
    function, given, targets, upstream=(1.0, 0.3), *, temperature=1.0, softcap=None, scale=1.0, outputs=tuple(FIELDS)
):
    """Outputs and gradients; ``upstream`` weighs log-probabilities and entropy."""
    for x in given:
        x.grad = None
    weight_of = torch.linspace(-1, 1, len(targets))
    hidden, weight, *bias = given
    found = function.apply(hidden, weight, *(bias or [None]), targets, temperature, 16, softcap, scale, outputs)
    terms = [factor * weight_of * x for factor, x in zip(upstream, found, strict=False) if factor and x is not None]
    sum(term.sum() for term in terms).backward()
    return [None if x is None else x.detach() for x in found], [x.grad for x in given]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"softcap": 3.0, "scale": 0.5, "temperature": 1.3},
        {"outputs": ("log_probs",)},
        {"outputs": ("entropy", "is_top1")},
    ],
)
def test_outputs_and_gradients_are_the_hosts(bias, options):
    given, targets = operands(bias=bias)
    theirs = outcome(ChunkedLogProbFunction, given, targets, **options)
    ours = outcome(HeadFunction, given, targets, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("upstream", [(1.0, 0.0), (0.0, 1.0)])
def test_either_gradient_alone_is_the_hosts(upstream):
    given, targets = operands()
    theirs = outcome(ChunkedLogProbFunction, given, targets, upstream)
    torch.testing.assert_close(outcome(HeadFunction, given, targets, upstream), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_the_hosts(dtype):
    """Statistics are float32 whatever comes in; gradients have the operands' dtype."""
    given, targets = operands(dtype)
    theirs, ours = (outcome(f, given, targets) for f in (ChunkedLogProbFunction, HeadFunction))
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=5e-2)  # and their dtypes


def test_a_head_in_another_dtype_is_cast_as_the_host_casts_it():
    """As ``cast_lm_head_to_fp32`` asks for, and as autocast does."""
    (hidden, weight, bias), targets = operands(torch.bfloat16)
    upcast = hidden.detach().float().requires_grad_()
    theirs, ours = (outcome(f, [upcast, weight, bias], targets) for f in (ChunkedLogProbFunction, HeadFunction))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
    given, _ = operands()
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (outcome(f, given, targets) for f in (ChunkedLogProbFunction, HeadFunction))
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=5e-2)


def test_the_first_of_equal_maxima_is_the_top_one():
    hidden, weight = torch.ones(3, 2), torch.ones(5, 2)
    weight[0] = 0.0
    targets = torch.tensor([1, 2, 0])
    for function in (ChunkedLogProbFunction, HeadFunction):
        assert function.apply(hidden, weight, None, targets, 1.0, 2)[4].tolist() == [True, False, False]


def test_rows_whose_gradient_is_zero_are_not_multiplied():
    (hidden, weight, bias), targets = operands()
    with count_multiplied_rows() as rows:
        logprobs, entropy, *_ = HeadFunction.apply(hidden, weight, bias, targets, 1.0, 16)
        kept = entropy >= entropy.quantile(0.8)
        (logprobs * kept).sum().backward()
    assert (rows.scored, rows.differentiated) == (33, int(kept.sum()))
    assert int(kept.sum()) == 7


def test_a_partitioned_weight_is_refused():
    (hidden, weight, bias), targets = operands()
    weight.ds_id = 3
    with pytest.raises(UserError, match="got one that DeepSpeed ZeRO-3 partitions"):
        HeadFunction.apply(hidden, weight, bias, targets, 1.0, 16)


# --- the older functions ------------------------------------------------------------------------


def logits_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 50, generator=generator).to(dtype).requires_grad_()
    return logits, torch.randint(0, 50, (2, 7), generator=generator)


def both_ways(call, logits):
    """Call with TRL's own functions, then with ours; results and gradients of each."""
    found = []
    for switch in (head.off, head.on):
        switch()
        logits.grad = None
        result = call()
        results = result if isinstance(result, tuple) else (result,)
        sum(x.float().sin().sum() for x in results if x.requires_grad).backward()
        found.append(([x.detach() for x in results], [x.requires_grad for x in results], logits.grad))
    return found


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, False), (torch.float64, False), (torch.bfloat16, False), (torch.float16, False),
        (torch.float32, True), (torch.bfloat16, True),
    ],
)  # fmt: skip
def test_the_older_functions_give_what_they_gave(dtype, autocast):
    logits, index = logits_of(dtype)
    mask = torch.arange(14).view(2, 7) % 3
    fine = dtype in (torch.float32, torch.float64)
    rounding = {"rtol": 1e-4, "atol": 1e-5} if fine else {"rtol": 2e-2, "atol": 5e-2}
    calls = [
        lambda: utils.selective_log_softmax(logits, index),
        lambda: utils.selective_log_softmax(logits, index, temperature=0.6),
        lambda: utils.selective_log_softmax(logits, index, row_mask=mask),
        lambda: utils.selective_log_softmax(logits, index.unsqueeze(-1), row_mask=mask.unsqueeze(-1)),
        lambda: utils.selective_log_softmax(logits, torch.stack([index, 49 - index], -1), 0.6),
        lambda: utils.entropy_from_logits(logits, chunk_size=3),
        lambda: utils.selective_log_softmax_and_entropy(logits, index, True, 0.8, mask),
        lambda: utils.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False),
    ]
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            theirs, ours = both_ways(call, logits)
        torch.testing.assert_close(ours, theirs, **rounding)


def test_those_who_import_the_older_functions_by_name_are_served():
    from trl.experimental.cpo import cpo_trainer

    theirs = cpo_trainer.selective_log_softmax
    with head:
        assert cpo_trainer.selective_log_softmax is utils.selective_log_softmax is not theirs
    assert cpo_trainer.selective_log_softmax is utils.selective_log_softmax is theirs


def test_a_class_out_of_range_is_refused():
    logits, index = logits_of()
    index[1, 2] = -100
    with head, pytest.raises(ValueError, match="target -100 in row 9 is out of range"):
        utils.selective_log_softmax(logits, index)


# --- a model with the head ----------------------------------------------------------------------


def labelled():
    tokens = torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, :5], labels[2] = -100, -100
    return tokens, labels  # 6 + 1 + 11 rows with a label, after the shift


def fields_and_gradients(model, serves, temperature=1.0, labels=None, **options):
    tokens, own = labelled()
    labels = own if labels is None else labels
    utils.add_fused_lm_head(model, temperature=temperature, outputs=tuple(FIELDS))
    if serves == "model":
        serve(model, temperature=temperature, outputs=tuple(FIELDS))
    elif serves == "head":
        head.on()
    out = model(input_ids=tokens, labels=labels, fused_lm_head=True, **options)
    (out.loss + 0.1 * out.log_probs.sin().sum() + 0.3 * out.entropy.sum()).backward()
    assert model(input_ids=tokens).logits.shape == (3, 12, 40)
    fields = {name: getattr(out, name) for name in (*FIELDS, "loss", "label_mask", "aux_loss")}
    return fields, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("serves", ["head", "model"])
@pytest.mark.parametrize("make", [llama, mixtral])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_field_and_gradient_is_the_hosts(serves, make, temperature):
    """A mixture of experts has one more term in its loss, the router's."""
    theirs = fields_and_gradients(make(), None, temperature)
    ours = fields_and_gradients(make(), serves, temperature)
    assert (theirs[0]["aux_loss"] is not None) == (make is mixtral)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_rows_without_a_label_are_not_multiplied():
    with count_multiplied_rows() as rows:
        fields_and_gradients(llama(), "head")
    assert (rows.scored, rows.differentiated) == (18, 18)


def test_a_batch_without_labels_gives_a_loss_of_zero_and_gradients():
    labels = torch.full((3, 12), -100)
    fields, gradients = fields_and_gradients(llama(), "head", labels=labels)
    assert fields["loss"].item() == 0.0
    assert all(not g.any() for g in gradients.values())


def test_the_compiled_head_is_the_hosts():
    theirs = fields_and_gradients(llama(), None)
    model = llama()
    utils.add_fused_lm_head(model, outputs=tuple(FIELDS))
    tokens, labels = labelled()
    head.on()
    out = torch.compile(model, backend="eager")(input_ids=tokens, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(out.loss, theirs[0]["loss"], rtol=1e-4, atol=1e-5)


def test_an_unknown_field_is_refused():
    with pytest.raises(UserError, match=r"must be some of log_probs, .*, got 'logits'"):
        serve(llama(), outputs=("logits",))


def test_missing_labels_are_refused_by_a_served_model():
    model = llama()
    serve(model)
    with pytest.raises(UserError, match="needs labels or shift_labels, got neither"):
        model(input_ids=labelled()[0], fused_lm_head=True)


# --- trainers -----------------------------------------------------------------------------------


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    raw = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def reward(completions, **_):
    """A reward that is known: fewer of one token."""
    return [-float(text.count("w7")) + 0.1 * len(text) for text in completions]


PROMPTS = {"prompt": ["w1 w2 w3", "w4 w5 w6"] * 8}
PAIRS = {**PROMPTS, "chosen": [" w8 w9"] * 16, "rejected": [" w10 w11 w12"] * 16}
TRAINERS = {
    "SFT": (PROMPTS | {"completion": [" w8 w9 w10"] * 16}, {}, {}),
    "DPO": (PAIRS, {}, {"ref_model": llama}),
    "KTO": (PROMPTS | {"completion": [" w8 w9", " w10"] * 8, "label": [True, False] * 8}, {}, {"ref_model": llama}),
    "GRPO": (PROMPTS, {"num_generations": 4, "max_completion_length": 6}, {"reward_funcs": reward}),
    "RLOO": (PROMPTS, {"num_generations": 4, "max_completion_length": 6, "beta": 0.0}, {"reward_funcs": reward}),
}


def trained(kind, folder, model=None, serves="head"):
    data, settings, options = TRAINERS[kind]
    arguments = getattr(trl, f"{kind}Config")(
        str(folder), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        logging_steps=1, disable_tqdm=True, seed=0, learning_rate=1e-2, bf16=False, **settings,
    )  # fmt: skip
    options = {name: make() if make is llama else make for name, make in options.items()}
    trainer = getattr(trl, f"{kind}Trainer")(
        model or llama(), args=arguments, train_dataset=Dataset.from_dict(data), processing_class=tokenizer(), **options
    )
    if serves == "head":
        head.on()
    elif serves == "model":
        serve(trainer.model, temperature=trainer.temperature)
    with count_multiplied_rows() as rows:
        trainer.train()
    head.off()
    return trainer.state.log_history, trainer.model.state_dict(), rows


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_trainer_learns_what_it_learned(kind, tmp_path):
    (history, weights, nothing), (mine, ours, rows) = (trained(kind, tmp_path, serves=s) for s in (None, "head"))
    assert nothing.scored == 0
    assert rows.scored >= rows.differentiated > 0
    clocks = ("time", "runtime", "per_second", "flos")
    for theirs, entry in zip(history, mine, strict=True):
        for name, value in theirs.items():
            if not any(clock in name for clock in clocks):
                assert entry[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    torch.testing.assert_close(ours, weights, rtol=1e-2, atol=1e-3)


def test_a_served_model_learns_what_it_learned(tmp_path):
    theirs, ours = (trained("GRPO", tmp_path, serves=serves) for serves in (None, "model"))
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-2, atol=1e-3)


def test_a_mixture_of_experts_keeps_its_routers_loss(tmp_path):
    theirs, ours = (trained("SFT", tmp_path, mixtral(), serves=serves) for serves in (None, "head"))
    assert "aux_loss" in theirs[0][0]
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-2, atol=1e-3)
