"""TRL's trainers on a tiny Llama with a SLIM adapter: tokenizer, data, a trainer of each kind."""

from __future__ import annotations

import torch

from tests import tiny_llm as tiny

COMMON = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, tiny.N_WORDS))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def text(n_words: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.N_WORDS, (n_words,), generator=generator)
    return " ".join(f"w{i}" for i in ids.tolist())


def rows(kind: str, n: int = 8):
    """Prompts of 3 to 5 words with answers of 2 to 6, no two lengths alike in a row."""
    from datasets import Dataset

    made = []
    for i in range(n):
        prompt, one, other = text(3 + i % 3, i), text(2 + i % 4, 100 + i), text(6 - i % 4, 200 + i)
        made.append(
            {
                "dpo": {"prompt": prompt, "chosen": f" {one}", "rejected": f" {other}"},
                "kto": {"prompt": prompt, "completion": f" {one}", "label": i % 3 != 0},
                "sft": {"prompt": prompt, "completion": f" {one}"},
            }.get(kind, {"prompt": prompt})
        )
    return Dataset.from_list(made)


def lengths(completions, **_):
    return [float(len(one.split())) for one in completions]


def trainer(kind: str, model, folder, *, data=None, peft_config=None, **options):
    """A trainer of TRL: ``dpo``, ``kto``, ``grpo``, ``rloo`` or ``sft``."""
    import trl

    defaults = {
        "dpo": {"per_device_train_batch_size": 2},
        "kto": {"per_device_train_batch_size": 4},
        "sft": {"per_device_train_batch_size": 4},
    }.get(
        kind,
        {
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 5,
            "beta": 0.1,
        },
    )
    name = kind.upper()
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(folder), **{**COMMON, **defaults, **options}
    )
    extra = {"reward_funcs": lengths} if kind in ("grpo", "rloo") else {}
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=arguments,
        train_dataset=rows(kind) if data is None else data,
        processing_class=tokenizer(),
        peft_config=peft_config,
        **extra,
    )


def recorded(trainer) -> list[dict]:
    """The inputs of each pass of training, filled while the trainer runs."""
    seen, original = [], trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        if model.training:
            seen.append(dict(inputs))
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    return seen
