from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from budwood.errors import InputError, UnknownNameError
from budwood.tune import plots
from budwood.tune.bench.plan import Plan, split
from budwood.tune.bench.rows import method_rows
from budwood.tune.bench.runner import Trial, best_rates
from budwood.tune.data import example_of
from budwood.tune.evaluate.drift import chat_prompts, measure_drift, text_windows
from budwood.tune.evaluate.harness import (
    find_task,
    run_tasks,
    shipped_tasks,
    task_names,
    task_of,
)
from budwood.tune.evaluate.report import report_rows
from budwood.tune.evaluate.routing import by_layer, routing_rows
from budwood.tune.evaluate.scores import Score, compare
from budwood.tune.evaluate.suite import find_tasks, make_texts
from budwood.tune.fitting import N_TEXTS
from budwood.tune.methods import attach, fit_rank, n_trainable, parse_tuner
from budwood.tune.own_text import own_text, replies
from tests import tiny_chat

TOKENS = tiny_chat.tokenizer()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_chat.save_data(tmp_path_factory.mktemp("nlp"))


@pytest.fixture
def adapted():
    """A LoRA that does something, and its base model."""
    model = attach(parse_tuner("lora"), tiny_chat.model(), 4, seed=0).eval()
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0, 0.3)
    return model


def score(values, metric="accuracy", task="t", weights=None, group="target"):
    weights = weights or [1.0] * len(values)
    return Score(task, metric, group, tuple(map(float, values)), tuple(weights))


def test_values():
    assert score([1, 0, 1, 1]).value == 0.75
    assert score([6, 2], "loss", weights=[3.0, 1.0]).value == 2.0
    assert score([6, 2], "perplexity", weights=[3.0, 1.0]).value == pytest.approx(np.exp(2))
    assert Score.from_dict(score([1, 0]).as_dict()) == score([1, 0])
    for wrong in ({"values": []}, {"metric": "f1", "values": [1]}):
        with pytest.raises(InputError):
            score(**wrong)


def test_interval_is_paired():
    draw = random.Random(0)
    before = [draw.random() < 0.5 for _ in range(400)]
    after = [x or draw.random() < 0.1 for x in before]
    row = compare(score(before), score(after))
    gains = np.array(after, float) - np.array(before, float)
    half = 1.96 * gains.std() / 20
    assert row["difference"] == pytest.approx(gains.mean())
    assert row["low"] == pytest.approx(gains.mean() - half, abs=0.01)
    assert row["high"] == pytest.approx(gains.mean() + half, abs=0.01)
    same = compare(score(before), score(before))
    assert (same["low"], same["high"]) == (0, 0)
    with pytest.raises(InputError, match="not of the same items"):
        compare(score(before), score(before, weights=[2.0] * 400))


def test_report_puts_targets_first_and_adds_means():
    befores = [score([1, 0], task=f"g{i}", group="general") for i in range(2)]
    afters = [score([0, 0], task=f"g{i}", group="general") for i in range(2)]
    rows = report_rows([*befores, score([0, 1])], [*afters, score([1, 1])])
    assert [(row["group"], row["task"]) for row in rows] == [
        ("target", "t"),
        ("general", "g0"),
        ("general", "g1"),
        ("general", "mean"),
    ]
    assert rows[-1]["difference"] == -0.5 and rows[-1]["n"] == 4


def test_shared_prompts_give_what_hflm_gives(adapted):
    from lm_eval.models.huggingface import HFLM

    from budwood.tune.evaluate.shared_prompt import SharedPromptLM

    draw = random.Random(1)
    requests = []
    for n in range(15):
        prompt = [draw.randrange(3, 250) for _ in range(draw.randrange(2, 40))]
        for _ in range(draw.randrange(1, 5)):
            answer = [draw.randrange(3, 250) for _ in range(draw.randrange(1, 6))]
            requests.append((("", str(n)), prompt, answer))
    ours = SharedPromptLM(adapted, TOKENS, 4)._loglikelihood_tokens(requests)
    theirs = HFLM(pretrained=adapted, tokenizer=TOKENS, batch_size=4)._loglikelihood_tokens(
        requests, disable_tqdm=True
    )
    assert [same for _, same in ours] == [same for _, same in theirs]
    assert [x for x, _ in ours] == pytest.approx([x for x, _ in theirs], abs=1e-4)


