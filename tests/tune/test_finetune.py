"""`budwood.tune.finetune`: data, arguments, resuming, and the same adapter as the command."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import integration_utils
from trl import SFTConfig
from typer.testing import CliRunner

from budwood import hub, records
from budwood.errors import InputError, OutputError, UnknownNameError, UnsupportedModelError
from budwood.files import read_json
from budwood.loading import load_language_model
from budwood.tune import Settings, SlimConfig, finetune, load_adapted, observe
from budwood.tune.data.encoding import IGNORED, encode, encode_rows, n_supervised
from budwood.tune.data.examples import example_of
from budwood.tune.data.self_generated import cached_texts
from budwood.tune.methods import attach, parse_tuner
from budwood.tune.methods.slim import Slim
from budwood.tune.saved.loading import load_adapter
from budwood.tune.training import run as train
from budwood.tune.training import trainer
from budwood.tune.training.settings import settings_from
from tests import tiny_chat
from tests.killed import killed_at

TOKENS = tiny_chat.tokenizer()
QUICK = {"rank": 2, "steps": 4, "batch": 4, "lr": 3e-3, "log_every": 1, "max_length": 300}
SLIM = "slim:n_experts=3+texts=8"


def turn(role, content):
    return {"role": role, "content": content}


MESSAGES = [turn("user", "Is it wet?"), turn("assistant", "yes")]
FORMATS = {
    "messages": {"messages": MESSAGES},
    "prompt and completion": {"prompt": "The sky is", "completion": " blue."},
    "conversational": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "choices": {"question": "Is it wet?", "choices": ["no", "yes"], "answer": 1},
    "answer": {"question": "Is it wet?", "answer": "yes"},
    "text": {"text": "The sky is blue."},
}


def run(folder, data=None, method="lora", model=None, **options):
    data = [FORMATS["messages"]] * 8 if data is None else data
    model = model or tiny_chat.model()
    options = {"tokenizer": TOKENS, **QUICK, **options}
    return finetune(model, data, folder, method=method, **options)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def supervised(row):
    tokens = encode_rows(example_of(row), TOKENS)[0]
    pairs = zip(tokens["input_ids"], tokens["labels"])
    return TOKENS.decode([token for token, label in pairs if label != IGNORED])


# --- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_in_a_list_a_dataset_and_a_file(tmp_path, name):
    rows = [FORMATS[name]] * 8
    file = tiny_chat.write_lines(tmp_path / "train.jsonl", rows)
    sources = {"list": rows, "dataset": Dataset.from_list(rows), "file": file, "files": [str(file)]}
    results = {key: run(tmp_path / key, data, steps=2) for key, data in sources.items()}
    assert {result.n_examples for result in results.values()} == {8}
    expected = weights(results["list"].output)
    assert all(same(weights(result.output), expected) for result in results.values())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompt and completion", " blue.<|im_end|>"),
        ("conversational", "yes<|im_end|>"),
        ("choices", "yes<|im_end|>"),
        ("text", "The sky is blue.<|im_end|>"),
    ],
)
def test_what_is_supervised(name, text):
    assert supervised(FORMATS[name]) == text


def test_plain_text_has_no_chat_template():
    row = encode_rows(example_of(FORMATS["prompt and completion"]), TOKENS)[0]
    assert TOKENS.decode(row["input_ids"]) == "The sky is blue.<|im_end|>"


def test_only_the_completion_of_a_conversation_is_supervised():
    turns = [*MESSAGES, turn("user", "Why?"), turn("assistant", "Rain.")]
    assert supervised({"messages": turns}) == "yes<|im_end|>Rain.<|im_end|>"
    assert supervised({"prompt": turns[:3], "completion": turns[3:]}) == "Rain.<|im_end|>"


def test_columns_that_a_dataset_fills_up_with_none_are_absent():
    answer, text = FORMATS["answer"], FORMATS["text"]
    columns = [*answer, *text]
    rows = Dataset.from_dict({key: [answer.get(key), text.get(key)] for key in columns})
    assert [example_of(row) for row in rows] == [
        example_of(FORMATS[name]) for name in ("answer", "text")
    ]


def test_tokens_are_taken_as_they_are(tmp_path):
    rows = encode([example_of(FORMATS["messages"])] * 8, TOKENS, 100).rows
    direct, encoded = run(tmp_path / "a"), run(tmp_path / "b", rows)
    assert same(weights(direct.output), weights(encoded.output))
    with pytest.raises(InputError, match="row 1 of the data has 3 input_ids and 2 labels"):
        run(tmp_path / "c", [rows[0], {"input_ids": [1, 2, 3], "labels": [1, 2]}])


@pytest.mark.parametrize("kind", ["torch", "numpy", "iterable"])
def test_tokens_in_any_format(tmp_path, kind):
    rows = encode([example_of(FORMATS["messages"])] * 8, TOKENS, 100).rows
    data = Dataset.from_list(rows)
    data = data.to_iterable_dataset() if kind == "iterable" else data.with_format(kind)
    expected = run(tmp_path / "a", rows, steps=1)
    assert same(weights(run(tmp_path / "b", data, steps=1).output), weights(expected.output))


ROW = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (Dataset.from_dict({"input_ids": [], "labels": []}), "the data are empty; give rows"),
        ([ROW, {"input_ids": [1, 2]}], "row 1 of the data: labels is a NoneType; give a list"),
        ([{"input_ids": [1, 2], "labels": [0.5, 1]}], "row 0 of the data: labels has 0.5; give"),
        ([{"input_ids": torch.ones(1, 2), "labels": [1, 2]}], r"input_ids has \[1.0, 1.0\]; give"),
        ([ROW, 7], "row 1 of the data is a int; give dicts"),
        ([{"input_ids": [1, 2], "labels": [1, IGNORED]}], "at least one label other than -100"),
        (Dataset.from_list([ROW]).with_format("pandas"), "row 0 of the data is a DataFrame"),
    ],
)
def test_bad_tokens_are_refused_before_a_model_is_loaded(tmp_path, data, reason):
    with pytest.raises(InputError, match=reason) as error:
        finetune(tmp_path / "there is no such model", data, tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "the data are empty"),
        ([{"prompt": MESSAGES, "completion": []}], "row 0 of the data: completion has no assist"),
        ({"question": "a"}, "data is a dict; give a path"),
        (7, "data is a int; give a path"),
        ([FORMATS["text"], 7], "row 1 of the data: is not an object"),
        ([{"prompt": "a", "chosen": "b"}], "row 0 of the data: has the keys prompt, chosen; give"),
        ([{}], r"row 0 of the data: has the keys \(none\); give"),
        ([{"prompt": "a", "completion": MESSAGES}], "prompt and completion are str and list; give"),
        ([{"prompt": "a", "completion": ""}], "completion must be a text that is not empty"),
        ([{"text": "a", "messages": MESSAGES, "tools": [1]}], "tools must be a list of JSON"),
        (DatasetDict(train=Dataset.from_list([FORMATS["text"]])), "has the splits train; give one"),
    ],
)
def test_bad_data(tmp_path, data, reason):
    with pytest.raises(InputError, match=reason) as error:
        run(tmp_path / "out", data)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_long_examples_are_left_out_with_a_warning(tmp_path):
    data = [FORMATS["text"]] * 3 + [{"text": "long " * 40}]
    with pytest.warns(UserWarning, match="left out 1 of 4 examples of more than 100 tokens"):
        result = run(tmp_path / "out", data, max_length=100)
    assert (result.n_examples, result.n_left_out) == (3, 1)


def test_without_a_chat_template_only_plain_text(tmp_path):
    bare, mute = tiny_chat.tokenizer(), tiny_chat.tokenizer()
    bare.chat_template = mute.chat_template = None
    mute.bos_token = mute.eos_token = None
    data, options = [FORMATS["text"]] * 4, {"rank": 2, "steps": 1}
    result = finetune(tiny_chat.model(), data, tmp_path / "a", tokenizer=bare, **options)
    assert result.model.peft_config["default"].distance == "discriminant"
    with pytest.raises(UnsupportedModelError, match="has no chat template; use an instruct"):
        finetune(
            tiny_chat.model(), [FORMATS["messages"]], tmp_path / "b", tokenizer=bare, **options
        )
    options["tokenizer"] = mute
    with pytest.warns(UserWarning, match="SLIM takes the whitened distance, .* neither a chat"):
        result = finetune(tiny_chat.model(), data, tmp_path / "c", **options)
    assert result.model.peft_config["default"].distance == "whitened"
    with pytest.raises(UnsupportedModelError, match="neither a chat template nor a token"):
        finetune(tiny_chat.model(), data, tmp_path / "d", method=SLIM, **options)


# --- the model ----------------------------------------------------------------------------------


def test_the_result_is_what_is_saved_and_the_base_is_as_it_was(tmp_path):
    import peft

    model = tiny_chat.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = run(tmp_path / "out", method=SLIM, model=model)
    assert not result.model.training and len(result.history) == 4 and not result.was_complete
    assert result.settings.lr == 3e-3 and result.n_trained_parameters > 0
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad():
        logits = result.model(**ids).logits
        again = peft.PeftModel.from_pretrained(tiny_chat.model(), str(result.output)).eval()
        assert torch.equal(again(**ids).logits, logits)
        repeated = run(tmp_path / "out", method=SLIM)  # complete: loaded, not trained
        assert repeated.was_complete and repeated.history == result.history
        assert torch.equal(repeated.model(**ids).logits, logits)
    assert model.config.use_cache is True
    after = result.model.unload().state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_model_and_its_tokenizer_by_name(tmp_path):
    folder = tiny_chat.save(tmp_path / "lm")
    data = [FORMATS["messages"]] * 8
    by_name = finetune(str(folder), data, tmp_path / "a", method="lora", **QUICK)
    model = type(tiny_chat.model()).from_pretrained(folder)
    by_object = finetune(model, data, tmp_path / "b", method="lora", **QUICK)
    assert by_name.model_name == by_object.model_name == "lm"
    assert by_object.tokenizer.chat_template == TOKENS.chat_template
    assert same(weights(by_name.output), weights(by_object.output))


def test_paths_are_taken_as_text_and_as_paths(tmp_path):
    folder = tiny_chat.save(tmp_path / "lm")
    texts = tmp_path / "texts.json"
    model = type(tiny_chat.model()).from_pretrained(folder)
    result = run(tmp_path / "out", method=SLIM, model=model, texts_file=str(texts))
    assert texts.exists() and not (tmp_path / "out" / "own.json").exists()
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad():
        loaded = [load_adapted(path) for path in (result.output, str(result.output))]
        loaded.append(load_adapted(result.output, folder))
        logits = [one.model.to("cpu")(**ids).logits for one in loaded]
        assert all(torch.equal(one, result.model(**ids).logits) for one in logits)
    base = load_language_model(str(folder))
    assert load_adapter(base, result.output).name == "lm"


def test_texts_of_another_model_tokenizer_or_number_are_refused(tmp_path):
    file, model = tmp_path / "own.json", tiny_chat.model()
    texts = cached_texts(file, model, TOKENS, 8)
    saved = json.loads(file.read_text())
    assert saved["texts"] == texts and saved["n"] == 8
    # The adapter around the model changes nothing.
    adapted = attach(parse_tuner(SLIM), tiny_chat.model(), 2, 0)
    assert cached_texts(file, adapted, TOKENS, 8) == texts
    other = tiny_chat.model(hidden_size=32)
    longer = tiny_chat.tokenizer()
    longer.add_tokens(["a new word"])
    for arguments, reason in (
        ((other, TOKENS, 8), "holds texts with model="),
        ((model, longer, 8), "holds texts with tokenizer="),
        ((model, TOKENS, 4), "holds texts with n=8, and n=4 is needed; give another file"),
    ):
        with pytest.raises(InputError, match=reason) as error:
            cached_texts(file, *arguments)
        assert "\n" not in str(error.value)
    file.write_text(json.dumps(texts))  # as they were saved at first
    assert cached_texts(file, model, TOKENS, 8) == texts
    for n in (4, 64):
        with pytest.raises(InputError, match=f"n=8, and n={n} is needed"):
            cached_texts(file, model, TOKENS, n)
    for content, reason in (("7", "no self-generated"), (json.dumps([{}] * 8), "row 0 of the te")):
        file.write_text(content)
        with pytest.raises(InputError, match=reason):
            cached_texts(file, model, TOKENS, 8)


def test_the_texts_of_the_published_comparison_are_read():
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "tune" / "own-128.json"
    assert len(cached_texts(file, tiny_chat.model(), TOKENS, 128)) == len(read_json(file))


def test_the_tokenizer_of_a_model_of_the_hub_is_not_waited_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "why_offline", lambda: "the hub does not answer")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", asked.append)
    model = tiny_chat.model()
    model.name_or_path = "someone/model-that-is-not-in-the-cache"
    with pytest.raises(InputError, match="'someone/model-.* has no tokenizer at hand; give tok"):
        finetune(model, [FORMATS["text"]] * 4, tmp_path / "out")
    assert not asked


@pytest.mark.parametrize("method", ["lora", SLIM])
def test_a_finished_run_whose_adapter_is_cut_off(tmp_path, method):
    file = run(tmp_path / "out", method=method).output / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    model = tiny_chat.model()
    before = state_of(model)
    with pytest.raises(InputError, match="adapter_model.safetensors is truncated") as error:
        run(tmp_path / "out", method=method, model=model)
    assert "\n" not in str(error.value) and state_of(model) == before
    save_file({"other": torch.ones(1)}, file)
    if method == SLIM:  # PEFT warns of tensors that a LoRA file lacks
        with pytest.raises(InputError, match="cannot load adapter|lacks") as error:
            run(tmp_path / "out", method=method, model=model)
        assert state_of(model) == before


def test_models_that_cannot_be_used(tmp_path):
    data, out = [FORMATS["text"]] * 4, tmp_path / "out"
    with pytest.raises(InputError, match="has no tokenizer at hand; give tokenizer="):
        finetune(tiny_chat.model(), data, out)
    for options in ({"device": "cpu"}, {"dtype": "float32"}):
        with pytest.raises(InputError, match="is for a model by name, and a model object is used"):
            run(out, data, **options)
    both = BartForConditionalGeneration(BartConfig(vocab_size=99, d_model=16))
    with pytest.raises(InputError, match="Bart.* .bart. has an encoder beside its decoder"):
        finetune(both, data, out, tokenizer=TOKENS)
    with pytest.raises(InputError, match="tokenizer is the name 'here'; give the tokenizer itself"):
        finetune(tiny_chat.model(), data, out, tokenizer="here")
    longer = tiny_chat.tokenizer()
    longer.add_tokens(["<new>"])
    with pytest.raises(InputError, match="have token 259 .'<new>'., and the model 259 embeddings"):
        finetune(tiny_chat.model(), [{"text": "a <new> text"}] * 4, out, tokenizer=longer)
    with pytest.raises(InputError, match="model is a list; give a causal language model"):
        finetune([], data, out)
    adapted = run(tmp_path / "first", data).model
    with pytest.raises(InputError, match="has an adapter already; give its base"):
        finetune(adapted, data, out, tokenizer=TOKENS)
    with pytest.raises(InputError, match="float16"):
        run(out, data, model=tiny_chat.model().half())
    assert not out.exists()


def state_of(model):
    """Modules and their modes, which weights are trained, and whether there is a cache."""
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    weights = {name: (id(w), w.requires_grad) for name, w in model.named_parameters()}
    return modules, weights, model.config.use_cache, hasattr(model, "peft_config")


@pytest.mark.parametrize("method", ["lora", SLIM])
def test_an_error_leaves_the_model_as_it_was(tmp_path, monkeypatch, method):
    model = tiny_chat.model()
    model.model.norm.train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = state_of(model)

    def stops(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "check_gradients", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", model=model, method=method)
    assert state_of(model) == before


def test_an_adapter_that_is_attached_in_part_is_taken_off(tmp_path, monkeypatch):
    from peft.tuners.lora import LoraModel

    model, inner, made = tiny_chat.model(), LoraModel._create_and_replace, []
    before = state_of(model)

    def fails(self, *args, **kwargs):
        if made:
            raise ValueError("this layer cannot be adapted")
        made.append(inner(self, *args, **kwargs))

    monkeypatch.setattr(LoraModel, "_create_and_replace", fails)
    with pytest.raises(InputError, match="cannot make the adapter: this layer cannot be adapted"):
        run(tmp_path / "out", model=model)
    assert made and state_of(model) == before


# --- settings -----------------------------------------------------------------------------------


def test_training_arguments_are_honoured(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path / "args"),
        learning_rate=1e-2,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=1,
        seed=5,
        logging_steps=1,
        adam_beta2=0.95,
        weight_decay=0.1,
        use_cpu=True,
        max_grad_norm=0.5,
    )
    data = [FORMATS["messages"]] * 8
    options = {"method": "lora", "rank": 2, "tokenizer": TOKENS}
    result = finetune(tiny_chat.model(), data, args=args, **options)
    assert result.output == tmp_path / "args"
    assert result.settings == Settings(
        lr=1e-2,
        steps=3,
        batch=2,
        accumulate=2,
        schedule="constant_with_warmup",
        seed=5,
        log_every=1,
        max_grad_norm=0.5,
    )
    assert [row["lr"] for row in result.history][1:] == pytest.approx([1e-2, 1e-2])
    kept = json.loads((result.output / "run.json").read_text())["config"]
    assert kept["arguments"] == {"warmup_steps": 1, "adam_beta2": 0.95, "weight_decay": 0.1}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_fields_at_their_default_keep_the_recommended_values(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path / "out"), max_steps=2, use_cpu=True, max_length=100)
    with pytest.warns(UserWarning, match="where SFTConfig has its defaults, budwood's .*batch=16"):
        result = finetune(
            tiny_chat.model(), [FORMATS["messages"]] * 8, args=args, tokenizer=TOKENS, seed=7
        )
    assert result.settings == Settings(lr=3e-3, steps=2, max_length=100, seed=7)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_the_defaults_of_the_trainer_are_had_by_the_call_in_the_warning():
    args = SFTConfig(output_dir="out", use_cpu=True, gradient_checkpointing=False, seed=42)
    with pytest.warns(UserWarning, match="budwood's are used") as told:
        settings_from(args)
    (call,) = (found for one in told if (found := str(one.message).partition("finetune(…, ")[2]))
    asked = eval(f"dict({call}")
    assert asked == {
        "lr": args.learning_rate,
        "epochs": 3.0,
        "batch": 8,
        "schedule": "linear",
        "seed": 42,
        "max_length": 1024,
        "warmup": 0.0,
    }
    settings, _ = settings_from(args, asked)  # without a warning
    assert settings == Settings(**asked)


@pytest.mark.filterwarnings("ignore:where TrainingArguments has its defaults")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"neftune_noise_alpha": 5}, "TrainingArguments.neftune_noise_alpha=5.* is not supported"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
        ({"eval_strategy": "steps"}, "eval_strategy='steps' is not supported"),
        ({"data_seed": 3}, "data_seed=3 is not supported"),
        ({"push_to_hub": True}, "push_to_hub=True is not supported"),
        ({"save_steps": 0.5}, "save_steps=0.5; give a number of steps"),
        ({"logging_steps": 0.5}, "logging_steps=0.5; give a number of steps"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0; give a number above 0"),
        ({"output_dir": "elsewhere"}, "args.output_dir 'elsewhere'; give one"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path, changes, reason):
    given = {"output_dir": str(tmp_path / "out"), "use_cpu": True, **changes}
    with pytest.raises(InputError, match=reason):
        run(tmp_path / "out", args=TrainingArguments(**given))


def test_numbers_of_numpy_are_plain_numbers_in_the_run(tmp_path):
    numbers = {"lr": 3e-3, "warmup": 0.5, "epochs": 1.0}
    settings = Settings(**{name: np.float32(value) for name, value in numbers.items()})
    kept = json.loads(json.dumps(dataclasses.asdict(settings)))
    assert {name: kept[name] for name in numbers} == pytest.approx(numbers)


def test_bad_settings(tmp_path):
    out = tmp_path / "out"
    for options, reason in (
        ({"stepz": 3}, "unknown setting 'stepz'; did you mean 'steps'"),
        ({"steps": -1}, "steps=-1 is below 0"),
        ({"steps": 1.5}, "steps=1.5; give an int"),
        ({"seed": 2**32}, "seed=4294967296 is out of range"),
        ({"lr": 0}, "lr=0; give a number above 0"),
        ({"lr": "3e-3"}, "lr='3e-3'; give a number above 0"),
        ({"warmup": "some"}, r"warmup='some'; give a fraction in \[0, 1\)"),
        ({"epochs": True}, "epochs=True; give a number above 0"),
        ({"max_grad_norm": None}, "max_grad_norm=None; give a number above 0"),
        ({"seed": 0.5}, "seed=0.5; give an int"),
        ({"checkpointing": "yes"}, "checkpointing='yes'; give True or False"),
        ({"rank": 0}, "rank=0 is below 1"),
        ({"rank": 2.5}, "rank=2.5; give an int of at least 1"),
        ({"rank": "4"}, "rank='4'; give an int of at least 1"),
        ({"args": {"lr": 1}}, "args is a dict; give Settings or"),
        ({"method": 3}, "method=3; give a name"),
    ):
        with pytest.raises(InputError, match=reason):
            run(out, **{"model": "no such model", **options})
    for options in ({"style": "list"}, {"method": "slum"}, {"schedule": "cos"}):
        with pytest.raises(UnknownNameError):
            run(out, **options)
    with pytest.raises(InputError, match="there is no output"):
        run(None)
    with pytest.raises(OutputError, match="there is no folder"):
        run(tmp_path / "no" / "out")
    (tmp_path / "mine.txt").touch()
    with pytest.raises(OutputError, match="is not empty and holds no run"):
        run(tmp_path)
    assert not out.exists()


# --- one pipeline -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["slim", SLIM])
def test_the_command_makes_the_same_adapter(tmp_path, method):
    from budwood.cli import app

    folder, data = tiny_chat.save(tmp_path / "lm"), tiny_chat.save_data(tmp_path / "data")
    file = data / "boolq_train.jsonl"
    line = ["tune", file, "--output", tmp_path / "a", "--model", folder, "--method", method]
    line += ["--steps", 3, "--batch", 4]
    done = CliRunner().invoke(app, [str(word) for word in line], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = Dataset.from_list([json.loads(row) for row in file.read_text().splitlines()])
    result = finetune(str(folder), rows, tmp_path / "b", method=method, steps=3, batch=4)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    kept = [json.loads((tmp_path / name / "run.json").read_text()) for name in "ab"]
    assert kept[0] == kept[1]
    one, other = (records.read(tmp_path / name / "record.json") for name in "ab")
    assert (one.config.pop("data"), other.config.pop("data")) == ([file.name], [])
    assert one.config == other.config and len(other.rows) == len(result.history)


@pytest.mark.parametrize("n_rows", [4, 200])
def test_slim_is_the_recommended_config(tmp_path, n_rows):
    """So is the ``slim`` row of the benchmark, which calls ``finetune`` with the method's name."""
    data = [{"question": f"Is {i} even?", "answer": "yes, indeed"} for i in range(n_rows)]
    rows = encode([example_of(row) for row in data], TOKENS, 300).rows
    expected = SlimConfig.recommended(n_supervised(rows))
    result = finetune(tiny_chat.model(), data, tmp_path / "out", tokenizer=TOKENS, steps=1)
    config = result.model.peft_config["default"]
    for name in SlimConfig.__dataclass_fields__:
        if name not in ("base", "target_modules", "peft_version", "auto_mapping"):
            assert getattr(config, name) == getattr(expected, name), name


