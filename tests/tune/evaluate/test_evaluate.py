from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from budwood.errors import InputError, UnsupportedModelError
from budwood.tune.data.encoding import encode_rows
from budwood.tune.data.examples import example_of, styled
from budwood.tune.data.self_generated import replies, self_generate
from budwood.tune.data.template import lead_of, render
from budwood.tune.evaluate.divergence import (
    chat_prompts,
    make_texts,
    measure_drift,
    text_windows,
)
from budwood.tune.evaluate.harness import run_tasks
from budwood.tune.evaluate.scores import Score, compare, report_rows
from budwood.tune.evaluate.suite import Suite, routing_rows
from budwood.tune.evaluate.tasks import (
    find_task,
    find_tasks,
    shipped_tasks,
    task_names,
    task_of,
)
from budwood.tune.methods import attach, parse_tuner
from tests import tiny_chat
from tests.tiny_chat import TEMPLATE

TOKENS = tiny_chat.tokenizer()
SIZES = {"vocab_size": len(TOKENS), "hidden_size": 32, "num_hidden_layers": 2}
STATEFUL = {
    "rwkv": lambda: RwkvForCausalLM(RwkvConfig(**SIZES, context_length=64)),
    "lfm2": lambda: Lfm2ForCausalLM(
        Lfm2Config(
            **SIZES,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
        )
    ),
}


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


@pytest.mark.parametrize("plain", [False, True])
def test_shared_prompts_give_what_hflm_gives(adapted, monkeypatch, plain):
    from lm_eval.models.huggingface import HFLM

    from budwood.tune.evaluate.harness import SharedPromptLM

    if plain:  # as models without these arguments are
        base = adapted.get_base_model()
        whole = base.forward

        def forward(input_ids, **given):
            assert not {"logits_to_keep", "position_ids"} & set(given)
            return whole(input_ids, **given)

        monkeypatch.setattr(base, "forward", forward)

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


@pytest.mark.filterwarnings("ignore:.*lose their beginnings")
def test_answers_that_leave_little_room(adapted):
    from lm_eval.models.huggingface import HFLM

    from budwood.tune.evaluate.harness import SharedPromptLM

    requests = [
        (("", str(n)), list(range(3, 3 + prompt)), list(range(40, 40 + n)))
        for prompt, n in [(30, 4), (30, 23), (1, 24), (30, 24)]
    ]
    sized = {"pretrained": adapted, "tokenizer": TOKENS, "max_length": 24, "batch_size": 1}
    ours = SharedPromptLM(adapted, TOKENS, 4, max_length=24)
    theirs = HFLM(**sized)._loglikelihood_tokens(requests, disable_tqdm=True)
    found = [value for value, _ in ours._loglikelihood_tokens(requests)]
    assert found == pytest.approx([value for value, _ in theirs], abs=1e-3)
    with pytest.raises(InputError, match="25 tokens is longer than the 24"):
        ours._loglikelihood_tokens([(("", ""), [3], list(range(3, 28)))])


@pytest.mark.filterwarnings("ignore:.*lose their beginnings")
def test_answers_of_several_lengths_at_the_last_position():
    """GPT-2 reads where a token is from a table, which ends."""
    from budwood.tune.evaluate.harness import SharedPromptLM

    torch.manual_seed(0)
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 260}
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.5)).eval()
    requests = [(("", ""), list(range(3, 43)), list(range(40, 40 + n))) for n in (2, 3, 1)]
    alone, together = (
        SharedPromptLM(model, TOKENS, batch)._loglikelihood_tokens(requests) for batch in (1, 4)
    )
    assert [x for x, _ in together] == pytest.approx([x for x, _ in alone], abs=1e-4)


