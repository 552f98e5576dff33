from __future__ import annotations

import json

import pytest
from PIL import Image

from budwood import records
from budwood.bench.prune import shape_pictures as pictures
from budwood.bench.prune.accuracy import _Exam
from budwood.bench.prune.shapes import SHAPES, Shape, random_model
from budwood.bench.prune.speed import SpeedConfig, largest_allocation, measure_speed
from budwood.cli.columns import Column, Columns
from budwood.cli.results import Results
from budwood.errors import InputError
from budwood.prune.families import FAMILIES, family_class, family_of
from budwood.sprout.questions import KINDS

SMALL = ["--scenes", 4, "--timed", 1, "--batch", 12]
PROMISED = {
    *("method", "keep", "n_visual", "n_kept", "accuracy", "accuracy_full", "retention"),
    *("ttft_ms", "ttft_full_ms", "select_ms"),
}


@pytest.fixture(scope="module")
def run(model_dir, tmp_path_factory):
    """One small run with everything, its record and its curve."""
    from typer.testing import CliRunner

    from budwood.cli import app

    folder = tmp_path_factory.mktemp("bench")
    command = ["bench", "prune", "--model", model_dir, *SMALL, "--json"]
    command += ["--methods", "adav,random", "--keep", "0.25,3", "--compat", "official"]
    command += ["--question", "turn,all"]
    command += ["--out", folder / "record.json", "--plot", folder / "curve.png"]
    result = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


def test_rows(run):
    _, found = run
    names = [(row["method"], row["question"], row["keep"]) for row in found["rows"]]
    assert names[:2] == [("full", None, 1.0), ("blind", None, 1.0)]
    each = [("adav", "turn"), ("adav", "all"), ("adav-official", "turn"), ("adav-official", "all")]
    each += [("random", None)]
    assert names[2:] == [(*one, keep) for keep in (0.25, 3) for one in each]
    for row in found["rows"]:
        assert set(row) >= PROMISED
        assert row["n_visual"] == 16 and row["ttft_ms"] > 0
        assert {f"accuracy_{group}" for group in (*KINDS, "salient", "other")} <= set(row)
    kept = {(row["method"], row["keep"]): row["n_kept"] for row in found["rows"]}
    assert kept["random", 0.25] == 4 and kept["adav", 3] == 3 and kept["adav-official", 3] == 2


def test_differences_are_to_the_reference_at_the_same_budget(run):
    _, found = run
    rows = {(row["method"], row["question"], row["keep"]): row for row in found["rows"]}
    assert rows["adav", "turn", 3]["difference"] is None
    other, own = rows["random", None, 3], rows["adav", "turn", 3]
    assert other["difference"] == pytest.approx(other["accuracy"] - own["accuracy"])
    assert other["difference_low"] <= other["difference"] <= other["difference_high"]


def test_record_says_how_it_came_about(run):
    folder, found = run
    record = records.read(folder / "record.json")
    assert record.rows == found["rows"] and record.status == "complete" and record.seed == 0
    config = record.config
    assert config["n_questions"] == sum(config[f"n_{kind}"] for kind in KINDS)
    assert config["n_questions"] == config["n_salient"] + config["n_other"]
    assert config["model"].startswith("llava") and "/" not in config["model"]
    with Image.open(folder / "curve.png") as curve:
        assert curve.format == "PNG"


def test_show(run, budwood):
    folder, found = run
    table = budwood("bench", "show", folder / "record.json").stdout
    assert table.startswith("| method |") and table.count("\n") == len(found["rows"]) + 2
    columns = ["--columns", "method,n_kept,accuracy:.1%"]
    lines = budwood("bench", "show", folder / "record.json", *columns).stdout.splitlines()
    assert lines[0] == "| method | n_kept | accuracy |"
    assert lines[2] == f"| full | 16 | {found['rows'][0]['accuracy']:.1%} |"


