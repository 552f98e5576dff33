"""lmms-eval's model and task; `make test-lmms` installs lmms-eval and runs this."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (make test-lmms)")

from budwood.errors import BudgetError, InputError, UnknownNameError
from budwood.evaluate import scene_questions, task_folder
from budwood.evaluate.lmms_eval import (
    ARGUMENTS,
    PrunedChat,
    cut_at,
    generation_options,
    stop_strings,
)
from budwood.evaluate.scenes import score
from tests.ecosystem import tiny
from tests.ecosystem.test_evaluate import N_SCENES, PAGE, answers_one_by_one, shell_lines

pytestmark = pytest.mark.filterwarnings("ignore")


# The plugin


def test_the_entry_point_gives_a_manifest():
    """Lmms-eval only warns of a plugin that fails, so it is loaded here."""
    (point,) = entry_points(group="lmms_eval.models", name="budwood")
    manifest = point.load()()
    assert manifest.model_id == "budwood"


def test_lmms_eval_finds_the_model():
    from lmms_eval import models

    assert "budwood" in models.list_available_models()
    assert models.get_model("budwood") is PrunedChat


# A run


def evaluated(folder, batch_size, **arguments):
    """Answers and accuracy on the task, through lmms-eval."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    given = ",".join(f"{k}={v}" for k, v in {"pretrained": folder, **arguments}.items())
    found = simple_evaluate(
        model="budwood",
        model_args=given,
        tasks=["sprout_scenes"],
        task_manager=TaskManager(include_path=str(task_folder("lmms_eval")), model_name="budwood"),
        batch_size=batch_size,
        limit=len(scene_questions(N_SCENES)),  # the first questions are those of the first scenes
        log_samples=True,
        cli_args=SimpleNamespace(process_with_media=False, output_path=None, reasoning_tags=None),
    )
    samples = sorted(found["samples"]["sprout_scenes"], key=lambda sample: sample["doc_id"])
    said = [sample["filtered_resps"][0] for sample in samples]
    right = [score(row, text)["accuracy"] for row, text in zip(scene_questions(N_SCENES), said)]
    measured = found["results"]["sprout_scenes"]["accuracy,none"]
    assert measured == pytest.approx(sum(right) / len(right))
    return said


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_generate(folder, batch_size):
    said = evaluated(folder, batch_size, keep=tiny.KEEP)
    assert said == answers_one_by_one(folder, keep=tiny.KEEP)
    assert said != answers_one_by_one(folder, keep=1.0)


def test_the_commands_of_the_page_run(folder, monkeypatch):
    lines = [line for line in shell_lines() if line.startswith("lmms-eval")]
    assert lines
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for line in lines:
        line = line.replace("pretrained=sprout-256", f"pretrained={folder}").replace(
            "keep=28", "keep=3"
        )
        line = line.replace("lmms-eval", f"{shlex.quote(sys.executable)} -m lmms_eval", 1)
        line = line.replace("$(python", f"$({shlex.quote(sys.executable)}") + " --limit 4"
        found = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
        assert "|sprout_scenes|" in found.stdout and "accuracy" in found.stdout, found.stdout


