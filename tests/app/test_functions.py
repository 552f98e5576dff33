"""The functions behind the tabs; none needs gradio."""

from __future__ import annotations

import json
import re
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from budwood.app import markup, points, prune, tune, uploads
from budwood.app.models import Lazy, Models, Sources
from budwood.errors import BudwoodError, InputError, MissingPackageError
from tests import tiny_vlm
from tests.app import parts
from tests.points import shipped


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return Models(Sources(str(tiny_vlm.save_llava(tmp_path_factory.mktemp("llava")))))


@pytest.fixture(scope="module")
def vlm_next(tmp_path_factory):
    return Models(Sources(str(tiny_vlm.save_llava_next(tmp_path_factory.mktemp("next")))))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return Models(Sources(tuned=str(parts.tuned(tmp_path_factory.mktemp("tuned")))))


@pytest.fixture
def tiny_points(tmp_path, monkeypatch):
    shipped.tiny(tmp_path, monkeypatch)
    return Models(Sources())


# Pruning


def test_answer(vlm, tmp_path):
    found = prune.answer(vlm, str(parts.picture(tmp_path)), "Is there any dog ?", "adav", 25)
    assert [*found.layers] == ["kept", "saliency", "relevance"]
    assert prune.OVERLAPPING not in found.layers["kept"]
    assert "<td>16</td>" in found.summary and "<td>4</td>" in found.summary
    assert (
        'alt="The picture with the layer kept, adav, 4 of 16 visual tokens"'
        in (found.layers["kept"])
    )


def test_answer_of_a_layout_with_crops(vlm_next, tmp_path):
    found = prune.answer(vlm_next, str(parts.picture(tmp_path)), "Is there any dog ?", "random", 10)
    assert [*found.layers] == ["kept"]
    assert "fixed tokens" in found.summary
    assert prune.OVERLAPPING in found.layers["kept"]


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (1, 1)), ("RGBA", (9, 7)), ("P", (9, 7)), ("I;16", (9, 7))]
)
def test_odd_pictures(mode, size, vlm, vlm_next, tmp_path):
    Image.new(mode, size).save(tmp_path / "odd.png")
    for models in (vlm, vlm_next):
        found = prune.answer(models, str(tmp_path / "odd.png"), "Is it red ?", "uniform", 50)
        assert "visual tokens" in found.summary


