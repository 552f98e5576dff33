"""Synonyms, labels that training has, and notices of those it has not."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from budwood.errors import InputError, InputWarning
from budwood.points import classify, embed_labels, load_clouds, trained_labels, unfamiliar
from budwood.points.encoders.sprout import load_sprout
from budwood.points.familiar import FAMILIAR, notice_of, save_trained_labels
from budwood.points.label_file import SPROUT_LABELS, labels_beside, names_in, stamp_in
from budwood.points.text import TextEmbeddings
from budwood.points.vocabulary import COMMON_LABELS, PHRASINGS, alike
from tests.points import models, sets, shipped


def test_phrasings_are_in_one_group_and_common_labels_are_distinct():
    words = [word for group in PHRASINGS for word in group]
    assert len(words) == len(set(words)) and all(word == word.casefold() for word in words)
    for labels in COMMON_LABELS.values():
        assert len(labels) == len(set(labels))


def test_alike():
    person = alike(["pedestrian"])
    assert person == alike(["Human"]) == alike(["persons"]) == alike(["walking_person"])
    assert len(person[0]) > 2
    assert alike(["fish"]) == [("fish",)]
    assert alike(["person", "car", "pedestrian"])[0] == ("person",)  # to be told apart


def test_synonyms_have_one_embedding():
    tower = models.Words()
    got = [
        embed_labels([one, "fish"], tower, "short", synonyms=True) for one in ("human", "person")
    ]
    assert torch.equal(got[0].vectors[0], got[1].vectors[0])
    plain = embed_labels(["human", "fish"], tower, "short")
    torch.testing.assert_close(got[0].vectors[1], plain.vectors[1])
    assert not torch.allclose(got[0].vectors[0], plain.vectors[0])
    each = embed_labels(alike(["human"])[0], tower, ("{}",), cache=False)
    mean = F.normalize(each.vectors.mean(0), dim=-1)
    one = embed_labels(["human"], tower, ("{}",), synonyms=True, cache=False)
    torch.testing.assert_close(one.vectors[0], mean)


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A tiny sprout that was trained on two of the labels of the clouds."""
    shipped.tiny(tmp_path, monkeypatch)
    texts = embed_labels(["chair", "car"], models.Words(12), cache=False)
    file = labels_beside(tmp_path / "tiny.safetensors")
    save_trained_labels(file, texts, ["indoor", "road"])
    return tmp_path / "tiny.safetensors", texts


def test_labels_that_training_has(known):
    path, texts = known
    encoder = load_sprout(path)
    assert trained_labels(encoder) == {"indoor": ("chair",), "road": ("car",)}
    assert unfamiliar(encoder, texts) == []
    others = embed_labels(["chair", "zebra"], models.Words(12), cache=False)
    (strange,) = unfamiliar(encoder, others)
    assert strange.label == "zebra" and strange.nearest in ("chair", "car")
    assert strange.cosine < FAMILIAR
    assert "'zebra'" in notice_of([strange]) and notice_of([]) == ""
    assert "and 2 more" in notice_of([strange] * 7)
    wide = TextEmbeddings(("a",), torch.ones(1, 5))
    assert unfamiliar(encoder, wide) == []  # of another text model
    encoder.labels_file = None
    assert trained_labels(encoder) is None and unfamiliar(encoder, others) == []


def test_classify_warns_of_labels_that_training_has_not(known):
    cloud = sets.clouds().xyz[0]
    with pytest.warns(InputWarning, match="nothing like 'zebra'"):
        classify(cloud, ["chair", "zebra"], synonyms=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classify(cloud, ["chair", "car"], synonyms=False)


def test_damaged_labels(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="no labels of training"):
        names_in(path)


def test_labels_that_ship():
    known = names_in(SPROUT_LABELS)
    names = {name for part in known.values() for name in part}
    assert len(names) > 300 and {"chair", "car", "standing person"} <= names
    assert set(known) <= {"indoor", "road"}
    # Of the weights that ship: what they tested on is known, or was kept from them.
    encoder = load_sprout()
    assert stamp_in(SPROUT_LABELS) == encoder.text_stamp() and trained_labels(encoder) == known
    for part in known:
        clouds = load_clouds(part=part)
        assert set(clouds.where(group="seen").classes) <= names
        assert not set(clouds.where(group="novel").classes) & names


def test_labels_of_other_weights_are_refused(known):
    path, texts = known
    encoder = load_sprout(path)  # the file of labels has no stamp, as those of earlier versions
    file = labels_beside(path)
    save_trained_labels(file, texts, ["indoor", "road"], encoder.text_stamp())
    assert load_sprout(path).labels_file == file
    encoder.text_center.fill_(0.5)
    save_trained_labels(file, texts, ["indoor", "road"], encoder.text_stamp())
    with pytest.raises(InputError, match="has the labels of other weights"):
        load_sprout(path)
    file.unlink()
    assert load_sprout(path).labels_file is None
