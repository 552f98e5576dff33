"""Families with tiles against the processors' own crops and prompts and the models' own merging."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.nn.functional import interpolate
from transformers import Idefics3Processor, InternVLProcessor, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from budwood.errors import InputError, UnsupportedModelError
from budwood.prune import attach, encode
from budwood.prune.families import family_of
from budwood.prune.families.llava_onevision import bilinear
from tests.contract import models
from tests.contract.models import BREAK, EOS, FAKE, IMAGE, TILE, Video, words

SIZES = [(60, 132), (150, 40), (90, 90), (47, 61), (33, 200), (120, 100)]
"""Heights and widths of pictures."""


@pytest.fixture(scope="module")
def cases():
    names = ("llava_onevision", "internvl", "idefics3", "smolvlm")
    return {name: models.BUILDERS[name]() for name in names}


@pytest.fixture(scope="module")
def large_onevision():
    """Sixteen patches along a crop: enough of them without any padding."""
    case = models.llava_onevision()
    case.model.config.vision_config.image_size = 48
    case.model.config.image_grid_pinpoints = [[48, 96], [96, 48], [96, 96]]
    return case


def picture(size: tuple[int, int]) -> Image.Image:
    """Red is how far right a pixel is, green how far down, and blue that it is no padding."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    channels = ((x + 0.5) / width, (y + 0.5) / height, np.ones(size))
    return Image.fromarray((np.stack(channels, -1) * 255).round().astype(np.uint8))


def patch_means(tiles: torch.Tensor, patch: int) -> torch.Tensor:
    """Mean colour of each patch, shape (n_tiles, n_patches, 3)."""
    means = tiles.float().unfold(2, patch, patch).unfold(3, patch, patch).mean((-1, -2))
    return means.flatten(2).transpose(1, 2)


def holds_pixels(boxes: torch.Tensor, colours: torch.Tensor, tolerance: float = 0.02) -> None:
    """Each token without padding has the colour of the middle of its box."""
    whole = colours[:, 2] > 0.99
    assert whole.float().mean() > 0.5
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    torch.testing.assert_close(middle[whole], colours[whole, :2], rtol=0, atol=tolerance)


RAW = {"do_normalize": False}


def marked_prompt(rows: int, columns: int, per_tile: int) -> list[int]:
    """SmolVLM's own prompt of an image, as ids."""
    text = get_image_prompt_string(rows, columns, per_tile, "F", "I", "G")
    text = text.replace("\n\n", "\n")  # one token in its tokenizer
    for row in range(rows):
        for column in range(columns):
            text = text.replace(f"<row_{row + 1}_col_{column + 1}>", "G")
    ids = {"F": FAKE, "I": IMAGE, "G": TILE, "\n": BREAK}
    return [ids[character] for character in text]


def prepare(name: str, size: tuple[int, int]) -> tuple[dict, torch.Tensor]:
    """What the family's own image processor makes of the picture, and the tiles in order."""
    image = picture(size)
    if name == "internvl":
        processor = GotOcr2ImageProcessorPil(
            size={"height": 18, "width": 18}, crop_to_patches=True, max_patches=6, **RAW
        )
        pixels = processor([image], return_tensors="pt")
        ids = [IMAGE] * 9 * int(pixels["num_patches"][0])
        return {"pixel_values": pixels["pixel_values"], "input_ids": ids}, pixels["pixel_values"]
    if name == "llava_onevision":
        processor = LlavaOnevisionImageProcessorPil(
            size={"height": 48, "width": 48},
            image_grid_pinpoints=[[48, 96], [96, 48], [96, 96]],
            **RAW,
        )
        pixels = dict(processor([image], return_tensors="pt"))
        return {**pixels, "input_ids": []}, pixels["pixel_values"][0]
    processors = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}
    processor = processors[name](
        size={"longest_edge": 54},
        max_image_size={"longest_edge": 18},
        return_row_col_info=True,
        **RAW,
    )
    pixels = dict(processor([[image]], return_tensors="pt"))
    grid = pixels.pop("rows")[0][0], pixels.pop("cols")[0][0]
    ids = marked_prompt(*grid, per_tile=4 if name == "idefics3" else 9)
    return {**pixels, "input_ids": ids}, pixels["pixel_values"][0]


