"""The attention row beside SDPA against eager attention, and what it may not allocate."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as qwen3_vl_moe
from transformers.vision_utils import get_vision_window_index

from budwood.catalogue import PATCH_SCORES
from budwood.errors import AttachError, UnknownNameError, UnsupportedModelError
from budwood.prune import attach, encode
from budwood.prune.families import family_of
from budwood.prune.saliency import (
    N_QUERIES,
    ClsRecorder,
    PackedRecorder,
    PixtralRecorder,
    ReceivedRecorder,
    cls_attention,
    received_attention,
    strided,
)
from tests.contract import models
from tests.contract.models import Video, noise, words

pytestmark = pytest.mark.versions


def eager_attentions(case, batch, layer):
    """Attention of one layer, by transformers' eager implementation, on a copy."""
    model = copy.deepcopy(case.model)
    model.set_attn_implementation("eager")
    images = {k: v for k, v in batch.items() if k in ("pixel_values", "image_sizes")}
    if "image_sizes" in images:
        counts = [5 if int(size[0]) == 30 else 3 for size in images["image_sizes"]]
        crops = [image[:n] for image, n in zip(images["pixel_values"], counts)]
        images = {"pixel_values": torch.cat(crops)}
    return model.model.vision_tower(**images, output_attentions=True).attentions[layer]


@pytest.mark.parametrize(("layer", "index"), [(-2, -2), (-1, -1), (1, 0), (3, 2), ([-3, -2], -2)])
def test_cls_row_equals_eager(layer, index):
    case = models.llava()
    batch = case.batch([0, 1, words(3, 1)])
    family = family_of(case.model)
    options = {**batch, "vision_feature_layer": layer if isinstance(layer, int) else layer[-1]}
    assert case.model.config._attn_implementation == "sdpa"
    with family.recorder({**batch, "vision_feature_layer": layer}) as recorder:
        features = family.features(options)
    found = family.saliency(recorder, family.layouts(batch, features))
    eager = eager_attentions(case, batch, index).mean(1)[:, 0, 1:]
    torch.testing.assert_close(torch.stack(found), eager, rtol=1e-5, atol=1e-6)


def test_llava_next_follows_the_llms_order():
    """Saliency of each feature is that of its patch, through crops, unpadding and newlines."""
    case = models.llava_next()
    batch = case.batch([0, 2, words(3, 1), 1])
    family = family_of(case.model)
    with family.recorder(batch) as recorder:
        features = family.features(batch)
    found = family.saliency(recorder, family.layouts(batch, features))
    rows = eager_attentions(case, batch, -2).mean(1)[:, 0, 1:].split([3, 5, 3])
    for some, crops, size in zip(found, rows, batch["image_sizes"]):
        # The model's own packing moves each score, given as a feature, to where the LLM sees it.
        packed, _ = case.model.pack_image_features(
            [crops[..., None]], size[None], "default", -torch.ones(1)
        )
        scores = packed[0].flatten()
        torch.testing.assert_close(some, scores[scores >= 0], rtol=1e-5, atol=1e-6)


def test_siglip_is_attention_received():
    case = models.llava_siglip()
    batch = case.batch([0, 1, words(3, 1)])
    family = family_of(case.model)
    with family.recorder(batch) as recorder:
        features = family.features(batch)
    found = family.saliency(recorder, family.layouts(batch, features))
    eager = eager_attentions(case, batch, -2).mean((1, 2))
    torch.testing.assert_close(torch.stack(found), eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "side", "pool"), [("paligemma", 4, 1), ("gemma3", 8, 2)])
