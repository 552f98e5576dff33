"""Tasks through lm-eval: those that ship, files of questions, and any that lm-eval knows."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood.checks import need_at_least
from budwood.errors import InputError, first_line
from budwood.tune.data import Example, is_file, read_examples, styled
from budwood.tune.encoding import lead_of, render
from budwood.tune.evaluate.known_tasks import (
    SHIPPED,
    leaf_tasks,
    no_lm_eval,
    shipped_tasks,
    task_manager,
)
from budwood.tune.evaluate.scores import Score


@dataclass(frozen=True)
class Task:
    """Something to be tested on.

    Attributes:
        name: as in the table.
        group: ``"target"`` or ``"general"``.
        config: of lm-eval, without data.
        examples: the data; None for a task of lm-eval's own.
        chat: asked through the chat template.
        rendered: some examples have a system prompt or several turns; lm-eval knows single
            questions alone, so that it gets whole prompts, as text.
    """

    name: str
    group: str
    config: dict[str, Any] | None
    examples: tuple[Example, ...] | None
    chat: bool = True
    rendered: bool = False

    @property
    def asked(self) -> str:
        """How: ``"chat"`` through the template by lm-eval, ``"rendered"`` before, or ``"text"``."""
        return ("rendered" if self.rendered else "chat") if self.chat else "text"


def find_task(
    name: str, data: Path | None, group: str = "general", limit: int = 0, seed: int = 0
) -> Task:
    """A task by its name.

    Args:
        name: one that ships, whose file is in ``data``; a file of JSON lines; or any of lm-eval's.
        data: folder with the files of shipped tasks.
        group: ``"target"`` or ``"general"``.
        limit: draw so many of its questions; 0 for all.
        seed: of the draw.

    Raises:
        InputError: its file is missing or malformed.
    """
    if is_file(name):
        examples = draw(read_examples(name), limit, seed)
        return task_of(Path(name).stem, examples, group)
    if name in shipped_tasks():
        config = _read_yaml(SHIPPED / f"{name}.yaml")
        if data is None:
            raise InputError(f"task {name!r} needs its file: give --data DIR")
        file = data / config["dataset_kwargs"]["data_files"]["test"]
        examples = draw(read_examples(str(file)), limit, seed)
        _need_single(name, examples)
        return Task(name, group, config, tuple(examples), config["metadata"].get("chat", True))
    return Task(name, group, None, None)


def task_names(asked: Sequence[str]) -> list[str]:
    """What tasks are called in tables, no two the same.

    Args:
        asked: as :func:`find_task` takes them.

    Returns:
        A file's stem; where several have the same, with the folder before it, and with more where
        that is not enough. Other tasks are called what they are.

    Raises:
        InputError: a file or another task is there twice.
    """
    paths = [Path(one).expanduser().resolve() if is_file(one) else None for one in asked]
    for what, n in Counter(path or one for path, one in zip(paths, asked)).items():
        if n > 1:
            raise InputError(f"task {what} is given {n} times; give it once, as target or general")
    names = [path.stem if path else one for path, one in zip(paths, asked)]
    for longer in (_with_folder, _with_folder_and_ending, str):
        counts = Counter(names)
        names = [longer(p) if p and counts[name] > 1 else name for p, name in zip(paths, names)]
    return names


def _need_single(name: str, examples: Sequence[Example]) -> None:
    other = next((example for example in examples if not example.is_single), None)
    if other is not None:
        raise InputError(
            f"{other.where}: task {name!r} takes single questions, and this has a system prompt or "
            "several turns; give the file itself as a task"
        )


def _with_folder(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def _with_folder_and_ending(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def task_of(name: str, examples: Sequence[Example], group: str = "target") -> Task:
    """A task made of examples: multiple choice, or the loss of the right answer.

    The answer is the last turn, after all of the conversation before it.

    Raises:
        InputError: some examples have choices and others have none.
    """
    with_choices = {bool(example.choices) for example in examples}
    if len(with_choices) != 1:
        raise InputError(f"{name}: some questions have choices and some have none")
    kind = "openbookqa" if with_choices == {True} else "gsm8k"
    config = _read_yaml(SHIPPED / f"{kind}.yaml") | {"doc_to_target": "answer"}  # as it is written
    rendered = not all(example.is_single for example in examples)
    return Task(name, group, config, tuple(examples), rendered=rendered)


def draw(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """So many examples at random, in their order; all of them for 0.

    Raises:
        InputError: the limit is below 0.
    """
    need_at_least(0, limit=limit)
    if not limit or limit >= len(examples):
        return list(examples)
    chosen = random.Random(seed).sample(range(len(examples)), limit)
    return [examples[i] for i in sorted(chosen)]


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    style: str = "cloze",
    batch: int = 16,
    limit: int = 0,
    advance: Callable[..., None] | None = None,
) -> list[Score]:
    """Score a model on tasks.

    Args:
        model: a causal language model, of transformers or PEFT.
        tokenizer: of the model, with a chat template.
        tasks: what on.
        style: one of ``budwood.tune.data.STYLES``, for multiple choice through the chat template.
        batch: prompts at a time.
        limit: questions of tasks that are lm-eval's own; 0 for all.
        advance: a function (done, total, note), for a progress bar.

    Returns:
        For multiple choice ``accuracy`` and the ``loss`` of the right answer, where there is one;
        for other answers ``loss``, or ``accuracy`` if they are generated.

    Raises:
        InputError: lm-eval is not installed, or can't run a task; two tasks have the same name, or
            a count is too low.
        UnknownNameError: lm-eval has no such task.
    """
    need_at_least(1, batch=batch)
    need_at_least(0, limit=limit)
    if not tasks:
        return []
    tasks = expanded(tasks)
    with _quiet(), tempfile.TemporaryDirectory(prefix="budwood-tasks-") as folder:
        lm = _model(model, tokenizer, batch, advance)
        files = {task.name: Path(folder, f"{i}.jsonl") for i, task in enumerate(tasks)}
        found: dict[str, list[Score]] = {}
        for asked in ("chat", "rendered", "text"):
            mine = [task for task in tasks if task.asked == asked]
            if mine:
                # A template writes the token that texts begin with, or means to have none.
                lm.add_bos_token = None if asked == "text" else False
                lm.lead = "" if asked == "text" else lead_of(tokenizer)
                samples = _evaluate(lm, mine, files, style, limit, asked == "chat")
                for task in mine:
                    found[task.name] = _scores(task, samples[task.name], tokenizer)
    return [score for task in tasks for score in found[task.name]]


def expanded(tasks: Sequence[Task]) -> list[Task]:
    """Tasks, with those of lm-eval's groups and tags in the place of these.

    Raises:
        InputError: lm-eval is not installed, or a group changes settings of its tasks; two tasks
            have the same name.
        UnknownNameError: lm-eval has no such task.
    """
    found = [leaf for task in tasks for leaf in _leaves(task)]
    for name, n in Counter(task.name for task in found).items():
        if n > 1:
            raise InputError(f"{n} tasks are called {name!r}; give each once, by its own name")
    return found


def _leaves(task: Task) -> list[Task]:
    if task.config is not None:
        return [task]
    with _quiet():
        return [dataclasses.replace(task, name=name) for name in leaf_tasks(task.name)]


def _model(model: Any, tokenizer: Any, batch: int, advance: Any) -> Any:
    try:
        from budwood.tune.evaluate.shared_prompt import SharedPromptLM
    except ImportError as error:
        raise no_lm_eval(error) from error
    model.eval()
    return SharedPromptLM(model, tokenizer, batch, advance)


def _evaluate(
    lm: Any, tasks: Sequence[Task], files: dict[str, Path], style: str, limit: int, chat: bool
) -> dict[str, list[dict[str, Any]]]:
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    own = any(task.config is None for task in tasks)
    manager = task_manager() if own else TaskManager(include_defaults=False)
    specs: list[Any] = [
        task.name
        if task.config is None
        else _with_data(task, files[task.name], style, lm.tokenizer)
        for task in tasks
    ]
    try:
        loaded = manager.load(specs)
    except Exception as error:  # whatever data sets and the hub's client raise
        names = ", ".join(task.name for task in tasks)
        raise InputError(f"lm-eval cannot load {names}: {first_line(error)}") from error
    found: Any = evaluate(
        lm=lm,
        task_dict=loaded,
        limit=limit if own and limit else None,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
    )
    if found is None or "samples" not in found:
        raise InputError("lm-eval gave no samples; run it on one rank")
    samples = found["samples"]
    for name, task in loaded["tasks"].items():
        for sample in samples[name]:
            sample["gold"] = _gold(task, sample["doc"])
    return samples


def _with_data(task: Task, file: Path, style: str, tokenizer: Any) -> dict[str, Any]:
    """The config with its questions in a file, since lm-eval reads datasets."""
    examples = task.examples or ()
    if task.rendered:
        rows = [_conversation(example, tokenizer) for example in examples]
    else:
        rows = [_row(example, style if task.chat else "cloze") for example in examples]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "cache")}
    return {**(task.config or {}), "task": task.name, "dataset_kwargs": data}


def _row(example: Example, style: str) -> dict[str, Any]:
    if not example.choices:
        return {"question": example.question, "answer": example.messages[-1]["content"]}
    asked = styled(example, style).question
    return {"question": asked, "choices": list(example.choices), "answer": example.answer}


def _conversation(example: Example, tokenizer: Any) -> dict[str, Any]:
    *before, last = example.messages
    prompt = render(tokenizer, before, True, example.where)
    return {"question": prompt, "answer": last["content"]}


def _scores(task: Task, samples: list[dict[str, Any]], tokenizer: Any) -> list[Score]:
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    found = []
    for name in filters:
        mine = sorted(
            (sample for sample in samples if sample["filter"] == name), key=lambda s: s["doc_id"]
        )
        label = task.name if len(filters) == 1 else f"{task.name}/{name}"
        found += _scores_of(Task(label, task.group, None, None), mine, tokenizer)
    return found


def _scores_of(task: Task, samples: list[dict[str, Any]], tokenizer: Any) -> list[Score]:
    metric = next((m for m in _ACCURACIES if m in samples[0]), None)
    found = []
    if metric:
        values = tuple(float(sample[metric]) for sample in samples)
        found.append(Score(task.name, "accuracy", task.group, values, (1.0,) * len(values)))
    pairs = [_right_answer(sample) for sample in samples]
    if all(pairs):
        losses = tuple(-pair[0] for pair in pairs if pair)
        counts = tuple(float(_n_tokens(tokenizer, pair[1])) for pair in pairs if pair)
        found.append(Score(task.name, "loss", task.group, losses, counts))
    if not found:
        raise InputError(f"task {task.name!r} has neither accuracy nor likelihoods")
    return found


_ACCURACIES = ("acc_norm", "acc", "exact_match")


def _right_answer(sample: dict[str, Any]) -> tuple[float, str] | None:
    """Log-likelihood and text of the right answer; None where it is not known."""
    gold = sample["gold"]
    if gold is None:
        return None
    return float(sample["filtered_resps"][gold][0]), str(sample["arguments"][gold][1])


def _gold(task: Any, doc: dict[str, Any]) -> int | None:
    """Which of a question's requests has the right answer, as lm-eval itself finds it.

    None where answers are generated, where none or several are right, and where a task has a
    function of its own that scores them.
    """
    config = task.config
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0
    if task.OUTPUT_TYPE != "multiple_choice" or not config.doc_to_choice or config.process_results:
        return None
    found = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = list(task.doc_to_choice(doc))
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, str):
        return choices.index(found) if found in choices else None
    return int(found) if isinstance(found, int) and 0 <= found < len(choices) else None


def _n_tokens(tokenizer: Any, text: str) -> int:
    return max(1, len(tokenizer(text, add_special_tokens=False)["input_ids"]))


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets draw bars and log much of what they do."""
    try:
        import datasets
    except ImportError as error:
        raise InputError("evaluation needs datasets: pip install 'budwood[tune]'") from error
    logger = logging.getLogger("lm_eval")
    level, shown = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
