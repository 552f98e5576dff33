"""Bad input ends with one line on standard error and exit code 2, before any slow work."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from budwood import records
from budwood.pictures import read_picture
from tests.refusals import refused


def png_of_size(path, width: int, height: int):
    """A PNG whose header claims a size, with next to no data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def test_missing_file(budwood, tmp_path):
    refused(budwood("prune", tmp_path / "no.png", "What?"), "there is no file", "no.png")


def test_directory(budwood, tmp_path):
    refused(budwood("prune", tmp_path, "What?"), "is a directory")


def test_empty_file(budwood, tmp_path):
    (tmp_path / "empty.png").touch()
    refused(budwood("prune", tmp_path / "empty.png", "What?"), "is empty")


def test_no_picture(budwood, tmp_path):
    (tmp_path / "text.png").write_text("these are words")
    refused(budwood("prune", tmp_path / "text.png", "What?"), "is not a picture")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_truncated_picture(budwood, picture, tmp_path, suffix):
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    Image.open(picture).save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    refused(budwood("prune", cut, "What?"), f"cut.{suffix}")


@pytest.mark.parametrize(
    ("size", "fragment"),
    [
        ((20_000, 20), "100 times"),
        ((20, 20_000), "100 times"),
        ((9_000, 9_000), "more than 50,000,000"),
        ((50_000, 50_000), "pixels"),
    ],
)
def test_huge_picture_is_refused_by_its_header(budwood, tmp_path, size, fragment):
    refused(budwood("prune", png_of_size(tmp_path / "huge.png", *size), "What?"), fragment)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 150)])
def test_tiny_picture_is_handled(budwood, tmp_path, model_dir, next_dir, size):
    Image.new("RGB", size, (200, 10, 10)).save(tmp_path / "tiny.png")
    for model in (model_dir, next_dir):
        result = budwood("prune", tmp_path / "tiny.png", "What?", "--model", model, "--keep", 3)
        assert result.exit_code == 0, result.output


def test_transparent_pictures_are_seen_on_white(tmp_path):
    for mode, colour in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        Image.new(mode, (20, 20), colour).save(tmp_path / "logo.png")
        assert read_picture(tmp_path / "logo.png").getcolors() == [(400, (255, 255, 255))]
    deep = Image.fromarray(np.zeros((20, 20), dtype=np.uint16))
    deep.save(tmp_path / "deep.png", transparency=0)
    assert read_picture(tmp_path / "deep.png").getcolors() == [(400, (255, 255, 255))]
    palette = Image.new("P", (20, 20), 0)
    palette.save(tmp_path / "logo.gif", transparency=0)
    assert read_picture(tmp_path / "logo.gif").getcolors() == [(400, (255, 255, 255))]


@pytest.mark.parametrize(
    "command",
    [
        ("demo", "--overlay-dir", ""),
        ("bench", "show", ""),
        ("compare", "", "What?"),
        ("tune", "x.jsonl", "--output", ""),
        ("tune", "x.jsonl", ""),
        ("classify", "", "--labels", "a,b"),
        ("tune", "eval", "x", "--target", ""),
    ],
)
def test_empty_paths(budwood, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    result = budwood(*command)
    assert result.exit_code == 2 and "it is empty; give " in result.stderr
    assert not list(tmp_path.iterdir())


def test_numbers_say_what_was_given(budwood):
    for options, said in (
        (("demo", "--scenes", 101), "101"),  # how it goes on depends on the version of typer
        (("report", "x", "--out", "r.html", "--examples", "abc"), "'abc'"),
        (("demo", "--scenes", ""), "''"),
    ):
        result = budwood(*options)
        assert result.exit_code == 2 and said in result.stderr


@pytest.mark.parametrize("question", ["", "  \n "])
def test_empty_question(budwood, picture, question):
    refused(budwood("prune", picture, question), "question is empty")


@pytest.mark.parametrize(
    "keep", ["0", "-3", "nan", "inf", "1.5", "0.0", "-0.1", "64.0", "many", ""]
)
def test_keep(budwood, picture, keep):
    refused(budwood("prune", picture, "What?", "--keep", keep), "keep=")


@pytest.mark.parametrize("keep", ["0", "0.1,nan", "0.1,0.1", ""])
def test_keep_of_benchmarks(budwood, keep):
    refused(budwood("bench", "prune", "--keep", keep))
    refused(budwood("bench", "prune-speed", "--keep", keep))


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "PICTURE", "What?", "--method", "adv"],
        ["bench", "prune", "--methods", "random,adv"],
        ["bench", "prune-speed", "--method", "adv"],
        ["demo", "--method", "adv"],
    ],
)
def test_unknown_method(budwood, picture, command):
    command = [picture if word == "PICTURE" else word for word in command]
    refused(budwood(*command), "unknown method 'adv', did you mean 'adav'?")