def merged(case, patches: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Values of patches, merged by the model's own packing: mean over what makes a token."""
    model, name = case.model.model, case.model.config.model_type
    if name == "llava_onevision":
        newline = torch.full((patches.shape[-1],), torch.nan)
        packed, _ = model.pack_image_features(
            [patches], inputs["image_sizes"], newline, case.model.config.vision_aspect_ratio
        )
        return packed[0][~packed[0].isnan().any(-1)]
    side = int(patches.shape[1] ** 0.5)
    tokens = []
    for channel in patches.unbind(-1):
        if name == "internvl":
            shuffled = model.pixel_shuffle(channel.view(-1, side, side, 1), 0.5).flatten(1, 2)
        else:
            shuffled = model.connector.pixel_shuffle(channel[..., None], model.config.scale_factor)
        tokens.append(shuffled.mean(-1).flatten())
    return torch.stack(tokens, -1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["llava_onevision", "internvl", "idefics3", "smolvlm"])
def test_boxes_hold_the_pixels_of_their_patches(cases, large_onevision, name, size):
    case = large_onevision if name == "llava_onevision" else cases[name]
    inputs, tiles = prepare(name, size)
    inputs["input_ids"] = torch.tensor([[*inputs["input_ids"], 9]])
    family = family_of(case.model)
    (layout,) = family.layouts(inputs, [])
    patch = case.model.config.vision_config.patch_size
    patches = patch_means(tiles, patch if isinstance(patch, int) else patch[0])
    colours = merged(case, patches, inputs)
    assert layout.n_crops == len(tiles)
    assert layout.n_candidates == len(colours)
    torch.testing.assert_close(layout.ordered(patches.flatten(0, 1)), colours)
    holds_pixels(family.placing(layout)(size), colours)


def test_boxes_of_padded_squares_hold_the_pixels_of_their_patches(large_onevision):
    processor = LlavaOnevisionImageProcessorPil(size={"height": 48, "width": 48}, **RAW)
    sizes = [(60, 132), (150, 40)]
    inputs = processor([list(map(picture, sizes))], return_tensors="pt")
    family = family_of(large_onevision.model)
    layouts = family.layouts(inputs, [])
    assert [layout.fixed.tolist() for layout in layouts] == [[256], [256]]
    for layout, size, tile in zip(layouts, sizes, inputs["pixel_values"]):
        colours = patch_means(tile, 3)[0]
        # The border is of the mean colour: what is in it has no place in the picture.
        boxes = family.placing(layout)(size)
        width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        inside = torch.minimum(width / width.max(), height / height.max()) > 0.999
        assert inside.float().mean() > 0.2
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        torch.testing.assert_close(middle[inside], colours[inside, :2], rtol=0, atol=0.03)


@pytest.mark.parametrize("grid", [(8, 8, 5, 5), (4, 9, 3, 7), (6, 6, 6, 6), (7, 3, 4, 2)])
def test_bilinear_is_torchs(grid):
    rows, columns, new_rows, new_columns = grid
    raster = models.noise(0, 1, 1, rows, columns)
    places, weights = bilinear(*grid)
    expected = interpolate(raster, [new_rows, new_columns], mode="bilinear").flatten()
    torch.testing.assert_close((raster.flatten()[places] * weights).sum(1), expected)
    torch.testing.assert_close(weights.sum(1), torch.ones(new_rows * new_columns))


def eager(case, pixels: torch.Tensor, layer: int, **masks) -> torch.Tensor:
    """Attention probabilities of one layer of the tower, by transformers' eager implementation."""
    model = copy.deepcopy(case.model)
    model.set_attn_implementation("eager")
    tower = getattr(model.model, case.tower)
    return tower(pixel_values=pixels, output_attentions=True, **masks).attentions[layer]


@pytest.mark.parametrize("name", ["llava_onevision", "internvl", "idefics3", "smolvlm"])
def test_saliency_equals_eager_attention(cases, name):
    """Two images in two rows; merged by the model's own packing."""
    case = cases[name]
    batch = case.batch([words(2, 1), 2, words(3, 1)], [1, words(4, 3)])
    family = family_of(case.model)
    with family.recorder(batch) as recorder:
        features = family.features(batch)
    layouts = family.layouts(batch, features)
    found = family.saliency(recorder, layouts)
    for image, (seed, some) in enumerate(zip((2, 1), found)):
        alone = case.batch([seed])
        tiles = alone["pixel_values"]
        tiles = tiles if name == "internvl" else tiles[0]
        layer = -2 if name == "internvl" else -1
        attention = eager(case, tiles, layer).mean(1)
        scores = attention[:, 0, 1:] if name == "internvl" else attention.mean(1)
        expected = merged(case, scores[..., None], alone)[:, 0]
        assert layouts[image].n_crops == len(tiles)
        torch.testing.assert_close(some, expected, rtol=1e-4, atol=1e-6)


def test_saliency_of_frames_equals_eager_attention(cases):
    """Pooled as the model pools features."""
    case = cases["llava_onevision"]
    batch = case.batch([Video(0), words(3, 1)], [Video(1)])
    videos = family_of(case.model).videos
    with videos.recorder(batch) as recorder:
        features = videos.features(batch)
    found = videos.saliency(recorder, videos.layouts(batch, features))
    frames = batch["pixel_values_videos"].flatten(0, 1)
    scores = eager(case, frames, -1).mean((1, 2))[..., None]
    expected = case.model.model.apply_pooling(scores).view(2, -1)
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_padding_inside_a_tile_gets_no_attention(cases, way):
    case = cases["idefics3"]
    batch = case.batch([0, words(3, 1)])
    batch["pixel_attention_mask"][0, 1, :, 12:] = 0  # two columns of patches of the second tile
    family = family_of(case.model)
    before = case.model.config._attn_implementation
    case.model.set_attn_implementation(way)
    with family.recorder(batch) as recorder:
        features = family.features(batch)
    case.model.set_attn_implementation(before)
    (found,) = family.saliency(recorder, family.layouts(batch, features))
    mask = torch.ones(3, 6, 6, dtype=torch.bool)
    mask[1, :, 4:] = False
    attention = eager(case, batch["pixel_values"][0], -1, patch_attention_mask=mask).mean((1, 2))
    torch.testing.assert_close(found, merged(case, attention[..., None], batch)[:, 0])
    assert (attention[1].view(6, 6)[:, 4:] == 0).all()


def test_a_layer_of_internvl_given_in_the_call_counts(cases):
    case = cases["internvl"]
    batch = case.batch([0, words(3, 1)])
    family = family_of(case.model)
    for index, layer in ((1, 0), (-1, -1)):
        given = {**batch, "vision_feature_layer": index}
        with family.recorder(given) as recorder:
            features = family.features(given)
        (found,) = family.saliency(recorder, family.layouts(given, features))
        scores = eager(case, batch["pixel_values"], layer).mean(1)[:, 0, 1:, None]
        torch.testing.assert_close(found, merged(case, scores, batch)[:, 0])


# Prompts


def idefics3_processor(per_tile: int) -> Idefics3Processor:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tiles]
    vocabulary = {"[UNK]": 0, "\n": 1, "\n\n": 2, "what": 3, "is": 4, "it": 5}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[UNK]",
        additional_special_tokens=special,
    )
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 54}, max_image_size={"longest_edge": 18}, **RAW
    )
    return Idefics3Processor(image_processor, fast, image_seq_len=per_tile)


