"""Index maps and boxes of the families, against the models' own packing and slow geometry."""

from __future__ import annotations

import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2Config
from transformers.image_processing_utils import select_best_resolution
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.vision_utils import get_vision_window_index

from budwood.errors import BudgetError, InputError, UnsupportedModelError
from budwood.prune import FAMILIES, attach
from budwood.prune.families import family_of
from budwood.prune.families.base import raster_boxes
from budwood.prune.families.llava import encoder_view
from budwood.prune.families.llava_next import anyres_layout, crop_layout
from budwood.prune.families.qwen2_5_vl import window_order
from budwood.prune.methods.base import rasters
from tests.contract import models
from tests.contract.models import words

pytestmark = pytest.mark.versions

PINPOINTS = ((12, 24), (24, 12), (24, 24), (12, 36), (36, 12))
SIZES = [(11, 37), (41, 9), (30, 28), (24, 24), (5, 90), (90, 5), (100, 101), (333, 120), (1, 1)]


@pytest.fixture(scope="module")
def next_case():
    case = models.llava_next()
    case.model.config.image_grid_pinpoints = [list(pinpoint) for pinpoint in PINPOINTS]
    return case


@pytest.mark.parametrize("size", SIZES)
def test_anyres_map_is_the_models_own_packing(next_case, size):
    layout = anyres_layout(size, PINPOINTS, 12, 4)
    height, width = select_best_resolution(size, [list(pinpoint) for pinpoint in PINPOINTS])
    n_crops = 1 + height * width // 144
    numbers = torch.arange(n_crops * 16.0).view(n_crops, 16, 1)
    packed, _ = next_case.model.pack_image_features(
        [numbers], torch.tensor([size]), "default", -torch.ones(1)
    )
    order = packed[0].flatten().long()
    assert layout.n_crops == n_crops
    assert layout.n_placeholders == len(order)
    assert torch.equal(layout.order, order[order >= 0])
    assert torch.equal(layout.candidates, (order >= 0).nonzero().flatten())
    assert torch.equal(layout.fixed, (order < 0).nonzero().flatten())
    assert crop_layout(size, PINPOINTS, 12, 4).n_placeholders == len(order)