def test_unknown_choices(budwood, picture):
    for question in ("turns", "", "current,all"):
        done = budwood("prune", picture, "What?", "--question", question)
        refused(done, f"unknown --question {question!r}")
    refused(budwood("prune", picture, "What?", "--compat", "old"), "unknown compat 'old'")
    refused(budwood("prune", picture, "What?", "--dtype", "int8"), "unknown dtype 'int8'")
    refused(budwood("prune", picture, "What?", "--device", "tpu"), "device 'tpu'")
    refused(budwood("prune", picture, "What?", "--device", "meta"), "'meta' holds no values")
    refused(budwood("bench", "prune", "--split", "tset"), "unknown split 'tset'")
    refused(budwood("bench", "prune", "--methods", "random-official"), "random")
    refused(budwood("bench", "prune-speed", "--shape", "gpt"), "unknown shape 'gpt'")


def test_published_form_that_does_not_exist(budwood, picture, model_dir):
    command = ["prune", picture, "What?", "--method", "uniform", "--compat", "official"]
    refused(budwood(*command), "uniform")


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_seed_out_of_range(budwood, picture, seed):
    refused(budwood("prune", picture, "What?", "--seed", seed), f"seed={seed}", "4294967295")
    refused(budwood("demo", "--seed", seed), f"seed={seed}", "4294967295")
    refused(budwood("bench", "prune", "--seed", seed), f"seed={seed}", "999")


def test_seed_beyond_the_scenes(budwood):
    refused(budwood("bench", "prune", "--seed", 5000), "seed=5000 is out of range; give 0 to 999")


@pytest.mark.parametrize("option", ["--scenes", "--batch", "--timed", "--max-new-tokens"])
def test_numbers_of_the_benchmark(budwood, option):
    refused(budwood("bench", "prune", option, 0), "below 1")


def test_choices_of_the_benchmark(budwood):
    refused(budwood("bench", "prune", "--workers", 0), "workers=0 is below 1")
    refused(budwood("bench", "prune", "--methods", "fastv:layers=1"), "it has: average, layer")
    refused(
        budwood("bench", "prune", "--methods", "random", "--reference", "adav"), "takes no part"
    )


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("adav:reserve=0.1+reserve=0.2", "gives reserve twice"),
        (
            "adav:temperature=100000000000000000000",
            "temperature=1e+20; give a number above 0, from 1e-9 to 1e9",
        ),
        ("adav+:reach=1e200", "reach=1e+200; give a number from 0.01 to 1,000,000"),
        ("mmtok:text_temperature=1e300", "text_temperature=1e+300"),
    ],
)
def test_parameters_of_a_method(budwood, picture, model_dir, method, reason):
    refused(budwood("prune", picture, "What?", "--model", model_dir, "--method", method), reason)


def test_missing_model(budwood, picture, tmp_path):
    refused(budwood("prune", picture, "What?", "--model", tmp_path / "gone"), "no model directory")
    refused(budwood("prune", picture, "What?", "--model", ""), "the name of the model is empty")
    (tmp_path / "a.jsonl").write_text('{"question": "Is it wet?", "answer": "yes"}')
    done = budwood("tune", tmp_path / "a.jsonl", "--model", " ", "--output", tmp_path / "run")
    refused(done, "the name of the model is empty")


def test_directory_without_model(budwood, picture, tmp_path):
    refused(budwood("prune", picture, "What?", "--model", tmp_path), "cannot load model")