def by_hand(model, prompt, answer):
    """Log-likelihood of an answer, by one plain pass."""
    start = TOKENS(prompt, add_special_tokens=False)["input_ids"]
    end = TOKENS(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([start + end])).logits[0].log_softmax(-1)
    return sum(logits[len(start) + i - 1, token].item() for i, token in enumerate(end)), len(end)


def test_tasks_score_as_by_hand(adapted, data):
    tasks = [find_task(name, data) for name in ("arc_easy", "winogrande", "gsm8k")]
    found = {one.key: one for one in run_tasks(adapted, TOKENS, tasks, batch=3)}

    def chat(question):
        turns = [{"role": "user", "content": question}]
        return TOKENS.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    arc, winogrande, gsm8k = (task.examples for task in tasks)
    for i, one in enumerate(arc):
        scores = [by_hand(adapted, chat(one.question), choice) for choice in one.choices]
        best = max(range(3), key=lambda k: scores[k][0] / len(one.choices[k]))
        assert found["arc_easy", "accuracy"].values[i] == float(best == one.answer)
        assert found["arc_easy", "loss"].values[i] == pytest.approx(
            -scores[one.answer][0], abs=1e-3
        )
    for i, one in enumerate(winogrande):
        before, after = one.question.split("_")
        scores = [by_hand(adapted, before + choice, after) for choice in one.choices]
        assert found["winogrande", "accuracy"].values[i] == float(
            (scores[1] > scores[0]) == bool(one.answer)
        )
    one = gsm8k[3]
    total, n = by_hand(adapted, chat("3 and 3?"), "6\n#### 6")
    assert one.messages[-1]["content"] == "<<3+3>>6\n#### 6"
    assert found["gsm8k", "loss"].values[3] == pytest.approx(-total, abs=1e-3)
    assert found["gsm8k", "loss"].weights[3] == n


def test_generated_answers_are_matched_strictly_and_anywhere(adapted, data):
    task = find_task("gsm8k_match", data, limit=2)
    task.config["generation_kwargs"]["max_gen_toks"] = 3
    found = run_tasks(adapted, TOKENS, [task], batch=2)
    assert [(one.task, one.metric, one.n) for one in found] == [
        ("gsm8k_match/strict", "accuracy", 2),
        ("gsm8k_match/flexible", "accuracy", 2),
    ]


def test_find_task(data, tmp_path):
    assert set(shipped_tasks()) >= {"openbookqa", "boolq", "arc_easy", "gsm8k", "winogrande"}
    drawn = find_task("arc_easy", data, limit=5, seed=1)
    assert len(drawn.examples) == 5
    assert drawn.examples == find_task("arc_easy", data, limit=5, seed=1).examples
    with pytest.raises(InputError, match="needs its file"):
        find_task("arc_easy", None)
    with pytest.raises(InputError, match="cannot read"):
        find_task("arc_easy", tmp_path)
    mixed = [example_of({"question": "q", "answer": "a"}), drawn.examples[0]]
    with pytest.raises(InputError, match="some questions have choices"):
        task_of("mixed", mixed)


def turns(*pairs):
    return [{"role": role, "content": text} for role, text in pairs]


def test_the_last_turn_is_scored_after_the_whole_conversation(adapted, tmp_path):
    single = turns(("user", "U1"), ("assistant", "A one"))
    longer = [*turns(("system", "Be short.")), *single, *turns(("user", "U2"), ("assistant", "B"))]
    chats = tiny_chat.write_lines(
        tmp_path / "chats.jsonl", [{"messages": longer}, {"messages": single}]
    )
    alone = tiny_chat.write_lines(tmp_path / "alone.jsonl", [{"messages": single}])
    tasks = find_tasks([str(chats)], [str(alone)], None, 0, 0)
    found = {one.task: one for one in run_tasks(adapted, TOKENS, tasks)}
    for i, chat in enumerate((longer, single)):
        prompt = TOKENS.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        total, n = by_hand(adapted, prompt, chat[-1]["content"])
        assert found["chats"].values[i] == pytest.approx(-total, abs=1e-3)
        assert found["chats"].weights[i] == n
    assert found["alone"].values[0] == pytest.approx(found["chats"].values[1], abs=1e-3)