def test_idefics3_reads_its_processors_prompts(cases, monkeypatch):
    """Three images in a row, two of them side by side, and one in another row."""
    processor = idefics3_processor(per_tile=4)
    pictures = [[picture(size) for size in ((50, 90), (12, 80), (80, 30))], [picture((50, 50))]]
    inputs = processor(
        text=["what <image> is <image><image> it", "<image> what"],
        images=pictures,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    family = family_of(cases["idefics3"].model, processor)
    monkeypatch.setattr(family.model.config, "image_token_id", processor.image_token_id)
    info = processor.image_processor(pictures, return_row_col_info=True, return_tensors="pt")
    grids = [grid for row in zip(info["rows"], info["cols"]) for grid in zip(*row, strict=True)]
    layouts = family.layouts(inputs, [])
    assert [layout.n_crops for layout in layouts] == [rows * cols + 1 for rows, cols in grids]
    expected = [[1 / (6 / 3 * cols), 1 / (6 / 3 * rows)] for rows, cols in grids]
    for layout, size in zip(layouts, expected):
        torch.testing.assert_close(layout.boxes[0, 2:], torch.tensor(size))
    samples = family.pictures(inputs)
    assert [len(tiles) for tiles in samples] == [layout.n_crops for layout in layouts]


def test_markers_of_images_are_no_question(cases):
    """Neither those behind the image, nor those of the next one, nor those inside it."""
    case = cases["idefics3"]
    text = words(5, 2)
    batch = case.batch([words(4, 1), 0, 1, text])
    for rule in ("current", "turn", "all"):
        with attach(case.model, keep=3, question=rule) as session:
            case.model.generate(**batch, max_new_tokens=1)
        for image in session.report:
            asked = batch["input_ids"][0, list(image.question)].tolist()
            assert asked == text


def test_markers_of_images_end_no_turn(cases):
    """A tokenizer lists them among its special tokens, which end turns."""
    case = cases["smolvlm"]
    tokenizer = SimpleNamespace(
        all_special_ids=[EOS, FAKE, TILE], unk_token_id=None, chat_template=None
    )
    processor = SimpleNamespace(tokenizer=tokenizer, chat_template=None, image_processor=None)
    batch = case.batch([words(4, 1), 0, words(5, 2), [EOS], words(3, 4)])
    with attach(case.model, keep=3, question="turn", processor=processor) as session:
        case.model.generate(**batch, max_new_tokens=1)
    asked = batch["input_ids"][0, list(session.report[0].question)].tolist()
    assert asked == words(5, 2)


def test_internvl_reads_its_processors_prompts(cases):
    namespace = SimpleNamespace(
        start_image_token="<", end_image_token=">", image_token="I", image_seq_length=9
    )
    given = {"num_patches": [3, 1, 5]}
    texts = [InternVLProcessor.replace_image_token(namespace, given, i) for i in range(3)]
    ids = {"<": FAKE, ">": TILE, "I": IMAGE}
    row = [ids[character] for character in "".join(texts)]
    family = family_of(cases["internvl"].model)
    layouts = family.layouts({"input_ids": torch.tensor([row])}, [])
    assert [layout.n_crops for layout in layouts] == [3, 1, 5]
    assert [layout.run_lengths for layout in layouts] == [(27,), (9,), (45,)]


TILE_OF_4 = [FAKE, TILE, *[IMAGE] * 4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([9, *TILE_OF_4[:-1], FAKE], "run of 3 image placeholders at position 3, .* takes 4"),
        ([9, *TILE_OF_4, *TILE_OF_4], "ends inside an image"),
        ([*TILE_OF_4, *TILE_OF_4, BREAK, *TILE_OF_4, BREAK, *TILE_OF_4, FAKE], "rows of 2, 1, 1"),
        ([*TILE_OF_4, BREAK, *TILE_OF_4, FAKE], "for 2 tiles, and there are 3"),
    ],
)
def test_prompts_that_are_laid_out_otherwise_say_so(cases, row, message):
    case = cases["idefics3"]
    ids = torch.tensor([row])
    inputs = {**case.batch([0]), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with attach(case.model, keep=3), pytest.raises(InputError, match=message):
        case.model.generate(**inputs, max_new_tokens=1)


def test_tiles_without_a_prompt_say_so(cases):
    batch = cases["smolvlm"].batch([0, words(3, 1)])
    del batch["input_ids"]
    with pytest.raises(InputError, match="'smolvlm' come without input_ids"):
        encode(cases["smolvlm"].model, batch)


# Models that cannot be pruned


def refusal(case, **changes) -> str:
    """The message when attaching to the model with another configuration."""
    config = case.model.config
    case.model.config = copy.deepcopy(config)
    try:
        for name, value in changes.items():
            part, _, inner = name.rpartition("__")
            owner = getattr(case.model.config, part) if part else case.model.config
            setattr(owner, inner, value)
        with pytest.raises(UnsupportedModelError) as caught:
            attach(case.model)
        return str(caught.value)
    finally:
        case.model.config = config


def test_unknown_towers_and_strategies_are_refused(cases):
    for case in cases.values():
        message = refusal(case, vision_config__model_type="pixtral")
        assert "vision tower 'pixtral'" in message
    assert "keeps [CLS]" in refusal(cases["internvl"], vision_feature_select_strategy="full")
    assert "layers" in refusal(cases["internvl"], vision_feature_layer=7)
    assert "takes one layer" in refusal(cases["internvl"], vision_feature_layer=[-1, -2])
    onevision = cases["llava_onevision"]
    message = refusal(onevision, vision_feature_select_strategy="default")
    assert "set it to 'full'" in message
    assert "'anyres_max_N'" in refusal(onevision, vision_aspect_ratio="square")
