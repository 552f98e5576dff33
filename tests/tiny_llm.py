"""A tiny random Llama, batches with padding on both sides, and a plain training loop."""

from __future__ import annotations

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from budwood.tune import SlimConfig

N_WORDS, D_MODEL, D_MLP = 61, 24, 40


def llama(dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": N_WORDS,
        "hidden_size": D_MODEL,
        "intermediate_size": D_MLP,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(dtype).eval()


def config(**changes) -> SlimConfig:
    sizes = {"r": 3, "n_experts": 4, "n_identity": 2, "n_clusters": 3, "task_type": "CAUSAL_LM"}
    sizes["skip_first"] = 0.0
    return SlimConfig(**{**sizes, **changes})


def slim(model=None, **changes) -> peft.PeftModel:
    torch.manual_seed(1)
    return peft.get_peft_model(llama() if model is None else model, config(**changes))


def batch(n: int = 4, length: int = 9, seed: int = 0, padding: str | None = "right") -> dict:
    """Token ids, mask and labels; row i has i tokens of padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, N_WORDS, (n, length), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(n if padding else 0):
        place = slice(length - i, length) if padding == "right" else slice(0, i)
        mask[i, place] = 0
    ids = ids.masked_fill(mask == 0, 0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def optimiser(model, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def train(
    model, steps: int = 4, *, lr: float = 1e-2, start: int = 0, optim=None, same=False, **kinds
) -> list:
    """Losses of a plain loop, on another batch in each step or on the same one."""
    model.train()
    optim = optim or optimiser(model, lr)
    losses = []
    for step in range(start, start + steps):
        optim.zero_grad()
        loss = model(**batch(seed=start if same else step, **kinds)).loss
        loss.backward()
        optim.step()
        losses.append(loss.item())
    return losses


def trained(steps: int = 4, model=None, **changes) -> peft.PeftModel:
    found = slim(model, **changes)
    train(found, steps)
    return found.eval()


def states(model, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {
        k: v.clone() for k, v in peft.get_peft_model_state_dict(model, adapter_name=adapter).items()
    }


def logits(model, inputs: dict | None = None) -> torch.Tensor:
    inputs = inputs or batch()
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