def test_animations_and_strips(vlm, tmp_path):
    frames = [Image.new("RGB", (9, 7), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "odd.gif", save_all=True, append_images=frames[1:])
    prune.answer(vlm, str(tmp_path / "odd.gif"), "Is it red ?", "uniform", 50)
    Image.new("RGB", (20_000, 1)).save(tmp_path / "odd.png")
    with pytest.raises(InputError, match=r"^odd\.png has 20000 × 1 pixels"):
        prune.answer(vlm, str(tmp_path / "odd.png"), "Is it red ?", "uniform", 50)


def test_side_by_side(vlm, tmp_path):
    chosen = ["adav", "random", "uniform"]
    found = prune.side_by_side(vlm, str(parts.picture(tmp_path)), "Is it red ?", chosen, 25)
    assert found.count("<img") == 3
    assert all(f"4 of 16 visual tokens that {method} keeps" in found for method in chosen)


@pytest.mark.parametrize(
    ("make", "question", "methods", "message"),
    [
        (lambda folder: None, "What ?", ["adav"], "there is no picture; choose an example"),
        (parts.picture, " ", ["adav"], "the question is empty"),
        (parts.picture, "What ?", [], "nothing to compare: choose at least one method"),
        (parts.cloud, "What ?", ["adav"], r"^cloud\.npy is not a picture"),
    ],
)
def test_bad_questions(make, question, methods, message, tmp_path):
    file = make(tmp_path)
    models = Models(Sources("/missing"))  # refused before a model is loaded
    with pytest.raises(InputError, match=message):
        prune.side_by_side(models, file and str(file), question, methods, 10)


def test_examples_are_scenes_with_questions():
    for name in prune.EXAMPLES:
        picture, question = prune.example(name)
        assert picture.mode == "RGB" and question.endswith("?")
    with pytest.raises(InputError, match="there is no example 'Scene 99'"):
        prune.example("Scene 99")


# Points


def test_labels_of_an_uploaded_cloud(tiny_points, tmp_path):
    file = str(parts.cloud(tmp_path))
    found = points.name(tiny_points, file, "", "chair, <b>table</b>", 16, "y")
    assert "before adaptation" in found.ranked and ">after<" not in found.ranked
    assert "&lt;b&gt;table&lt;/b&gt;" in found.ranked and "<b>" not in found.ranked
    assert len(found.figure.data[0].x) == 16


def test_points_without_coordinates_are_left_out(tiny_points, tmp_path):
    xyz = np.random.default_rng(0).normal(size=(50, 3))
    xyz[3, 1] = np.nan
    np.save(tmp_path / "cloud.npy", xyz)
    found = points.name(tiny_points, str(tmp_path / "cloud.npy"), "", "chair", 16, "y")
    assert "points left out: 1 invalid" in found.ranked
    np.save(tmp_path / "cloud.npy", np.full((50, 3), np.nan))
    with pytest.raises(InputError, match=r"^cloud\.npy: all 50 points have NaN"):
        points.name(tiny_points, str(tmp_path / "cloud.npy"), "", "chair", 16, "y")


def test_adaptation_is_kept_for_the_next_page(tiny_points, tmp_path, monkeypatch):
    monkeypatch.setattr("budwood.app.models.STEPS", 2)
    monkeypatch.setattr("budwood.app.models.COUNTS", (16,))
    steps = []
    points.adapt(tiny_points, lambda done, total, note="": steps.append((done, total)))
    assert steps[-1] == (2, 2)
    again = Models(Sources())
    found = points.name(again, str(parts.cloud(tmp_path)), "", "chair, table", 16, "y")
    assert ">after<" in found.ranked
    points.adapt(again, pytest.fail)  # nothing is left to do


def test_scan(tmp_path, monkeypatch):
    frame = points.room().xyz
    shipped.tiny(tmp_path, monkeypatch)
    np.save(tmp_path / "frame.npy", frame)
    figure, found = points.scan(Models(Sources()), str(tmp_path / "frame.npy"), "chair, desk", "z")
    assert len(figure.data) >= 3
    assert f"{len(points.ROOM)} objects" in found


def test_the_example_room_is_what_scan_expects(tmp_path, monkeypatch):
    cloud = points.room()
    assert cloud.xyz.shape[1] == 3 and cloud.xyz[:, 2].min() < -1.1
    assert np.array_equal(cloud.xyz, points.room().xyz)


@pytest.mark.parametrize(
    ("labels", "message"), [("chair", "."), ("chair, chair", "chair"), (",", "label")]
)
def test_bad_labels(labels, message, tiny_points, tmp_path):
    if labels == "chair":  # one label is enough
        points.name(tiny_points, str(parts.cloud(tmp_path)), "", labels, 16, "y")
        return
    with pytest.raises(InputError, match=message):
        points.name(tiny_points, str(parts.cloud(tmp_path)), "", labels, 16, "y")


def test_an_unknown_example_is_refused(tiny_points):
    with pytest.raises(InputError, match="there is no example '/etc/passwd'"):
        points.name(tiny_points, None, "/etc/passwd", "chair", 16, "y")


# Fine-tuning


def test_replies_side_by_side(tuned):
    found = tune.reply(tuned, "Why ?", 8)
    assert found.index("Base model") < found.index("Tuned model")
    assert re.search(r'title="\d+% on identity experts"', found)
    assert "Weight on identity experts</caption>" in found
    assert f"rgb{tune.LOW}" in found and f"rgb{tune.HIGH}" in found


def test_replies_need_an_adapter_and_a_prompt(tuned):
    with pytest.raises(InputError, match="start the page with --tuned DIR"):
        tune.reply(Models(Sources()), "Why ?", 8)
    with pytest.raises(InputError, match="the prompt is empty"):
        tune.reply(tuned, " ", 8)


def record(folder, rows):
    path = folder / "record.json"
    about = {"name": "bench tune", "command": "", "seed": 0, "config": {}, "format": 1}
    path.write_text(json.dumps({**about, "rows": rows}))
    return str(path)


def test_curve(tmp_path):
    rows = [
        {"method": "base", "lr": None, "target": 0.4, "kl_chat": 0.0},
        {"method": "slim", "lr": 1e-2, "target": 0.5, "kl_chat": 0.2, "target_std": 0.01},
        {"method": "slim", "lr": 1e-3, "target": 0.45, "kl_chat": 0.1},
    ]
    figure, table = tune.curve(record(tmp_path, rows))
    by_name = {trace.name: trace for trace in figure.data}
    assert list(by_name["slim"].x) == [0.1, 0.2] and list(by_name["slim"].y) == [45, 50]
    assert "<td>50.0</td><td>0.20</td>" in table


def test_a_record_of_something_else(tmp_path):
    with pytest.raises(InputError, match=r"^record.json has no numbers under kl_chat or"):
        tune.curve(record(tmp_path, [{"method": "adav", "accuracy": 1.0}]))
    none = {"method": "slim", "target": 0.5, "kl_chat": None}
    with pytest.raises(InputError, match=r"^record.json has no numbers under kl_chat or"):
        tune.curve(record(tmp_path, [none]))
    nan = {"method": "slim", "target": 0.5, "kl_chat": float("nan")}
    with pytest.raises(InputError, match=r"^record.json is malformed: .* infinite or NaN"):
        tune.curve(record(tmp_path, [nan]))
    with pytest.raises(InputError, match="there is no record"):
        tune.curve(None)


# Files of visitors


def test_messages_do_not_name_folders(tmp_path):
    file = tmp_path / "scan.ply"
    with pytest.raises(InputError, match=r"^scan\.ply is empty$"), uploads.uploaded(str(file)):
        raise InputError(f"{file} is empty")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.gltf", json.dumps({"buffers": [{"uri": "../../secret.bin", "byteLength": 4}]})),
        ("a.gltf", json.dumps({"images": [{"uri": "/etc/passwd"}]})),
        ("a.gltf", json.dumps({"images": [{"uri": "..%2Fsecret"}]})),
        ("a.gltf", json.dumps({"images": [{"uri": "file:///etc/passwd"}]})),
        ("a.obj", "mtllib ../secret.mtl\nv 0 0 0\n"),
        ("a.obj", "mtllib\t/etc/passwd\nv 0 0 0\n"),
        ("a.ply", "ply\nformat ascii 1.0\ncomment TextureFile ..\\secret.png\nend_header\n"),
    ],
)
def test_meshes_that_name_other_files(name, text, tmp_path, tiny_points):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"^{name} names a file outside its folder \("):
        points.name(tiny_points, str(tmp_path / name), "", "chair", 16, "y")