def test_show_several_side_by_side(budwood, tmp_path):
    for i, method in enumerate("ab"):
        rows = [{"method": method, "kind": k, "n": n, "top": i} for k in "xy" for n in (64, 8)]
        records.write(records.new_record("r", rows, seed=0, config={}), tmp_path / f"{method}.json")
    command = ["bench", "show", tmp_path / "a.json", tmp_path / "b.json", "--columns", "method,top"]
    side_by_side = [*command, "--where", "kind=x,method=a|b", "--across", "n"]
    table = budwood(*side_by_side, "--plot", tmp_path / "curves.png").stdout.splitlines()
    assert table[0] == "| method | 64 | 8 |" and table[2:] == ["| a | 0 | 0 |", "| b | 1 | 1 |"]
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.format == "PNG"
    for options, fragment in (
        (["--across", "n"], "two rows are a with n 64"),
        (["--across", "m"], "unknown column 'm'; known: kind, method, n, top"),
        (["--where", "kind=z"], "no row has kind=z; there are x, y"),
        (["--where", "kind"], "--where 'kind': write key=value"),
        (["--where", "size=1"], "unknown column 'size'"),
        (["--plot", tmp_path / "b.png"], "--plot needs --across, and two --columns"),
        (
            ["--where", "n=8", "--across", "kind", "--plot", tmp_path / "b.png"],
            "needs numbers above 0 along kind",
        ),
        ([*side_by_side[-4:], "--plot", tmp_path / "curves.png"], "exists"),
    ):
        result = budwood(*command, *options)
        assert result.exit_code == 2 and fragment in result.stderr


def test_show_chooses_records_and_formats(budwood, tmp_path):
    rows = [{"method": "a", "n": 1234, "x": 0.5, "none": None}]
    for name, kind, status in (
        ("one/record.json", "r", "complete"),
        ("one/runs/a/record.json", "r run", "complete"),
        ("other.json", "s", "partial"),
    ):
        record = records.new_record(kind, rows, seed=0, config={}, status=status)
        records.write(record, tmp_path / name)
    one, other = tmp_path / "one", tmp_path / "other.json"
    # A folder is its own record, and keys without a value are no columns.
    assert budwood("bench", "show", one).stdout.splitlines()[0] == "| method | n | x |"
    assert budwood("bench", "show", one).stdout.count("\n") == 3
    assert "other.json is not complete" in budwood("bench", "show", other).stderr
    for columns, cells in (
        ("n:d,method", "| 1234 | a |"),
        ("n:,,method", "| 1,234 | a |"),
        ("n:,.1f,x:.0%", "| 1,234.0 | 50% |"),
        ("x:,.2f", "| 0.50 |"),
        ("method,x:.2f,", "| a | 0.50 |"),
        ("n:,", "| 1,234 |"),
    ):
        shown = budwood("bench", "show", one, "--columns", columns)
        assert shown.exit_code == 0 and shown.stdout.splitlines()[2] == cells
    for arguments, fragment in (
        ((one, other), "records of several kinds: r ("),
        ((other, other), "other.json is given twice"),
        ((one, "--columns", "n,n:d"), "--columns has n twice"),
        ((one, "--columns", "x:d"), "format 'd' of column 'x' is unusable"),
        ((one, "--columns", "x:.1%,f"), "unknown column 'f'"),
        ((one, "--columns", "n,x", "--across", "n"), "needs --columns without n"),
        ((one, "--across", "n"), "needs --columns without n"),
    ):
        result = budwood("bench", "show", *arguments)
        assert result.exit_code == 2 and fragment in result.stderr


def test_same_seed_same_answers(budwood, model_dir):
    command = ["bench", "prune", "--model", model_dir, *SMALL, "--methods", "random", "--json"]
    command += ["--reference", "random", "--keep", 5]

    def scores(seed):
        rows = json.loads(budwood(*command, "--seed", seed).stdout)["rows"]
        return _without_times(rows)

    assert scores(3) == scores(3)