def test_gemma_is_attention_received_by_each_pooled_square(name, side, pool):
    case = models.BUILDERS[name]()
    batch = case.batch([0, 1, words(3, 1)])
    family = family_of(case.model)
    with family.recorder(batch) as recorder:
        features = family.features(batch)
    layouts = family.layouts(batch, features)
    keys = family.keys(recorder, layouts)
    found = family.saliency(recorder, layouts)
    eager = eager_attentions(case, {"pixel_values": batch["pixel_values"]}, -1)
    asked = eager[:, :, strided(side * side, torch.device("cpu"))].mean((1, 2))
    projected = []
    layer = case.model.model.vision_tower.encoder.layers[-1].self_attn
    handle = layer.k_proj.register_forward_hook(lambda *call: projected.append(call[-1]))
    family.features(batch)
    handle.remove()
    for image in range(2):
        assert len(found[image]) == len(keys[image]) == len(features[image])
        for token in range(len(found[image])):
            row, column = divmod(token, side // pool)
            patches = [
                (row * pool + y) * side + column * pool + x
                for y in range(pool)
                for x in range(pool)
            ]
            torch.testing.assert_close(found[image][token], asked[image, patches].mean())
            mean = projected[0][image, patches].mean(0).view(5, 6)
            torch.testing.assert_close(keys[image][token], mean)


@pytest.mark.parametrize(
    ("name", "merge", "layer"), [("llava-pixtral", 1, -1), ("mistral3", 2, -2)]
)
def test_pixtral_is_attention_received_within_an_image(name, merge, layer):
    case = models.BUILDERS[name]()
    batch = case.batch([0, 1, words(3, 1)])
    family = family_of(case.model)
    with family.recorder(batch) as recorder:
        features = family.features(batch)
    found = family.saliency(recorder, family.layouts(batch, features))
    model = copy.deepcopy(case.model)
    model.set_attn_implementation("eager")
    tower = model.model.vision_tower(
        batch["pixel_values"], image_sizes=batch["image_sizes"], output_attentions=True
    )
    start = 0
    for some, (rows, columns) in zip(found, [(5, 7), (3, 4)]):
        n = rows * columns * merge**2
        block = tower.attentions[layer][0, :, start : start + n, start : start + n]
        asked = block[:, strided(n, block.device)].mean((0, 1))
        raster = asked.view(rows, merge, columns, merge).mean((1, 3))
        torch.testing.assert_close(some, raster.flatten(), rtol=1e-4, atol=1e-6)
        start += n


QWEN = {
    "qwen2_vl": (qwen2_vl, 3),
    "qwen2_5_vl": (qwen2_5_vl, 2),
    "qwen3_vl": (qwen3_vl, 3),
    "qwen3_vl_moe": (qwen3_vl_moe, 3),
}
"""Where the attention of each is, and the block that is read."""


def received_eagerly(case, name, kind, batch):
    """Attention received by each patch, eager, frame by frame as the encoder orders them."""
    source, number = QWEN[name]
    eager = copy.deepcopy(case.model)
    eager.set_attn_implementation("eager")
    block, caught = eager.model.visual.blocks[number].attn, []
    # One call of the attention function per image or frame; its second result are probabilities.
    plain = source.eager_attention_forward

    def catch(module, *args, **kwargs):
        output, probabilities = plain(module, *args, **kwargs)
        if module is block:
            caught.append(probabilities[0])
        return output, probabilities

    source.eager_attention_forward = catch
    try:
        eager.get_image_features(*(batch[name] for name in (kind.pixels, kind.grids)))
    finally:
        source.eager_attention_forward = plain
    received = []
    for probabilities in caught:
        n = probabilities.shape[-1]
        asked = probabilities[:, strided(n, torch.device("cpu"))]
        received.append(asked.mean((0, 1)))
    return torch.cat(received)


def norms(case, kind, batch):
    """Norm of each patch as the encoder leaves it, before the merger."""
    output = case.model.get_image_features(*(batch[name] for name in (kind.pixels, kind.grids)))
    return torch.stack([patch.norm() for patch in output.last_hidden_state])


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("patches", ["mean", "max", "norm", "in small stacks"])
def test_qwen_is_attention_received_by_each_merged_group(name, patches, monkeypatch):
    """Against eager attention, unshuffled by the model's own index."""
    if patches == "in small stacks":
        monkeypatch.setattr("budwood.prune.saliency._TOKENS_AT_ONCE", 70)
        patches = "mean"
    case = models.BUILDERS[name]()
    batch = case.batch([0, Video(0), 1, words(3, 1)], [0, Video(2), words(3, 1)])
    kinds = family_of(case.model, patches=patches).kinds
    for kind, lengths in zip(kinds, ([35, 12, 35], [45, 48])):
        with kind.recorder(batch) as recorder:
            features = kind.features(batch)
        found = kind.saliency(recorder, kind.layouts(batch, features))
        if patches == "norm":
            expected = norms(case, kind, batch).view(-1, 4).mean(1)
        else:
            received = received_eagerly(case, name, kind, batch).view(-1, 4)
            expected = received.mean(1) if patches == "mean" else received.max(1).values
        if name == "qwen2_5_vl":
            index, _ = get_vision_window_index(batch[kind.grids], 2, 12, 2)
            expected = torch.empty(len(index)).index_copy(0, index, expected)
        assert [len(some) for some in found] == lengths
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-6)


