"""Exercises of stages 2 and 3 of sprout: single patches, tables, notes and questions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from budwood.sprout.atlas import categories
from budwood.sprout.model import IMAGE_TOKEN, image_tensor, tower_config
from budwood.sprout.questions import DIRECTIONS, KINDS, TEMPLATES, Question, ask, lies
from budwood.sprout.scenes import SIZE, Scene, SceneObject, make_scene, scene_rng

PREFIX = "<|im_start|>user\n"
PROMPT = "\n{}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
STAGES = ("regions", "questions")
LETTERS = [f" {letter}" for letter in "ABCDEFGHJKLMNPQRSTUVWXYZ"]
LOGGED = (
    *KINDS,
    *(f"{kind} in short" for kind in KINDS),
    "name",
    "frame",
    "badge",
    "number",
    "relation",
    "caption",
    "word key",
    "visual key",
    "order",
    "reverse",
    "about",
)
SHORT = {
    "presence": " {} shown",
    "colour": " {} frame",
    "digit": " {} digit",
    "count": " {} number",
    "largest": " largest",
    "left of": " left of {}",
    "right of": " right of {}",
    "above": " above {}",
    "below": " below {}",
}
FIRST_SEED = 10_000_000  # the tower has seen the seeds below
SIDE = SIZE // tower_config().patch_size
PATCHES = SIDE**2
SOME = 2_400  # pictures of the last stage in which only some of the objects are seen
WHOLE = 4_800  # pictures of the last stage, after which every picture is seen whole


@dataclass
class Turn:
    """Given tokens and asked tokens. A token is a word's id, or `~patch` if visual."""

    kind: str  # one of LOGGED; kinds that are not in KINDS occur in training only
    given: list[int]
    asked: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.given + self.asked


Segment = list[Turn]  # in one context, which sees the picture and nothing else


@dataclass
class Item:
    """The prefix that all segments of a picture see, and segments that do not see each other."""

    pixels: Tensor  # (3, 336, 336)
    shared: list[int]
    segments: list[Segment]


