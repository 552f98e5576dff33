"""Pictures that are encoded once, for many questions, methods and budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from budwood.errors import InputError
from budwood.prune.families import family_of
from budwood.prune.methods.base import Method
from budwood.prune.selection import resolve_method
from budwood.unwrap import innermost


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a vision encoder says about some pictures; made by :func:`encode`.

    Videos count as pictures, and come after the images.

    Attributes:
        features: projected features, one tensor per picture, shape (n_features, d_model), or
            (n_features, n_levels, d_model) for models with deepstack.
        saliency: of the candidates, one float32 tensor per picture, shape (n_candidates,).
        samples: a few pixels of each picture, by which it is known again.
        keys: of the candidates, in the layer of the saliency, one tensor per picture, shape
            (n_candidates, n_heads, d_head); None where the family does not give them.
        whole_crops: features are whole crops, as ``adav-official`` reads them.
        patches: how patches that become one token make its saliency.
    """

    features: list[Tensor]
    saliency: list[Tensor]
    samples: list[Tensor]
    keys: list[Tensor | None]
    whole_crops: bool = False
    patches: str = "mean"

    def __len__(self) -> int:
        return len(self.features)

    def pick(self, pictures: Sequence[int]) -> Encoded:
        """Arrange pictures for a batch: its image ``i`` is picture ``pictures[i]`` of these."""
        return Encoded(
            [self.features[i] for i in pictures],
            [self.saliency[i] for i in pictures],
            [self.samples[i] for i in pictures],
            [self.keys[i] for i in pictures],
            self.whole_crops,
            self.patches,
        )


@torch.no_grad()
def encode(
    model: Any,
    inputs: Mapping[str, Any],
    method: str | Method = "adav",
    patches: str = "mean",
) -> Encoded:
    """Encode the pictures of a batch once, for many calls under ``attach(..., encoded=...)``.

    Example::

        pictures = encode(model, inputs)
        for method in ("adav", "fastervlm", "random"):
            with attach(model, method=method, keep=64, encoded=pictures):
                out = model.generate(**inputs)

    Args:
        model: a transformers model of a known family; may be wrapped by PEFT.
        inputs: what ``generate`` takes, with at least the pictures (``pixel_values``, …).
        method: the method that will choose. ``adav-official`` reads LLaVA-NeXT's crops in another
            form than all other methods, which can share their pictures.
        patches: as of :func:`budwood.prune.attach`.

    Returns:
        Features and saliency, on the device of the model.

    Raises:
        UnsupportedModelError: no family knows the model, or the method does not run on it.
        InputError: there are no pictures.
    """
    whole_crops = resolve_method(method).whole_crops
    family = family_of(innermost(model), whole_crops=whole_crops, patches=patches)
    encoded = Encoded([], [], [], [], family.whole_crops, patches)
    for visuals in family.visuals(inputs):
        recorder = visuals.recorder(inputs)
        with recorder:
            features = visuals.features(inputs)
        layouts = visuals.layouts(inputs, features)
        encoded.features.extend(features)
        encoded.keys.extend(visuals.keys(recorder, layouts))  # the saliency releases them
        encoded.saliency.extend(visuals.saliency(recorder, layouts))
        encoded.samples.extend(map(sample, visuals.pictures(inputs)))
    if not encoded.features:
        raise InputError("inputs have no pictures to encode; give pixel_values, …")
    return encoded


def sample(picture: Tensor) -> Tensor:
    """Pixels spread over a picture, float32, on the CPU, shape (at most 128,)."""
    pixels = picture.detach().flatten()
    return pixels[:: max(1, len(pixels) // 127)][:128].float().cpu()
