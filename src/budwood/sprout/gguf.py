"""Read a Llama model from a GGUF file, many times as fast as transformers does.

transformers parses the file's word list three times and its name table once per module: 40 seconds
for SmolLM2-135M, where the weights themselves take two.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from budwood.errors import InputError

_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9

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


@dataclass(frozen=True)
class Stored:
    """Where a file has a tensor.

    Attributes:
        name: in the file.
        shape: as torch has it.
        kind: number of its quantisation type.
        start: of its data, bytes from the beginning of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


class _Reader:
    """Reads values one after the other; lists are skipped."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        kind, length = self.number("I"), self.number("Q")
        if kind == _STRING:
            for _ in range(length):
                skipped = self.number("Q")
                self.at += skipped
        else:
            self.at += length * struct.calcsize(_NUMBERS[kind])
        return None


def read_header(data: mmap.mmap) -> tuple[dict[str, Any], list[Stored]]:
    """Read the metadata of a GGUF file, without its lists, and where its tensors are.

    Source: the GGUF specification, version 3.
    """
    reader = _Reader(data)
    if data[:4] != b"GGUF":
        raise InputError("this is no GGUF file; reinstall the package that it belongs to")
    reader.at = 8  # past the version
    n_tensors, n_values = reader.number("Q"), reader.number("Q")
    metadata = {reader.string(): reader.value() for _ in range(n_values)}
    table = []
    for _ in range(n_tensors):
        name, n_axes = reader.string(), reader.number("I")
        shape = tuple(reader.number("Q") for _ in range(n_axes))[::-1]
        table.append(Stored(name, shape, reader.number("I"), reader.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    begin = -(-reader.at // alignment) * alignment
    return metadata, [Stored(t.name, t.shape, t.kind, begin + t.start) for t in table]


def load_llama(path: Path, dtype: torch.dtype) -> Any:
    """Load a ``LlamaForCausalLM``, dequantised.

    Args:
        path: a GGUF file of a Llama model with tied embeddings.
        dtype: of the weights.

    Raises:
        InputError: the file is no GGUF file, or holds another kind of model.
    """
    from transformers import LlamaForCausalLM

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        metadata, table = read_header(data)
        if metadata["general.architecture"] != "llama":
            raise InputError(f"{path.name} holds a {metadata['general.architecture']!r} model")
        config = _config(metadata, table)
        weights = dict(_weights(data, table, config, dtype))
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def _config(metadata: dict[str, Any], table: list[Stored]) -> Any:
    from transformers import LlamaConfig

    llama = {key.removeprefix("llama."): value for key, value in metadata.items()}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    return LlamaConfig(
        vocab_size=next(stored.shape[0] for stored in table if stored.name == "token_embd.weight"),
        hidden_size=llama["embedding_length"],
        intermediate_size=llama["feed_forward_length"],
        num_hidden_layers=llama["block_count"],
        num_attention_heads=llama["attention.head_count"],
        num_key_value_heads=llama["attention.head_count_kv"],
        max_position_embeddings=llama["context_length"],
        rms_norm_eps=llama["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": llama["rope.freq_base"]},
        tie_word_embeddings=all(stored.name != "output.weight" for stored in table),
        **{name: token for name, token in ids.items() if token is not None},
    )


_SPECIAL = {
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "pad_token_id": "padding",
    "unk_token_id": "unknown",
}


def _weights(
    data: mmap.mmap, table: list[Stored], config: Any, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    from gguf import GGMLQuantizationType, dequantize
    from gguf.quants import quant_shape_to_byte_shape

    for stored in table:
        kind = GGMLQuantizationType(stored.kind)
        shape = quant_shape_to_byte_shape(stored.shape, kind)
        raw = np.frombuffer(data, np.uint8, int(np.prod(shape)), stored.start).reshape(shape)
        if kind == GGMLQuantizationType.F32:
            raw = raw.view(np.float32)
        weight = torch.from_numpy(np.array(dequantize(raw, kind)).reshape(stored.shape)).to(dtype)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
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
