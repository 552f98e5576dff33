"""SLIM works with each of PEFT's task types: made, trained, saved, loaded and taken off."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers

from tests import tiny_llm as tiny

SIZES = {
    "vocab_size": tiny.N_WORDS,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 5,
}
LLAMA = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
BERT = transformers.BertConfig(**SIZES)
BERT_QA = transformers.BertConfig(**{**SIZES, "num_labels": 2})
T5 = transformers.T5Config(
    vocab_size=tiny.N_WORDS,
    d_model=24,
    d_ff=40,
    d_kv=6,
    num_layers=3,
    num_heads=4,
    decoder_start_token_id=0,
)
BART = transformers.BartConfig(
    vocab_size=tiny.N_WORDS,
    d_model=24,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=40,
    decoder_ffn_dim=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    forced_eos_token_id=None,
)


def batch(task: str) -> dict:
    """Inputs with the targets of a task."""
    inputs = tiny.batch()
    labels = inputs.pop("labels")
    targets = {
        "SEQ_CLS": {"labels": torch.tensor([0, 3, 1, 4])},
        "TOKEN_CLS": {"labels": labels.where(labels == -100, labels % 5)},
        "QUESTION_ANS": {
            "start_positions": torch.tensor([0, 2, 1, 3]),
            "end_positions": torch.tensor([1, 2, 4, 3]),
        },
        "SEQ_2_SEQ_LM": {"labels": tiny.batch(length=7, seed=1)["labels"]},
        "CAUSAL_LM": {"labels": labels},
        "FEATURE_EXTRACTION": {},
    }
    return inputs | targets[task]


MODELS = {
    "SEQ_CLS": ["LlamaForSequenceClassification", "BertForSequenceClassification"],
    "TOKEN_CLS": ["LlamaForTokenClassification", "BertForTokenClassification"],
    "QUESTION_ANS": ["LlamaForQuestionAnswering", "BertForQuestionAnswering"],
    "SEQ_2_SEQ_LM": ["T5ForConditionalGeneration", "BartForConditionalGeneration"],
    "CAUSAL_LM": ["LlamaForCausalLM", "BertLMHeadModel"],
    "FEATURE_EXTRACTION": ["LlamaModel", "BertModel"],
}
CASES = [(task.value, name) for task in peft.TaskType for name in MODELS[task.value]]
HEADS = {"SEQ_CLS": ("score", "classifier"), "TOKEN_CLS": ("score", "classifier")}
HEADS["QUESTION_ANS"] = ("qa_outputs",)


def base(name: str):
    configs = {"BertForQ": BERT_QA, "Llama": LLAMA, "Bert": BERT, "T5": T5, "Bart": BART}
    kind = next(kind for kind in configs if name.startswith(kind))
    torch.manual_seed(0)
    return getattr(transformers, name)(configs[kind]).eval()


def output(model, task: str) -> torch.Tensor:
    """All numbers of a model's output that belong to the task."""
    with torch.no_grad():
        found = model(**batch(task))
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return torch.cat([found[name].flatten() for name in names if name in found])


def loss_of(model, task: str) -> torch.Tensor:
    found = model(**batch(task))
    if task != "FEATURE_EXTRACTION":
        return found.loss
    hidden = found.last_hidden_state
    return (hidden - hidden.new_tensor([1.0, -1.0]).repeat(12)).square().mean()


@pytest.mark.filterwarnings("ignore:.*BertLMHeadModel.*", "ignore:If you want to use")
@pytest.mark.parametrize(("task", "name"), CASES)
def test_task_type(task, name, tmp_path):
    plain = output(base(name), task)
    torch.manual_seed(1)
    config = tiny.config(task_type=task)
    model = peft.get_peft_model(base(name), config)
    assert torch.equal(output(model.eval(), task), plain)
    optim, losses = tiny.optimiser(model), []
    model.train()
    for _ in range(6):
        optim.zero_grad()
        losses.append(loss_of(model, task))
        losses[-1].backward()
        optim.step()
    assert losses[-1] < losses[0]
    changed = output(model.eval(), task)
    assert (changed - plain).abs().max() > 1e-5
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(name), tmp_path).eval()
    assert type(loaded) is type(model)
    assert torch.equal(output(loaded, task), changed)  # a new head is saved with the adapter
    saved = model.peft_config["default"].modules_to_save
    assert sorted(saved or ()) == sorted(HEADS.get(task, ()))
    model.add_adapter("second", tiny.config(task_type=task))
    assert torch.equal(output(model, task), changed)
    with model.disable_adapter():
        assert torch.equal(output(model, task), plain)
    if task not in HEADS:  # a new head stays, as PEFT leaves it
        assert torch.equal(output(loaded.unload(), task), plain)


@pytest.mark.parametrize(
    ("task", "given"), [("TOKEN_CLS", ["embed_tokens"]), ("QUESTION_ANS", ["embed_tokens"])]
)
def test_modules_to_save_beside_the_head(task, given):
    config = tiny.config(task_type=task, modules_to_save=list(given))
    model = peft.get_peft_model(base(MODELS[task][0]), config)
    assert model.peft_config["default"].modules_to_save == [*given, *HEADS[task][::-1]]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("modules_to_save" in name for name in trained) >= 2