def test_patches_are_those_of_the_call():
    case = models.qwen3_vl()
    batch = case.batch([words(3, 1), 0, words(3, 1), Video(0)])
    reports = {}
    for patches in PATCH_SCORES:
        encoded = encode(case.model, batch, patches=patches)
        for pictures in (None, encoded):
            with attach(case.model, keep=5, patches=patches, encoded=pictures) as session:
                case.model.generate(**batch, max_new_tokens=1)
            reports.setdefault(patches, []).append(torch.cat([r.saliency for r in session.report]))
        assert torch.equal(*reports[patches])
    assert not torch.allclose(reports["mean"][0], reports["max"][0])
    assert not torch.allclose(reports["mean"][0], reports["norm"][0])
    with pytest.raises(AttachError, match="encoded with patches='norm'"):
        attach(case.model, encoded=encoded)
    with pytest.raises(UnknownNameError, match="'mean', 'max', 'norm'"):
        attach(case.model, patches="median")
    with pytest.raises(UnsupportedModelError, match="leave it out for 'llava'"):
        attach(models.llava().model, patches="max")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_float32_probabilities(dtype):
    query, keys = noise(1, 3, 20).to(dtype), noise(2, 3, 7, 20).to(dtype)
    row = cls_attention(query, keys, 5, 0.5)
    assert row.dtype == torch.float32
    torch.testing.assert_close(row.sum(-1), torch.ones(3))
    expected = torch.zeros(3, 7)
    for crop in range(3):
        for head in range(5):
            part = slice(4 * head, 4 * head + 4)
            logits = keys[crop, :, part].float() @ query[crop, part].float() * 0.5
            expected[crop] += logits.softmax(0) / 5
    torch.testing.assert_close(row, expected)


def test_received_equals_a_loop_over_many_queries():
    queries, keys = noise(1, 2, 37, 12), noise(2, 2, 50, 12)
    expected = torch.zeros(2, 50)
    for crop in range(2):
        for query in range(37):
            for head in range(3):
                part = slice(4 * head, 4 * head + 4)
                logits = keys[crop, :, part] @ queries[crop, query, part] * 0.5
                expected[crop] += logits.softmax(0) / (37 * 3)
    torch.testing.assert_close(received_attention(queries, keys, 3, 0.5), expected)


def test_a_large_tower_without_cls_asks_only_some_queries():
    attention = SimpleNamespace(num_heads=3, scale=0.5, q_proj=None, k_proj=None)
    recorder, (queries, keys) = ReceivedRecorder(attention), noise(1, 2, 2, 150, 12)
    recorder._seen = {"queries": queries, "keys": keys}
    asked = queries[:, strided(150, queries.device)]
    assert asked.shape[1] == N_QUERIES
    assert torch.equal(recorder.saliency(), received_attention(asked, keys, 3, 0.5))