@pytest.mark.parametrize("kind", STATEFUL)
def test_models_that_keep_a_state(kind):
    from budwood.tune.evaluate.harness import SharedPromptLM

    torch.manual_seed(0)
    model = STATEFUL[kind]().eval()
    draw = random.Random(0)
    rows = [[draw.randrange(3, 250) for _ in range(n)] for n in (12, 5, 9)]
    requests = [(("", ""), row, [7, 8, 9][:n]) for row, n in zip(rows, (1, 3, 2))]
    found = SharedPromptLM(model, TOKENS, 4)._loglikelihood_tokens(requests)
    with torch.no_grad():
        for (_, prompt, answer), (total, _) in zip(requests, found):
            logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            by_hand = sum(logits[i, token].item() for i, token in zip(at, answer))
            assert total == pytest.approx(by_hand, abs=1e-3)
    labelled = [{"input_ids": row, "labels": [-100] * 2 + row[2:]} for row in rows]
    together, _ = measure_drift(model, TOKENS, labelled, "t", batch=3)
    alone, _ = measure_drift(model, TOKENS, labelled, "t", batch=1)
    assert together[0].values == pytest.approx(alone[0].values, rel=1e-4)


LEADS = {  # what a template writes before an answer
    "<think>\n\n</think>\n\n": TEMPLATE.replace(
        "+ '\n' + message['content']",
        "+ '\n' + ('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '') "
        "+ message['content']",
    ),
    " ": "{% for message in messages %}{{ '[INST]' + message['content'] + '[/INST]' if "
    "message['role'] == 'user' else ' ' + message['content'] + eos_token }}{% endfor %}",
    "": TEMPLATE,
}


@pytest.mark.parametrize("lead", LEADS)
def test_answers_are_scored_where_training_puts_them(adapted, tmp_path, lead):
    tokens = tiny_chat.tokenizer()
    tokens.chat_template = LEADS[lead]
    assert lead_of(tokens) == lead
    row = {"question": "Is it wet?", "choices": ["no", "yes"], "answer": 1}
    chat = {"messages": turns(("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B"))}
    for name, given, said in (("single", row, "yes"), ("chat", chat, "B")):
        file = tiny_chat.write_lines(tmp_path / f"{name}.jsonl", [given])
        (found,) = (
            one
            for one in run_tasks(adapted, tokens, [find_task(str(file), None)])
            if one.metric == "loss"
        )
        trained = encode_rows(example_of(given), tokens)[0]["input_ids"]
        answer = tokens(said + tokens.eos_token, add_special_tokens=False)["input_ids"]
        assert trained[-len(answer) :] == answer
        with torch.no_grad():
            logits = adapted(torch.tensor([trained])).logits[0].log_softmax(-1)
        first = len(trained) - len(answer)
        # A space before the answer is a token of its own here, and lm-eval counts it in.
        first -= lead == " "
        picked = [logits[i - 1, trained[i]].item() for i in range(first, len(trained) - 1)]
        assert found.values[0] == pytest.approx(-sum(picked), abs=1e-3)


def test_todays_date_is_in_no_prompt(adapted):
    """Or else a run could not be gone on with, or a score be repeated, the day after."""
    from budwood.tune.evaluate.harness import SharedPromptLM

    tokens = tiny_chat.tokenizer()
    tokens.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + TEMPLATE
    turn = turns(("user", "U"))
    ours = render(tokens, turn, True)
    assert ours.startswith("01 Jan 2025\n")
    assert SharedPromptLM(adapted, tokens).apply_chat_template(turn) == ours


def test_what_a_user_wrote_is_scored_as_it_is(adapted, tmp_path):
    """lm-eval would take a question of digits for a number, and brackets for a list."""
    written = [("7", "[2, 3]"), ("Write.", "cout << x; cin >> y;"), ("{{q}}", "['a']"), ("8", "9")]
    free = [{"question": question, "answer": answer} for question, answer in written]
    choices = [
        {"question": question, "choices": [answer, "no"], "answer": 0}
        for question, answer in written
    ]
    files = [
        tiny_chat.write_lines(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("free", free), ("choices", choices))
    ]
    found = {
        one.key: one
        for one in run_tasks(adapted, TOKENS, find_tasks(map(str, files), (), None, 0, 0))
    }
    for i, (question, answer) in enumerate(written):
        turns = [{"role": "user", "content": question}]
        prompt = TOKENS.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        total, n = by_hand(adapted, prompt, answer)
        for name in ("free", "choices"):
            assert found[name, "loss"].values[i] == pytest.approx(-total, abs=1e-3)
            assert found[name, "loss"].weights[i] == n
    assert len(found["choices", "accuracy"].values) == len(written)


