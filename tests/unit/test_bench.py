from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from budwood.bench.prune import (
    Config,
    Outcome,
    Variant,
    Workers,
    counts,
    rows_of,
    run,
    variants_of,
)
from budwood.bench.prune.accuracy import Asked, Times, normalise
from budwood.bench.prune.answering import Sheet, answer, answer_full
from budwood.bench.prune.earlier import SAME, earlier_answers, identity, pack
from budwood.bench.prune.plan import FULL, Run
from budwood.bench.prune.speed import _Largest
from budwood.bootstrap import PairedBootstrap, interval
from budwood.errors import InputError, UnknownNameError
from budwood.loading import load_vlm_model
from budwood.prune import attach
from budwood.prune.chat import answers, prepare, render
from budwood.prune.inside import FastV, PyramidDrop, attach_inside
from budwood.prune.latency import FirstToken
from budwood.records import Record
from budwood.sprout.questions import Question, ask, balanced, chats
from tests import tiny_vlm

WHICH = [0, 0, 0, 1, 1]
GREEDY = {"do_sample": False, "max_new_tokens": 4}


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def vlm(request, tmp_path_factory):
    save = {"llava": tiny_vlm.save_llava, "llava_next": tiny_vlm.save_llava_next}[request.param]
    folder = save(tmp_path_factory.mktemp(request.param))
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def exam():
    """Two pictures of unequal shape, and questions of unequal length about them."""
    images = [
        balanced(5, 2)[i][0].image.crop((0, 0, 336, side)) for i, side in ((0, 336), (1, 150))
    ]
    texts = [
        "Is there any owl ?",
        "What ?",
        "How many times does the owl appear ?",
        "What ?",
        "Is ?",
    ]
    return images, texts


def sheet_of(vlm, exam) -> Sheet:
    images, texts = exam
    return Sheet(*vlm, images, WHICH, texts)


@pytest.mark.parametrize("keep", [12, 0.75])
@pytest.mark.parametrize(
    "variant",
    [
        Variant("adav"),
        Variant("adav-official", "all"),
        Variant("random"),
        Variant("fastervlm", None),
        Variant("fastervlm", None, "original"),
        Variant("adav+:focus=0+merge=0.1"),  # the question has a say in every token
        Variant("visionzip", None),
        Variant("overview", None),
    ],
)
def test_shared_work_gives_the_same_answers(vlm, exam, variant, keep):
    model, processor = vlm
    sheet = sheet_of(vlm, exam)
    found = answer(sheet, variant, keep=keep, seed=3)
    options = {"keep": keep, "seed": 3}
    with attach(model, processor=processor, **variant.options, **options) as session:
        output = model.generate(**sheet.inputs, **GREEDY)
    assert found.texts == answers(processor, output, sheet.inputs["input_ids"].shape[1])
    assert found.n_kept == [image.n_after for image in session.report]
    assert found.n_visual == [image.n_before for image in session.report]
    assert len(set(found.texts)) > 1


@pytest.mark.parametrize(
    ("method", "schedule"),
    [
        ("fastv:layer=1", FastV(average=False, layer=1)),
        ("pyramiddrop:stages=3", PyramidDrop(average=False, stages=3)),
    ],
)
def test_pruning_inside_the_llm_gives_the_same_answers(vlm, exam, method, schedule):
    model, processor = vlm
    sheet = sheet_of(vlm, exam)
    (variant,) = variants_of([method])
    assert variant.schedule == schedule
    found = answer(sheet, variant, keep=0.5, seed=3)
    for row in range(len(WHICH)):
        inputs = sheet.alone(row)
        with attach_inside(model, method=schedule, keep=0.5) as session:
            output = model.generate(**inputs, **GREEDY)
        assert found.texts[row] == answers(processor, output, inputs["input_ids"].shape[1])[0]
        assert found.n_kept[row] == session.report.average < session.report.n_visual


def test_shared_prefix_gives_the_same_answers(vlm, exam):
    model, processor = vlm
    sheet = sheet_of(vlm, exam)
    assert sheet.can_share
    found = answer_full(sheet).texts
    output = model.generate(**sheet.inputs, **GREEDY)
    assert found == answers(processor, output, sheet.inputs["input_ids"].shape[1])
    assert len(set(found)) > 1


