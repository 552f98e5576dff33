"""lm-eval with a pruned model, offline, on a task of sprout scenes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from budwood.errors import BudgetError, InputError, UnknownNameError
from budwood.evaluate import load_pruned, picture, scene_questions, task_folder
from budwood.evaluate.scenes import normalise, score
from budwood.prune import attach
from budwood.prune.chat import prepare
from budwood.sprout import balanced
from tests.ecosystem import tiny

PAGE = Path(__file__).parents[2] / "docs/evaluate.md"
N_SCENES = 3


def answers_one_by_one(folder, **options):
    """Each question of the task by itself, through `generate`."""
    model, processor = tiny.load(folder)
    said = []
    with attach(model, processor=processor, **options):
        for row in scene_questions(N_SCENES):
            batch = prepare(processor, [picture(row)], [row["question"]])
            output = model.generate(**batch, max_new_tokens=8, do_sample=False)
            new = output[0, batch["input_ids"].shape[1] :]
            said.append(processor.decode(new, skip_special_tokens=True).strip())
    return said


# The task


@pytest.mark.parametrize("layout", [{}, {"high_resolution": True}], ids=str)
def test_scenes_are_those_of_the_benchmark(layout):
    pytest.importorskip("datasets", reason="datasets is not installed")
    rows = scene_questions(N_SCENES, "shifted", scene_seed=2, **layout)
    asked = [(scene, q) for scene, some in balanced(2, N_SCENES, "shifted", **layout) for q in some]
    assert len(rows) == len(asked) > N_SCENES
    for row, (scene, question) in zip(rows, asked):
        assert (row["question"], row["answer"]) == (question.text, question.answer)
        assert row["kind"] == question.kind
        assert picture(row).tobytes() == scene.image.tobytes()
    assert (
        rows[0]["question"]
        != scene_questions(N_SCENES, "shifted", scene_seed=3, **layout)[0]["question"]
    )


def test_an_answer_is_right_whatever_its_case_and_punctuation():
    assert normalise(" A  Grand piano. ") == "a grand piano"
    assert score({"answer": "yes"}, "Yes!") == {"accuracy": 1.0}
    assert score({"answer": "yes"}, "yes, it is") == {"accuracy": 0.0}


def test_bad_scenes_are_refused():
    with pytest.raises(InputError, match="n_scenes=0 is below 1"):
        scene_questions(0)
    with pytest.raises(InputError, match="unknown split 'tset'"):
        scene_questions(1, "tset")


def test_the_folder_of_a_harness():
    for harness in ("lm_eval", "lmms_eval"):
        command = [sys.executable, "-m", "budwood.evaluate", harness]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == str(task_folder(harness))
        assert (task_folder(harness) / "sprout_scenes.yaml").is_file()
    command[-1] = "lmeval"
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1 and "lm_eval or lmms_eval" in found.stderr


def test_importing_budwood_imports_no_harness():
    code = "import sys, budwood, budwood.prune, budwood.evaluate; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"lm_eval", "lmms_eval", "datasets", "torch"} & set(found.stdout.split())


# Loading


def test_load_pruned(folder):
    loaded = load_pruned(str(folder), device="cpu", dtype="float32", attn_implementation="eager")
    assert loaded.model.config.text_config._attn_implementation == "eager"
    batch = prepare(loaded.processor, [tiny.picture(0)], ["What is the largest object?"])
    loaded.model.generate(**batch, max_new_tokens=1)
    assert loaded.session.report[0].n_after == 16  # the default keeps 64, and there are 16
    pytest.importorskip("accelerate")
    spread = load_pruned(str(folder), device_map="auto", keep=5)
    spread.model.generate(**batch, max_new_tokens=1)
    assert spread.session.report[0].n_after == 5


def test_bad_arguments_are_refused(folder):
    for options, error, message in (
        ({"attn_implementation": "flash"}, UnknownNameError, "'flash'; known: eager, sdpa"),
        ({"dtype": "half"}, InputError, "unknown dtype"),
        ({"device": "gpu"}, InputError, "device 'gpu' cannot be used"),
        ({"keep": 0}, BudgetError, "keep=0"),
        ({"pretrained": "sprout", "device_map": "auto"}, InputError, "no device_map"),
    ):
        with pytest.raises(error, match=message):
            load_pruned(**{"pretrained": str(folder), **options})


def test_options_are_checked_before_weights_are_read():
    for options, error in (
        ({"keep": "1.5"}, BudgetError),
        ({"method": "adaw"}, UnknownNameError),
        ({"method": "random", "compat": "official"}, UnknownNameError),
        ({"seed": -1}, InputError),
    ):
        with pytest.raises(error, match=f"{list(options.values())[-1]}"):
            load_pruned("a/folder/that/is/not/there", **options)


# lm-eval


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed")


def evaluated(lm_eval, lm):
    """Answers and accuracy of a model on the task."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(task_folder("lm_eval")),
        include_defaults=False,
        metadata={"n_scenes": N_SCENES},
    )
    found = lm_eval.simple_evaluate(
        lm, tasks=["sprout_scenes"], task_manager=manager, apply_chat_template=True
    )
    samples = sorted(found["samples"]["sprout_scenes"], key=lambda sample: sample["doc_id"])
    said = [sample["filtered_resps"][0].strip() for sample in samples]
    right = [score(row, text)["accuracy"] for row, text in zip(scene_questions(N_SCENES), said)]
    measured = found["results"]["sprout_scenes"]["accuracy,none"]
    assert measured == pytest.approx(sum(right) / len(right))
    return said


