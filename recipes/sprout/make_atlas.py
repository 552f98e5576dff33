"""Build the sprite atlas and the background strip that sprout scenes are drawn from.

Everything comes from package registries: the sprites from the npm packages
`@lobehub/fluent-emoji-3d` and `emojibase-data` (both MIT), the photographs from the PyPI packages
scikit-image and scikit-learn.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0     # then unpack each into its
    own folder python recipes/sprout/make_atlas.py --emoji fluent-emoji-3d/package --labels
    emojibase-data/package
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import skimage
import sklearn.datasets
from PIL import Image

from budwood.sprout.atlas import BACKGROUND_SIZE, DATA, SPRITE_SIZE

CATEGORIES = """
monkey dog fox cat lion tiger horse zebra cow pig giraffe elephant mouse rabbit bear panda
kangaroo chicken penguin eagle duck owl parrot frog crocodile turtle snake whale dolphin shark
octopus crab lobster snail butterfly spider cactus rose sunflower mushroom grapes watermelon lemon
banana pineapple pear peach strawberry tomato coconut avocado carrot broccoli onion bread pizza
sandwich egg cookie pie castle house tent train bus taxi tractor motorcycle bicycle ship airplane
helicopter rocket umbrella balloon trophy basketball baseball kite crown bell guitar violin drum
trumpet camera candle laptop telephone key hammer scissors books envelope ladder chair bed bucket
broom anchor
""".split()  # noqa: SIM905

# Public domain or CC0 (scikit-image's data/README); scikit-learn adds two CC-BY ones: see NOTICE.
PHOTOGRAPHS = """
astronaut.png brick.png chelsea.png coffee.png grass.png gravel.png hubble_deep_field.jpg rocket.jpg
""".split()  # noqa: SIM905
COLUMNS = 10


def sprite_paths(emoji: Path, labels: Path) -> dict[str, Path]:
    """Map each category to its picture, by hexcode with or without the variation selector."""
    entries = json.loads((labels / "en" / "data.json").read_text())
    by_label = {e["label"]: e["hexcode"].lower() for e in entries}
    paths = {}
    for name in CATEGORIES:
        code = by_label[name]
        spellings = (code, code.replace("-fe0f", ""), f"{code}-fe0f")
        candidates = [emoji / "assets" / f"{c}.webp" for c in spellings]
        paths[name] = next(p for p in candidates if p.exists())
    return paths


def trimmed(sprite: Image.Image) -> Image.Image:
    """Crop to what is visible, pad to a square, resize: a sprite is as large as its object."""
    sprite = sprite.crop(sprite.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    side = max(sprite.size)
    square = Image.new("RGBA", (side, side))
    square.paste(sprite, ((side - sprite.width) // 2, (side - sprite.height) // 2))
    return square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)


def photographs() -> list[Image.Image]:
    folder = Path(skimage.__file__).parent / "data"
    pictures = [
        Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS if (folder / name).exists()
    ]
    pictures += [Image.fromarray(p) for p in sklearn.datasets.load_sample_images().images]
    return pictures


def square(picture: Image.Image, side: int) -> Image.Image:
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    return picture.crop((left, top, left + edge, top + edge)).resize(
        (side, side), Image.Resampling.LANCZOS
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--emoji", type=Path, required=True, help="unpacked @lobehub/fluent-emoji-3d"
    )
    parser.add_argument("--labels", type=Path, required=True, help="unpacked emojibase-data")
    args = parser.parse_args()

    paths = sprite_paths(args.emoji, args.labels)
    rows = -(-len(paths) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * SPRITE_SIZE, rows * SPRITE_SIZE))
    for i, path in enumerate(paths.values()):
        tile = trimmed(Image.open(path).convert("RGBA"))
        atlas.paste(tile, (i % COLUMNS * SPRITE_SIZE, i // COLUMNS * SPRITE_SIZE))
    DATA.mkdir(parents=True, exist_ok=True)
    atlas.save(DATA / "sprites.webp", quality=88, method=6)
    (DATA / "sprites.json").write_text(json.dumps(list(paths), indent=0) + "\n")

    pictures = photographs()
    strip = Image.new("RGB", (len(pictures) * BACKGROUND_SIZE, BACKGROUND_SIZE))
    for i, picture in enumerate(pictures):
        strip.paste(square(picture, BACKGROUND_SIZE), (i * BACKGROUND_SIZE, 0))
    strip.save(DATA / "backgrounds.webp", quality=80, method=6)
    print(f"{len(paths)} sprites, {len(pictures)} backgrounds → {DATA}")


if __name__ == "__main__":
    main()
