from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from budwood.errors import InputError, InputWarning
from budwood.prune import attach
from budwood.prune.chat import prepare
from budwood.prune.methods.base import Split
from budwood.prune.overlay import PANEL, draw, draw_methods, layers
from budwood.prune.report import ImageReport


def report(boxes, kept, saliency=None, relevance=None, view=(0.0, 0.0, 1.0, 1.0)):
    """What was kept of a picture of which the encoder saw the part `view`."""
    x0, y0, x1, y1 = view
    size = torch.tensor([x1 - x0, y1 - y0, x1 - x0, y1 - y0])
    placed = torch.tensor(boxes) * size + torch.tensor([x0, y0, x0, y0])
    return ImageReport(
        kept=torch.tensor(kept),
        n_before=len(boxes),
        n_after=len(kept),
        n_fixed=0,
        n_unpruned=len(boxes),
        split=Split(),
        saliency=saliency,
        relevance=relevance,
        row=0,
        image=0,
        grid=None,
        question=(),
        boxes=torch.tensor(boxes),
        placed=lambda _: placed,
    )


QUARTERS = [[x / 2, y / 2, (x + 1) / 2, (y + 1) / 2] for y in (0, 1) for x in (0, 1)]
LEFT, TOP = 16, 16  # of the first panel, where there is no caption


def pixels(picture, rows, columns, panel=0):
    """A patch well inside a quarter of a square panel."""
    left = LEFT + panel * (PANEL + 16)
    half = PANEL // 2
    y, x = TOP + rows * half + half // 2, left + columns * half + half // 2
    return np.asarray(picture)[y - 20 : y + 20, x - 20 : x + 20].reshape(-1, 3).astype(float)


def test_kept_is_bright_and_the_rest_is_grey_and_dim():
    image = Image.new("RGB", (80, 80), (200, 100, 40))
    drawn = draw(image, report(QUARTERS, [1]))
    assert (pixels(drawn, 0, 1) == (200, 100, 40)).all()
    for rows, columns in ((0, 0), (1, 0), (1, 1)):
        patch = pixels(drawn, rows, columns)
        assert patch.max() < 60 and (np.ptp(patch, axis=1) == 0).all()


def test_maps_follow_their_scores():
    image = Image.new("RGB", (80, 80), (10, 10, 10))
    scores = torch.tensor([0.1, 0.9, 0.0, 0.3])
    drawn = draw(image, report(QUARTERS, [1], saliency=scores, relevance=scores.flip(0)))
    order = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for panel, given in ((1, scores), (2, scores.flip(0))):
        shades = torch.tensor([pixels(drawn, *where, panel).mean() for where in order])
        assert torch.equal(shades.argsort(), given.argsort())
    assert draw(image, report(QUARTERS, [1], relevance=scores)).width == 2 * PANEL + 3 * 16


def test_layers_are_the_panels_of_the_sheet():
    image = Image.new("RGB", (80, 40), (200, 100, 40))
    one = report(QUARTERS, [1], relevance=torch.rand(4))
    found, sheet = layers(image, one), draw(image, one)
    assert [*found] == ["kept", "relevance"]
    for panel, drawn in enumerate(found.values()):
        left = LEFT + panel * (PANEL + 16)
        part = sheet.crop((left, TOP, left + drawn.width, TOP + drawn.height))
        assert np.array_equal(np.asarray(part), np.asarray(drawn))


