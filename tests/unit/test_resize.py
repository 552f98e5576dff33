"""Pictures scaled down to a budget of visual tokens, with real processors."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor, Qwen2VLImageProcessorPil

from budwood.errors import BudgetError, InputError, UnsupportedModelError
from budwood.prune import resize_for
from budwood.prune.resize import visual_tokens
from budwood.sprout.model import load_tokenizer, make_processor


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer()
    tokenizer.add_tokens(["<image>", "<|image_pad|>", "<|video_pad|>"], special_tokens=True)
    return tokenizer


class Qwen:
    """What Qwen's processor does with pictures; the whole one needs torchvision for its videos."""

    def __init__(self):
        pixels = {"shortest_edge": 4 * 28 * 28, "longest_edge": 4096 * 28 * 28}
        self.image_processor = Qwen2VLImageProcessorPil(size=pixels)

    def _get_num_multimodal_tokens(self, image_sizes):
        patches = (self.image_processor.get_number_of_image_patches(*s, {}) for s in image_sizes)
        return {"num_image_tokens": [count // 4 for count in patches]}


@pytest.fixture(scope="module")
def qwen():
    return Qwen()


@pytest.fixture(scope="module")
def llava_next(tokenizer):
    pinpoints = [[336, 672], [672, 336], [672, 672]]
    crops = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size=336, image_grid_pinpoints=pinpoints
    )
    return LlavaNextProcessor(
        crops,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def counted(processor, image):
    """Placeholders that the processor really puts into a prompt."""
    if isinstance(processor, Qwen):
        grid = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"]
        return int(grid.prod()) // 4
    token = processor.image_token
    inputs = processor(images=[image], text=[token], return_tensors="pt")
    return int((inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(token)).sum())


@pytest.mark.parametrize("size", [(644, 420), (301, 977), (90, 1200)])
@pytest.mark.parametrize("keep", [7, 40, 0.25, 0.9, 1.0])
def test_qwen_makes_nearly_as_many_tokens(qwen, size, keep):
    image = Image.new("RGB", size)
    full = counted(qwen, image)
    small = resize_for(qwen, image, keep)
    most = keep if isinstance(keep, int) else full * keep + 0.5
    assert counted(qwen, small) <= most
    assert counted(qwen, small) >= 0.6 * min(most, full)
    assert small.width / small.height == pytest.approx(size[0] / size[1], rel=0.15)


def test_what_fits_stays_as_it_is(qwen):
    image = Image.new("RGB", (300, 200))
    assert resize_for(qwen, image, 4000) is image
    assert resize_for(qwen, image, 1.0) is image


def test_llava_next_drops_crops(llava_next):
    image = Image.new("RGB", (672, 672))
    assert counted(llava_next, image) == 576 + 48 * 49
    small = resize_for(llava_next, image, 1500)
    assert counted(llava_next, small) == 576 + 24 * 25
    assert small.width < 672
    with pytest.raises(BudgetError, match="below the 1176 visual tokens.*672×672"):
        resize_for(llava_next, image, 320)


def test_an_encoder_of_one_size_cannot(tokenizer):
    image = Image.new("RGB", (500, 400))
    with pytest.raises(BudgetError, match="keep=64 is below the 256 visual tokens"):
        resize_for(make_processor(tokenizer), image, 64)
    with pytest.raises(UnsupportedModelError, match="does not say how many"):
        resize_for(tokenizer, image, 64)
    with pytest.raises(BudgetError, match="keep=0"):
        resize_for(make_processor(tokenizer), image, 0)


def test_pictures_that_cannot_be_counted_are_refused(qwen):
    with pytest.raises(InputError, match="image is a ndarray; give a PIL image"):
        resize_for(qwen, np.zeros((40, 50, 3), dtype=np.uint8), 4)
    with pytest.raises(InputError, match="Qwen refuses a size: absolute aspect ratio"):
        resize_for(qwen, Image.new("RGB", (3000, 10)), 4)


def test_counts_are_those_of_the_processor(qwen, llava_next):
    for processor in (qwen, llava_next):
        sizes = [(644, 420), (150, 333), (700, 700)]
        counts = visual_tokens(processor, sizes)
        pictures = [Image.new("RGB", (width, height)) for height, width in sizes]
        assert counts == [counted(processor, picture) for picture in pictures]
