"""Every causal language model of transformers, with few layers and without memory for weights.

Some are also there with weights, 64 channels and two layers.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    *("encoder_layers", "num_decoder_layers", "num_encoder_layers"),
)
N_LAYERS = 4
_FEW = [{"rope_type": "default", "rope_theta": 1e4}]
MORE: dict[str, dict] = {
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(["full_attention", "sliding_attention"], _FEW[0])
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 8}},
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {
        "num_hidden_layers": N_LAYERS,
        "layer_types": ["conv", "conv", "full_attention", "conv"],
    },
    "ministral": {"head_dim": 64},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
}
"""What some configs need beside their defaults."""


NOT_BUILT = {
    "gemma3n": "its vision tower needs timm; gemma3n_text is its decoder",
    "gemma4_assistant": "transformers does not build it from a config alone",
    "gemma4_unified_assistant": "transformers does not build it from a config alone",
    "musicgen": "AutoModelForCausalLM does not build it from its config",
    "musicgen_melody": "AutoModelForCausalLM does not build it from its config",
    "qwen4_exp": "transformers does not build it from its defaults; qwen4_exp_text is its decoder",
}


SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    "head_dim": 16,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Of the models with weights, as far as their configs have them."""


def small(kind: str) -> PreTrainedModel:
    """A model of a kind that can be small, with weights, in evaluation."""
    options: dict = {"is_decoder": True, **MORE.get(kind, {})}
    plain = AutoConfig.for_model(kind, **options)
    options |= {name: 2 for name in _LAYERS if isinstance(getattr(plain, name, None), int)}
    options |= {n: v for n, v in SIZES.items() if isinstance(getattr(plain, n, None), int)}
    options |= {name: SIZES[name] for name in ("hidden_size", "vocab_size")}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()


def model(kind: str) -> PreTrainedModel:
    """One of :data:`KINDS` on the meta device; with its own number of layers if it insists."""
    for shorter in (True, False):
        try:
            config = _config(kind, shorter)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config)
        except Exception:
            if not shorter:
                raise
    raise AssertionError


def _config(kind: str, shorter: bool):
    options: dict = {"is_decoder": True, **MORE.get(kind, {})}
    plain = AutoConfig.for_model(kind, **options)
    if not shorter:
        return plain
    options |= {name: N_LAYERS for name in _LAYERS if isinstance(getattr(plain, name, None), int)}
    for part in ("text_config", "vision_config", "audio_config"):
        inner = getattr(plain, part, None)
        if inner is not None:
            options[part] = {
                name: N_LAYERS for name in _LAYERS if isinstance(getattr(inner, name, None), int)
            }
    return AutoConfig.for_model(kind, **options)
