"""Sprout scenes: a seed becomes a picture of named objects.

A scene has one large, salient object and several smaller ones on a busy background. An object can
have a coloured frame around it and a digit on a badge beside it. One category may occur up to four
times, so that there is something to count. Only the atlas is read from disk, and global random
state has no influence.

A small scene is 336×336 px and shows five to nine objects. A high-resolution one is 672×672 px or
of another shape, shows up to 25 objects and a sign with a number, and most of its objects are
small beside it.
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
SIGN_HEIGHT, SIGN_DIGIT = 46, 21  # px; the second is the room for one digit
MAX_COPIES = 4
HIGH_SHAPES = ((672, 672), (336, 672), (672, 336), (336, 1008), (1008, 336))
"""Heights and widths of high-resolution scenes; every fourth has another one, in between."""

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
HIGH_LOOK = Look(rotation=(0, 12), hue=(0, 0.02), small=(36, 70), large=(150, 220))
# Outside the training range: every sprite is turned and tinted more than any sprite was in
# training.
SHIFTED_LOOK = Look(rotation=(15, 28), hue=(0.03, 0.06), small=(36, 84), large=(108, 172))
HIGH_SHIFTED_LOOK = Look(rotation=(15, 28), hue=(0.03, 0.06), small=(34, 76), large=(140, 230))


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
class Sign:
    """A plate with a number of two or three digits."""

    number: int
    outer: Box


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it; `budwood.sprout.questions.ask` asks about it."""

    seed: int
    split: str
    image: Image.Image = field(repr=False)  # RGB
    objects: tuple[SceneObject, ...]
    sign: Sign | None = None  # in high-resolution scenes

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


def make_scene(seed: int, split: str = "test", high_resolution: bool = False) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: 0 ≤ seed < 1e9; the same arguments always give the same picture.
        split: "train", "validation", "test", or "shifted" (looks outside the training range).
        high_resolution: draw a large picture with many small objects.

    Raises:
        InputError: unknown split, or seed out of range.
    """
    rng = scene_rng(seed, split)
    shifted = split == "shifted"
    if high_resolution:
        look = HIGH_SHIFTED_LOOK if shifted else HIGH_LOOK
        size = _high_size(rng)
        objects, sign = _arrange_high(rng, look, size)
    else:
        look = SHIFTED_LOOK if shifted else TRAIN_LOOK
        size = SIZE, SIZE
        objects, sign = _arrange(rng, look), None
    canvas = _background(rng, size)
    for thing in objects:
        _draw(canvas, thing, rng, look)
    if sign is not None:
        _draw_sign(canvas, sign)
    return Scene(seed, split, canvas, tuple(objects), sign)


def _high_size(rng: random.Random) -> tuple[int, int]:
    """Height and width of a high-resolution scene: half of them are the largest square."""
    chance = rng.random()
    if chance < 0.5:
        return HIGH_SHAPES[0]
    if chance < 0.75:
        return rng.choice(HIGH_SHAPES[1:])
    return rng.randint(420, 800), rng.randint(420, 800)


def _arrange(rng: random.Random, look: Look) -> list[SceneObject]:
    """Place 5 to 9 objects without overlap, the salient first; start again when too crowded."""
    copies = rng.randint(1, MAX_COPIES)  # outside the loop, so that crowded scenes stay as likely
    while True:
        names = rng.sample(categories(), 9)
        others = rng.randint(max(1, 4 - copies), min(6, 8 - copies))
        placed = _place_all(rng, names, copies, others, look, (SIZE, SIZE))
        if placed is not None:
            return placed


def _arrange_high(
    rng: random.Random, look: Look, size: tuple[int, int]
) -> tuple[list[SceneObject], Sign]:
    """Place a sign and 10 to 25 objects on a full square, fewer on less room."""
    copies = rng.randint(1, MAX_COPIES)
    room = min(1.0, size[0] * size[1] / 672**2)
    while True:
        number = max(6, round(rng.randint(10, 25) * room))
        others = max(1, number - 1 - copies)
        sign = _place_sign(rng, size)
        names = rng.sample(categories(), 2 + others)
        placed = _place_all(rng, names, copies, others, look, size, (sign.outer,))
        if placed is not None:
            return placed, sign


def _place_all(
    rng: random.Random,
    names: list[str],
    copies: int,
    others: int,
    look: Look,
    size: tuple[int, int],
    taken: tuple[Box, ...] = (),
) -> list[SceneObject] | None:
    """Place one salient object, some copies of another and others; None where it is too crowded."""
    plan = [names[0], *[names[1]] * copies, *names[2 : 2 + others]]
    placed: list[SceneObject] = []
    for i, name in enumerate(plan):
        sides = look.large if i == 0 else look.small
        occupied = [*taken, *(thing.outer for thing in placed)]
        thing = _place(rng, name, sides, i == 0, occupied, size)
        if thing is None:
            return None
        placed.append(thing)
    return placed


def _place(
    rng: random.Random,
    name: str,
    sides: tuple[int, int],
    salient: bool,
    occupied: list[Box],
    size: tuple[int, int],
) -> SceneObject | None:
    """Find room for an object with its frame and badge; None after 60 attempts."""
    colour = rng.choice(list(COLOURS)) if rng.random() < 0.6 else None
    digit = rng.randint(0, 9) if rng.random() < 0.6 else None
    margin = FRAME_WIDTH + 2
    for _ in range(60):
        side = rng.randint(*sides)
        width = side + 2 * margin + (BADGE if digit is not None else 0)
        height = side + 2 * margin
        left, top = rng.randint(0, size[1] - width), rng.randint(0, size[0] - height)
        outer = (left, top, left + width, top + height)
        if any(_overlap(outer, other) for other in occupied):
            continue
        box = (left + margin, top + margin, left + margin + side, top + margin + side)
        return SceneObject(name, box, colour, digit, outer, salient)
    return None


def _place_sign(rng: random.Random, size: tuple[int, int]) -> Sign:
    number = rng.randint(10, 99) if rng.random() < 0.5 else rng.randint(100, 999)
    width = SIGN_DIGIT * len(str(number)) + 18
    left, top = rng.randint(0, size[1] - width), rng.randint(0, size[0] - SIGN_HEIGHT)
    return Sign(number, (left, top, left + width, top + SIGN_HEIGHT))


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _background(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A random crop of a photograph, mirrored, tinted and darkened or washed out at random."""
    photo = rng.choice(backgrounds())
    side = rng.randint(SIZE // 2, BACKGROUND_SIZE)
    left, top = rng.randint(0, BACKGROUND_SIZE - side), rng.randint(0, BACKGROUND_SIZE - side)
    crop = photo.resize(
        (size[1], size[0]), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
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


def _draw_sign(canvas: Image.Image, sign: Sign) -> None:
    left, top, right, bottom = sign.outer
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((left, top, right - 1, bottom - 1), fill=(250, 250, 240), outline="black")
    pen.rectangle((left + 3, top + 3, right - 4, bottom - 4), outline=(30, 70, 225), width=2)
    for i, digit in enumerate(str(sign.number)):
        middle = left + 9 + SIGN_DIGIT * (i + 0.5), (top + bottom) / 2
        pen.text(middle, digit, "black", _font(), anchor="mm", stroke_width=1)


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
