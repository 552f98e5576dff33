"""Sprout scenes: deterministic, without overlap, with one right answer a question."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

from budwood.errors import InputError
from budwood.sprout import example
from budwood.sprout.questions import DIRECTIONS, KINDS, TEMPLATES, ask, balanced
from budwood.sprout.scenes import SIZE, SPLIT_OFFSETS, Scene, make_scene


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(seed) for seed in range(60)]


@pytest.fixture(scope="module")
def large_scenes() -> list[Scene]:
    return [make_scene(seed, high_resolution=True) for seed in range(60)]


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(scene.image)


def test_a_seed_decides_everything(scenes: list[Scene]) -> None:
    random.seed(5)  # global state must not matter
    again = make_scene(7)
    assert (pixels(again) == pixels(scenes[7])).all()
    assert again.objects == scenes[7].objects
    assert ask(again) == ask(scenes[7])
    assert (pixels(scenes[8]) != pixels(scenes[7])).any()


def test_splits_do_not_share_scenes() -> None:
    layouts = {make_scene(0, split).objects for split in SPLIT_OFFSETS}
    assert len(layouts) == len(SPLIT_OFFSETS)


def test_objects_lie_inside_and_apart(scenes: list[Scene], large_scenes: list[Scene]) -> None:
    for scene in [*scenes, *large_scenes]:
        width, height = scene.image.size
        assert 5 <= len(scene.objects) <= (9 if scene.sign is None else 25)
        covered = np.zeros((height, width), dtype=int)
        for thing in [*scene.objects, *([scene.sign] if scene.sign else [])]:
            left, top, right, bottom = thing.outer
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1


def test_high_resolution_scenes_have_many_small_objects_and_several_shapes(
    large_scenes: list[Scene],
) -> None:
    sizes = Counter(scene.image.size for scene in large_scenes)
    assert sizes.most_common(1)[0][0] == (672, 672)
    assert {(672, 336), (336, 672), (1008, 336), (336, 1008)} & set(sizes)
    numbers = [len(scene.objects) for scene in large_scenes]
    assert max(numbers) > 20 and min(numbers) < 12
    small = [o.box[2] - o.box[0] for scene in large_scenes for o in scene.objects[1:]]
    assert min(small) >= 36 and max(small) <= 70


def test_the_salient_object_is_by_far_the_largest(
    scenes: list[Scene], large_scenes: list[Scene]
) -> None:
    for scene in [*scenes, *large_scenes]:
        large, *others = (o.box[2] - o.box[0] for o in scene.objects)
        assert large >= 1.5 * max(others)
        assert [o.salient for o in scene.objects].count(True) == 1


def test_every_answer_is_true(scenes: list[Scene], large_scenes: list[Scene]) -> None:
    for scene in [*scenes, *large_scenes]:
        by_name = {o.category: o for o in scene.objects}
        for question in ask(scene):
            named = [
                o for name, o in by_name.items() if f" {name} " in question.text.replace("?", " ")
            ]
            copies = len(scene.copies(named[0].category)) if named else 0
            if question.kind == "reading":
                assert scene.sign and question.answer == str(scene.sign.number)
            elif question.kind == "compare":
                first, second = named
                assert (question.answer == "yes") == (first.colour == second.colour)
                assert math.dist(first.centre, second.centre) > SIZE
            elif question.kind == "presence":
                assert question.answer == ("yes" if named else "no")
            elif question.kind == "count":
                assert question.answer == str(copies)
            elif question.kind == "largest":
                assert question.answer == scene.salient.category
            else:
                assert copies == 1
            if question.kind == "colour":
                assert question.answer == named[0].colour
            if question.kind == "digit":
                assert question.answer == str(named[0].digit)


def test_spatial_answers_lie_in_their_direction(scenes: list[Scene]) -> None:
    asked = [(s, q) for s in scenes for q in ask(s, "spatial")]
    assert len(asked) > 50
    for scene, question in asked:
        by_name = {o.category: o for o in scene.objects}
        for name, direction in DIRECTIONS.items():
            start = TEMPLATES[name].split("{}")[0]
            if question.text.startswith(start):
                anchor = by_name[question.text.removeprefix(start).removesuffix("?")]
                answer = by_name[question.answer]
                offset = np.subtract(answer.centre, anchor.centre)
                assert offset @ direction > 0
                assert abs(offset @ direction) > np.abs(offset).sum() / 2


def test_the_test_set_is_balanced() -> None:
    chosen = [q for _, questions in balanced(3, 400) for q in questions]
    kinds = Counter(q.kind for q in chosen)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 0.6 * max(kinds.values())
    yes = [q.answer for q in chosen if q.kind == "presence"].count("yes")
    assert 0.4 < yes / kinds["presence"] < 0.6
    counts = Counter(q.answer for q in chosen if q.kind == "count")
    assert set(counts) == set("1234")
    assert max(counts.values()) < 0.35 * kinds["count"]
    salient = sum(q.asks_salient for q in chosen) / len(chosen)
    assert 0.2 < salient < 0.5


def test_blind_guesses_get_little_of_the_high_resolution_set() -> None:
    chosen = [q for _, questions in balanced(3, 150, high_resolution=True) for q in questions]
    kinds = Counter(q.kind for q in chosen)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 0.6 * max(kinds.values())
    best = [Counter(q.answer for q in chosen if q.kind == k).most_common(1)[0][1] for k in kinds]
    assert sum(best) / len(chosen) < 0.25
    assert sum(q.asks_salient for q in chosen) / len(chosen) < 0.3


def test_shifted_scenes_look_different(scenes: list[Scene]) -> None:
    """Sprites are turned further than any in training; the layout's rules stay."""
    shifted = make_scene(0, "shifted")
    assert shifted.objects != scenes[0].objects
    assert 5 <= len(shifted.objects) <= 9


@pytest.mark.parametrize(
    ("seed", "split", "said"),
    [(0, "tset", "unknown split 'tset'"), (-1, "test", "seed -1"), (10**9, "test", "out of range")],
)
def test_bad_input(seed: int, split: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_scene(seed, split)


@pytest.mark.parametrize("seed", [-1, 1000])
def test_seeds_of_a_set_have_a_range(seed: int) -> None:
    with pytest.raises(InputError, match=f"seed={seed} is out of range; give 0 to 999"):
        balanced(seed, 1)


def test_the_example_asks_about_a_small_object() -> None:
    image, question = example()
    assert image.size == (2 * SIZE, 2 * SIZE) and image.tobytes() == example()[0].tobytes()
    scene = make_scene(5027, high_resolution=True)
    assert scene.image.tobytes() == image.tobytes()
    asked = next(q for q in ask(scene) if q.text == question)
    assert not asked.asks_salient and asked.answer == "red"
