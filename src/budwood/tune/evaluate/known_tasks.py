"""Tasks that ship, tasks that lm-eval knows, and those that its groups and tags stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from budwood.errors import InputError, UnknownNameError

SHIPPED = Path(__file__).parents[1] / "tasks"
_STRUCTURE = frozenset(
    ("group", "group_alias", "task", "task_alias", "tag", "aggregate_metric_list", "metadata")
)
"""Keys of a group that change nothing in its tasks."""
_SHOWN = 5


def shipped_tasks() -> tuple[str, ...]:
    """Names of the tasks that ship."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


@cache
def task_manager() -> Any:
    """lm-eval's, with all that it knows; to look for that takes seconds, and is done once.

    Raises:
        InputError: lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise no_lm_eval(error) from error
    return TaskManager()


def no_lm_eval(error: ImportError) -> InputError:
    """What to say where lm-eval can't be imported."""
    return InputError(f"evaluation needs lm-eval ({error}): pip install 'budwood[tune]'")


def leaf_tasks(name: str) -> list[str]:
    """The tasks that a name of lm-eval's stands for.

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