def test_a_template_decides_what_a_prompt_begins_with(adapted, data, tmp_path):
    """Where the tokenizer puts a token before texts, training and generation have none in chats."""
    adds = tiny_chat.tokenizer()
    adds.bos_token = "<|endoftext|>"
    adds.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert adds("a")["input_ids"][0] == 0
    chat = turns(("user", "U1"), ("assistant", "A"), ("user", "U2"), ("assistant", "B"))
    file = tiny_chat.write_lines(tmp_path / "chats.jsonl", [{"messages": chat}])
    tasks = [find_task("gsm8k", data), find_task(str(file), None), find_task("winogrande", data)]
    plain = {one.key: one.values for one in run_tasks(adapted, TOKENS, tasks)}
    found = {one.key: one.values for one in run_tasks(adapted, adds, tasks)}
    for name in ("gsm8k", "chats"):
        assert found[name, "loss"] == pytest.approx(plain[name, "loss"], abs=1e-3)
    assert found["winogrande", "loss"] != pytest.approx(plain["winogrande", "loss"], abs=1e-3)


def test_a_task_whose_data_cannot_be_had(adapted, data, monkeypatch):
    from lm_eval.tasks import TaskManager

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(TaskManager, "load", unreachable)
    with pytest.raises(InputError, match="lm-eval cannot load arc_easy: no network"):
        run_tasks(adapted, TOKENS, [find_task("arc_easy", data)])


def test_routed_targets_are_asked_as_the_tasks_are(data):
    task = find_task("arc_easy", data, "target", limit=2)
    rows = Suite((task,), style="listed").routed(tiny_chat.model(), TOKENS)["target"]
    assert rows == [encode_rows(styled(one, "listed"), TOKENS)[0] for one in task.examples]
    assert rows != [encode_rows(one, TOKENS)[0] for one in task.examples]
    lengths = [len(encode_rows(one, TOKENS)[0]["input_ids"]) for one in task.examples]
    short = tiny_chat.model(max_position_embeddings=min(lengths))
    (left,) = Suite((task,)).routed(short, TOKENS)["target"]
    assert len(left["input_ids"]) == min(lengths) < max(lengths)


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
    rows = [{"question": "q", "answer": "a"}]
    text = tiny_chat.write_lines(tmp_path / "lines.txt", rows)
    assert find_task(str(text), None).examples == tuple(map(example_of, rows))
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


def test_a_call_of_a_tool_is_scored_as_it_is_written(adapted, tmp_path):
    tokens = tiny_chat.tokenizer()
    tokens.chat_template = tiny_chat.WITH_TOOLS
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    asked = turns(("user", "Is it cold?"))
    row = {"messages": [*asked, {"role": "assistant", "tool_calls": [call]}], "tools": [call]}
    file = tiny_chat.write_lines(tmp_path / "calls.jsonl", [row])
    (found,) = run_tasks(adapted, tokens, find_tasks([str(file)], [], None, 0, 0))
    prompt = tokens.apply_chat_template(
        asked, tools=[call], tokenize=False, add_generation_prompt=True
    )
    said = '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>'
    total, n = by_hand(adapted, prompt, said)
    assert found.values[0] == pytest.approx(-total, abs=1e-3) and found.weights[0] == n


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
    assert plain[0] == plain[1] and plain[1][1].value == 0
    assert plain[0][0].values == pytest.approx(before[0].values, rel=1e-4)


def test_replies_are_the_base_models_own(adapted):
    asked = chat_prompts(3)
    made = make_texts(adapted, TOKENS, text=None, n_windows=0, n_prompts=3)
    tuned = replies(adapted, TOKENS, asked)
    assert made["chat"] == replies(adapted.unload(), TOKENS, asked) != tuned


