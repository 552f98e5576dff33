"""Sprout scenes: a seed becomes a picture of named objects.

A scene is 336×336 px: one large, salient object and four to eight smaller ones on a busy
background. An object can have a coloured frame around it and a digit on a badge beside it. One
category may occur up to four times, so that there is something to count. Only the atlas is read
from disk, and global random state has no influence.
"""

from __future__ import annotations

import colorsys
import math
import random
from dataclasses import dataclass, field
from functools import cache

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from budwood.errors import InputError
from budwood.sprout.atlas import BACKGROUND_SIZE, backgrounds, categories, sprites

SIZE = 336
COLOURS = {
    "red": (222, 30, 38),
    "orange": (255, 140, 0),
    "yellow": (255, 226, 30),
    "green": (24, 160, 60),
    "blue": (30, 70, 225),
    "purple": (140, 40, 190),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
FRAME_WIDTH = 6
BADGE = 36
MAX_COPIES = 4

# A split's seed is its offset plus the user's seed, so the splits share no seed.
SPLIT_OFFSETS = {
    "train": 0,
    "validation": 1_000_000_000,
    "test": 2_000_000_000,
    "shifted": 3_000_000_000,
}
SEEDS_PER_SPLIT = 1_000_000_000

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Look:
    """How far a sprite's look may differ from the atlas."""

    rotation: tuple[float, float]  # degrees, either direction
    hue: tuple[float, float]  # turns of the colour wheel, either direction
    small: tuple[int, int] = (40, 76)  # side of an ordinary object, px
    large: tuple[int, int] = (120, 160)  # side of the salient object, px


TRAIN_LOOK = Look(rotation=(0, 12), hue=(0, 0.02))
# Outside the training range: every sprite is turned and tinted more than any sprite was in
# training.
SHIFTED_LOOK = Look(rotation=(15, 28), hue=(0.03, 0.06), small=(36, 84), large=(108, 172))


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene. Boxes are (left, top, right, bottom) in px."""

    category: str
    box: Box  # the sprite
    colour: str | None  # of the frame, if it has one
    digit: int | None  # on the badge beside it, if it has one
    outer: Box  # sprite, frame and badge
    salient: bool  # the one large object of the scene

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it; `budwood.sprout.questions.ask` asks about it."""

    seed: int
    split: str
    image: Image.Image = field(repr=False)  # RGB, SIZE × SIZE
    objects: tuple[SceneObject, ...]

    @property
    def salient(self) -> SceneObject:
        return self.objects[0]

    def copies(self, category: str) -> list[SceneObject]:
        return [o for o in self.objects if o.category == category]


def scene_rng(seed: int, split: str) -> random.Random:
    """The random stream of one scene; streams of different splits never coincide.

    Raises:
        InputError: unknown split, or seed out of range.
    """
    check_split(split)
    if not 0 <= seed < SEEDS_PER_SPLIT:
        raise InputError(f"seed {seed} is out of range; give 0 to {SEEDS_PER_SPLIT - 1}")
    return random.Random(SPLIT_OFFSETS[split] + seed)


def check_split(split: str) -> None:
    """Refuse an unknown split.

    Raises:
        InputError: it is none of ``SPLIT_OFFSETS``.
    """
    if split not in SPLIT_OFFSETS:
        raise InputError(f"unknown split {split!r}; give one of {', '.join(SPLIT_OFFSETS)}")


def make_scene(seed: int, split: str = "test") -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: 0 ≤ seed < 1e9; the same seed and split always give the same picture.
        split: "train", "validation", "test", or "shifted" (looks outside the training range).

    Raises:
        InputError: unknown split, or seed out of range.
    """
    rng = scene_rng(seed, split)
    look = SHIFTED_LOOK if split == "shifted" else TRAIN_LOOK
    objects = _arrange(rng, look)
    canvas = _background(rng)
    for thing in objects:
        _draw(canvas, thing, rng, look)
    return Scene(seed, split, canvas, tuple(objects))


def _arrange(rng: random.Random, look: Look) -> list[SceneObject]:
    """Place 5 to 9 objects without overlap, the salient first; start again when too crowded."""
    copies = rng.randint(1, MAX_COPIES)  # outside the loop, so that crowded scenes stay as likely
    while True:
        names = rng.sample(categories(), 9)
        others = rng.randint(max(1, 4 - copies), min(6, 8 - copies))
        plan = [names[0], *[names[1]] * copies, *names[2 : 2 + others]]
        placed: list[SceneObject] = []
        for i, name in enumerate(plan):
            thing = _place(rng, name, look.large if i == 0 else look.small, i == 0, placed)
            if thing is None:
                break
            placed.append(thing)
        else:
            return placed


def _place(
    rng: random.Random, name: str, sides: tuple[int, int], salient: bool, placed: list[SceneObject]
) -> SceneObject | None:
    """Find room for an object with its frame and badge; None after 60 attempts."""
    colour = rng.choice(list(COLOURS)) if rng.random() < 0.6 else None
    digit = rng.randint(0, 9) if rng.random() < 0.6 else None
    margin = FRAME_WIDTH + 2
    for _ in range(60):
        side = rng.randint(*sides)
        width = side + 2 * margin + (BADGE if digit is not None else 0)
        height = side + 2 * margin
        left, top = rng.randint(0, SIZE - width), rng.randint(0, SIZE - height)
        outer = (left, top, left + width, top + height)
        if any(_overlap(outer, other.outer) for other in placed):
            continue
        box = (left + margin, top + margin, left + margin + side, top + margin + side)
        return SceneObject(name, box, colour, digit, outer, salient)
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _background(rng: random.Random) -> Image.Image:
    """A random crop of a photograph, mirrored, tinted and darkened or washed out at random."""
    photo = rng.choice(backgrounds())
    side = rng.randint(SIZE // 2, BACKGROUND_SIZE)
    left, top = rng.randint(0, BACKGROUND_SIZE - side), rng.randint(0, BACKGROUND_SIZE - side)
    crop = photo.resize(
        (SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    crop = ImageEnhance.Contrast(crop).enhance(rng.uniform(0.4, 0.9))
    veil = tuple(
        round(255 * c) for c in colorsys.hsv_to_rgb(rng.random(), 0.4, rng.uniform(0.3, 1))
    )
    return Image.blend(crop, Image.new("RGB", crop.size, veil), rng.uniform(0.1, 0.45))


def _draw(canvas: Image.Image, thing: SceneObject, rng: random.Random, look: Look) -> None:
    left, top, right, bottom = thing.box
    pen = ImageDraw.Draw(canvas)
    if thing.colour is not None:
        grown = (
            left - FRAME_WIDTH,
            top - FRAME_WIDTH,
            right + FRAME_WIDTH - 1,
            bottom + FRAME_WIDTH - 1,
        )
        pen.rectangle(grown, outline=COLOURS[thing.colour], width=FRAME_WIDTH)
    sprite = _dressed(thing.category, right - left, rng, look)
    canvas.paste(sprite, (left, top), sprite)
    if thing.digit is not None:
        x, y = thing.outer[2] - BADGE, (top + bottom - BADGE) // 2
        pen.rounded_rectangle(
            (x, y, x + BADGE - 2, y + BADGE - 2), radius=5, fill=(20, 20, 20), outline="white"
        )
        pen.text(
            (x + BADGE / 2 - 1, y + BADGE / 2 - 1),
            str(thing.digit),
            "white",
            _font(),
            anchor="mm",
            stroke_width=1,
        )


def _dressed(category: str, side: int, rng: random.Random, look: Look) -> Image.Image:
    """The category's sprite at its size, mirrored, turned and tinted at random."""
    sprite = sprites()[categories().index(category)]
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turn = rng.choice((-1, 1)) * rng.uniform(*look.rotation)
    hue = rng.choice((-1, 1)) * rng.uniform(*look.hue)
    sprite = sprite.resize((side, side), Image.Resampling.BILINEAR).rotate(
        turn, Image.Resampling.BILINEAR
    )
    return _tinted(sprite, hue)


def _tinted(sprite: Image.Image, hue: float) -> Image.Image:
    """Turn the colours around the grey axis by `hue` of a full circle."""
    cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    a, b = cos + (1 - cos) / 3, (1 - cos) / 3
    c = sin / math.sqrt(3)
    matrix = (a, b - c, b + c, 0, b + c, a, b - c, 0, b - c, b + c, a, 0)
    turned = sprite.convert("RGB").convert("RGB", matrix)
    turned.putalpha(sprite.getchannel("A"))
    return turned


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(32)