def _is_time(key: str) -> bool:
    return key.endswith("_ms") or key == "speedup"


def test_answers_of_an_earlier_record_are_taken_over(
    run, budwood, model_dir, tmp_path, monkeypatch
):
    folder, found = run
    asked = []
    sit = _Exam.sit
    monkeypatch.setattr(
        _Exam, "sit", lambda exam, run_: asked.append(run_.method) or sit(exam, run_)
    )
    command = ["bench", "prune", "--model", model_dir, *SMALL, "--json"]
    command += ["--methods", "adav,random,uniform", "--keep", 3, "--question", "turn"]
    reuse = ["--reuse", folder / "record.json"]

    more = json.loads(budwood(*command, *reuse).stdout)
    assert set(asked) == {"uniform"}
    (origin,) = more["config"]["reused"]
    assert origin["file"] == "record.json" and origin["command"] == found["command"]
    before = {(row["resolved"], row["question"], row["keep"]): row for row in found["rows"]}
    for row in more["rows"]:
        key = (row["resolved"], row["question"], row["keep"])
        if row["method"] != "uniform":
            assert (
                row["accuracy"] == before[key]["accuracy"] and row["right"] == before[key]["right"]
            )

    short = tmp_path / "short.json"  # its second batch is cut off by the end of the scenes
    budwood(*command, "--scenes", 3, "--out", short)
    asked.clear()  # of more scenes, only the batches that are not whole there
    command += ["--scenes", 5]
    longer = json.loads(budwood(*command, "--reuse", short).stdout)
    reused, asked[:] = asked.count("adav"), []
    plain = json.loads(budwood(*command).stdout)
    assert 0 < reused < asked.count("adav")
    assert _without_times(longer["rows"]) == _without_times(plain["rows"])


def _without_times(rows):
    return [{key: x for key, x in row.items() if not _is_time(key)} for row in rows]


@pytest.mark.parametrize(
    ("changes", "options", "fragment"),
    [
        ({}, ["--seed", 1], "has other answers (seed 0, not 1)"),
        ({}, ["--scenes", 2], "4 scenes, more than 2"),
        ({"status": "partial"}, [], "is a partial record of 'bench prune'"),
        ({"rows": [{"method": "full"}]}, [], "is older than answers in records"),
        ({"rows": [{"method": "full", "keep": 1.0, "right": "AA=="}]}, [], "has 8 answers to"),
        ({"rows": [{"method": "full", "keep": 1.0, "right": "?"}]}, [], "has damaged answers"),
        ({}, ["--out", "same", "--force"], "is one of the files that are read"),
    ],
)
def test_records_that_cannot_be_reused(
    changes, options, fragment, run, budwood, model_dir, tmp_path
):
    file = tmp_path / "same"
    file.write_text(json.dumps(run[1] | changes))
    options = [file if option == "same" else option for option in options]
    command = ["bench", "prune", "--model", model_dir, *SMALL, "--methods", "random"]
    result = budwood(*command, "--reuse", file, *options)
    assert result.exit_code == 2 and fragment in result.stderr
    assert str(file) in result.stderr and len(result.stderr.splitlines()) <= 2


def test_table(budwood, model_dir):
    result = budwood("bench", "prune", "--model", model_dir, *SMALL, "--methods", "uniform")
    assert result.exit_code == 0
    head, *rows = result.stdout.splitlines()
    assert head.split()[:3] == ["method", "keep", "tokens"]
    assert [row.split()[0] for row in rows] == ["full", "blind", "uniform", "uniform"]
    assert "questions about 4 high-resolution scenes, seed 0" in result.stderr