def test_a_run_with_other_default_options_is_not_continued(tmp_path, monkeypatch):
    for method in ("lora", SLIM):
        run(tmp_path / method[:4], method=method)
    monkeypatch.setattr(Slim, "defaults", "2030-01-01")
    assert run(tmp_path / "lora", method="lora").was_complete
    with pytest.raises(OutputError, match="defaults '2026-11-30' there and '2030-01-01' here"):
        run(tmp_path / "slim", method=SLIM)


@pytest.mark.parametrize("method", ["lora", SLIM])
def test_an_interrupted_run_continues_bit_equal(tmp_path, method):
    whole = run(tmp_path / "whole", method=method, save_every=1)
    with killed_at(3), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", method=method, save_every=1)
    assert (tmp_path / "cut" / "checkpoint-2").is_dir()
    result = run(tmp_path / "cut", method=method, save_every=1)
    assert not result.was_complete and same(weights(whole.output), weights(result.output))
    assert [row["loss"] for row in result.history] == [row["loss"] for row in whole.history]
    with pytest.raises(OutputError, match="holds another run .*lr 0.003 there and 0.01 here"):
        run(tmp_path / "cut", method=method, save_every=1, lr=0.01)


@pytest.fixture
def sigint():
    """Python's own handling of Ctrl-C, which workers of pytest-xdist switch off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_ends_a_run_with_a_checkpoint(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", method=SLIM)
    inner, seen = trainer.check_gradients, []

    def interrupts(model, step):
        seen.append(step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        inner(model, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "check_gradients", interrupts)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", method=SLIM)
    assert seen == [1, 2, 3] and (tmp_path / "cut" / "checkpoint-3").is_dir()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    result = run(tmp_path / "cut", method=SLIM)
    assert same(weights(whole.output), weights(result.output))
    assert [row["loss"] for row in result.history] == [row["loss"] for row in whole.history]


@pytest.mark.usefixtures("sigint")
def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path, monkeypatch):
    def interrupts(model, step):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer, "check_gradients", interrupts)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("checkpoint-*"))


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_in_the_last_step_is_too_late(tmp_path, monkeypatch):
    inner = trainer.check_gradients

    def interrupts(model, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        inner(model, step)

    monkeypatch.setattr(trainer, "check_gradients", interrupts)
    assert len(run(tmp_path / "out").history) == 4


def test_checkpoints_are_written_in_time(tmp_path, monkeypatch):
    for seconds, there in ((0.0, True), (300.0, False)):
        monkeypatch.setattr(trainer, "_SAVE_AT_LEAST", seconds)
        with killed_at(3), pytest.raises(KeyboardInterrupt):
            run(tmp_path / str(seconds))
        assert (tmp_path / str(seconds) / "checkpoint-2").is_dir() == there


def test_a_short_run_has_a_loss(tmp_path):
    history = run(tmp_path / "out", method=SLIM, log_every=10).history
    assert [row["step"] for row in history] == [4]
    assert history[0]["loss"] > 0 and "identity_share" in history[0]


def test_trackers_are_told(tmp_path, monkeypatch):
    told = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append(logs)

    known = {**integration_utils.INTEGRATION_TO_CALLBACK, "mine": Tracker}
    monkeypatch.setattr(integration_utils, "INTEGRATION_TO_CALLBACK", known)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["mine"])
    run(tmp_path / "out", report_to=["mine"])
    assert sum("loss" in logs for logs in told) == 4
    for names, error, message in (
        (["mime"], UnknownNameError, "unknown tracker 'mime' in report_to; known: .*mine"),
        (["wandb"], InputError, "report_to='wandb' needs a package that is missing"),
        ("mine", InputError, "is a string; give a list of names"),
    ):
        with pytest.raises(error, match=message):
            run(tmp_path / "other", report_to=names)


def test_a_run_goes_on_with_other_logging_and_checkpoints(tmp_path, monkeypatch):
    def stops(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "weaken", stops)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", save_every=3)
    noted = json.loads((tmp_path / "out" / "run.json").read_text())
    noted["config"]["arguments"] = {"report_to": ["none"], "log_level": "error"}  # of older runs
    (tmp_path / "out" / "run.json").write_text(json.dumps(noted))
    result = run(tmp_path / "out", log_every=2, save_every=1)
    assert not result.was_complete
    assert same(weights(result.output), weights(run(tmp_path / "whole").output))
    with pytest.raises(OutputError, match="batch 4 there and 2 here"):
        run(tmp_path / "out", batch=2)


@pytest.mark.filterwarnings("ignore:where TrainingArguments has its defaults")
def test_no_checkpoint_is_written_after_the_last_step(tmp_path, monkeypatch):
    def stops(*args):
        raise KeyboardInterrupt

    args = TrainingArguments(
        str(tmp_path / "out"), save_strategy="epoch", num_train_epochs=2, use_cpu=True
    )
    monkeypatch.setattr(train, "weaken", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", args=args, steps=0)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("method", ["lora", SLIM])
def test_the_only_step_of_a_run_learns(tmp_path, method):
    with pytest.warns(UserWarning, match="8 examples make 1 step of training; give more steps"):
        done = run(tmp_path / "run", method=method, steps=0, batch=16)
    assert done.history[-1]["step"] == 1
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    outputs = [value for name, value in weights.items() if "lora_B" in name or "slim_out" in name]
    assert outputs and all(value.abs().max() > 0 for value in outputs)


def test_held_out_examples_that_are_left_out_are_called_so(tmp_path):
    data = [{"question": "q", "answer": "a"}] * 4
    held_out = [{"question": "x" * 600, "answer": "a"}, data[0]]
    with pytest.warns(UserWarning, match="left out 1 of 2 held-out examples of more than 300"):
        run(tmp_path / "out", data, eval_data=held_out, max_length=300)
    with pytest.raises(InputError, match="all 1 held-out examples are longer than"):
        run(tmp_path / "other", data, eval_data=held_out[:1], max_length=300)


def test_rows_from_a_generator_are_those_of_a_list(tmp_path):
    data = [{"question": f"q {i}", "answer": "a"} for i in range(6)]
    one, other = (run(tmp_path / str(i), rows) for i, rows in enumerate((data, iter(data))))
    assert same(weights(one.output), weights(other.output))


def test_new_tokens_and_a_template_come_back_with_the_adapter(tmp_path):
    """The embeddings, since their number was changed, and the tokenizer that was trained with."""
    tokenizer = tiny_chat.tokenizer()
    tiny_chat.save(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<new>"])
    tokenizer.chat_template = tiny_chat.TEMPLATE.replace("<|im_start|>", "<|im_start|>the ")
    model.resize_token_embeddings(len(tokenizer))
    data = [{"question": f"<new> {i}", "answer": "<new>, indeed"} for i in range(6)]
    result = run(tmp_path / "out", data, model=model, tokenizer=tokenizer, method="lora")
    loaded = load_adapted(result.output)
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    ids = torch.tensor([[len(tokenizer) - 1, 5, 6]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, result.model.eval()(ids).logits)
    plain = run(tmp_path / "plain")
    assert not any("embed" in name for name in weights(plain.output))


def test_what_the_user_wrote_is_adapted_as_well(tmp_path):
    data = [
        {"question": f"What is {i} made of?", "answer": "of stone, all of it"} for i in range(12)
    ]
    shares = []
    for fit_on in ("supervised", "content"):
        method = f"{SLIM}+boundary=fixed+distance=discriminant+skip_first=0+fit_on={fit_on}"
        result = run(tmp_path / fit_on, data, method=method)
        assert result.model.peft_config["default"].fit_on == fit_on
        row = encode_rows(example_of(data[0]), TOKENS)[0]
        with observe(result.model) as seen, torch.no_grad():
            result.model(input_ids=torch.tensor([row["input_ids"]]))
        shares.append(np.mean([layer.bypassed / layer.n_tokens for layer in seen.layers.values()]))
    assert shares[1] < shares[0]  # fewer tokens of the question bypass
