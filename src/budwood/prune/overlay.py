"""Pictures of what was kept: the kept patches, and the scores that they were chosen by."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from budwood.checks import need_int
from budwood.errors import InputError, InputWarning
from budwood.prune.report import ImageReport

PANEL = 420
"""Longer side of each panel in pixels."""

_GAP, _LINE, _TEXT = 16, 20, 14
_MOST_NAMED = 10  # characters in a warning
_DIM, _GREY_OF = 0.35, (0.299, 0.587, 0.114)
_OUTLINE = (255, 176, 0)
_INK, _PAPER = (30, 30, 30), (255, 255, 255)
# Dark to bright, so that it reads without colour as well.
_HEAT = np.array([(20, 11, 54), (120, 28, 109), (212, 72, 66), (251, 155, 6), (252, 255, 164)])

Floats = NDArray[np.float32]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Panel:
    """A picture of a sheet, lines below it, and whether a colour bar follows."""

    picture: Image.Image
    titles: tuple[str, ...]
    has_bar: bool = False


def draw(
    image: Image.Image, report: ImageReport, caption: str | Sequence[str] = (), frame: int = 0
) -> Image.Image:
    """Draw panels side by side: kept patches bright and the rest dimmed, then the score maps.

    Patches are where the model saw them in this picture, whatever its processor cropped or padded.
    Parts that it never saw are hatched. Where tokens overlap, as an overview and its crops do, a
    pixel is bright if any of its tokens was kept, and has the largest of its scores. The maps are
    shaded by the square root of the score over the largest one.

    Args:
        image: the picture as the processor was given it.
        report: what was kept of it.
        caption: a line above the panels, or several.
        frame: of a video, counted as in ``report.frames``; ``image`` is a picture of it.

    Returns:
        An RGB picture.

    Raises:
        InputError: the video has no such frame.
    """
    drawn = layers(image, report, frame)
    words = {
        "kept": _kept_line(report, frame),
        "saliency": "saliency",
        "relevance": "relevance to the question",
    }
    panels = [
        Panel(picture, (words[name],), has_bar=name != "kept") for name, picture in drawn.items()
    ]
    return _sheet(panels, caption, len(panels))


def layers(image: Image.Image, report: ImageReport, frame: int = 0) -> dict[str, Image.Image]:
    """Draw what :func:`draw` puts side by side as pictures of their own.

    Args:
        image: the picture as the processor was given it.
        report: what was kept of it.
        frame: of a video; ``image`` is a picture of it.

    Returns:
        RGB pictures of one size: ``"kept"``, and ``"saliency"`` and ``"relevance"`` where the
        method uses them.

    Raises:
        InputError: the video has no such frame, or the image or the report is something else.
    """
    _check(image, report)
    need_int(0, frame=frame)
    if frame >= report.frames:
        raise InputError(f"frame={frame}, and the report has {report.frames}, counted from 0")
    picture = _fitted(image)
    n_tokens = report.n_before // report.frames
    part = slice(frame * n_tokens, (frame + 1) * n_tokens)
    boxes = _pixels(report.boxes_on((image.height, image.width))[part], picture.size)
    kept = [boxes[i] for i in report.kept_by_frame[frame].tolist()]
    drawn = {"kept": _kept_panel(picture, boxes, kept)}
    for name, scores in (("saliency", report.saliency), ("relevance", report.relevance)):
        if scores is not None:
            drawn[name] = _heat_panel(picture, boxes, scores[part])
    return drawn


def _kept_line(report: ImageReport, frame: int) -> str:
    n_kept, n_tokens = len(report.kept_by_frame[frame]), report.n_before // report.frames
    return f"bright: the {n_kept} of {n_tokens} visual tokens that were kept"


def draw_methods(
    image: Image.Image,
    reports: Mapping[str, ImageReport],
    titles: Mapping[str, str],
    caption: str | Sequence[str] = (),
) -> Image.Image:
    """Draw what several methods kept of one picture, three panels in a row.

    Args:
        image: the picture as the processor was given it.
        reports: what each method kept of it.
        titles: a third line below each panel, such as the answer.
        caption: a line above the panels, or several.

    Returns:
        An RGB picture.

    Raises:
        InputError: there is no report, one is of a video or has no title, or the image or a report
            is something else.
    """
    if not reports:
        raise InputError("nothing to draw: give the report of at least one method")
    for method, report in reports.items():
        _check(image, report)
        if method not in titles:
            raise InputError(f"there is no title for {method!r}; give one for each report")
    if any(report.kind == "video" for report in reports.values()):
        raise InputError("a report is of a video; draw its frames with draw(..., frame=...)")
    picture = _fitted(image)
    panels = []
    for method, report in reports.items():
        boxes = _pixels(report.boxes_on((image.height, image.width)), picture.size)
        panel = _kept_panel(picture, boxes, [boxes[i] for i in report.kept.tolist()])
        counted = f"{report.n_after} of {report.n_before} visual tokens"
        panels.append(Panel(panel, (method, counted, titles[method])))
    return _sheet(panels, caption, min(3, len(panels)))


def _fitted(image: Image.Image) -> Image.Image:
    """The picture at the size of a panel."""
    scale = PANEL / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def _check(image: Image.Image, report: ImageReport) -> None:
    if not isinstance(image, Image.Image):
        raise InputError(f"image is a {type(image).__name__}; give a PIL.Image")
    if not isinstance(report, ImageReport):
        raise InputError(
            f"report is a {type(report).__name__}; give one entry, such as session.report[0]"
        )


def _pixels(boxes: Tensor, size: tuple[int, int]) -> list[Box]:
    """Boxes in pixels of the panel; empty where they are out of sight."""
    width, height = size
    scaled = boxes.cpu().double().numpy() * [width, height, width, height]
    return [(int(x0), int(y0), int(x1), int(y1)) for x0, y0, x1, y1 in scaled.round()]


def _kept_panel(
    picture: Image.Image,
    boxes: Sequence[Box],
    kept: Sequence[Box],
) -> Image.Image:
    colours = np.asarray(picture, dtype=np.float32)
    bright, seen = _painted(picture, kept), _painted(picture, boxes)
    dimmed = _grey(picture) * _DIM
    dimmed = np.where(seen > 0, dimmed, dimmed * _hatch(picture))
    panel = _as_image(np.where(bright > 0, colours, dimmed))
    pen = ImageDraw.Draw(panel)
    for x0, y0, x1, y1 in kept:
        if x1 > x0 and y1 > y0:
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=_OUTLINE)
    return panel


def _heat_panel(picture: Image.Image, boxes: Sequence[Box], scores: Tensor) -> Image.Image:
    values = scores.detach().float().cpu().numpy()
    values = values - values.min()  # the colours span what there is, of a flat list too
    values = np.sqrt(values / max(float(values.max()), float(np.finfo(np.float32).tiny)))
    heat = _heat_colour(_painted(picture, boxes, values))
    grey = _grey(picture) * _DIM
    seen = _painted(picture, boxes) > 0
    return _as_image(np.where(seen, 0.7 * heat + grey, grey * _hatch(picture)))


def _painted(
    picture: Image.Image,
    boxes: Sequence[Box],
    values: Sequence[float] | NDArray | None = None,
) -> Floats:
    """The largest value of the boxes over each pixel, 0 where there is none: (height, width, 1)."""
    canvas = np.zeros((picture.height, picture.width, 1), dtype=np.float32)
    for (x0, y0, x1, y1), value in zip(boxes, np.ones(len(boxes)) if values is None else values):
        patch = canvas[y0:y1, x0:x1]
        np.maximum(patch, value, out=patch)
    return canvas


def _grey(picture: Image.Image) -> Floats:
    grey = np.asarray(picture, dtype=np.float32) @ np.array(_GREY_OF, dtype=np.float32)
    return grey[..., None].repeat(3, axis=-1)


def _hatch(picture: Image.Image) -> Floats:
    y, x = np.mgrid[: picture.height, : picture.width]
    return ((x + y) // 6 % 2)[..., None].astype(np.float32)


def _heat_colour(values: Floats) -> Floats:
    """Colours of values in [0, 1], shape (height, width, 3)."""
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(values[..., 0], stops, channel) for channel in _HEAT.T]
    return np.stack(channels, axis=-1).astype(np.float32)


def _as_image(pixels: NDArray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def _sheet(panels: Sequence[Panel], caption: str | Sequence[str], columns: int) -> Image.Image:
    """Panels in rows, caption above, titles and colour bars below each."""
    caption = [caption] if isinstance(caption, str) else caption
    # A narrow picture still needs room for its legend.
    width = max(PANEL, *(panel.picture.width for panel in panels))
    height = max(panel.picture.height for panel in panels)
    n_lines = max(len(panel.titles) + panel.has_bar for panel in panels)
    row_height = height + n_lines * _LINE + _GAP
    top = _GAP + _LINE * len(caption) + (_GAP // 2 if caption else 0)
    n_rows = -(-len(panels) // columns)
    size = (columns * (width + _GAP) + _GAP, top + n_rows * row_height)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = _font_for([*caption, *(title for panel in panels for title in panel.titles)])
    for number, line in enumerate(caption):
        place = (_GAP, _GAP + number * _LINE)
        pen.text(place, _clipped(line, size[0] - 2 * _GAP, font), _INK, font)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        left, upper = _GAP + column * (width + _GAP), top + row * row_height
        sheet.paste(panel.picture, (left, upper))
        below = upper + height + 6
        for line in panel.titles:
            pen.text((left, below), _clipped(line, width, font), _INK, font)
            below += _LINE
        if panel.has_bar:
            _colour_bar(sheet, (left, below), font)
    return sheet


def _font_for(lines: Sequence[str]) -> Font:
    """Pillow's font, or matplotlib's if that has more of the characters and is installed.

    Warns of characters that neither has.
    """
    characters = sorted(set("".join("".join(lines).split())))  # white space is drawn as one space
    font: Font = ImageFont.load_default(_TEXT)
    lacking = _lacking(font, characters)
    if lacking and (other := _matplotlib_font()):
        without = _lacking(other, characters)
        if len(without) < len(lacking):
            font, lacking = other, without
    if lacking:
        some = "".join(lacking[:_MOST_NAMED]) + ("…" if len(lacking) > _MOST_NAMED else "")
        warnings.warn(
            f"the picture shows boxes for {some}, which its font does not have",
            InputWarning,
            stacklevel=4,
        )
    return font


def _matplotlib_font() -> Font | None:
    try:
        import matplotlib as mpl

        file = Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
        return ImageFont.truetype(str(file), _TEXT)
    except (ImportError, OSError):
        return None


def _lacking(font: Font, characters: Sequence[str]) -> list[str]:
    """The characters that a font draws as it draws what is no character."""
    box = _drawn("\U0010ffff", font)
    return [one for one in characters if _drawn(one, font) == box]


def _drawn(character: str, font: Font) -> bytes:
    canvas = Image.new("L", (2 * _TEXT, 2 * _TEXT))
    ImageDraw.Draw(canvas).text((0, 0), character, 255, font)
    return canvas.tobytes()


def _colour_bar(sheet: Image.Image, where: tuple[int, int], font: Font) -> None:
    x, y = where
    pen = ImageDraw.Draw(sheet)
    pen.text((x, y), "low", _INK, font)
    ramp = np.linspace(0, 1, 120, dtype=np.float32)[None, :, None].repeat(10, axis=0)
    sheet.paste(_as_image(_heat_colour(ramp)), (x + 32, y + 4))
    pen.text((x + 160, y), "high", _INK, font)


def _clipped(line: str, width: int, font: Font) -> str:
    """The beginning of a line that fits."""
    line = " ".join(line.split())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
