"""Tiny random mixture-of-experts models, with fused experts in each form that transformers has."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny_llm import N_WORDS

_COMMON = {
    "vocab_size": N_WORDS,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {
    "qwen3_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 6,
    },
    "qwen2_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "decoder_sparse_step": 2,
    },
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 6,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 6,
        "first_k_dense_replace": 1,
    },
    "mixtral": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": {
        "layers_block_type": ["attention", "moe", "moe"],
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 24,
        "n_routed_experts": 4,
        "head_dim": 6,
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
    },
}


def model(kind: str, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """One of :data:`SIZES`, with weights large enough that its experts differ."""
    torch.manual_seed(0)
    sizes = {**_COMMON, **SIZES[kind], "initializer_range": 0.2, **changes}
    if kind == "nemotron_h":
        del sizes["num_hidden_layers"]
    config = AutoConfig.for_model(kind, **sizes)
    built = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if "expert" in name or "gate" in name or "router" in name:
                weight.normal_(std=0.2)  # some are made empty
    return built.to(dtype).eval()
