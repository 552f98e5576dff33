"""Exercises of sprout's stages on pictures: single patches, tables, notes and questions."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from pictures import NEWLINE, PATCHES, SIDE, Picture, high_resolution_picture, small_picture
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from budwood.sprout.atlas import categories
from budwood.sprout.model import IMAGE_TOKEN
from budwood.sprout.questions import DIRECTIONS, KINDS, TEMPLATES, Question, ask, lies
from budwood.sprout.scenes import Scene, SceneObject, make_scene, scene_rng

PREFIX = "<|im_start|>user\n"
PROMPT = "\n{}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
STAGES = ("regions", "questions", "high")
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
SOME = 2_400  # pictures of stage 3 in which only some of the objects are seen
WHOLE = 4_800  # pictures of stage 3, after which every picture is seen whole
HIGH_SOME, HIGH_WHOLE = 1_260, 1_740  # pictures of stage 4, likewise


@dataclass
class Turn:
    """Given tokens and asked tokens. A token is a word's id, or `~token` if visual."""

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

    pixels: Tensor  # (n_crops, 3, 336, 336)
    shared: list[int]
    segments: list[Segment]


def training_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Questions that the scene allows, with frequent kinds thinned out for balance."""
    thinned = ("presence", "count")
    questions = [q for q in ask(scene) if q.kind in KINDS and q.kind not in thinned]
    for answer in ("yes", "no"):
        pool = [q for q in ask(scene, "presence") if q.answer == answer]
        questions += rng.sample(pool, min(2, len(pool)))
    counts = ask(scene, "count")
    questions += [q for q in counts if scene.objects[1].category in q.text]
    if rng.random() < 0.25:
        questions.append(rng.choice(counts))
    return rng.sample(questions, len(questions))


def balanced_kinds(questions: list[Question], number: int) -> list[Question]:
    """Take questions of all kinds in turn."""
    by_kind: dict[str, list[Question]] = {}
    for question in questions:
        by_kind.setdefault(question.kind, []).append(question)
    rounds = itertools.zip_longest(*by_kind.values())
    return [q for turn in rounds for q in turn if q is not None][:number]


def in_short(question: Question) -> str:
    """The question in two or three words: "dog frame", "left of dog"."""
    for kind, template in TEMPLATES.items():
        pattern = re.escape(template).replace(re.escape("{}"), "(.+)")
        named = re.fullmatch(pattern, question.text)
        if named:
            return SHORT[kind].format(*named.groups())
    raise ValueError(question.text)


def listings(
    scene: Scene, shown: list[SceneObject], rng: random.Random
) -> list[tuple[str, str, str]]:
    """Further training questions (kind, question, answer): orders, look-ups, captions."""
    extra = []
    if scene.sign is None:  # of all objects: too long for a picture of many
        words, axis = rng.choice((("from left to right", 0), ("from top to bottom", 1)))
        ordered = sorted(shown, key=lambda o: o.centre[axis])
        names = ", ".join(o.category for o in ordered)
        orders = [("order", f"Name all objects {words}.", names)]
    else:
        orders = []
    for text, values in (
        ("Which object has the {} frame?", [o.colour for o in scene.objects]),
        ("Which object is beside the digit {}?", [o.digit for o in scene.objects]),
    ):
        known = [i for i, v in enumerate(values) if v is not None and values.count(v) == 1]
        known = [i for i in known if scene.objects[i] in shown]
        extra += [("reverse", text.format(values[i]), scene.objects[i].category) for i in known]
    single = [o for o in shown if len(scene.copies(o.category)) == 1]
    about = [("about", f"Describe the {o.category}.", details(scene, o, o.centre)) for o in single]
    return [
        *orders,
        *rng.sample(extra, min(2, len(extra))),
        *rng.sample(about, min(2, len(about))),
    ]


def details(scene: Scene, thing: SceneObject | None, point: tuple[float, float]) -> str:
    """Describe frame, digit and place of an object in words, the place on a grid of 16 × 16."""
    column, row = (
        int(edge * SIDE / size) + 1 for edge, size in zip(point, scene.image.size, strict=True)
    )
    known = [thing.colour, thing.digit] if thing else []
    return ", ".join(str(v) for v in [*known, f"row {row}, column {column}"] if v is not None)


def caption(picture: Picture, patch: int) -> str:
    """Describe in words what a single visual token shows."""
    thing = picture.covers[patch]
    name = thing.category if thing else "background"
    return as_answer(f"{name}, {details(picture.scene, thing, picture.centres[patch])}")


def as_answer(text: str) -> str:
    """Add a leading space, so that an answer is the same token as the word in a question."""
    return text if text.isdigit() else f" {text}"


def patches_of(picture: Picture, rng: random.Random) -> dict[SceneObject, int]:
    """A random patch of each object."""
    patches: dict[SceneObject, list[int]] = {}
    for patch, thing in picture.covers.items():
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
        self.high_resolution = stage == "high"
        self.make = {
            "regions": self._regions,
            "questions": self._questions,
            "high": self._high,
        }[stage]

    def __len__(self) -> int:
        return self.images - self.start

    def __getitem__(self, i: int) -> Item:
        place = self.start + i
        scene = make_scene(self.first + place, "train", self.high_resolution)
        rng = scene_rng(self.first + place, "validation")  # a stream of its own, not the picture's
        see = high_resolution_picture if self.high_resolution else small_picture
        return self.make(see(scene), rng, place)

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

    def _regions(self, picture: Picture, rng: random.Random, place: int) -> Item:
        patches = [p for p in picture.patches if picture.covers[p]]
        patches = rng.sample(patches, 2) + rng.sample(picture.patches, 1)
        segments = [self._segment("caption", "<image>:", caption(picture, p), p) for p in patches]
        numbers = {"name": 20, "frame": 12, "badge": 12, "number": 6}
        segments += self._readings(picture, rng, numbers)
        segments.append(self._relations(picture, rng, 8))
        segments += self._lookups(picture, rng, 6)
        return Item(picture.pixels, self._tokens(PREFIX), segments)

    def _readings(
        self, picture: Picture, rng: random.Random, numbers: dict[str, int]
    ) -> list[Segment]:
        """Names, frames, digits and numbers of copies, read from single patches."""
        covers = [(p, o) for p, o in picture.covers.items() if o]
        segments = []
        for kind, text, value in (
            ("name", "<image>,<image>,", lambda o: o.category),
            ("frame", "<image> frame<image>", lambda o: o.colour),
            ("badge", "<image> digit<image>", lambda o: o.digit),
            ("number", "<image> number<image>", lambda o: len(picture.scene.copies(o.category))),
        ):
            known = [(p, str(v)) for p, o in covers if (v := value(o)) is not None]
            for patch, answer in rng.sample(known, min(numbers.get(kind, 0), len(known))):
                segments.append(self._segment(kind, text, as_answer(answer), patch, patch))
        return segments

    def _relations(self, picture: Picture, rng: random.Random, number: int) -> Segment:
        """Direction of one patch's object from another's: "<patch> from<patch> left"."""
        patches = patches_of(picture, rng)
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

    def _lookups(self, picture: Picture, rng: random.Random, number: int) -> list[Segment]:
        """Tables of words looked up by a patch, tables of patches looked up by a word, in turn."""
        segments = []
        shown = {thing.category for thing in picture.scene.objects}
        strangers = rng.sample([c for c in categories() if c not in shown], 3)
        for n in range(number):
            patches = {thing.category: p for thing, p in patches_of(picture, rng).items()}
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

    def _questions(self, picture: Picture, rng: random.Random, place: int) -> Item:
        seen = self._seen(picture, rng, place)
        shown = self._shown(picture, seen)
        boxes = {thing.outer for thing in shown}
        questions = training_questions(picture.scene, rng)
        questions = [q for q in questions if boxes.issuperset(q.boxes)]
        segments = self._asked(picture.scene, questions[:6], shown, rng)
        segments += self._notes(rng.sample(questions, len(questions)))
        segments.append(self._relations(picture, rng, 8))
        numbers = {"name": 2, "frame": 2, "badge": 4} if place < SOME else {"badge": 2}
        segments += self._readings(picture, rng, {**numbers, "number": 3})
        if place < SOME:
            segments += self._lookups(picture, rng, 2)
        shared = self._tokens(PREFIX) + [~patch for patch in seen]
        return Item(picture.pixels, shared, segments)

    def _high(self, picture: Picture, rng: random.Random, place: int) -> Item:
        """Questions about a large picture; the first ones lack most patches between objects."""
        done = min(max(0.0, (place - HIGH_SOME) / (HIGH_WHOLE - HIGH_SOME)), 1.0)
        seen = set(patches_of(picture, rng).values())
        rest = [p for p in picture.patches if p not in seen]
        share = rng.uniform(0.1 + 0.9 * done, 0.4 + 0.6 * done)
        seen.update(rng.sample(rest, round(len(rest) * share)))
        questions = balanced_kinds(training_questions(picture.scene, rng), 24)
        shown = list(picture.scene.objects)
        segments = self._asked(picture.scene, questions[:10], shown, rng)
        segments += self._notes(rng.sample(questions, len(questions)), in_a_row=5)
        segments.append(self._relations(picture, rng, 6))
        segments += self._readings(picture, rng, {"badge": 3, "name": 2, "frame": 1})
        tokens = [t for t in picture.tokens if t == NEWLINE or t in seen]
        return Item(picture.pixels, self._tokens(PREFIX) + [~t for t in tokens], segments)

    def _asked(
        self,
        scene: Scene,
        questions: list[Question],
        shown: list[SceneObject],
        rng: random.Random,
    ) -> list[Segment]:
        """The questions, and two further ones, as users ask them."""
        asked = [(q.kind, q.text, q.answer) for q in questions]
        asked += rng.sample(extra := listings(scene, shown, rng), min(2, len(extra)))
        return [self._segment(k, PROMPT.format(q), as_answer(a)) for k, q, a in asked]

    def _notes(self, questions: list[Question], in_a_row: int = 8) -> list[Segment]:
        """Questions in two or three words, several in a row."""
        turns = [
            Turn(
                f"{q.kind} in short",
                self._tokens(in_short(q)),
                self._tokens(as_answer(q.answer) + ","),
            )
            for q in questions
        ]
        return [turns[n : n + in_a_row] for n in range(0, len(turns), in_a_row)]

    @staticmethod
    def _shown(picture: Picture, seen: list[int]) -> list[SceneObject]:
        covered = {picture.covers[p] for p in seen}
        return [thing for thing in picture.scene.objects if thing in covered]

    def _seen(self, picture: Picture, rng: random.Random, place: int) -> list[int]:
        """Choose the visible patches: one or two objects at first, then all objects, then all.

        Their number is the same for the pictures of a batch.
        """
        first = place // self.batch * self.batch
        chance = random.Random(first)
        one_each = patches_of(picture, rng)
        if first < SOME:
            objects = chance.randint(1, 2 + 6 * first // SOME)
            shown = rng.sample(list(one_each), min(objects, len(one_each)))
            number = 2 * objects
        else:
            shown = list(one_each)
            done = min(1.0, (first - SOME) / (WHOLE - SOME))
            number = round(20 * (PATCHES / 20) ** done * chance.uniform(0.5 if done < 1 else 1, 1))
        seen = [one_each[thing] for thing in shown]
        rest = [patch for patch in picture.patches if patch not in seen]
        rng.shuffle(rest)
        if first < SOME:  # others only where the objects have too few
            rest.sort(key=lambda patch: picture.covers[patch] not in shown)
        return sorted(seen + rest[: number - len(seen)])