def test_archives_that_unpack_to_too_much(tmp_path, monkeypatch, tiny_points):
    monkeypatch.setattr(uploads, "MAX_UNPACKED", 1_000)
    with zipfile.ZipFile(tmp_path / "cloud.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xyz.npy", bytes(2_000))
    with pytest.raises(InputError, match=r"^cloud\.npz unpacks to 2,000 bytes"):
        points.name(tiny_points, str(tmp_path / "cloud.npz"), "", "chair", 16, "y")


def test_archives_of_other_files_are_refused(tmp_path, tiny_points):
    with zipfile.ZipFile(tmp_path / "cloud.zip", "w") as archive:
        archive.writestr("cloud.xyz", "0 0 0\n")
    with pytest.raises(InputError, match=r"^cloud\.zip is of no known format"):
        points.name(tiny_points, str(tmp_path / "cloud.zip"), "", "chair", 16, "y")


# The rest


def test_html_is_escaped():
    evil = "<script>alert(1)</script>"
    shown = markup.table(evil, [evil], [[evil, evil]]) + markup.paragraph(evil)
    shown += markup.picture(Image.new("RGB", (4, 4)), f'"{evil}', evil)
    assert "<script" not in shown and 'alt="&quot;&lt;script' in shown


def test_a_model_is_made_once_and_held_by_one():
    made, inside = [], []
    lazy = Lazy(lambda: made.append(1) or "model")
    assert not lazy.is_made

    def use():
        with lazy.held() as value:
            inside.append(value)
            assert len(inside) == 1
            inside.pop()

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and lazy.is_made


def test_a_model_that_cannot_be_made_is_tried_again():
    answers = iter([InputError("no"), "model"])

    def make():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    lazy = Lazy(make)
    with pytest.raises(InputError), lazy.held():
        pass
    with lazy.held() as value:
        assert value == "model"


@pytest.mark.parametrize(
    "sources", [{"model": "./missing"}, {"adapter": "./missing"}, {"tuned": "./missing"}]
)
def test_sources_are_checked_at_the_start(sources):
    with pytest.raises(BudwoodError, match="missing"):
        Sources(**sources).check()


@pytest.mark.parametrize("package", ["gradio", "plotly"])
def test_a_missing_package(package, monkeypatch):
    from budwood import optional
    from budwood.app import build

    find = optional.is_installed
    monkeypatch.setattr(optional, "is_installed", lambda name: name != package and find(name))
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(
        MissingPackageError, match=rf"needs {package}.*pip install 'budwood\[app\]'"
    ):
        build()
