"""Every causal language model of transformers, with few layers and without memory for weights."""

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
