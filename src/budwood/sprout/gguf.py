"""Read a Llama model from a GGUF file.

transformers does the same, but parses the file several times: 40 seconds for SmolLM2-135M. Here the
library ``gguf`` reads it once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from budwood.errors import InputError

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names of modules and those of transformers."""


_SPECIAL = {
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "pad_token_id": "padding",
    "unk_token_id": "unknown",
}
"""transformers' names of special tokens and those of GGUF."""


def load_llama(path: Path, dtype: torch.dtype) -> Any:
    """Load a ``LlamaForCausalLM``, dequantised.

    Args:
        path: a GGUF file of a Llama model.
        dtype: of the weights.

    Raises:
        InputError: the file is not a GGUF file, or holds another kind of model.
    """
    from gguf import GGUFReader
    from transformers import LlamaForCausalLM

    try:
        reader = GGUFReader(path)
    except ValueError as error:
        raise InputError(f"{path.name} cannot be read ({error}); reinstall its package") from error
    architecture = _value(reader, "general.architecture")
    if architecture != "llama":
        raise InputError(f"{path.name} holds a {architecture!r} model; give that of a Llama")
    config = _config(reader)
    weights = dict(_weights(reader, config, dtype))
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def _value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents() if key in reader.fields else None


def _config(reader: Any) -> Any:
    from transformers import LlamaConfig

    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    ids = {ours: _value(reader, f"tokenizer.ggml.{key}_token_id") for ours, key in _SPECIAL.items()}
    return LlamaConfig(
        vocab_size=int(shapes["token_embd.weight"][-1]),
        hidden_size=_value(reader, "llama.embedding_length"),
        intermediate_size=_value(reader, "llama.feed_forward_length"),
        num_hidden_layers=_value(reader, "llama.block_count"),
        num_attention_heads=_value(reader, "llama.attention.head_count"),
        num_key_value_heads=_value(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_value(reader, "llama.context_length"),
        rms_norm_eps=_value(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _value(reader, "llama.rope.freq_base"),
        },
        tie_word_embeddings="output.weight" not in shapes,
        **{name: token for name, token in ids.items() if token is not None},
    )


def _weights(reader: Any, config: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for stored in reader.tensors:
        values = np.array(dequantize(stored.data, stored.tensor_type))
        weight = torch.from_numpy(values.reshape(stored.shape[::-1])).to(dtype)
        module = stored.name.split(".")[-2]
        if module in heads:
            weight = _unpermuted(weight, heads[module])
        yield _name(stored.name), weight


def _name(stored: str) -> str:
    """Rename a tensor, such as ``blk.3.attn_q.weight``, to its name in transformers."""
    *block, module, kind = stored.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{_NAMES[module]}.{kind}"


def _unpermuted(weight: Tensor, n_heads: int) -> Tensor:
    """Undo GGUF's order of rows, in which rotary pairs stand side by side."""
    rows, columns = weight.shape
    pairs = weight.view(n_heads, rows // n_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