@pytest.mark.filterwarnings("ignore")
def test_hf_multimodal_with_an_attached_model(lm_eval, folder):
    from lm_eval.models.hf_vlms import HFMultimodalLM

    model, _ = tiny.load(folder)
    lm = HFMultimodalLM(model, batch_size=4)
    whole = evaluated(lm_eval, lm)
    with attach(model, keep=tiny.KEEP, processor=lm.processor) as session:
        fewer = evaluated(lm_eval, lm)
    assert session.report[0].n_after == tiny.KEEP
    assert whole == answers_one_by_one(folder, keep=1.0)
    assert fewer == answers_one_by_one(folder, keep=tiny.KEEP)
    assert whole != fewer


@pytest.mark.filterwarnings("ignore")
def test_the_model_budwood(lm_eval, folder):
    from budwood.evaluate.lm_eval import PrunedMultimodal

    lm = PrunedMultimodal(str(folder), batch_size="4", device="cuda:0", keep=3, method="uniform")
    assert evaluated(lm_eval, lm) == answers_one_by_one(folder, keep=3, method="uniform")
    lm.session.detach()


def test_what_model_args_have_wins_over_lm_evals_own(lm_eval, folder):
    from budwood.evaluate.lm_eval import PrunedMultimodal

    given = {"pretrained": str(folder), "device": "cpu", "batch_size": 3, "keep": 3}
    lm = PrunedMultimodal.create_from_arg_obj(
        given, {"batch_size": 1, "max_batch_size": None, "device": "cuda:7"}
    )
    assert lm.batch_size == 3 and lm.model.device.type == "cpu"
    lm.session.detach()


def test_arguments_that_do_not_exist(lm_eval, folder):
    from budwood.evaluate.lm_eval import PrunedMultimodal

    with pytest.raises(UnknownNameError, match="no 'kep', did you mean 'keep'; it has pretrained"):
        PrunedMultimodal(str(folder), kep=3)
    with pytest.raises(UnknownNameError, match="unknown patches 'min'"):
        PrunedMultimodal(str(folder), patches="min")
    with pytest.raises(InputError, match="batch_size='auto'"):
        PrunedMultimodal(str(folder), batch_size="auto")


# The page


def shell_lines():
    """Commands of docs/evaluate.md that need no network."""
    text = PAGE.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if "--tasks sprout_scenes" in line]
    return [" ".join(line.split()) for line in lines if "$(" in line]


def test_the_commands_of_the_page_run(lm_eval, folder, monkeypatch):
    """With a tiny model in place of sprout, and few questions."""
    ours = [line for line in shell_lines() if line.startswith("python -m budwood.evaluate.lm_eval")]
    assert ours
    for line in ours:
        line = re.sub("pretrained=sprout-256", f"pretrained={folder}", line).replace(
            "keep=28", "keep=3"
        )
        line = line.replace("python ", f"{sys.executable} ") + " --limit 4"
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        found = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        assert "|sprout_scenes|" in found.stdout and "accuracy" in found.stdout