def test_conversations_that_a_task_cannot_take(adapted, data, tmp_path):
    chat = turns(("system", "S"), ("user", "U"), ("assistant", "A"))
    file = tiny_chat.write_lines(tmp_path / "gsm8k_test_part.jsonl", [{"messages": chat}])
    with pytest.raises(InputError, match="part.jsonl, line 1: task 'gsm8k_match' takes single"):
        find_task("gsm8k_match", tmp_path)
    strict = tiny_chat.tokenizer()
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + strict.chat_template
    )
    with pytest.raises(InputError, match="part.jsonl, line 1: .*no system"):
        run_tasks(adapted, strict, [find_task(str(file), None)])


def test_files_of_the_same_stem_are_two_tasks(adapted, tmp_path):
    files = [tmp_path / name / "test.jsonl" for name in "ab"]
    draw = random.Random(2)
    for n, file in enumerate(files, 5):
        file.parent.mkdir()
        tiny_chat.write_lines(file, [tiny_chat.question(draw, 2) for _ in range(n)])
    tasks = find_tasks([str(files[0])], [str(files[1])], None, 0, 0)
    assert [task.name for task in tasks] == ["a/test", "b/test"]
    together = run_tasks(adapted, TOKENS, tasks)
    assert [(one.key, one.n) for one in together if one.metric == "loss"] == [
        (("a/test", "loss"), 5),
        (("b/test", "loss"), 6),
    ]
    apart = [one for task in tasks for one in run_tasks(adapted, TOKENS, [task])]
    for one, other in zip(together, apart):
        assert one.key == other.key and one.values == pytest.approx(other.values, abs=1e-3)
    rows = report_rows(together, together)
    assert {row["task"]: row["n"] for row in rows} == {"a/test": 5, "b/test": 6}
    same = [find_task(str(file), None) for file in files]
    with pytest.raises(InputError, match="2 tasks are called 'test'"):
        run_tasks(adapted, TOKENS, same)
    with pytest.raises(InputError, match="same task and metric"):
        report_rows([score([1]), score([0])], [score([1])])


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (["a/x.jsonl", "a/y.jsonl", "boolq"], ["x", "y", "boolq"]),
        (["a/boolq.jsonl", "boolq"], ["a/boolq", "boolq"]),
        (["a/x.jsonl", "a/x.json", "b/x.json"], ["a/x.jsonl", "a/x.json", "b/x"]),
        (["/1/a/x.json", "/2/a/x.json"], ["/1/a/x.json", "/2/a/x.json"]),
    ],
)
def test_names_of_tasks(asked, names):
    assert task_names(asked) == names


@pytest.mark.parametrize("asked", [["boolq", "boolq"], ["a/x.jsonl", "a/../a/x.jsonl"]])
def test_a_task_is_given_once(asked):
    with pytest.raises(InputError, match="is given 2 times"):
        find_tasks(asked[:1], asked[1:], None, 0, 0)


def test_drift_by_hand(adapted, data):
    rows = text_windows(data / "wikitext2_valid.txt", TOKENS, 3, length=40)
    assert len(rows) == 3 and rows[0]["input_ids"] != rows[1]["input_ids"]
    before, after = measure_drift(adapted, TOKENS, rows, "text", batch=2)
    ids = torch.tensor(rows[1]["input_ids"])[None]
    with torch.no_grad():
        tuned = adapted(ids).logits[0, :-1].log_softmax(-1)
        with adapted.disable_adapter():
            base = adapted(ids).logits[0, :-1].log_softmax(-1)
    kl = (base.exp() * (base - tuned)).sum().item()
    assert after[1].values[1] == pytest.approx(kl, rel=1e-4) and before[1].value == 0
    for scores, logs in ((before, base), (after, tuned)):
        nll = -logs.gather(1, ids[0, 1:, None]).sum().item()
        assert scores[0].values[1] == pytest.approx(nll, rel=1e-4)
    plain = measure_drift(adapted.unload(), TOKENS, rows, "text")
    assert plain[0] == plain[1] or plain[1][1].value == 0