@pytest.mark.parametrize("side", [8, 14, 16, 24, 27, 32, 64])
def test_strided_queries_reach_every_column(side):
    asked = strided(side * side, torch.device("cpu"))
    assert len(asked) == min(side * side, N_QUERIES)
    assert len(asked.unique()) == len(asked)
    assert len((asked % side).unique()) >= 0.5 * min(side, N_QUERIES)
    assert len((asked // side).unique()) == min(side, N_QUERIES)


def test_a_tower_that_hides_its_layer_says_so():
    case = models.llava()
    family = family_of(case.model)
    with family.recorder({}) as recorder:
        pass  # the encoder did not run
    with pytest.raises(AttachError, match="query"):
        family.saliency(recorder, [])


def test_hooks_are_gone_even_if_one_cannot_be_set():
    case = models.llava()
    attention = case.model.model.vision_tower.encoder.layers[-2].self_attn
    recorder = family_of(case.model).recorder({})
    projection, attention.k_proj = attention.k_proj, torch.nn.Identity()
    attention.k_proj.register_forward_hook = None
    with pytest.raises(TypeError):
        recorder.__enter__()
    attention.k_proj = projection
    assert not attention.q_proj._forward_hooks


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.n_values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for one in output if isinstance(output, list | tuple) else [output]:
            if isinstance(one, torch.Tensor):
                self.n_values = max(self.n_values, one.numel())
        return output


@pytest.mark.parametrize("name", [*models.BUILDERS, "siglip"])
def test_nothing_of_size_heads_n_n_is_allocated(name):
    """Saliency, selection and cutting on an image of some 1,000 patches, on the models' layers."""
    n_heads, n_patches, width = 6, 1024, 48
    torch.manual_seed(0)
    attention = SimpleNamespace(
        num_heads=n_heads, scale=0.3, scaling=0.3, q_proj=None, k_proj=None, qkv=None
    )
    if name in ("llava-pixtral", "mistral3"):
        recorder = PixtralRecorder(attention)
        recorder._seen = {
            "queries": torch.randn(1, n_patches, width),
            "keys": torch.randn(1, n_patches, width),
            "position_embeddings": (torch.randn(n_patches, 8), torch.randn(n_patches, 8)),
        }
        arguments = ([n_patches],)
    elif "qwen" in name:
        recorder = PackedRecorder(attention)
        recorder._seen = {
            "qkv": torch.randn(n_patches, 3 * width),
            "position_embeddings": (torch.randn(n_patches, 8), torch.randn(n_patches, 8)),
        }
        arguments = ([n_patches],)
    else:
        kind = ReceivedRecorder if name in ("siglip", "gemma3", "paligemma") else ClsRecorder
        recorder, arguments = kind(attention), ()
        keys = torch.randn(1, n_patches + 1, width)
        recorder._seen = {"query": keys[:, 0], "queries": keys, "keys": keys}
    with Largest() as largest:
        recorder.saliency(*arguments)
    assert largest.n_values <= n_heads * 16 * (n_patches + 1)  # a few queries at a time


def test_a_whole_call_allocates_nothing_of_size_heads_n_n():
    """Under SDPA the encoder allocates no such thing either, so the whole call can be watched."""
    torch.manual_seed(0)
    clip = {**models.CLIP, "image_size": 96, "patch_size": 3, "num_attention_heads": 5}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**clip),
            text_config=LlamaConfig(**models.TEXT | {"max_position_embeddings": 2048}),
            image_token_id=models.IMAGE,
        )
    ).eval()
    ids = torch.tensor([[models.BOS, *[models.IMAGE] * 1024, *words(4, 1)]])
    with attach(model, keep=16), Largest() as largest:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=noise(0, 1, 3, 96, 96),
            max_new_tokens=1,
            pad_token_id=0,
        )
    assert largest.n_values < 5 * 1024 * 1024 / 10
