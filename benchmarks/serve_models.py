"""Write the models that benchmarks/serve.sh serves.

    python benchmarks/serve_models.py FOLDER

FOLDER/sprout is the embedded model, with 256 visual tokens; FOLDER/2304 has its language model
behind a random tower with 2,304.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

import budwood
from budwood.sprout import model as sprout

SIDE, PATCH = 672, 14


def main(folder: Path) -> None:
    """Both models."""
    save(*budwood.load("sprout-256"), folder / "sprout")
    save(*large(), folder / "2304")


def large() -> tuple[Any, Any]:
    """48 × 48 visual tokens; only the speed of such a model means anything."""
    torch.manual_seed(0)
    sizes = sprout.tower_config().to_dict() | {"image_size": SIDE, "patch_size": PATCH}
    tokenizer, llm = sprout.load_tokenizer(), sprout.load_llm()
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes)).to(torch.bfloat16)
    processor = sprout.make_processor(tokenizer)
    processor.patch_size = PATCH
    square = {"height": SIDE, "width": SIDE}
    processor.image_processor.size = processor.image_processor.crop_size = square
    return sprout.assemble(tower, llm, tokenizer), processor


def save(model: Any, processor: Any, folder: Path) -> None:
    """Save a model with the tower's older names, the only ones that stock vLLM 0.32 loads."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    file, new, old = folder / "model.safetensors", "vision_tower.", "vision_tower.vision_model."
    weights = {
        name if old in name else name.replace(new, old): weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