def training_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Questions that the scene allows, with presence and counts thinned out for balance."""
    questions = [q for q in ask(scene) if q.kind not in ("presence", "count")]
    presence = ask(scene, "presence")
    for answer in ("yes", "no"):
        pool = [q for q in presence if q.answer == answer]
        questions += rng.sample(pool, min(2, len(pool)))
    counts = ask(scene, "count")
    questions += [q for q in counts if scene.objects[1].category in q.text]
    if rng.random() < 0.25:
        questions.append(rng.choice(counts))
    return rng.sample(questions, len(questions))


def in_short(question: Question) -> str:
    """The question in two or three words: "dog frame", "left of dog"."""
    for kind, template in TEMPLATES.items():
        before, _, after = template.partition("{}")
        if question.text.startswith(before) and question.text.endswith(after):
            return SHORT[kind].format(question.text.removeprefix(before).removesuffix(after))
    raise ValueError(question.text)


def listings(
    scene: Scene, shown: list[SceneObject], rng: random.Random
) -> list[tuple[str, str, str]]:
    """Further training questions (kind, question, answer): orders, look-ups, captions."""
    words, axis = rng.choice((("from left to right", 0), ("from top to bottom", 1)))
    ordered = sorted(shown, key=lambda o: o.centre[axis])
    order = ("order", f"Name all objects {words}.", ", ".join(o.category for o in ordered))
    extra = []
    for text, values in (
        ("Which object has the {} frame?", [o.colour for o in scene.objects]),
        ("Which object is beside the digit {}?", [o.digit for o in scene.objects]),
    ):
        known = [i for i, v in enumerate(values) if v is not None and values.count(v) == 1]
        known = [i for i in known if scene.objects[i] in shown]
        extra += [("reverse", text.format(values[i]), scene.objects[i].category) for i in known]
    single = [o for o in shown if len(scene.copies(o.category)) == 1]
    about = [("about", f"Describe the {o.category}.", details(o, o.centre)) for o in single]
    return [
        order,
        *rng.sample(extra, min(2, len(extra))),
        *rng.sample(about, min(2, len(about))),
    ]


def details(thing: SceneObject | None, point: tuple[float, float]) -> str:
    """Describe frame, digit and place of an object in words."""
    column, row = (int(edge * SIDE / SIZE) + 1 for edge in point)
    known = [thing.colour, thing.digit] if thing else []
    return ", ".join(str(v) for v in [*known, f"row {row}, column {column}"] if v is not None)


def middle(patch: int) -> tuple[float, float]:
    """Centre of a patch, x and y in px."""
    row, column = divmod(patch, SIDE)
    return (column + 0.5) * SIZE / SIDE, (row + 0.5) * SIZE / SIDE


def what_covers(scene: Scene, patch: int) -> SceneObject | None:
    """The object at the centre of a patch."""
    x, y = middle(patch)
    for thing in scene.objects:
        left, top, right, bottom = thing.outer
        if left <= x < right and top <= y < bottom:
            return thing
    return None


def caption(scene: Scene, patch: int) -> str:
    """Describe in words what a single visual token shows."""
    thing = what_covers(scene, patch)
    name = thing.category if thing else "background"
    return as_answer(f"{name}, {details(thing, middle(patch))}")


def as_answer(text: str) -> str:
    """Add a leading space, so that an answer is the same token as the word in a question."""
    return text if text.isdigit() else f" {text}"


def patches_of(scene: Scene, rng: random.Random) -> dict[SceneObject, int]:
    """A random patch of each object."""
    patches: dict[SceneObject, list[int]] = {}
    for patch in range(PATCHES):
        thing = what_covers(scene, patch)
        if thing is not None:
            patches.setdefault(thing, []).append(patch)
    return {thing: rng.choice(covering) for thing, covering in patches.items()}


class Exercises(Dataset):
    """The scenes of one stage from the `start`-th on; the index decides everything."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stage: str,
        images: int,
        start: int,
        batch: int,
    ):
        self.tokenizer, self.images, self.start, self.batch = tokenizer, images, start, batch
        self.first = FIRST_SEED * (1 + STAGES.index(stage))
        self.make = {
            "regions": self._regions,
            "questions": self._questions,
        }[stage]

    def __len__(self) -> int:
        return self.images - self.start

    def __getitem__(self, i: int) -> Item:
        place = self.start + i
        scene = make_scene(self.first + place, "train")
        rng = scene_rng(self.first + place, "validation")  # a stream of its own, not the picture's
        return self.make(scene, rng, place)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _segment(self, kind: str, given: str, asked: str, *seen: int) -> Segment:
        """Tokenise a turn; each `<image>` stands for the next of the patches seen."""
        return [Turn(kind, self._given(given, iter(seen)), self._tokens(asked + END))]

    def _given(self, text: str, patches: Iterator[int]) -> list[int]:
        first, *rest = text.split(IMAGE_TOKEN)
        ids = self._tokens(first)
        for part in rest:
            ids += [~next(patches), *self._tokens(part)]
        return ids

    def _regions(self, scene: Scene, rng: random.Random, place: int) -> Item:
        patches = [p for p in range(PATCHES) if what_covers(scene, p)]
        patches = rng.sample(patches, 2) + rng.sample(range(PATCHES), 1)
        segments = [self._segment("caption", "<image>:", caption(scene, p), p) for p in patches]
        segments += self._readings(scene, rng, {"name": 20, "frame": 12, "badge": 12, "number": 6})
        segments.append(self._relations(scene, rng, 8))
        segments += self._lookups(scene, rng, 6)
        return Item(image_tensor(scene.image), self._tokens(PREFIX), segments)

    def _readings(self, scene: Scene, rng: random.Random, numbers: dict[str, int]) -> list[Segment]:
        """Names, frames, digits and numbers of copies, read from single patches."""
        covers = [(p, o) for p in range(PATCHES) if (o := what_covers(scene, p))]
        segments = []
        for kind, text, value in (
            ("name", "<image>,<image>,", lambda o: o.category),
            ("frame", "<image> frame<image>", lambda o: o.colour),
            ("badge", "<image> digit<image>", lambda o: o.digit),
            ("number", "<image> number<image>", lambda o: len(scene.copies(o.category))),
        ):
            known = [(p, str(v)) for p, o in covers if (v := value(o)) is not None]
            for patch, answer in rng.sample(known, min(numbers.get(kind, 0), len(known))):
                segments.append(self._segment(kind, text, as_answer(answer), patch, patch))
        return segments

    def _relations(self, scene: Scene, rng: random.Random, number: int) -> Segment:
        """Direction of one patch's object from another's: "<patch> from<patch> left"."""
        patches = patches_of(scene, rng)
        pairs = [
            (a, b, name.removesuffix(" of"))
            for a in patches
            for b in patches
            for name, direction in DIRECTIONS.items()
            if lies(b, a, direction)
        ]
        turns = []
        for a, b, answer in rng.sample(pairs, min(number, len(pairs))):
            given = self._given("<image> from<image>", iter((patches[a], patches[b])))
            turns.append(Turn("relation", given, self._tokens(f" {answer},")))
        return turns

    def _lookups(self, scene: Scene, rng: random.Random, number: int) -> list[Segment]:
        """Tables of words looked up by a patch, tables of patches looked up by a word, in turn."""
        segments = []
        shown = {thing.category for thing in scene.objects}
        strangers = rng.sample([c for c in categories() if c not in shown], 3)
        for n in range(number):
            patches = {thing.category: p for thing, p in patches_of(scene, rng).items()}
            rows = [*patches, *(strangers if n % 2 else ())]
            rng.shuffle(rows)
            letters = dict(zip(rows, rng.sample(LETTERS, len(rows)), strict=True))
            kind, row, key = (
                ("word key", " {}", "<image>") if n % 2 else ("visual key", "<image>", " {}")
            )
            text = "".join(row.format(c) + f"{letters[c]}," for c in rows)
            turns, seen = [], iter([] if n % 2 else [patches[c] for c in rows])
            for asked in rng.sample(list(patches), min(4, len(patches))):
                given = self._given(text + key.format(asked), chain(seen, [patches[asked]]))
                turns.append(Turn(kind, given, self._tokens(letters[asked] + ",")))
                text = ""
            segments.append(turns)
        return segments

    def _questions(self, scene: Scene, rng: random.Random, place: int) -> Item:
        seen = self._seen(scene, rng, place)
        shown = [thing for thing in scene.objects if thing in {what_covers(scene, p) for p in seen}]
        boxes = {thing.outer for thing in shown}
        questions = [q for q in training_questions(scene, rng) if boxes.issuperset(q.boxes)]
        asked = [(q.kind, q.text, q.answer) for q in questions[:6]]
        asked += rng.sample(extra := listings(scene, shown, rng), min(2, len(extra)))
        segments = [self._segment(k, PROMPT.format(q), as_answer(a)) for k, q, a in asked]
        segments += self._notes(rng.sample(questions, len(questions)))
        segments.append(self._relations(scene, rng, 8))
        numbers = {"name": 2, "frame": 2, "badge": 4} if place < SOME else {"badge": 2}
        segments += self._readings(scene, rng, {**numbers, "number": 3})
        if place < SOME:
            segments += self._lookups(scene, rng, 2)
        shared = self._tokens(PREFIX) + [~patch for patch in seen]
        return Item(image_tensor(scene.image), shared, segments)

    def _notes(self, questions: list[Question]) -> list[Segment]:
        """Questions in two or three words, eight in a row."""
        turns = [
            Turn(
                f"{q.kind} in short",
                self._tokens(in_short(q)),
                self._tokens(as_answer(q.answer) + ","),
            )
            for q in questions
        ]
        return [turns[n : n + 8] for n in range(0, len(turns), 8)]

    def _seen(self, scene: Scene, rng: random.Random, place: int) -> list[int]:
        """Choose the visible patches: one or two objects at first, then all objects, then all.

        Their number is the same for the pictures of a batch.
        """
        first = place // self.batch * self.batch
        chance = random.Random(first)
        one_each = patches_of(scene, rng)
        if first < SOME:
            objects = chance.randint(1, 2 + 6 * first // SOME)
            shown = rng.sample(list(one_each), min(objects, len(one_each)))
            number = 2 * objects
        else:
            shown = list(one_each)
            done = min(1.0, (first - SOME) / (WHOLE - SOME))
            number = round(20 * (PATCHES / 20) ** done * chance.uniform(0.5 if done < 1 else 1, 1))
        seen = [one_each[thing] for thing in shown]
        rest = [patch for patch in range(PATCHES) if patch not in seen]
        rng.shuffle(rest)
        if first < SOME:  # others only where the objects have too few
            rest.sort(key=lambda patch: what_covers(scene, patch) not in shown)
        return sorted(seen + rest[: number - len(seen)])
