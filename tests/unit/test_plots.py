"""Plots: what is drawn, with labels in words that do not lie on each other."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("matplotlib")

from budwood.bench import plots
from budwood.errors import InputError, OutputError

ROWS = [
    {"method": "adav", "n_kept": 28, "accuracy": 0.61, "low": 0.59, "high": 0.63},
    {"method": "adav", "n_kept": 14, "accuracy": 0.556, "low": 0.53, "high": 0.58},
    {"method": "random", "n_kept": 28, "accuracy": 0.61, "low": 0.46, "high": 0.5},
]
LINES = {"x": "n_kept", "y": "accuracy", "by": "method"}


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or path)
    return figures


def test_lines_are_written(tmp_path):
    path = plots.plot_lines(ROWS, tmp_path / "c.png", **LINES, low="low", high="high", log=True)
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="a row has no 'ttft_ms'"):
        plots.plot_lines(ROWS, tmp_path / "d.png", **{**LINES, "y": "ttft_ms"})
    for bad in (tmp_path / "none" / "c.png", tmp_path / "c.nonsense"):
        with pytest.raises(OutputError, match="cannot write"):
            plots.plot_lines(ROWS, bad, **LINES)


def test_axes_have_words_and_units(drawn, tmp_path):
    plots.plot_lines(ROWS, tmp_path / "c.png", **LINES, baseline=0.8, baseline_label="all tokens")
    axes = drawn[0].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("visual tokens kept", "accuracy, %")
    assert list(axes.lines[0].get_ydata()) == pytest.approx([55.6, 61])
    written = {text.get_text(): text for text in axes.texts}
    assert set(written) == {"all tokens", "adav", "random"}
    bottom, top = axes.get_ylim()
    apart = abs(written["adav"].xyann[1] - written["random"].xyann[1]) / (top - bottom)
    assert apart == pytest.approx(plots._LABEL / (drawn[0].get_figheight() - plots._BELOW))


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0.9, 0.1], [0.9, 0.1]),
        ([0.5, 0.5], [0.47, 0.53]),
        ([0.5, 0.5, 0.52], [0.5066667 + 0.06 * k for k in (-1, 0, 1)]),
        ([0.99, 1.0, 0.98], [0.94, 1.0, 0.88]),  # room ends at 1
        ([0.0, 0.01], [0.0, 0.06]),
        ([0.9, 0.99, 1.0, 0.1], [0.88, 0.94, 1.0, 0.1]),
    ],
)
def test_labels_move_apart_and_stay_inside(heights, expected):
    assert plots._spread(heights, 0.06) == pytest.approx(expected)


def test_many_curves_differ_and_their_labels_have_room(drawn, tmp_path):
    rows = [{"method": f"m{i}", "n_kept": 8, "accuracy": 0.5 + i / 1000} for i in range(40)]
    plots.plot_lines(rows, tmp_path / "c.png", **LINES)
    axes = drawn[0].axes[0]
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 40
    bottom, top = axes.get_ylim()
    places = sorted((text.xyann[1] - bottom) / (top - bottom) for text in axes.texts)
    assert places[0] > -0.01 and places[-1] < 1.01
    gaps = [above - below for below, above in itertools.pairwise(places)]
    assert min(gaps) * (drawn[0].get_figheight() - plots._BELOW) > 0.19


def test_ticks_keep_apart(drawn, tmp_path):
    values = (28.25, 28.6, 55.2, 55.6, 110.35, 112.98, 112.99)
    rows = [{"method": "m", "n_kept": value, "accuracy": 0.5} for value in values]
    plots.plot_lines(rows, tmp_path / "c.png", **LINES, log=True)
    assert [tick.get_text() for tick in drawn[0].axes[0].get_xticklabels()] == [
        "28.2",
        "55.2",
        "110",
    ]


def test_what_is_no_number_is_left_out_or_refused(drawn, tmp_path):
    empty = {"method": "none", "n_kept": 8, "accuracy": None}
    plots.plot_lines([*ROWS, empty], tmp_path / "c.png", **LINES)
    assert {text.get_text() for text in drawn[0].axes[0].texts} == {"adav", "random"}
    for bad, said in (
        ("0.5", "cannot plot 'accuracy': it is '0.5' in a row"),
        (float("nan"), "cannot plot 'accuracy': it is nan"),
    ):
        with pytest.raises(InputError, match=said):
            plots.plot_lines([{**empty, "accuracy": bad}], tmp_path / "c.png", **LINES)
    with pytest.raises(InputError, match="cannot plot 'accuracy': no row has a value"):
        plots.plot_lines([empty], tmp_path / "c.png", **LINES)


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        (("kl_chat", "kl_text", "perplexity"), [plots.KL["kl_chat"], "perplexity of text"]),
        (("kl_text", "perplexity"), [plots.KL["kl_text"], "perplexity of text"]),
        (("kl_chat", "perplexity_of_replies"), [plots.KL["kl_chat"]]),
    ],
)
def test_pictures_show_what_was_measured(keys, labels, drawn, tmp_path):
    rows = [
        {"method": "base", "lr": None, "status": "complete", "validation": 0.3},
        {"method": "lora", "lr": 1e-3, "status": "complete", "validation": 0.4},
        {"method": "lora", "lr": 1e-2, "status": "diverged"},
    ]
    for row in rows[:2]:
        row |= dict.fromkeys((*keys, "validation_loss"), 1.5)
    plots.plot_front(rows, tmp_path / "front.png")
    plots.plot_curves({"lora": [{"step": 2, "probe": rows[1]}, {"step": 3}]}, tmp_path / "c.png")
    front, curves = drawn
    assert [axis.get_xlabel() for axis in front.axes] == labels
    assert [len(axis.lines) for axis in curves.axes] == [1, 1, 1]
    assert curves.axes[2].get_ylabel() == labels[0]


@pytest.mark.parametrize("base", [[], [{"method": "base", "lr": None, "validation": 0.25}]])
def test_runs_that_learn_little_lie_outside(base, drawn, tmp_path):
    runs = [(1e-3, 0.4, 0.5), (3e-3, 0.5, 2.0), (1e-2, 0.3, 900.0)]
    shared = {"method": "lora", "status": "complete"}
    rows = [shared | {"lr": lr, "validation": v, "kl_chat": kl} for lr, v, kl in runs]
    plots.plot_front([*base, *rows], tmp_path / "front.png")
    axis = drawn[0].axes[0]
    (low, high), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    assert 0.4 < low < 0.5 and bottom < 40 and 50 < top < 55
    assert 2 < high < 3 if base else high > 900
    assert len(axis.lines[0].get_xdata()) == 3  # a line leads there


def test_a_picture_of_nothing_is_refused(tmp_path):
    row = {"method": "lora", "lr": 1e-3, "status": "complete", "validation": 0.4}
    with pytest.raises(InputError, match="measured on no text"):
        plots.plot_front([row], tmp_path / "front.png")


def test_identity_has_a_line_for_each_kind_of_text(drawn, tmp_path):
    rows = [
        {"text": text, "layer": layer, "identity_share": 0.5, "distance": 1.0}
        for text in ("target", "chat", "notes")
        for layer in (3, 4)
    ]
    plots.plot_identity(rows, tmp_path / "i.png")
    labels = [line.get_label() for line in drawn[0].axes[0].lines]
    assert labels == ["answers of the tasks", "replies of the base model", "notes"]
    assert list(drawn[0].axes[0].lines[0].get_ydata()) == [50, 50]
