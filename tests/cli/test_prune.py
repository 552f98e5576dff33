from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused


def test_json(budwood, picture, model_dir):
    command = ["prune", picture, "What colour ?", "--model", model_dir, "--keep", 5, "--json"]
    result = budwood(*command, "--method", "adav")
    found = json.loads(result.stdout)
    assert (found["n_visual"], found["n_kept"], len(found["kept"])) == (16, 5, 5)
    assert sum(found["split"].values()) == 5
    assert found["answer"] and found["answer_full"]
    assert found["question"] == "What colour ?" and found["question_span"] == "current"
    for times in (found["ttft"], found["ttft_full"]):
        parts = times["encode_ms"] + times["select_ms"] + times["prefill_ms"]
        assert np.isclose(parts, times["total_ms"], atol=0.01)
        assert times["encode_ms"] > 0 and times["prefill_ms"] > 0
    assert found["ttft"]["select_ms"] > 0 and found["ttft_full"]["select_ms"] == 0


def test_keeping_everything_gives_the_same_answer(budwood, picture, model_dir):
    command = ["prune", picture, "What colour ?", "--model", model_dir, "--json", "--keep"]
    found = json.loads(budwood(*command, "1.0").stdout)
    assert found["answer"] == found["answer_full"]
    pruned = json.loads(budwood(*command, "2").stdout)
    assert pruned["answer_full"] == found["answer_full"] != pruned["answer"]


def test_table_and_overlay(budwood, picture, model_dir, tmp_path):
    overlay = tmp_path / "kept.png"
    command = ["prune", picture, "What colour ?", "--model", model_dir, "--keep", "0.25"]
    result = budwood(*command, "--method", "adav", "--overlay", overlay)
    assert result.exit_code == 0
    assert "all tokens" in result.stdout and "kept 4 of 16 candidates, 0 fixed: " in result.stdout
    assert "saliency" in result.stdout
    assert f"wrote {overlay}" in result.stderr
    with Image.open(overlay) as drawn:
        assert drawn.width > 3 * 420
    assert {path.name for path in tmp_path.iterdir()} == {"kept.png", picture.name}


@pytest.mark.parametrize("command", [["prune", "--overlay"], ["compare", "--out"]])
def test_the_picture_is_not_written_over(budwood, picture, model_dir, command):
    name, option = command
    before = picture.read_bytes()
    done = budwood(name, picture, "What ?", "--model", model_dir, option, picture, "--force")
    refused(done, "is one of the files that are read; give another name")
    assert picture.read_bytes() == before


def test_picture_with_fewer_tokens_than_keep(budwood, picture, model_dir):
    result = budwood("prune", picture, "What ?", "--model", model_dir, "--keep", 99, "--json")
    assert json.loads(result.stdout)["n_kept"] == 16
    assert "16 candidates, so all were kept" in result.stderr


def test_anyres_model(budwood, picture, next_dir, tmp_path):
    command = ["prune", picture, "What ?", "--model", next_dir, "--keep", 7, "--json"]
    found = json.loads(budwood(*command, "--overlay", tmp_path / "kept.png").stdout)
    assert found["n_kept"] == 7 and found["n_visual"] > 16 and found["n_fixed"] > 0


def test_random_follows_the_seed(budwood, picture, model_dir):
    command = ["prune", picture, "What ?", "--model", model_dir, "--keep", 5, "--json"]
    kept = [
        json.loads(budwood(*command, "--method", "random", "--seed", seed).stdout)["kept"]
        for seed in (1, 1, 2)
    ]
    assert kept[0] == kept[1] != kept[2]


def test_the_method_to_start_with(budwood, picture, model_dir):
    command = ["prune", picture, "What ?", "--model", model_dir, "--keep", 5, "--json"]
    assert json.loads(budwood(*command).stdout)["method"] == "adav+"


def test_the_published_form_is_a_method_and_compat_its_alias(budwood, picture, model_dir):
    command = ["prune", picture, "What ?", "--model", model_dir, "--keep", 7, "--json"]
    by_name = json.loads(budwood(*command, "--method", "adav-official").stdout)
    by_alias = json.loads(budwood(*command, "--compat", "official").stdout)
    assert by_name["method"] == by_alias["method"] == "adav-official"
    assert by_name["kept"] == by_alias["kept"] and by_name["n_kept"] == 6


def test_the_published_form_has_the_same_parameters(budwood, picture, model_dir):
    asked = ["prune", picture, "What ?", "--model", model_dir, "--keep", 6, "--json"]
    alias = budwood(*asked, "--method", "adav:reserve=0.5+temperature=5", "--compat", "official")
    named = budwood(*asked, "--method", "adav-official:reserve=0.5+temperature=5")
    assert json.loads(alias.stdout)["method"] == "adav-official:reserve=0.5+temperature=5"
    assert json.loads(alias.stdout)["kept"] == json.loads(named.stdout)["kept"]


def test_bad_parameters_are_refused_before_the_model_is_loaded(budwood, picture, not_loaded):
    result = budwood("prune", picture, "What ?", "--method", "adav:reserve=0.9")
    assert result.exit_code == 2 and "reserve" in result.stderr


def test_a_method_without_a_split_has_none(budwood, picture, model_dir):
    asked = ["prune", picture, "What ?", "--model", model_dir, "--keep", 6, "--json"]
    assert json.loads(budwood(*asked, "--method", "uniform").stdout)["split"] is None


def test_question_span_changes_the_choice(budwood, picture, model_dir):
    command = ["prune", picture, "Is there any owl ?", "--model", model_dir, "--keep", 5, "--json"]
    kept = [
        json.loads(budwood(*command, "--method", "t2i", "--question", span).stdout)["kept"]
        for span in ("turn", "all")
    ]
    assert kept[0] != kept[1]


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_a_picture_of_16_bits_keeps_its_greys(tmp_path, suffix):
    from budwood.pictures import read_picture

    ramp = np.linspace(0, 65535, 20 * 30).astype("uint16").reshape(20, 30)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{suffix}")
    read = np.asarray(read_picture(tmp_path / f"ramp.{suffix}"))
    assert np.array_equal(read, np.repeat((ramp // 257)[:, :, None], 3, 2))


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_a_picture_of_32_bits_is_refused(budwood, tmp_path, dtype):
    Image.fromarray(np.ones((20, 30), dtype=dtype)).save(tmp_path / "deep.tiff")
    refused(budwood("prune", tmp_path / "deep.tiff", "What?"), "32 bits a pixel", "8 or 16")


def test_a_placeholder_in_the_question_is_refused(budwood, picture, model_dir):
    done = budwood("prune", picture, "What is <image> ?", "--model", model_dir)
    refused(done, "the question contains '<image>'", "leave it out")


def test_picture_is_turned_as_the_camera_says(tmp_path):
    from budwood.pictures import read_picture

    picture = Image.new("RGB", (30, 20))
    exif = picture.getexif()
    exif[0x0112] = 6  # rotated by 90°
    picture.save(tmp_path / "photo.jpg", exif=exif)
    assert read_picture(tmp_path / "photo.jpg").size == (20, 30)