def test_interrupting_leaves_what_is_done(budwood, model_dir, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("budwood.bench.prune.accuracy.measure", interrupted)
    target = tmp_path / "record.json"
    command = ["bench", "prune", "--model", model_dir, *SMALL, "--methods", "random"]
    assert budwood(*command, "--out", target).exit_code == 130
    assert records.read(target).status == "partial"
    monkeypatch.undo()
    assert budwood(*command, "--scenes", 5, "--out", target).exit_code  # part of another run
    again = budwood(*command, "--out", target)
    assert again.exit_code == 0 and f"continues {target}" in again.stderr
    assert records.read(target).status != "partial"


def test_speed(budwood, model_dir, tmp_path):
    command = ["bench", "prune-speed", "--model", model_dir, "--repeats", 2, "--new-tokens", 3]
    result = budwood(*command, "--keep", "0.25,2", "--out", tmp_path / "speed.json", "--json")
    found = json.loads(result.stdout)
    names = [(row["method"], row["keep"]) for row in found["rows"]]
    pruned = [(name, keep) for keep in (0.25, 2) for name in ("plain", "adav")]
    assert names == [("full", 1.0), *pruned]
    full, plain, adav = found["rows"][:3]
    assert full["n_prompt"] - adav["n_prompt"] == 12 and plain["n_prompt"] == adav["n_prompt"]
    assert adav["prefill_over_plain"] > 0 and adav["select_over_full"] > 0
    assert plain["encode_ms"] == plain["select_ms"] == 0
    assert adav["largest_numel"] > 0 and "largest_numel" not in found["rows"][-1]
    assert records.read(tmp_path / "speed.json").rows == found["rows"]
    assert "| prefill_over_plain |" in budwood("bench", "show", tmp_path / "speed.json").stdout


def test_speed_of_a_shape(budwood):
    shape = ["--shape", "llava-next", "--layers", 1, "--width", 128]
    shape += ["--vision-layers", 2, "--vision-width", 64]
    command = ["bench", "prune-speed", *shape, "--repeats", 1, "--new-tokens", 2, "--keep", 160]
    result = budwood(*command, "--json")
    full, _, adav = json.loads(result.stdout)["rows"]
    assert (full["n_visual"], adav["n_kept"]) == (2880, 160)
    assert full["n_prompt"] - adav["n_prompt"] == 2880 - 160
    assert adav["limit_numel"] == 5 * 576**2 > adav["largest_numel"]
    assert adav["kv_mib"] < full["kv_mib"] and full["peak_mib"] is None
    per_token = 2 * 4 * 128 / 2**20  # keys and values of one layer, float32
    assert full["kv_mib"] == pytest.approx(per_token * (full["n_prompt"] + 1), abs=1e-3)
    assert adav["attach_ms"] > 0 and adav["detach_ms"] > 0


def test_speed_of_several_shapes(budwood):
    """Widths that fit no heads are rounded down."""
    size = ["--layers", 1, "--width", 130, "--vision-layers", 2, "--vision-width", 70]
    command = ["bench", "prune-speed", *size, "--repeats", 1, "--new-tokens", 2, "--keep", 40]
    result = budwood(*command, "--shape", "llava-1.5,smolvlm2", "--json")
    found = json.loads(result.stdout)
    names = [(row["model"], row["method"]) for row in found["rows"]]
    three = ("full", "plain", "adav")
    assert names == [(name, one) for name in ("llava-1.5", "smolvlm2") for one in three]
    shapes = [(one["name"], one["width"], one["vision_width"]) for one in found["config"]["shapes"]]
    assert shapes == [("llava-1.5", 128, 64), ("smolvlm2", 128, 72)]
    assert all(found["rows"][i]["attach_ms"] > 0 for i in (2, 5))
    refused = budwood(*command, "--shape", "llava-1.5,llava")
    assert refused.exit_code and "unknown shape 'llava'; known: llava-1.5" in refused.stderr


@pytest.mark.parametrize("shape", ["llava-1.5", "qwen2.5-vl"])
def test_other_shapes_can_be_built(shape):
    size = Shape(shape, layers=1, width=128, vision_layers=2, vision_width=320)
    model, inputs = random_model(size, seed=0)
    n_visual = {"llava-1.5": 576, "qwen2.5-vl": 1296}[shape]
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == n_visual
    assert model.config._attn_implementation == "sdpa"
    assert family_of(model).recorder({}) is not None


def test_every_family_has_a_shape():
    assert {published.family for published in SHAPES.values()} == set(FAMILIES.names())


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "llava-next"])
def test_speed_of_every_shape(name, monkeypatch):
    monkeypatch.setattr(pictures, "SIDE", 224)
    monkeypatch.setattr(pictures, "MARKED_ROWS", 2)
    head, vision_head = SHAPES[name].head, SHAPES[name].vision_head
    model, inputs = random_model(Shape(name, 1, max(128, head), 2, vision_head), seed=0)
    assert family_class(model.config, name).model_type == SHAPES[name].family
    full, plain, adav = measure_speed(model, None, inputs, SpeedConfig((40,), repeats=1, n_new=2))
    assert full["n_visual"] == (inputs["input_ids"] == model.config.image_token_id).sum() - (
        2 * 27 if name == "llava-onevision" else 0  # newlines
    )
    assert adav["n_kept"] == 40 and plain["n_prompt"] == adav["n_prompt"]
    assert full["n_prompt"] - adav["n_prompt"] == full["n_visual"] - 40
    assert list(full) == list(plain) == list(adav) and adav["prefill_over_plain"] > 0
    assert largest_allocation(model, None, inputs, 40)["limit_numel"] > 0


