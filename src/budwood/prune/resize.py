"""The baseline that prunes nothing: a smaller picture, of which the encoder makes fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from budwood.errors import BudgetError, InputError, UnsupportedModelError
from budwood.prune.budget import Budget

_STEPS = 256
"""Scales that are tried: 1/256, 2/256, … 1 of each side."""


def resize_for(processor: Any, image: Image.Image, keep: int | float) -> Image.Image:
    """Scale a picture down so that it takes at most so many visual tokens.

    For models whose encoder takes pictures of several sizes. Qwen models make tokens in proportion
    to the pixels. LLaVA-NeXT drops crops, and never goes below the fewest crops that its
    ``image_grid_pinpoints`` allow. Of the scales that fit, the one with the most tokens is taken,
    and of these the largest.

    Args:
        processor: of the model.
        image: any picture.
        keep: tokens, an int, or a fraction of those of the whole picture, a float in (0, 1].
            Newline tokens count.

    Returns:
        The picture, scaled with a bicubic filter; the same object if it fits as it is.

    Raises:
        BudgetError: ``keep`` is no budget, or no scale takes so few tokens.
        InputError: ``image`` is no PIL image, or the processor refuses its size.
        UnsupportedModelError: the processor does not say how many tokens a picture takes.
    """
    if not isinstance(image, Image.Image):
        raise InputError(f"image is a {type(image).__name__}; give a PIL image")
    width, height = image.size
    scales = [step / _STEPS for step in range(_STEPS, 0, -1)]
    sizes = [(max(1, round(height * s)), max(1, round(width * s))) for s in scales]
    counts = visual_tokens(processor, sizes)
    most = Budget.parse(keep).count(counts[0], clamp=True)
    if counts[0] <= most:
        return image
    fitting = [place for place, count in enumerate(counts) if count <= most]
    if not fitting:
        raise BudgetError(
            f"keep={keep} is below the {min(counts)} visual tokens that this processor makes of a "
            f"{width}×{height} picture at any scale; keep more, or choose another baseline"
        )
    best = max(fitting, key=lambda place: (counts[place], -place))
    rows, columns = sizes[best]
    return image.resize((columns, rows), Image.Resampling.BICUBIC)


def visual_tokens(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Visual tokens that a processor makes of pictures.

    Args:
        processor: of a transformers model.
        sizes: height and width of each picture in pixels.

    Raises:
        UnsupportedModelError: the processor does not say.
        InputError: it refuses a size, such as one of a very narrow picture.
    """
    # What vLLM asks processors too; transformers has no public way without making the pixels.
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None:
        raise UnsupportedModelError(
            f"{type(processor).__name__} does not say how many tokens a picture takes; give the "
            "processor of a vision-language model"
        )
    try:
        found = count(image_sizes=[list(size) for size in sizes])
    except ValueError as error:
        raise InputError(f"{type(processor).__name__} refuses a size: {error}") from error
    return list(map(int, found["num_image_tokens"]))
