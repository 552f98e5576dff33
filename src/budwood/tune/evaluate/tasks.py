"""What a model is tested on: shipped tasks, files of questions, and tasks of lm-eval."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from budwood import optional
from budwood.checks import need_at_least
from budwood.errors import InputError, MissingPackageError, UnknownNameError
from budwood.loading import is_file_name
from budwood.tune.data.examples import Example, read_examples
from budwood.tune.tasks import MADE, made

SHIPPED = Path(__file__).parents[1] / "tasks"
LATER = ("arc_challenge", "piqa")
"""Shipped tasks that are lm-eval's own where ``data`` lacks their file."""
_STRUCTURE = frozenset(
    ("group", "group_alias", "task", "task_alias", "tag", "aggregate_metric_list", "metadata")
)
"""Keys of a group that change nothing in its tasks."""
_SHOWN = 5


@dataclass(frozen=True)
class Task:
    """A task to evaluate on.

    Attributes:
        name: its name in tables.
        group: ``"target"`` or ``"general"``.
        config: lm-eval's config, without data; None for a task of lm-eval's own.
        examples: the data; None for a task of lm-eval's own.
        chat: whether it is asked through the chat template.
        rendered: some examples have a system prompt or several turns. lm-eval knows single
            questions only, so it gets whole prompts as text.
    """

    name: str
    group: str
    config: dict[str, Any] | None
    examples: tuple[Example, ...] | None
    chat: bool = True
    rendered: bool = False

    @property
    def constant(self) -> float | None:
        """Fraction of questions that the best constant answer gets right; None if unknown."""
        answers = [example.messages[-1]["content"] for example in self.examples or ()]
        return max(Counter(answers).values()) / len(answers) if answers else None

    @property
    def asked(self) -> str:
        """How: ``"chat"`` through the template by lm-eval, ``"rendered"`` before, or ``"text"``."""
        return ("rendered" if self.rendered else "chat") if self.chat else "text"


def find_task(
    name: str, data: Path | None, group: str = "general", limit: int = 0, seed: int = 0
) -> Task:
    """Find a task by its name.

    Args:
        name: a shipped task, whose file is in ``data`` or which brings its own data (see
            :data:`budwood.tune.tasks.MADE`); a file of examples; or one of lm-eval's.
        data: folder with the files of shipped tasks.
        group: ``"target"`` or ``"general"``.
        limit: number of questions to draw; 0 for all.
        seed: seed of the draw.

    Raises:
        InputError: its file is missing or malformed.
    """
    if is_file_name(name):
        examples = draw(read_examples(name), limit, seed)
        return task_of(Path(name).stem, examples, group)
    if name in MADE:
        examples = draw(made(name)["test"], limit, seed)
        return task_of(name, examples, group, exact=True)
    if name in shipped_tasks():
        config = _read_yaml(SHIPPED / f"{name}.yaml")
        file = data and data / config["dataset_kwargs"]["data_files"]["test"]
        if name in LATER and not (file and file.is_file()):
            return Task(name, group, None, None)  # lm-eval has it as well
        if file is None:
            raise InputError(f"task {name!r} needs its file: give --data DIR")
        examples = draw(read_examples(str(file)), limit, seed)
        _need_single(name, examples)
        return Task(name, group, config, tuple(examples), config["metadata"].get("chat", True))
    return Task(name, group, None, None)


def task_names(asked: Sequence[str]) -> list[str]:
    """Names of tasks in tables, no two the same.

    Args:
        asked: names as :func:`find_task` takes them.

    Returns:
        The stem of a file, with the folder before it where stems are the same, and longer if
        needed. Other tasks keep their names.

    Raises:
        InputError: a file or task is given twice.
    """
    paths = [Path(one).expanduser().resolve() if is_file_name(one) else None for one in asked]
    for what, n in Counter(path or one for path, one in zip(paths, asked)).items():
        if n > 1:
            raise InputError(f"task {what} is given {n} times; give it once, as target or general")
    names = [path.stem if path else one for path, one in zip(paths, asked)]
    for longer in (_with_folder, _with_folder_and_ending, str):
        counts = Counter(names)
        names = [longer(p) if p and counts[name] > 1 else name for p, name in zip(paths, names)]
    return names


def _need_single(name: str, examples: Sequence[Example]) -> None:
    other = next((ex for ex in examples if ex.is_plain or not ex.is_single), None)
    if other is not None:
        raise InputError(
            f"{other.where}: task {name!r} takes single questions, and this has a system prompt or "
            "several turns, or is plain text; give the file itself as a task"
        )