def test_no_prefix_is_shared_where_the_picture_comes_last(vlm, exam):
    model, processor = vlm
    images, texts = exam
    sheet = sheet_of(vlm, exam)
    prompts = [f"user : {text} <image> assistant :" for text in texts]
    sheet.inputs = dict(
        processor(
            images=[images[i] for i in WHICH],
            text=prompts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
    )
    assert not sheet.can_share
    output = model.generate(**sheet.inputs, **GREEDY)
    given = answers(processor, output, sheet.inputs["input_ids"].shape[1])
    assert answer_full(sheet).texts == given
    assert answer(sheet, Variant("uniform", None), keep=1.0, seed=0).texts == given


def test_run_scores_what_the_model_says(vlm, monkeypatch):
    """Asked for what it answers when alone, the model is right with all tokens, and only then."""
    model, processor = vlm
    scenes = [(scene, [(_own(vlm, scene, q),) for q in asked]) for scene, asked in balanced(2, 5)]
    monkeypatch.setattr("budwood.bench.prune.accuracy.chats", lambda *_: scenes)
    config = Config(
        tuple(variants_of(["adav", "uniform"])), (1.0, 2), n_scenes=5, batch=12, n_timed=2
    )
    told = []
    outcome = run(model, processor, config, lambda done, total, note="": told.append((done, total)))
    rows = {(row["method"], row["keep"]): row for row in rows_of(outcome, config)}
    for all_kept in (("full", 1.0), ("adav", 1.0), ("uniform", 1.0)):
        assert rows[all_kept]["accuracy"] == rows[all_kept]["retention"] == 1.0
    assert rows["blind", 1.0]["accuracy"] < 0.5 and rows["adav", 2]["accuracy"] < 0.5
    n_questions = sum(len(asked) for _, asked in scenes)
    assert told[-1] == (6 * n_questions, 6 * n_questions)
    assert all(len(right) == n_questions for right in outcome.right.values())


def test_an_interrupted_run_goes_on(vlm):
    """With the answers kept so far it ends as an uninterrupted one, and asks only the rest."""
    model, processor = vlm
    config = Config(
        tuple(variants_of(["random"])), (4,), n_scenes=4, batch=6, n_timed=1, turns=2, seed=3
    )
    kept = []
    whole = run(model, processor, config, keep=lambda rows: kept.append(list(rows)))
    assert len(kept) > 1
    told = []
    again = run(
        model, processor, config, lambda done, total, note="": told.append(done), begun=kept[0]
    )
    assert again.right == whole.right and again.n_kept == whole.n_kept
    assert min(told) > sum(len(row["right"]) for row in kept[0])


def test_workers_answer_the_same(vlm):
    model, processor = vlm
    config = Config(tuple(variants_of(["random", "adav"])), (4,), n_scenes=4, batch=6, n_timed=1)
    here = run(model, processor, config)
    kept = []
    with Workers(2, partial(load_vlm_model, model.name_or_path, "cpu")) as workers:
        there = run(
            model,
            processor,
            config,
            keep=lambda rows: kept.append(len(rows)),
            answers_of=workers.answers,
        )
    assert there.right == here.right and there.n_kept == here.n_kept
    assert kept == sorted(set(kept)) and len(kept) > 1


def test_at_least_one_worker():
    with pytest.raises(InputError, match="workers=0"):
        Workers(0, load_vlm_model)


KILLED = """
import os, time
from budwood.bench.prune.workers import Workers

def load():
    print(os.getpid(), flush=True)
    time.sleep(120)

if __name__ == "__main__":
    Workers(1, load)._pool.submit(int).result()
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    started = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    worker = int(started.stdout.readline())
    started.kill()
    try:
        started.communicate(timeout=30)  # ends once the worker, too, has closed its output
    except subprocess.TimeoutExpired:
        os.kill(worker, signal.SIGKILL)
        raise


def test_chats_are_about_other_objects():
    seen = 0
    for scene, of_scene in chats(0, 12, 3):
        for *before, last in of_scene:
            seen += 1
            assert len(before) == len(set(before)) == 2 and last.boxes
            for question in before:
                assert question in ask(scene)
                assert set(question.boxes).isdisjoint(last.boxes)
    assert seen > 12
    singles = [(scene, [(q,) for q in questions]) for scene, questions in balanced(0, 3)]
    assert [of_scene for _, of_scene in chats(0, 3, 1)] == [of_scene for _, of_scene in singles]


def test_earlier_turns_are_in_the_prompt(vlm):
    _, processor = vlm
    prompt = render(processor, "Is it red?", [("Is it big?", "no"), ("Where is it?", "left")])
    places = [
        prompt.index(text) for text in ("<image>", "Is it big?", "no", "Where", "left", "red")
    ]
    assert places == sorted(places) and prompt.count("<image>") == 1
    assert render(processor, "Is it red?").count("user") == 1


def _own(vlm, scene, question: Question) -> Question:
    model, processor = vlm
    inputs = prepare(processor, [scene.image], [question.text])
    output = model.generate(**inputs, **GREEDY)
    return replace(question, answer=answers(processor, output, inputs["input_ids"].shape[1])[0])


def outcome_of(right: dict[Run, list[bool]], scenes, salient) -> Outcome:
    asked = [
        Asked(scene, Question("digit" if one else "colour", "", "", one, ()))
        for scene, one in zip(scenes, salient)
    ]
    times = dict.fromkeys(right, Times(FirstToken(9.0, 2.0, 1.0), 2.0))
    counts = {run: [4] * len(asked) for run in right}
    return Outcome(asked, right, [16] * len(asked), counts, times)


def test_rows():
    config = Config(tuple(variants_of(["random", "adav"])), (4,), n_resamples=500)
    full, blind, random, adav = config.runs
    right = {
        full: [True, True, True, True, False],
        blind: [False] * 5,
        random: [False, False, True, False, False],
        adav: [True, False, True, True, False],
    }
    outcome = outcome_of(right, [0, 0, 1, 2, 2], [True, False, False, False, True])
    rows = {row["method"]: row for row in rows_of(outcome, config)}
    assert rows["adav"]["accuracy"] == 0.6 and rows["adav"]["retention"] == pytest.approx(0.75)
    assert rows["adav"]["accuracy_salient"] == 0.5 == rows["adav"]["accuracy_digit"]
    assert rows["adav"]["accuracy_other"] == pytest.approx(2 / 3) == rows["adav"]["accuracy_colour"]
    assert rows["adav"]["accuracy_count"] is None and rows["adav"]["difference"] is None
    assert rows["random"]["difference"] == pytest.approx(-0.4)
    assert rows["random"]["difference_other"] == pytest.approx(-1 / 3)
    assert rows["random"]["difference_low"] < -0.4 < rows["random"]["difference_high"] <= 0
    assert rows["blind"]["retention"] == 0 and rows["full"]["retention_low"] == 1.0
    assert rows["random"]["best"] == "adav" and rows["adav"]["best"] == "random"
    assert rows["adav"]["best_difference"] == pytest.approx(0.4)
    assert rows["full"]["best"] is rows["full"]["best_difference"] is None
    assert rows["adav"]["prefill_ms"] == 6.0 and rows["adav"]["speedup"] == 2.0


def test_accuracy_by_the_size_of_what_has_to_be_seen():
    boxes = [((0, 0, 50, 90),), ((0, 0, 60, 200),), ((0, 0, 300, 200), (0, 0, 400, 110)), ()]
    asked = [Asked(i, Question("colour", "", "", False, one)) for i, one in enumerate(boxes)]
    config = Config((Variant("adav"),), (4,), n_resamples=10, high_resolution=True)
    right = {run: [True, False, True, True] for run in config.runs}
    times = dict.fromkeys(right, Times(FirstToken(9.0, 2.0, 1.0), 2.0))
    outcome = Outcome(asked, right, [16] * 4, {run: [4] * 4 for run in right}, times)
    row = rows_of(outcome, config)[-1]
    assert [row[f"accuracy_{size}"] for size in ("small", "medium", "large")] == [1, 0, 1]
    assert counts(outcome)["n_small"] == 1 and row["accuracy_count"] is None


def test_retention_of_a_model_that_is_never_right_is_unknown():
    config = Config((Variant("adav"),), (4,), n_resamples=50)
    outcome = outcome_of({run: [False, False] for run in config.runs}, [0, 1], [True, False])
    row = rows_of(outcome, config)[-1]
    assert row["retention"] is row["retention_low"] is None and row["accuracy"] == 0


def test_bootstrap_draws_scenes_and_not_questions():
    """Five questions about each of 40 scenes that are all right or all wrong."""
    scenes = [scene for scene in range(40) for _ in range(5)]
    right = [scene % 2 == 0 for scene in scenes]
    draws = PairedBootstrap(scenes, 4000, seed=0)
    accuracies = draws.accuracies(right, [True] * 200)
    assert accuracies.mean() == pytest.approx(0.5, abs=0.01)
    assert accuracies.std() == pytest.approx((0.25 / 40) ** 0.5, rel=0.05)
    low, high = interval(accuracies)
    assert low == pytest.approx(0.5 - 1.96 * 0.079, abs=0.015)
    assert high == pytest.approx(0.5 + 1.96 * 0.079, abs=0.015)
    # Paired: a difference that every scene shares has no spread.
    other = draws.accuracies([True] * 200, [True] * 200)
    assert (other == 1.0).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("  the   BELL!", "the bell"),
        ("7", "7"),
        ("", ""),
        ("ice-cream", "icecream"),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


def test_variants():
    names = [(v.method, v.question) for v in variants_of(["adav", "random"], "official", ["all"])]
    assert names == [("adav", "all"), ("adav-official", "all"), ("random", None)]
    assert variants_of(["adav", "adav-official"]) == variants_of(["adav"], "official")
    assert variants_of(["adav-official"])[0].options == {
        "method": "adav-official",
        "question": "all",
        "positions": None,
    }
    places = variants_of(["adav+", "random", "fastv"], positions=["own", "compact", "original"])
    assert [(v.method, v.positions) for v in places] == [
        ("adav+", None),
        ("adav+", "compact"),
        ("random", None),
        ("random", "original"),
        ("fastv", None),
    ]
    assert [v.placed for v in places] == ["original", "compact", "compact", "original", "original"]
    names = [v.method for v in variants_of(["adav:reserve=0+temperature=50", "fastv"])]
    assert names == ["adav:reserve=0+temperature=50", "fastv"]
    for wrong in (["adv"], ["adav-unofficial"], ["uniform-official"]):
        with pytest.raises(UnknownNameError):
            variants_of(wrong)
    with pytest.raises(UnknownNameError, match="unknown positions 'old'; known: own, compact"):
        variants_of(["adav"], positions=["old"])
    with pytest.raises(InputError):
        variants_of([])


def test_published_forms_keep_their_parameters():
    names = [variant.method for variant in variants_of(["adav:reserve=0.5", "t2i"], "official")]
    assert names == ["adav:reserve=0.5", "adav-official:reserve=0.5", "t2i"]


def test_a_token_is_not_all_tokens():
    """1 and 1.0 are equal as numbers."""
    variants = tuple(variants_of(["adav"]))
    record = Record(
        name="bench prune",
        command="",
        seed=0,
        config={**dict.fromkeys(SAME), "n_scenes": 2, "n_questions": 2},
        rows=[
            identity(run) | {"right": pack([True, False]), "n_kept": 9.0}
            for run in Config(variants, (1.0,), n_scenes=2).runs
        ],
    )
    described = dict.fromkeys(SAME)
    for keep, n_known in ((1.0, 3), (1, 2)):
        config = Config(variants, (keep,), n_scenes=2)
        assert len(earlier_answers(record, described, config)) == n_known
    with pytest.raises(InputError, match="leave one out"):
        Config(variants, (1, 1.0))


def test_reference_is_the_method_at_the_same_budget():
    config = Config(tuple(variants_of(["random", "adav"])), (4, 0.5))
    assert config.reference_run(0.5) == Run("", Variant("adav"), 0.5)
    assert config.runs[0] == FULL
    others = Config(tuple(variants_of(["random", "uniform"])), (0.5,))
    assert others.reference_run(0.5) is None
    assert replace(others, reference="uniform").reference_run(0.5) == others.runs[3]
    with pytest.raises(InputError, match="'t2i' takes no part; give one of random, adav"):
        replace(config, reference="t2i")


def test_template_that_writes_the_first_token_gets_no_second(vlm, exam):
    _, processor = vlm
    inputs = prepare(processor, exam[0][:1], ["What ?"])
    assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum() == 0
    assert render(processor, "What ?").startswith("user : <image>")


def test_largest_allocation_counts_no_views():
    x = torch.ones(6, 7)
    with _Largest() as seen:
        _ = x.expand(5, 6, 7), x.T, x[:2] * 2
    assert seen.numel == 14 and seen.shape == (2, 7)
    with _Largest() as seen:
        (x[:, None] + x).sum()
    assert seen.numel == 6 * 6 * 7