@pytest.mark.parametrize("size", [(11, 37), (41, 9), (30, 28), (100, 101)])
def test_anyres_boxes_hold_the_pixels_of_their_patch(size):
    """Draw each pixel's own coordinates, fit and pad and cut as the processor does, look inside."""
    height, width = size
    canvas_h, canvas_w = select_best_resolution(size, [list(pinpoint) for pinpoint in PINPOINTS])
    scale = min(canvas_h / height, canvas_w / width)
    fitted_h, fitted_w = (
        min(-int(-height * scale // 1), canvas_h),
        min(-int(-width * scale // 1), canvas_w),
    )
    top, left = (canvas_h - fitted_h) / 2, (canvas_w - fitted_w) / 2
    boxes = crop_layout(size, PINPOINTS, 12, 4).boxes
    columns = canvas_w // 12
    for crop in range(columns * (canvas_h // 12)):
        for patch in range(16):
            x = crop % columns * 12 + patch % 4 * 3
            y = crop // columns * 12 + patch // 4 * 3
            expected = torch.tensor(
                [
                    (x - left) / fitted_w,
                    (y - top) / fitted_h,
                    (x + 3 - left) / fitted_w,
                    (y + 3 - top) / fitted_h,
                ]
            ).clamp(0, 1)
            torch.testing.assert_close(boxes[16 * (crop + 1) + patch], expected)


@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (3, 4), (8, 5), (3, 3), (1, 9), (7, 6)])
def test_window_order_is_the_models_own(rows, columns):
    grid = torch.tensor([[1, 2 * rows, 2 * columns]])
    index, _ = get_vision_window_index(grid, spatial_merge_size=2, window_size=12, patch_size=2)
    assert torch.equal(window_order(rows, columns, 3), index)


def test_full_keeps_cls_and_never_chooses_it():
    case = models.llava(vision_feature_select_strategy="full")
    batch = case.batch([words(2, 1), 0, words(4, 2)])
    base = case.model.generate(**batch, max_new_tokens=4)
    with attach(case.model, keep=1.0) as session:
        assert torch.equal(base, case.model.generate(**batch, max_new_tokens=4))
    image = session.report[0]
    assert (image.n_before, image.n_fixed, image.grid) == (16, 1, (4, 4))
    with attach(case.model, keep=3) as session:
        case.model.generate(**batch, max_new_tokens=2)
    assert (session.origin >= 0).sum() == batch["input_ids"].shape[1] - 13
    assert (session.origin == 3).any()  # [CLS] is the image's first token


def test_a_layer_and_strategy_given_in_the_call_count():
    case = models.llava()
    batch = case.batch([words(2, 1), 0, words(4, 2)])
    options = {"vision_feature_layer": 2, "max_new_tokens": 4}
    base = case.model.generate(**batch, **options)
    with attach(case.model, keep=1.0) as session:
        assert torch.equal(base, case.model.generate(**batch, **options))
        first = session.report[0].saliency
        case.model.generate(**batch, max_new_tokens=4)
        assert not torch.equal(first, session.report[0].saliency)


def test_siglip_works_end_to_end():
    case = models.llava_siglip()
    batch = case.batch([words(2, 1), 0, words(4, 2)])
    base = case.model.generate(**batch, max_new_tokens=4)
    with attach(case.model, keep=1.0) as session:
        assert torch.equal(base, case.model.generate(**batch, max_new_tokens=4))
    assert session.report[0].grid == (4, 4)


def test_boxes_of_rasters_are_row_major():
    for build, rows, columns in ((models.llava, 4, 4), (models.qwen2_5_vl, 5, 7)):
        case = build()
        batch = case.batch([0, words(3, 1)])
        with attach(case.model, keep=2) as session:
            case.model.generate(**batch, max_new_tokens=1)
        image = session.report[0]
        assert image.grid == (rows, columns)
        token = columns + 2  # second row, third column
        expected = torch.tensor([2 / columns, 1 / rows, 3 / columns, 2 / rows])
        torch.testing.assert_close(image.boxes[token], expected)
        assert torch.equal(image.boxes_on((50, 90)), image.boxes)


def test_boxes_allow_for_the_processors_crop():
    crop = SimpleNamespace(
        do_center_crop=True, size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}
    )
    assert encoder_view(crop, (30, 90)) == pytest.approx((1 / 3, 0, 2 / 3, 1))
    padded = SimpleNamespace(do_pad=True)
    assert encoder_view(padded, (30, 90)) == pytest.approx((0, -1, 1, 2))
    assert encoder_view(None, (30, 90)) is None
    case = models.llava()
    tokenizer = SimpleNamespace(all_special_ids=[], unk_token_id=None, chat_template=None)
    processor = SimpleNamespace(image_processor=crop, tokenizer=tokenizer, chat_template=None)
    with attach(case.model, keep=2, processor=processor) as session:
        case.model.generate(**case.batch([0, words(3, 1)]), max_new_tokens=1)
    boxes = session.report[0].boxes_on((30, 90))
    torch.testing.assert_close(boxes[0], torch.tensor([1 / 3, 0, 1 / 3 + 1 / 12, 1 / 4]))


@pytest.mark.parametrize("name", models.BUILDERS)
def test_a_report_neither_holds_the_model_nor_pickles_it(name):
    case = models.BUILDERS[name]()
    with attach(case.model, keep=2, timing=False) as session:
        case.model.generate(**case.batch([0, words(3, 1)]), max_new_tokens=1)
    report = session.report[0]
    again = pickle.loads(pickle.dumps(report))
    assert torch.equal(again.boxes_on((30, 90)), report.boxes_on((30, 90)))
    model = weakref.ref(case.model)
    del case, session
    gc.collect()
    assert model() is None


def test_official_llava_next_feeds_crop_ordered_features():
    """Neither unpadded nor with newlines: rows of the projector's own output."""
    case = models.llava_next()
    batch = case.batch([words(2, 1), 0, words(4, 2)])
    projected, seen = [], []
    handles = [
        case.model.model.multi_modal_projector.register_forward_hook(
            lambda module, args, output: projected.append(output.flatten(0, 1))
        ),
        case.model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
        ),
    ]
    with attach(case.model, keep=13, method="adav-official", question="all") as session:
        case.model.generate(**batch, max_new_tokens=1)
    for handle in handles:
        handle.remove()
    image = session.report[0]
    assert (image.n_before, image.n_fixed) == (48, 0)
    assert image.n_after == 2 * 3 * (13 // 2 // 3)
    assert torch.equal(seen[0][3 : 3 + image.n_after], projected[0][image.kept])
    assert len(seen[0]) == 1 + 2 + image.n_after + 4


def test_official_cannot_keep_more_than_the_prompt_has_room_for():
    case = models.llava_next()
    batch = case.batch([words(2, 1), 0, words(4, 2)])  # 34 placeholders for 48 patches
    with attach(case.model, keep=48, compat="official"), pytest.raises(BudgetError, match="34"):
        case.model.generate(**batch, max_new_tokens=1)


def test_official_llava_is_the_selection_of_one_crop():
    case = models.llava()
    batch = case.batch([words(2, 1), 0, words(4, 2)])
    with attach(case.model, keep=7, compat="official") as session:
        case.model.generate(**batch, max_new_tokens=1)
    assert session.report[0].n_after == 6


def test_frames_and_missing_full_blocks_say_so():
    case = models.qwen2_5_vl()
    batch = case.batch([0, words(3, 1)])
    family = family_of(case.model)
    with pytest.raises(InputError, match="2 frames"):
        family.layouts({"image_grid_thw": torch.tensor([[2, 4, 4]])}, [])
    case.model.config.vision_config.fullatt_block_indexes = [9]
    with pytest.raises(UnsupportedModelError, match="fullatt_block_indexes"):
        attach(case.model)
    assert batch


def test_paligemma_2_has_sliding_windows_as_well():
    """Against the stock model, given the pruned prompt and an encoder of the kept features."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    text = Gemma2Config(**models.GEMMA, sliding_window=7, layer_types=layers)
    case = models.paligemma(text)
    batch = case.batch([0, words(5, 2)])
    options = {"max_new_tokens": 5, "do_sample": False}
    stock = case.model.generate(**batch, **options)
    with attach(case.model, keep=1.0):
        assert torch.equal(case.model.generate(**batch, **options), stock)
    with attach(case.model, keep=6) as session:
        pruned = case.model.generate(**batch, **options)
    kept = session.origin[0]
    features = case.model.get_image_features(batch["pixel_values"]).pooler_output
    few = BaseModelOutputWithPooling(pooler_output=features[:, session.report[0].kept])
    case.model.model.get_image_features = lambda pixel_values, **_: few
    names = ("input_ids", "attention_mask", "token_type_ids")
    by_hand = case.model.generate(
        **{name: batch[name][:, kept] for name in names},
        pixel_values=batch["pixel_values"],
        **options,
    )
    assert torch.equal(pruned[:, -5:], by_hand[:, -5:])


def test_pixtral_keeps_breaks_and_does_not_ask_about_them():
    case = models.llava_pixtral()
    batch = case.batch([words(2, 1), 0, words(4, 2)])
    special = [models.IMAGE, models.ROW_END, models.IMAGE_END]
    tokenizer = SimpleNamespace(all_special_ids=special, unk_token_id=None, chat_template=None)
    for question in ("all", "turn", "current"):
        processor = None if question == "all" else SimpleNamespace(tokenizer=tokenizer)
        options = {"method": "uniform", "processor": processor, "question": question}
        with attach(case.model, keep=1, **options) as one:
            case.model.generate(**batch, max_new_tokens=1)
        asked = batch["input_ids"][0, list(one.report[0].question)]
        assert asked.tolist() == words(4, 2)
    ids = batch["input_ids"][0]
    left = ids[one.origin[0]].tolist()
    assert (left.count(models.ROW_END), left.count(models.IMAGE_END), left.count(models.IMAGE)) == (
        4,
        1,
        1,
    )


@pytest.mark.parametrize(("name", "unit"), [("llava-pixtral", 3), ("mistral3", 6)])
def test_sizes_that_a_processor_does_not_make_say_so(name, unit):
    case = models.BUILDERS[name]()
    batch = case.batch([0, words(3, 1)])
    with attach(case.model, keep=2):
        with pytest.raises(InputError, match=f"multiples of {unit}"):
            case.model.generate(**batch | {"image_sizes": batch["image_sizes"] - unit // 3})
        del batch["image_sizes"]
        with pytest.raises(InputError, match="image_sizes is missing"):
            case.model.generate(**batch)


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "paligemma"])
def test_a_tower_of_another_family_is_refused(name):
    case = models.BUILDERS[name]()
    case.model.config.vision_config.model_type = "clip_vision_model"
    with pytest.raises(UnsupportedModelError, match="'clip_vision_model'"):
        attach(case.model)


def test_names_are_model_types():
    for name in FAMILIES.names():
        assert FAMILIES.get(name).model_type == name


def test_rasters_are_found_in_boxes():
    overview, tiles = raster_boxes(3, 2), raster_boxes(4, 5)
    assert rasters(overview) == ((3, 2),)
    assert rasters(torch.cat((overview, tiles))) == ((3, 2), (4, 5))
    assert rasters(torch.cat((tiles, tiles))) == ((4, 5), (4, 5))  # two frames
    assert rasters(tiles[1:]) == ((1, 4), (3, 5))  # a first token that is missing
    assert rasters(raster_boxes(1, 4)) == ((1, 4),)
    assert rasters(raster_boxes(4, 1)) == ((4, 1),)
    assert rasters(raster_boxes(1, 1).repeat(3, 1)) == ((1, 1),) * 3  # frames of one token
