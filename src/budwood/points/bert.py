"""Sentence encoders of BERT's architecture, such as MiniLM, on torch and tokenizers alone.

Importing transformers takes longer than loading such a model and embedding a few hundred sentences.
The layers are torch's own; this module maps names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from budwood.errors import InputError
from budwood.files import read_json

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
LAYER = {
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}
"""Parts of a layer in transformers → in ``nn.TransformerEncoderLayer``."""

HiddenStates = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""From texts to the last hidden states, shape (n_texts, n_tokens, d), and which tokens are no
padding, shape (n_texts, n_tokens)."""


class Bert(nn.Module):
    """BERT without its pooler and heads.

    Source: Devlin et al., *BERT*, NAACL 2019.

    Args:
        config: as transformers writes it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        dim, eps = config["hidden_size"], config["layer_norm_eps"]
        self.words = nn.Embedding(config["vocab_size"], dim)
        self.positions = nn.Embedding(config["max_position_embeddings"], dim)
        self.types = nn.Embedding(config["type_vocab_size"], dim)
        self.norm = nn.LayerNorm(dim, eps)
        layer = nn.TransformerEncoderLayer(
            dim,
            config["num_attention_heads"],
            config["intermediate_size"],
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=eps,
            batch_first=True,
        )
        n_layers = config["num_hidden_layers"]
        self.blocks = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the last hidden states.

        Args:
            ids: of tokens, shape (batch, n_tokens).
            mask: which tokens are no padding, bool, same shape.

        Returns:
            Shape (batch, n_tokens, d); those of padding mean nothing.
        """
        place = torch.arange(ids.shape[1], device=ids.device)
        x = self.words(ids) + self.positions(place) + self.types.weight[0]
        return self.blocks(self.norm(x), src_key_padding_mask=~mask)


def is_readable(folder: Path) -> bool:
    """Whether a folder has a model of this architecture, and its tokenizer, in these files."""
    if not all((folder / name).is_file() for name in (CONFIG, WEIGHTS, TOKENIZER)):
        return False
    try:
        config = read_json(folder / CONFIG)
    except InputError:
        return False
    if not isinstance(config, dict) or config.get("model_type") != "bert":
        return False
    known = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
    return all(config.get(key, value) == value for key, value in known.items())


def load(folder: Path) -> HiddenStates:
    """Load a model and its tokenizer.

    Args:
        folder: one for which :func:`is_readable` holds.

    Raises:
        OSError, KeyError, RuntimeError, ValueError: a file is damaged.
    """
    from tokenizers import Tokenizer

    config = read_json(folder / CONFIG)
    state = load_file(folder / WEIGHTS)
    with torch.random.fork_rng(devices=[]):  # on the meta device, torch would import sympy first
        model = Bert(config)
    model.load_state_dict(_renamed(state, config["num_hidden_layers"]), assign=True)
    model.eval().requires_grad_(False)
    tokenizer = Tokenizer.from_str((folder / TOKENIZER).read_text(encoding="utf-8"))
    tokenizer.enable_truncation(config["max_position_embeddings"])
    tokenizer.enable_padding(pad_id=config.get("pad_token_id", 0))

    def hidden(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = tokenizer.encode_batch(list(texts))
        ids = torch.tensor([row.ids for row in rows])
        mask = torch.tensor([row.attention_mask for row in rows]).bool()
        return model(ids, mask), mask

    return hidden


def _renamed(state: Mapping[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """The state of :class:`Bert` from that of transformers' ``BertModel``, in float32."""
    state = {key.removeprefix("bert."): value.float() for key, value in state.items()}
    made = {
        "words.weight": state["embeddings.word_embeddings.weight"],
        "positions.weight": state["embeddings.position_embeddings.weight"],
        "types.weight": state["embeddings.token_type_embeddings.weight"],
        "norm.weight": state["embeddings.LayerNorm.weight"],
        "norm.bias": state["embeddings.LayerNorm.bias"],
    }
    for i in range(n_layers):
        theirs, ours = f"encoder.layer.{i}", f"blocks.layers.{i}"
        for kind in ("weight", "bias"):
            parts = [
                state[f"{theirs}.attention.self.{part}.{kind}"]
                for part in ("query", "key", "value")
            ]
            made[f"{ours}.self_attn.in_proj_{kind}"] = torch.cat(parts)
            made |= {
                f"{ours}.{here}.{kind}": state[f"{theirs}.{there}.{kind}"]
                for there, here in LAYER.items()
            }
    return made