def test_replies_end(adapted):
    found = replies(adapted, TOKENS, chat_prompts(3), n_tokens=5, batch=2)
    assert found == replies(adapted, TOKENS, chat_prompts(3), n_tokens=5, batch=2)
    assert len(found) == 3
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
        lambda: self_generate(adapted, TOKENS, 0),
        lambda: measure_drift(adapted, TOKENS, rows, "text", batch=0),
        lambda: routing_rows(adapted, TOKENS, {"text": rows}, batch=-1),
        lambda: run_tasks(adapted, TOKENS, [task], batch=0),
        lambda: run_tasks(adapted, TOKENS, [task], batch=-1),
        lambda: run_tasks(adapted, TOKENS, [task], limit=-1),
        lambda: find_task("arc_easy", data, limit=-1),
    ):
        with pytest.raises(InputError, match="is below .; give at least"):
            call()


def test_more_prompts_than_ship_are_refused():
    with pytest.raises(InputError, match="there are 64 prompts, not 65; ask for fewer"):
        chat_prompts(65)
    assert len(chat_prompts()) == len(chat_prompts(64)) == 64


def test_a_text_is_not_called_as_the_replies_are(adapted, tmp_path):
    file = tmp_path / "chat.txt"
    file.write_text("words " * 200)
    with pytest.raises(InputError, match="chat.txt is called 'chat' .* another name"):
        make_texts(adapted, TOKENS, text=file, n_windows=1, n_prompts=1)


def test_completions_are_scored_without_the_chat_template(tmp_path):
    rows = [{"prompt": "The sky is", "completion": " blue."}, {"prompt": "A", "completion": "b c"}]
    file = tiny_chat.write_lines(tmp_path / "plain.jsonl", rows)
    model = tiny_chat.model().eval()
    scores = run_tasks(model, TOKENS, [find_task(str(file), None)])
    expected = []
    for row in rows:
        prompt, answer = (TOKENS(row[key])["input_ids"] for key in ("prompt", "completion"))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])
        expected.append(-float(log_probs.sum()))
    assert [score.metric for score in scores] == ["loss"]
    assert scores[0].values == pytest.approx(expected, abs=1e-3)


def test_text_alone_and_mixed_examples_are_no_task(tmp_path):
    chat, plain = {"question": "q", "answer": "a"}, {"prompt": "p", "completion": "c"}
    for rows, reason in (
        (
            [{"text": "words"}],
            "line 1: a text alone has no answer to score",
        ),
        ([chat, plain], "some examples are plain text and some are chats"),
    ):
        file = tiny_chat.write_lines(tmp_path / "mixed.jsonl", rows)
        with pytest.raises(InputError, match=reason):
            find_task(str(file), None)


def test_prompts_that_the_model_cannot_read_whole_are_counted():
    rows = [{"question": "why " * n, "choices": ["a", "b"], "answer": 0} for n in (5, 600, 700)]
    task = task_of("long", [example_of(row) for row in rows])
    with pytest.warns(UserWarning, match=r"4 of 6 prompts .* than the 1024 tokens .* lose their"):
        run_tasks(tiny_chat.model(), TOKENS, [task])


def test_an_answer_that_the_template_does_not_show_is_refused():
    call = {"function": {"name": "f", "arguments": {}}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = {"messages": [{"role": "user", "content": "x"}, said]}
    with pytest.raises(InputError, match="has no place for tool_calls"):
        run_tasks(tiny_chat.model(), TOKENS, [task_of("tools", [example_of(row)])])


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = tiny_chat.tokenizer()
    tokenizer.chat_template = None
    task = task_of("asked", [example_of({"question": "q", "answer": "a"})])
    with pytest.raises(
        UnsupportedModelError, match="no chat template, through which the tasks are"
    ):
        run_tasks(tiny_chat.model(), tokenizer, [task])