def _with_folder(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def _with_folder_and_ending(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def task_of(
    name: str, examples: Sequence[Example], group: str = "target", *, exact: bool = False
) -> Task:
    """A task made of examples: multiple choice, or the loss of the right answer.

    The answer is the last turn, after all of the conversation before it; or the completion.

    Args:
        name: its name in tables.
        examples: the data.
        group: ``"target"`` or ``"general"``.
        exact: without choices, also score whether greedy decoding writes the answer.

    Raises:
        InputError: some examples have choices and others have none, some are plain text and others
            are chats, or one has no answer.
    """
    if len({bool(example.choices) for example in examples}) != 1:
        raise InputError(f"{name}: some questions have choices and some have none")
    if len({example.is_plain for example in examples}) != 1:
        raise InputError(f"{name}: some examples are plain text and some are chats")
    bare = next((example for example in examples if len(example.messages) < 2), None)
    if bare is not None:
        raise InputError(
            f"{bare.where or name}: a text alone has no answer to score; measure it with --text"
        )
    kind = "openbookqa" if examples[0].choices else "gsm8k"
    config = _read_yaml(SHIPPED / f"{kind}.yaml") | {"doc_to_target": "answer"}  # as it is written
    if exact and kind == "gsm8k":
        config["metric_list"] = [*config["metric_list"], {"metric": "acc", "aggregation": "mean"}]
    if examples[0].is_plain:
        # The completion has its own white space, if any.
        return Task(name, group, config | {"target_delimiter": ""}, tuple(examples), chat=False)
    rendered = not all(example.is_single for example in examples)
    return Task(name, group, config, tuple(examples), rendered=rendered)


def draw(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """Draw examples at random and keep their order; 0 takes all.

    Raises:
        InputError: the limit is below 0.
    """
    need_at_least(0, limit=limit)
    if not limit or limit >= len(examples):
        return list(examples)
    chosen = random.Random(seed).sample(range(len(examples)), limit)
    return [examples[i] for i in sorted(chosen)]


def find_tasks(
    targets: Sequence[str], general: Sequence[str], data: Path | None, limit: int, seed: int
) -> tuple[Task, ...]:
    """Find tasks by their names, as :func:`find_task`.

    A group or tag of lm-eval stands for all of its tasks.

    Raises:
        InputError: a task is given twice, a file is missing or malformed, or a group of lm-eval
            changes settings of its tasks.
        UnknownNameError: there is no such task.
    """
    asked = [(name, "target") for name in targets] + [(name, "general") for name in general]
    tasks = [
        dataclasses.replace(find_task(source, data, group, limit, seed), name=name)
        for (source, group), name in zip(asked, task_names([source for source, _ in asked]))
    ]
    return tuple(expanded(tasks))


def expanded(tasks: Sequence[Task]) -> list[Task]:
    """Replace the groups and tags of lm-eval by their tasks.

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
    with quiet_harness():
        return [dataclasses.replace(task, name=name) for name in leaf_tasks(task.name)]


def shipped_tasks() -> tuple[str, ...]:
    """Names of the shipped tasks."""
    return tuple(sorted([*MADE, *(path.stem for path in SHIPPED.glob("*.yaml"))]))


@cache
def task_manager() -> Any:
    """lm-eval's task manager with all of its tasks; made once, since it takes seconds.

    Raises:
        InputError: lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise no_lm_eval(error) from error
    return TaskManager()


def no_lm_eval(error: ImportError) -> MissingPackageError:
    """The error where lm-eval cannot be imported."""
    return optional.missing_package("lm_eval", "evaluation", error)


def leaf_tasks(name: str) -> list[str]:
    """The tasks behind a name of lm-eval.

    Args:
        name: a task, which stands for itself, a group or a tag.

    Raises:
        UnknownNameError: lm-eval has no such name.
        InputError: it is a group that changes settings of its tasks.
    """
    manager = task_manager()
    if name not in manager.task_index:
        known = ", ".join(shipped_tasks())
        raise UnknownNameError(
            f"unknown task {name!r}; give a file, one of {known}, or a task of lm-eval"
        )
    found = dict(_walk(name, manager, frozenset()))
    changed = sorted(frozenset().union(*found.values()))
    if changed:
        few = ", ".join([*found][:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
        raise InputError(
            f"group {name!r} of lm-eval changes {', '.join(changed)} of its tasks, which is not "
            f"done here; give the tasks themselves: {few}"
        )
    return list(found)


def _walk(
    part: str | Mapping[str, Any], manager: Any, changed: frozenset[str]
) -> Iterator[tuple[str, frozenset[str]]]:
    """Each task below a name or a group's config, and the settings that are changed on the way."""
    if isinstance(part, Mapping):
        members = part.get("task", part.get("group"))
        changed |= set(part) - _STRUCTURE
        for member in [members] if isinstance(members, str) else members or ():
            yield from _walk(member, manager, changed)
    elif part in manager.all_groups:
        yield from _walk(manager.task_index[part].cfg, manager, changed)
    elif part in manager.all_tags:
        yield from ((task, changed) for task in sorted(manager.task_index[part].tags))
    else:
        yield part, changed


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence the bars and logs of lm-eval and datasets."""
    datasets = optional.need("datasets", "evaluation")
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