def test_what_the_model_never_saw_is_hatched():
    image = Image.new("RGB", (100, 50), (90, 90, 90))
    # The middle half of the width: a square picture cut from a wide one.
    drawn = draw(image, report(QUARTERS, [0], view=(0.25, 0.0, 0.75, 1.0)))
    panel = np.asarray(drawn)[TOP : TOP + PANEL // 2, LEFT : LEFT + PANEL].astype(float)
    outside, inside = panel[:, : PANEL // 4 - 2], panel[110:, PANEL // 4 + 2 : PANEL // 2 - 2]
    assert outside.min() == 0 and outside.max() > 20
    assert inside.std() == 0
    bright = panel[2:100, PANEL // 4 + 2 : PANEL // 2 - 2]
    assert (bright == 90).all()


def test_a_frame_of_a_video_has_its_own_tokens():
    image = Image.new("RGB", (90, 90), (200, 200, 200))
    video = report(QUARTERS * 2, [1, 4, 7], torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7]))
    video = dataclasses.replace(video, kind="video", frames=2)
    assert [kept.tolist() for kept in video.kept_by_frame] == [[1], [0, 3]]
    first, second = (np.asarray(draw(image, video, frame=frame)) for frame in (0, 1))
    alone = report(QUARTERS, [0, 3], torch.tensor([4.0, 5, 6, 7]))
    assert (second == np.asarray(draw(image, alone))).all()
    assert (first != second).any()
    with pytest.raises(InputError, match="frame=2, and the report has 2"):
        draw(image, video, frame=2)


def test_something_else_to_draw_says_so():
    kept = report(QUARTERS, [0])
    with pytest.raises(InputError, match=r"report is a list; give one entry.*report\[0\]"):
        draw(Image.new("RGB", (30, 20)), [])
    with pytest.raises(InputError, match="image is a str; give a PIL.Image"):
        draw("picture.png", kept)
    with pytest.raises(InputError, match="frame='1'; give an int"):
        draw(Image.new("RGB", (30, 20)), kept, frame="1")
    with pytest.raises(InputError, match="image is a str; give a PIL.Image"):
        draw_methods("picture.png", {"adav": kept}, {"adav": ""})
    with pytest.raises(InputError, match="report is a int"):
        draw_methods(Image.new("RGB", (30, 20)), {"adav": 3}, {"adav": ""})
    with pytest.raises(InputError, match="there is no title for 'adav'"):
        draw_methods(Image.new("RGB", (30, 20)), {"adav": kept}, {})


def test_a_caption_of_one_line():
    image, kept = Image.new("RGB", (80, 80)), report(QUARTERS, [0])
    one, listed = draw(image, kept, "Hello"), draw(image, kept, ["Hello"])
    assert (np.asarray(one) == np.asarray(listed)).all()


def test_other_scripts_and_what_no_font_has():
    pytest.importorskip("matplotlib")
    image, kept = Image.new("RGB", (80, 80)), report(QUARTERS, [0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words, others = (np.asarray(draw(image, kept, text)) for text in ("Что", "Кто"))
    assert (words != others).any()  # letters, not one box for all
    with pytest.warns(InputWarning, match="the picture shows boxes for 图里, which"):
        draw(image, kept, "图里")


@pytest.mark.parametrize("space", ["\t", "\r\n", "\x85", "\u2029"])
def test_white_space_in_a_caption_is_one_space(space):
    image, kept = Image.new("RGB", (80, 80)), report(QUARTERS, [0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = (np.asarray(draw(image, kept, f"Wie groß?{gap}Что")) for gap in (" ", space))
    assert (one == other).all()


def test_methods_are_compared_on_pictures():
    image = Image.new("RGB", (80, 80))
    video = dataclasses.replace(report(QUARTERS * 2, [1]), kind="video", frames=2)
    with pytest.raises(InputError, match="of a video"):
        draw_methods(image, {"adav": video}, {"adav": ""})
    with pytest.raises(InputError, match="nothing to draw"):
        draw_methods(image, {}, {})


def test_overlapping_tokens():
    """An overview token that was dropped does not hide a crop's token that was kept."""
    image = Image.new("RGB", (80, 80), (200, 100, 40))
    boxes = [[0.0, 0.0, 1.0, 1.0], *QUARTERS]
    drawn = draw(image, report(boxes, [4]))
    assert (pixels(drawn, 1, 1) == (200, 100, 40)).all()
    assert pixels(drawn, 0, 0).max() < 60


@pytest.mark.parametrize("size", [(300, 3), (3, 300), (1, 1)])
def test_any_shape_with_a_long_caption(size):
    drawn = draw(Image.new("RGB", size), report(QUARTERS, [2]), ["word " * 100, "two\nlines"])
    assert drawn.width == PANEL + 2 * 16


def test_boxes_are_where_the_processor_cut(tmp_path):
    """On a wide picture LLaVA's processor shows the centre alone; kept patches are drawn there."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from tests import tiny_vlm

    folder = tiny_vlm.save_llava(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.new("RGB", (96, 48), (200, 100, 40))
    with attach(model, keep=1.0, processor=processor) as session:
        model.generate(**prepare(processor, [image], ["What ?"]), max_new_tokens=1)
    drawn = np.asarray(draw(image, session.report[0]))
    row = drawn[TOP + 90, LEFT : LEFT + PANEL]
    bright = (row == (200, 100, 40)).all(-1).nonzero()[0]
    assert PANEL // 4 <= bright.min() < PANEL // 4 + 4
    assert PANEL * 3 // 4 - 4 <= bright.max() < PANEL * 3 // 4
