"""Questions about sprout scenes: eight kinds, each with exactly one right answer."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

from PIL import Image

from budwood.errors import InputError
from budwood.sprout.atlas import categories
from budwood.sprout.scenes import (
    MAX_COPIES,
    SEEDS_PER_SPLIT,
    SIZE,
    Box,
    Scene,
    SceneObject,
    check_split,
    make_scene,
    scene_rng,
)

KINDS = ("presence", "colour", "digit", "spatial", "count", "largest")
"""Kinds of question in a held-out set."""
ALL_KINDS = (*KINDS, "reading", "compare")
"""High-resolution scenes allow two more, which sprout has not learnt: they are in no set."""
TEMPLATES = {
    "presence": "Is there any {} in the picture?",
    "colour": "What colour is the frame around the {}?",
    "digit": "Which digit is beside the {}?",
    "count": "How many times does the {} appear?",
    "largest": "What is the largest object?",
    "left of": "What is directly left of the {}?",
    "right of": "What is directly right of the {}?",
    "above": "What is directly above the {}?",
    "below": "What is directly below the {}?",
    "reading": "Which number is on the sign?",
    "compare": "Do the {} and the {} have frames of the same colour?",
}
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


SCENES_PER_SEED = 1_000_000
"""Scenes that a seed of :func:`balanced` has to itself."""


@dataclass(frozen=True)
class Question:
    """One question about one scene."""

    kind: str  # one of ALL_KINDS
    text: str
    answer: str
    asks_salient: (
        bool  # whether the large, salient object is named by the question, or is its answer
    )
    boxes: tuple[Box, ...]  # what has to be seen to answer it, px; empty where the answer is "no"


def ask(scene: Scene, kind: str | None = None) -> list[Question]:
    """Ask every question that the scene allows, in a fixed order; of one kind if it is given.

    Presence is asked of every category that is there, and of as many that are not.
    """
    questions = [q for maker in _MAKERS.values() for q in maker(scene)]
    return [q for q in questions if kind is None or q.kind == kind]


def example() -> tuple[Image.Image, str]:
    """A held-out scene and a question about one of its small objects.

    Example::

        image, question = example()

    Returns:
        A picture, RGB, 672×672 px, and the question. The right answer is "red".
    """
    scene = make_scene(5027, "test", high_resolution=True)
    return scene.image, TEMPLATES["colour"].format("rocket")


def balanced(
    seed: int, n_scenes: int, split: str = "test", high_resolution: bool = False
) -> list[tuple[Scene, list[Question]]]:
    """Draw the held-out set of a seed: for each scene one question of every kind that it allows.

    Scene `i` has the seed `seed · SCENES_PER_SEED + i`, which also decides the questions.

    Args:
        seed: of the set.
        n_scenes: pictures.
        split: as in :func:`budwood.sprout.make_scene`.
        high_resolution: likewise.

    Raises:
        InputError: unknown split, seed out of range, or too many scenes.
    """
    check_set(seed, n_scenes, split)
    chosen = []
    for i in range(n_scenes):
        scene = make_scene(seed * SCENES_PER_SEED + i, split, high_resolution)
        rng = scene_rng(scene.seed, split)
        by_kind = [_pick(scene, kind, rng) for kind in KINDS]
        chosen.append((scene, [q for q in by_kind if q is not None]))
    return chosen


def chats(
    seed: int, n_scenes: int, n_turns: int, split: str = "test", high_resolution: bool = False
) -> list[tuple[Scene, list[tuple[Question, ...]]]]:
    """Draw chats about the scenes of :func:`balanced`, each question about other objects.

    Each of a scene's questions that is about something in it ends a chat. The questions before it
    are drawn from those about objects that have nothing to do with its answer.

    Args:
        seed: as in :func:`balanced`.
        n_scenes: likewise; a scene may allow no chat.
        n_turns: questions in a chat.
        split: as in :func:`balanced`.
        high_resolution: likewise.
    """
    return [
        (scene, [chat for last in questions if (chat := _chat(scene, last, n_turns))])
        for scene, questions in balanced(seed, n_scenes, split, high_resolution)
    ]


def _chat(scene: Scene, last: Question, n_turns: int) -> tuple[Question, ...] | None:
    """Questions about other objects, and the last; None if there are not enough."""
    if n_turns == 1:
        return (last,)
    seen = set(last.boxes)
    others = [q for q in ask(scene) if q.boxes and seen.isdisjoint(q.boxes)]
    if not last.boxes or len(others) < n_turns - 1:
        return None
    rng = random.Random(f"{scene.split} {scene.seed} {last.text}")
    return (*rng.sample(others, n_turns - 1), last)


def check_set(seed: int, n_scenes: int, split: str) -> None:
    """Check that a held-out set can be drawn, without drawing it.

    Raises:
        InputError: unknown split, seed out of range, or too many scenes.
    """
    check_split(split)
    highest = SEEDS_PER_SPLIT // SCENES_PER_SEED - 1
    if not 0 <= seed <= highest:
        raise InputError(f"seed={seed} is out of range; give 0 to {highest}")
    if n_scenes > SCENES_PER_SEED:
        raise InputError(f"n_scenes={n_scenes} is above {SCENES_PER_SEED}; give fewer")


def _pick(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """One question of a kind, its answer drawn evenly where the scene allows several.

    Scenes without two frames of one colour have no "yes" of ``compare``, so "no" is more frequent.
    """
    questions = ask(scene, kind)
    if not questions:
        return None
    if kind == "count":  # of the category that is drawn one to four times, uniformly
        text = TEMPLATES["count"].format(scene.objects[1].category)
        return next(q for q in questions if q.text == text)
    if kind in ("presence", "compare"):
        answer = rng.choice(("yes", "no"))
        questions = [q for q in questions if q.answer == answer] or questions
    return rng.choice(questions)


def _unique(scene: Scene) -> list[SceneObject]:
    """Objects that a name alone points to."""
    return [o for o in scene.objects if len(scene.copies(o.category)) == 1]


def _presence(scene: Scene) -> list[Question]:
    shown = list(dict.fromkeys(o.category for o in scene.objects))
    rng = scene_rng(scene.seed, scene.split)
    absent = rng.sample([c for c in categories() if c not in shown], len(shown))
    there = [
        Question(
            "presence",
            TEMPLATES["presence"].format(c),
            "yes",
            c == scene.salient.category,
            _outer(scene, c),
        )
        for c in shown
    ]
    return there + [
        Question("presence", TEMPLATES["presence"].format(c), "no", False, ()) for c in absent
    ]


def _outer(scene: Scene, category: str) -> tuple[Box, ...]:
    return tuple(o.outer for o in scene.copies(category))


def _about(kind: str, thing: SceneObject, answer: str) -> Question:
    return Question(
        kind, TEMPLATES[kind].format(thing.category), answer, thing.salient, (thing.outer,)
    )


def _colour(scene: Scene) -> list[Question]:
    return [_about("colour", o, o.colour) for o in _unique(scene) if o.colour is not None]


def _digit(scene: Scene) -> list[Question]:
    return [_about("digit", o, str(o.digit)) for o in _unique(scene) if o.digit is not None]


def _count(scene: Scene) -> list[Question]:
    return [
        Question(
            "count",
            TEMPLATES["count"].format(c),
            str(len(boxes)),
            c == scene.salient.category,
            boxes,
        )
        for c in dict.fromkeys(o.category for o in scene.objects)
        if len(boxes := _outer(scene, c)) <= MAX_COPIES
    ]


def _largest(scene: Scene) -> list[Question]:
    thing = scene.salient
    return [Question("largest", TEMPLATES["largest"], thing.category, True, (thing.outer,))]


def _spatial(scene: Scene) -> list[Question]:
    """Pairs where one object alone lies within 45° of a direction, and both names are unique."""
    unique = _unique(scene)
    questions = []
    for anchor in unique:
        for name, direction in DIRECTIONS.items():
            there = [o for o in scene.objects if o is not anchor and lies(anchor, o, direction)]
            if len(there) == 1 and there[0] in unique:
                other = there[0]
                text = TEMPLATES[name].format(anchor.category)
                salient = anchor.salient or other.salient
                questions.append(
                    Question("spatial", text, other.category, salient, (anchor.outer, other.outer))
                )
    return questions


def lies(anchor: SceneObject, other: SceneObject, direction: tuple[int, int]) -> bool:
    """Whether `other` lies within 45° of `direction`, seen from the anchor's centre."""
    dx, dy = (b - a for a, b in zip(anchor.centre, other.centre, strict=True))
    along = dx * direction[0] + dy * direction[1]
    across = abs(dx * direction[1]) + abs(dy * direction[0])
    return along > across


def _reading(scene: Scene) -> list[Question]:
    if scene.sign is None:
        return []
    answer = str(scene.sign.number)
    return [Question("reading", TEMPLATES["reading"], answer, False, (scene.sign.outer,))]


def _compare(scene: Scene) -> list[Question]:
    """Pairs of framed objects that are further apart than one crop of the encoder is wide."""
    if scene.sign is None:  # a small scene
        return []
    framed = [o for o in _unique(scene) if o.colour is not None]
    return [
        Question(
            "compare",
            TEMPLATES["compare"].format(a.category, b.category),
            "yes" if a.colour == b.colour else "no",
            a.salient or b.salient,
            (a.outer, b.outer),
        )
        for a, b in itertools.permutations(framed, 2)
        if math.dist(a.centre, b.centre) > SIZE
    ]


_MAKERS = {
    "presence": _presence,
    "colour": _colour,
    "digit": _digit,
    "spatial": _spatial,
    "count": _count,
    "largest": _largest,
    "reading": _reading,
    "compare": _compare,
}
