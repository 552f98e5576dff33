"""Questions about sprout scenes as a dataset of both harnesses, drawn from a seed, offline."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from budwood import optional
from budwood.checks import need_at_least
from budwood.errors import UnknownNameError
from budwood.sprout.questions import balanced
from budwood.sprout.scenes import make_scene

HARNESSES = ("lm_eval", "lmms_eval")
N_SCENES = 200


def task_folder(harness: str) -> Path:
    """The folder with the task ``sprout_scenes``, for the harness's ``--include_path``.

    Args:
        harness: ``"lm_eval"`` or ``"lmms_eval"``.

    Raises:
        UnknownNameError: it is neither.
    """
    if harness not in HARNESSES:
        raise UnknownNameError(f"unknown harness {harness!r}; known: {', '.join(HARNESSES)}")
    return Path(__file__).parent / "tasks" / harness


def scene_questions(
    n_scenes: int = N_SCENES, split: str = "test", scene_seed: int = 0, **layout: Any
) -> Any:
    """Draw scenes and ask one question of every kind about each.

    Example::

        rows = scene_questions(n_scenes=100)
        picture(rows[0]), rows[0]["question"], rows[0]["answer"]

    Args:
        n_scenes: scenes; each allows about six questions.
        split: as in ``budwood.sprout.make_scene``.
        scene_seed: another one gives other scenes.
        layout: further options of ``make_scene``.

    Returns:
        A ``datasets.Dataset`` with the columns ``question``, ``answer``, ``kind``, and ``scene``,
        ``split`` and ``layout``, from which :func:`picture` draws the scene again.

    Raises:
        InputError: unknown split, or a count or seed out of range.
        MissingPackageError: datasets is not installed.
    """
    need_at_least(1, n_scenes=n_scenes)
    datasets = optional.need("datasets", "a task of sprout scenes")
    rows = [
        {
            "question": question.text,
            "answer": question.answer,
            "kind": question.kind,
            "scene": scene.seed,
            "split": split,
            "layout": json.dumps(layout),
        }
        for scene, questions in balanced(scene_seed, n_scenes, split, **layout)
        for question in questions
    ]
    return datasets.Dataset.from_list(rows)


def picture(row: Mapping[str, Any]) -> Image.Image:
    """Draw the scene of a row of :func:`scene_questions`, RGB."""
    return _picture(row["scene"], row["split"], row["layout"])


@lru_cache(maxsize=64)
def _picture(seed: int, split: str, layout: str) -> Image.Image:
    return make_scene(seed, split, **json.loads(layout)).image


def normalise(text: str) -> str:
    """Remove case, punctuation and superfluous space from an answer."""
    bare = text.casefold().translate(str.maketrans("", "", string.punctuation))
    return " ".join(bare.split())


def score(row: Mapping[str, Any], said: str) -> dict[str, float]:
    """Compare an answer with the right one.

    Returns:
        ``accuracy``, 1.0 or 0.0.
    """
    return {"accuracy": float(normalise(said) == normalise(row["answer"]))}
