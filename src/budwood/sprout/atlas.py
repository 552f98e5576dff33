"""The pictures that sprout scenes are drawn from: a sprite atlas and a strip of photographs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from PIL import Image

DATA = Path(__file__).parent / "data"
SPRITE_SIZE = 128
BACKGROUND_SIZE = 400


@cache
def categories() -> tuple[str, ...]:
    """Names of the objects that scenes can show, in the order of the atlas."""
    return tuple(json.loads((DATA / "sprites.json").read_text()))


@cache
def sprites() -> tuple[Image.Image, ...]:
    """One RGBA sprite a category, `SPRITE_SIZE` px square, cropped to what is visible."""
    return _tiles("sprites.webp", "RGBA", SPRITE_SIZE)[: len(categories())]


@cache
def backgrounds() -> tuple[Image.Image, ...]:
    """Photographs that serve as busy backgrounds, RGB, `BACKGROUND_SIZE` px square."""
    return _tiles("backgrounds.webp", "RGB", BACKGROUND_SIZE)


def _tiles(file: str, mode: str, side: int) -> tuple[Image.Image, ...]:
    """Cut a sheet of square tiles, row by row."""
    with Image.open(DATA / file) as picture:
        sheet = picture.convert(mode)
    return tuple(
        sheet.crop((x, y, x + side, y + side))
        for y in range(0, sheet.height, side)
        for x in range(0, sheet.width, side)
    )