def test_two_processes_share_the_questions(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [
        *("-m", "lmms_eval", "--model", "budwood", "--model_args", f"pretrained={folder},keep=3"),
        *("--include_path", str(task_folder("lmms_eval")), "--tasks", "sprout_scenes"),
        *("--limit", "5", "--log_samples", "--output_path", str(tmp_path)),
    ]
    found = subprocess.run(
        [sys.executable, *launch, *command], capture_output=True, text=True, check=False
    )
    assert "|sprout_scenes|" in found.stdout, found.stdout + found.stderr
    (samples,) = tmp_path.glob("**/*samples*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    said = {row["doc_id"]: row["filtered_resps"] for row in rows}
    assert [said[i] for i in range(5)] == answers_one_by_one(folder, keep=3)[:5]


def test_the_benchmarks_of_the_page_exist():
    from lmms_eval.tasks import TaskManager

    page = PAGE.read_text()
    listed = re.search(r"TASKS=(\S+)", page)[1].split(",")
    assert re.findall(r"\(`(\w+)`\) \|", page) == listed
    known = TaskManager(model_name="budwood")
    assert set(listed) <= set(known.all_tasks)
    for task, metric in re.findall(r"\(`(\w+)`\) \| `(\w+)`", page):
        config = known._get_config(task)
        assert metric in [entry["metric"] for entry in config["metric_list"]]


# Requests of all kinds


def request(number, text, options, images=1):
    """One request as lmms-eval makes it, and the document that it is about."""
    content = [{"type": "image", "url": tiny.picture(number)} for _ in range(images)]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    arguments = (text, lambda doc: doc, options, number, "task", "test")
    return SimpleNamespace(args=arguments), messages


def asked(folder, *requests, **arguments):
    chat = PrunedChat(str(folder), **arguments)
    chat.task_dict = {"task": {"test": {r.args[3]: messages for r, messages in requests}}}
    seen = []
    generate = chat.model.generate

    def watching(**kwargs):
        seen.append({**kwargs, "n_rows": len(kwargs["input_ids"])})
        return generate(**kwargs)

    chat.model.generate = watching
    found = chat.generate_until([r for r, _ in requests])
    return [result.text for result in found], seen


def test_questions_of_one_kind_share_a_batch_and_keep_their_order(folder):
    short, long = {"max_new_tokens": 2}, {"max_new_tokens": 5}
    texts = [q for q in tiny.QUESTIONS for _ in range(2)]
    requests = [request(i, text, (short, long)[i % 3 == 0]) for i, text in enumerate(texts)]
    together, seen = asked(folder, *requests, batch_size=4, keep=3)
    assert [call["n_rows"] for call in seen] == [3, 4, 1]
    alone, _ = asked(folder, *requests, batch_size=1, keep=3)
    assert together == alone
    assert [len(text.split()) for text in alone] == [5 if i % 3 == 0 else 2 for i in range(8)]


def test_a_question_without_a_picture_and_one_with_two(folder):
    options = {"max_new_tokens": 3}
    requests = [request(i, "What is the largest object ?", options, i % 3) for i in range(4)]
    together, seen = asked(folder, *requests, batch_size=4, keep=3)
    assert sorted(call["n_rows"] for call in seen) == [2, 2]
    assert together == asked(folder, *requests, batch_size=1, keep=3)[0]


def test_until_ends_an_answer(folder):
    whole, _ = asked(folder, request(0, tiny.QUESTIONS[0], {"max_new_tokens": 6}))
    words = whole[0].split()
    stop = f" {words[3]}"
    options = {"max_new_tokens": 6, "until": [stop]}
    cut, _ = asked(folder, request(0, tiny.QUESTIONS[0], options))
    assert cut[0] == whole[0][: whole[0].index(stop)]


def test_a_system_prompt(folder, tmp_path):
    (tmp_path / "prompt").write_text("the red ball")
    question = request(0, tiny.QUESTIONS[0], {"max_new_tokens": 1})
    _, plain = asked(folder, question)
    _, longer = asked(folder, question, system_prompt=str(tmp_path / "prompt"))
    assert longer[0]["input_ids"].shape[1] == plain[0]["input_ids"].shape[1] + 6


def test_options_of_generate():
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    for given, expected in (
        ({}, greedy),
        ({"temperature": 0, "top_p": 1.0}, greedy),
        ({"temperature": 0.2, "do_sample": False}, greedy),
        ({"temperature": 0, "do_sample": True}, greedy),
        ({"temperature": 0.2}, {"do_sample": True, "temperature": 0.2}),
        ({"num_beams": 3, "until": ["x"], "image_aspect_ratio": "pad"}, {**greedy, "num_beams": 3}),
    ):
        assert generation_options(given) == expected


def test_where_an_answer_ends():
    assert (
        stop_strings({"until": ["\n\n"]}) == stop_strings({}) == stop_strings({"until": None}) == []
    )
    assert stop_strings({"until": "a"}) == ["a"]
    assert stop_strings({"until": ["\n\n", "b", ""]}) == ["b"]
    assert cut_at("one two three", ["three", " two"]) == "one"
    assert cut_at("one", []) == cut_at("one", ["two"]) == "one"


def test_arguments(folder):
    assert {"pretrained", "method", "keep", "batch_size", "attn_implementation"} < set(ARGUMENTS)
    for arguments, error, message in (
        ({"kep": 3}, UnknownNameError, "model 'budwood' has no 'kep', did you mean 'keep'; it has"),
        ({"max_num_frames": 3}, UnknownNameError, "no 'max_num_frames'"),
        ({"batch_size": "auto"}, InputError, "batch_size='auto'; give a whole number"),
        ({"keep": 1.5}, BudgetError, "keep=1.5"),
        ({"method": "adva"}, UnknownNameError, "did you mean 'adav'"),
    ):
        with pytest.raises(error, match=message) as found:
            PrunedChat(str(folder), **arguments)
        assert "\n" not in str(found.value)


def test_what_it_cannot_do(folder):
    chat = PrunedChat(str(folder))
    for wanted in (chat.loglikelihood, chat.generate_until_multi_round):
        with pytest.raises(InputError, match="'budwood'"):
            wanted([])
    video, messages = request(0, "What ?", {})
    messages[0]["content"][0] = {"type": "video", "url": "film.mp4"}
    chat.task_dict = {"task": {"test": {0: messages}}}
    with pytest.raises(InputError, match="task 'task' has a video"):
        chat.generate_until([video])
