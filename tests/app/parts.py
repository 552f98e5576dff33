"""What the page is tried with: tiny models, and files that a visitor sends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import torch
from PIL import Image

from tests import tiny_chat, tiny_llm


def picture(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    path = folder / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


def cloud(folder: Path, n_points: int = 200) -> Path:
    path = folder / "cloud.npy"
    np.save(path, np.random.default_rng(0).normal(size=(n_points, 3)))
    return path


def tuned(folder: Path) -> Path:
    """An adapter on a tiny model; its B is not zero, so that it says something else."""
    base = tiny_chat.save(folder / "base")
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_chat.model(), tiny_llm.config())
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"