def test_replies_are_the_base_models_own(adapted):
    with adapted.disable_adapter():
        found = replies(adapted, TOKENS, chat_prompts(3), n_tokens=5, batch=2)
        again = replies(adapted, TOKENS, chat_prompts(3), n_tokens=5, batch=2)
    assert found == again and len(found) == 3
    for row in found:
        said = [label for label in row["labels"] if label != -100]
        assert 1 <= len(said) <= 5 and row["input_ids"][-len(said) :] == said


def test_text_that_is_too_short(tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(InputError, match="a window needs"):
        text_windows(tmp_path / "short.txt", TOKENS, 3)


def test_counts_that_are_too_low(adapted, data):
    text = data / "wikitext2_valid.txt"
    rows = text_windows(text, TOKENS, 1, length=40)
    task = find_task("arc_easy", data)
    for call in (
        lambda: make_texts(adapted, TOKENS, text=text, n_windows=-1, n_prompts=0),
        lambda: make_texts(adapted, TOKENS, text=None, n_windows=0, n_prompts=-60),
        lambda: text_windows(text, TOKENS, -1),
        lambda: text_windows(text, TOKENS, 1, length=1),
        lambda: chat_prompts(-60),
        lambda: replies(adapted, TOKENS, ["a"], batch=0),
        lambda: replies(adapted, TOKENS, ["a"], n_tokens=0),
        lambda: own_text(adapted, TOKENS, 0),
        lambda: measure_drift(adapted, TOKENS, rows, "text", batch=0),
        lambda: routing_rows(adapted, 0, {"text": rows}, batch=-1),
        lambda: run_tasks(adapted, TOKENS, [task], batch=0),
        lambda: run_tasks(adapted, TOKENS, [task], batch=-1),
        lambda: run_tasks(adapted, TOKENS, [task], limit=-1),
        lambda: find_task("arc_easy", data, limit=-1),
    ):
        with pytest.raises(InputError, match="is below .; give at least"):
            call()


def test_more_prompts_than_ship_are_refused():
    with pytest.raises(InputError, match="there are 64 prompts, not 65; ask for fewer, or 0"):
        chat_prompts(65)
    assert len(chat_prompts()) == len(chat_prompts(64)) == 64


def test_a_text_is_not_called_as_the_replies_are(adapted, tmp_path):
    file = tmp_path / "chat.txt"
    file.write_text("words " * 200)
    with pytest.raises(InputError, match="chat.txt is called 'chat' .* another name"):
        make_texts(adapted, TOKENS, text=file, n_windows=1, n_prompts=1)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("lora", {"weight_decay": 0.0, "kl": 0.0}),
        ("lora-wd:weight_decay=3", {"weight_decay": 3}),
        ("lora-kl:kl=0.5+alpha=1", {"kl": 0.5, "alpha": 1}),
        ("slim:distance=max+beta=2", {"extra": {"distance": "max", "beta": 2}}),
    ],
)
def test_parse_tuner(text, fields):
    tuner = parse_tuner(text)
    assert {name: getattr(tuner, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("text", "n"),
    [
        *(("slim", N_TEXTS), ("slim:texts=3", 3), ("slim:texts=0", 0)),
        *(
            ("slim-no-yielding", 0),
            ("slim-whitened", 0),
            ("slim-rms", 0),
            ("slim-paper", 0),
            ("moe", 0),
        ),
        *(("lora", 0), ("lora-kl", 0), ("lora-own", N_TEXTS), ("lora-own:texts=3", 3)),
    ],
)
def test_only_methods_that_take_it_have_text_written(text, n):
    assert parse_tuner(text).n_own == n


BAD = (
    *("slim:texts=1.5", "lora-own:texts=0", "lora-own:texts=2.5"),
    *("slim:strength=0", "lora:strength=1.1", "lora:strength=nan", "lora:strength=half"),
)


@pytest.mark.parametrize(
    ("n_learnt", "n", "distance"), [(1279, 0, "whitened"), (1280, N_TEXTS, "discriminant")]
)
def test_few_tokens_to_learn_mean_no_other_text(n_learnt, n, distance):
    found = parse_tuner("slim").fitted_to(n_learnt)
    assert found.n_own == n and found.config(1, None, 0).distance == distance
    assert parse_tuner("slim:texts=8").fitted_to(n_learnt).n_own == 8
    assert parse_tuner("slim:texts=0").fitted_to(n_learnt).config(1, None, 0).distance == "whitened"
    asked = parse_tuner("slim:distance=discriminant").fitted_to(n_learnt)
    assert asked.n_own == N_TEXTS and asked.config(1, None, 0).distance == "discriminant"


@pytest.mark.parametrize(
    ("text", "margin"),
    [("slim", 1.0), ("slim:texts=0", 1.5), ("slim:margin=0", 0), ("slim-rms", 1.5)],
)
def test_the_margin_at_inference_goes_with_the_distance(text, margin):
    config = parse_tuner(text).config(1, None, 0)
    assert config.margin_of(training=False) == margin
    assert config.margin_of(training=True) == (0 if margin == 0 else 1.5)


def test_the_plain_reading_has_nothing_of_ours():
    plain = parse_tuner("slim-paper")
    assert plain.config(1, None, 0).margin == 0 and plain.strength == 1
    assert parse_tuner("moe").strength == parse_tuner("lora").strength == 1
    assert parse_tuner("slim").strength == parse_tuner("slim-no-l1").strength == 0.7


def test_parse_tuner_refuses():
    with pytest.raises(UnknownNameError, match="did you mean 'dora'"):
        parse_tuner("dara")
    for wrong in ("lora:alpha", "lora:=3", "lora:kl=-1", "slim:texts=-1", *BAD):
        with pytest.raises(InputError):
            parse_tuner(wrong)


def test_fit_rank():
    assert fit_rank(lambda rank: 100 * rank, 720) == 7
    assert fit_rank(lambda rank: 50 + 100 * rank, 1040) == 10
    with pytest.raises(InputError, match="no rank gives"):
        fit_rank(lambda rank: 100 * rank, 150)


def test_adapters_leave_the_base_as_it_was():
    model = tiny_chat.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name in ("lora", "dora", "lora-attn"):
        adapted = attach(parse_tuner(name), model, 3, seed=0)
        assert n_trainable(adapted) > 0
        adapted.unload()
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)