def test_widths_that_fit_no_heads():
    with pytest.raises(
        InputError, match="width=1000 must be a multiple of 256 in gemma3; give 768"
    ):
        Shape("gemma3", width=1000, vision_width=72)
    with pytest.raises(InputError, match="vision_width=1024 must be a multiple of 72 in qwen3-vl"):
        Shape("qwen3-vl")


def test_requests_of_several_threads(budwood, model_dir):
    command = ["bench", "prune-speed", "--model", model_dir, "--repeats", 1, "--new-tokens", 2]
    found = json.loads(budwood(*command, "--keep", 2, "--threads", "1,2", "--json").stdout)
    loads = [row for row in found["rows"] if "threads" in row]
    assert [(row["method"], row["threads"]) for row in loads] == [
        ("full", 1),
        ("adav", 1),
        ("full", 2),
        ("adav", 2),
    ]
    assert all(row["requests_per_s"] > 0 for row in loads)
    assert loads[0]["requests_over_full"] == 1.0
    refused = budwood(*command, "--threads", "none")
    assert refused.exit_code and "threads='none' is not a number" in refused.stderr


def test_a_chat_before_each_question(budwood, model_dir, tmp_path):
    command = ["bench", "prune", "--model", model_dir, *SMALL, "--methods", "adav", "--turns", 2]
    command += ["--keep", 2, "--question", "all,current"]
    result = budwood(*command, "--out", tmp_path / "record.json")
    assert result.exit_code == 0 and "questions in chats of 2 turns about" in result.stderr
    record = records.read(tmp_path / "record.json")
    assert record.config["turns"] == 2 and record.status != "partial"
    first, other = (row for row in record.rows if row["method"] == "adav")
    assert first["question_difference"] is None and other["question_difference"] is not None


def test_results_are_printed_before_they_are_drawn(tmp_path, capsys):
    def fail(rows, part):
        raise RuntimeError("no picture")

    results = Results(None, False, False, plot=tmp_path / "plot.png")
    record = records.new_record("bench", [{"score": 0.75}], seed=0, config={})
    with pytest.raises(RuntimeError, match="no picture"):
        results.publish(record, Columns(Column("score", ".2f")), draw=fail)
    assert "0.75" in capsys.readouterr().out and not any(tmp_path.iterdir())