def test_model_with_code_of_its_own(budwood, picture, tmp_path):
    """Transformers would ask on the terminal whether to run it."""
    config = {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "configuration.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = budwood("prune", picture, "What?", "--model", tmp_path)
    refused(done, "needs remote code, which budwood does not run")


def test_model_without_weights(budwood, picture, tmp_path, model_dir):
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    refused(budwood("prune", picture, "What?", "--model", tmp_path), "cannot load model")


def test_model_without_vision(budwood, picture, blind_dir):
    result = budwood("prune", picture, "What?", "--model", blind_dir)
    refused(result, "has no vision", "known families: llava,")


def test_existing_file_is_kept_unless_forced(budwood, picture, tmp_path, model_dir):
    target = tmp_path / "kept.png"
    target.write_text("mine")
    command = ["prune", picture, "What?", "--model", model_dir, "--overlay", target]
    refused(budwood(*command), "exists", "--force")
    assert target.read_text() == "mine"
    assert budwood(*command, "--force").exit_code == 0
    assert target.read_bytes().startswith(b"\x89PNG")


def test_existing_record_is_kept(budwood, tmp_path):
    target = tmp_path / "record.json"
    target.write_text("mine")
    refused(budwood("bench", "prune", "--out", target), "exists")
    refused(budwood("bench", "prune-speed", "--out", target), "exists")
    assert target.read_text() == "mine"


@pytest.mark.parametrize("target", ["picture.png/kept.png", "."])
def test_unwritable_file(budwood, picture, tmp_path, target):
    refused(budwood("prune", picture, "What?", "--overlay", tmp_path / target))


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "PICTURE", "What?", "--overlay", "none/kept.png"],
        ["bench", "prune", "--out", "none/record.json"],
        ["bench", "points", "--plot", "none/plot.png"],
        ["tune", "train.jsonl", "--output", "none/tuned"],
        ["points", "adapt", "scans", "--output", "none/adapted"],
        ["points", "demo", "--dir", "none/demo"],
        ["demo", "--overlay-dir", "none/demo"],
    ],
)
def test_output_into_a_missing_folder(budwood, picture, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    command = [picture if word == "PICTURE" else word for word in command]
    refused(budwood(*command), "there is no folder none; make it first, or give another")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", [["demo", "--overlay-dir"], ["points", "demo", "--dir"]])
def test_file_in_place_of_a_folder(budwood, tmp_path, command):
    (tmp_path / "file").write_text("mine")
    refused(budwood(*command, tmp_path / "file"), "file is a file; give a folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_overlay_of_unknown_format(budwood, picture, tmp_path):
    refused(budwood("prune", picture, "What?", "--overlay", tmp_path / "kept.txt"), "must end in")


def test_usage(budwood, picture):
    refused(budwood("prune", picture), "Missing argument", "see budwood prune --help")
    refused(budwood("prune", picture, "What?", "--kep", 3), "--kep")
    refused(budwood("prnue"), "prnue")
    refused(budwood("bench", "prune", "--scenes", "few"), "--scenes")


def test_record_to_show(budwood, tmp_path):
    refused(budwood("bench", "show", tmp_path / "no.json"), "no.json")
    row = {"method": "adav", "accuracy": 0.5}
    record = records.new_record("bench prune", [row], seed=0, config={})
    path = records.write(record, tmp_path / "record.json")
    refused(budwood("bench", "show", path, "--columns", "accurate"), "unknown column 'accurate'")
    refused(budwood("bench", "show", path, "--columns", "accuracy:.1q"), "format '.1q'")


def test_other_exceptions_are_not_swallowed(budwood, picture, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("budwood.cli.models.load", broken)
    with pytest.raises(ZeroDivisionError):
        budwood("prune", picture, "What?")


def test_json_errors_leave_stdout_empty(budwood, tmp_path):
    refused(budwood("prune", tmp_path / "no.png", "What?", "--json"))


def test_a_list_that_is_given_twice_is_said(budwood):
    """The last one counts, as in scripts that add options to a command."""
    result = budwood("classify", "no.ply", "--labels", "a", "--labels=b", "--json", "--json")
    note, error = result.stderr.splitlines()
    assert note.startswith("note: --labels is given 2 times, and the last one counts")
    assert "no.ply does not exist" in error