def test_split_keeps_a_question_on_one_side():
    examples = [
        example_of({"question": f"q{i % 20}", "choices": ["a", "b"], "answer": 0})
        for i in range(40)
    ]
    validation, train = split(examples, 5, 20, "t")
    assert not {x.question for x in validation} & {x.question for x in train}
    assert len(validation) == 5 and len(train) == 20
    assert split(examples, 5, 20, "t") == (validation, train)
    with pytest.raises(InputError, match="needs more than"):
        split(examples, 20, 0, "t")


def run(method, lr, validation, loss=1.0, status="complete"):
    row = {"validation": validation, "validation_loss": loss, "status": status}
    return Trial(method, lr, 0), row


def test_best_rate_is_chosen_on_validation():
    found = dict(
        [
            run("a", 1e-3, 0.5),
            run("a", 1e-2, 0.6),
            run("b", 1e-3, 0.5, loss=2.0),
            run("b", 1e-2, 0.5, loss=1.0),
            run("b", 1e-1, 0.9, status="diverged"),
        ]
    )
    assert best_rates(found) == {"a": 1e-2, "b": 1e-2}
    with pytest.raises(InputError, match="every run diverged"):
        best_rates(dict([run("a", 1.0, 0.0, status="diverged")]))


def test_method_rows():
    def final(method, seed, target, kl):
        row = {"method": method, "lr": 1e-3, "seed": seed, "rank": 4, "params": 9}
        row |= {"status": "complete", "final": True, "target": target, "target_before": 0.3}
        return row | {"kl_chat": kl, "perplexity": 20 + kl, "perplexity_before": 20.0}

    rows = [final("lora", 0, 0.4, 1.0), final("lora", 1, 0.6, 3.0), final("slim", 0, 0.5, 0.2)]
    found = {row["method"]: row for row in method_rows(rows)}
    assert found["lora"]["target"] == 0.5 and found["lora"]["n_seeds"] == 2
    assert found["lora"]["target_gain"] == pytest.approx(0.2)
    assert found["lora"]["target_std"] == pytest.approx(0.02**0.5)
    assert found["slim"]["kl_chat_ratio"] == pytest.approx(0.1)
    assert found["slim"]["perplexity_rise_ratio"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        (("kl_chat", "kl_text", "perplexity"), ["KL to the base model on its replies", "perp"]),
        (("kl_text", "perplexity"), ["KL to the base model on text", "perp"]),
        (("kl_chat", "perplexity_of_replies"), ["KL to the base model on its replies"]),
    ],
)
def test_pictures_show_what_was_measured(keys, labels, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure) or path)
    rows = [
        {"method": "base", "lr": None, "status": "complete", "validation": 0.3},
        {"method": "lora", "lr": 1e-3, "status": "complete", "validation": 0.4},
        {"method": "lora", "lr": 1e-2, "status": "diverged"},
    ]
    for row in rows[:2]:
        row |= dict.fromkeys(keys, 1.5)
    plots.plot_front(rows, tmp_path / "front.png")
    plots.plot_curves({"lora": [{"step": 2, "probe": rows[1]}, {"step": 3}]}, tmp_path / "c.png")
    front, curves = ([axis.get_xlabel() for axis in figure.axes] for figure in drawn)
    assert len(front) == len(labels) and all(a.startswith(b) for a, b in zip(front, labels))
    assert len(curves) == 2 and [len(axis.lines) for axis in drawn[1].axes] == [1, 1]
    assert drawn[1].axes[1].get_ylabel() == front[0]


