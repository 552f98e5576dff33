"""Read pictures from files; one that cannot be used is refused before it fills the memory."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from budwood.errors import InputError

MAX_PIXELS = 50_000_000
MAX_ASPECT = 100
MIN_SIDE = 4


def read_picture(path: Path) -> Image.Image:
    """Read a picture in RGB, turned as its camera says; of an animation the first frame.

    Transparent parts become white, as on a page. The size in the file's header is checked before
    anything is decoded. A picture narrower than ``MIN_SIDE`` pixels is enlarged, because image
    processors take its sides for channels.

    Raises:
        InputError: there is no such file, it is empty, truncated or no picture; or it has more than
            ``MAX_PIXELS`` pixels, or one side is over ``MAX_ASPECT`` times the other; or its values
            have no known range, as those of 32 bits.
    """
    if not path.exists():
        raise InputError(f"there is no file {path}")
    if path.is_dir():
        raise InputError(f"{path} is a directory; give a picture")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty; give a picture")
        with warnings.catch_warnings():
            # The size is checked here, and by a lower limit than Pillow's.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                _check_size(path, picture.size)
                return _enlarged(_rgb(picture, path))
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a picture that Pillow knows; give PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path} has too many pixels; make it smaller first") from None
    except InputError:
        raise
    # What Pillow raises for damaged data depends on the format.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _check_size(path: Path, size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{path} has {width} × {height} pixels, more than {MAX_PIXELS:,}; make it smaller first"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise InputError(
            f"{path} has {width} × {height} pixels, and one side is more than {MAX_ASPECT} times "
            "the other; cut it first"
        )


def _rgb(picture: Image.Image, path: Path) -> Image.Image:
    """A picture turned as its camera says, 8 bits a channel, white where it is transparent.

    Pillow alone would cut 16 bits off at 255, and show what transparent pixels hide.
    """
    of_16_bits = picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PPM")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F") and not of_16_bits:
        raise InputError(
            f"{path} has signed values or 32 bits a pixel (mode {picture.mode}), so that their "
            "range is not known; save it with 8 or 16 unsigned bits"
        )
    if of_16_bits:
        import numpy as np  # not at the start of every command

        clear = picture.info.get("transparency")
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        if isinstance(clear, int):
            picture.info["transparency"] = clear // 257
    if picture.has_transparency_data:
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture.convert("RGBA"))
    return picture.convert("RGB")


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = -(-MIN_SIDE // min(picture.size))
    if factor == 1:
        return picture
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)