def test_a_picture_of_nothing_is_refused(tmp_path):
    row = {"method": "lora", "lr": 1e-3, "status": "complete", "validation": 0.4}
    with pytest.raises(InputError, match="measured on no text"):
        plots.plot_front([row], tmp_path / "front.png")


def test_layers_are_means_of_their_projections():
    rows = [
        {"layer": f"m.layers.{n}.mlp.{p}", "identity_share": s, "bypassed_share": 0, "distance": 1}
        for n, p, s in [(10, "up", 0.2), (2, "up", 0.4), (10, "down", 0.4)]
    ]
    found = by_layer(rows)
    assert [row["layer"] for row in found] == [2, 10]
    assert found[1]["identity_share"] == pytest.approx(0.3)


def test_plan_refuses():
    for wrong in ({"seeds": (0, 0)}, {"lrs": ()}, {"rank": 0}, {"lrs": (-1.0,)}, {"limit": -1}):
        with pytest.raises(InputError):
            Plan(**wrong)
    with pytest.raises(UnknownNameError):
        Plan(methods=("lore",))


@pytest.mark.parametrize(("n_learnt", "expected"), [(0, 8), (160, 16), (1_000_000, 128)])
def test_directions_follow_the_amount_of_data(n_learnt, expected):
    assert parse_tuner("slim").fitted_to(n_learnt).config(2, None, 0).n_directions == expected
    given = parse_tuner("slim-paper:n_directions=5").fitted_to(n_learnt)
    assert given.config(2, None, 0).n_directions == 5
    assert parse_tuner("lora").fitted_to(n_learnt) == parse_tuner("lora")
