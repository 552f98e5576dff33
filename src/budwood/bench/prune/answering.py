"""Answers to many questions about few pictures, each picture encoded once.

The benchmark measures ``attach`` and ``generate`` themselves. It shares only work that comes out
the same each time: the encoded pictures, between questions, methods and budgets; and, where all
questions about a picture get the same visual tokens, the keys and values of the prompt up to where
the questions begin to differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from budwood.bench.prune.plan import Variant
from budwood.caches import cache_of, name_for
from budwood.prune.chat import GREEDY, Turns, answers, prepare
from budwood.prune.encoded import Encoded, encode
from budwood.prune.families import Family, family_of
from budwood.prune.generation import flash_attention
from budwood.prune.inside import Schedule, attach_inside
from budwood.prune.report import ImageReport
from budwood.prune.selection import resolve_method
from budwood.prune.session import attach
from budwood.unwrap import innermost


@dataclass(frozen=True)
class Answered:
    """Answers to the questions of a sheet.

    Attributes:
        texts: one per question.
        n_visual: visual tokens of each question's picture before pruning.
        n_kept: visual tokens that the LLM saw; inside the LLM, the mean over its layers.
    """

    texts: list[str]
    n_visual: list[int]
    n_kept: list[float]


@dataclass(eq=False)
class Sheet:
    """Questions about some pictures, as a model takes them.

    Attributes:
        model: the model, with nothing attached.
        processor: its processor.
        images: RGB.
        which: picture of each question.
        questions: what is asked.
        before: earlier turns of each question's chat; None for single questions.
        max_new_tokens: where an answer is cut.
    """

    model: Any
    processor: Any
    images: Sequence[Image.Image]
    which: Sequence[int]
    questions: Sequence[str]
    before: Sequence[Turns] | None = None
    max_new_tokens: int = 4
    _encoded: dict[bool, Encoded] = field(default_factory=dict, init=False)
    _alone: dict[int, dict[str, Any]] = field(default_factory=dict, init=False)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """One row per question, one picture in each."""
        images = [self.images[i] for i in self.which]
        return prepare(self.processor, images, self.questions, self.model.device, self.before)

    def alone(self, row: int) -> dict[str, Any]:
        """The inputs of one question."""
        if row not in self._alone:
            image, before = self.images[self.which[row]], self.before and [self.before[row]]
            asked = [self.questions[row]]
            device = self.model.device
            self._alone[row] = prepare(self.processor, [image], asked, device, before)
        return self._alone[row]

    def encoded(self, whole_crops: bool = False) -> Encoded:
        """The pictures, encoded once for all methods that read them in the same form."""
        if whole_crops not in self._encoded:
            blank = ["-"] * len(self.images)
            pictures = prepare(self.processor, self.images, blank, self.model.device)
            method = "adav-official" if whole_crops else "adav"
            self._encoded[whole_crops] = encode(self.model, pictures, method)
        return self._encoded[whole_crops]

    @property
    def n_visual(self) -> list[int]:
        """Visual tokens of each question's picture, newlines not counted."""
        return [len(self.encoded().saliency[i]) for i in self.which]

    @cached_property
    def family(self) -> Family:
        """Where things are in the model."""
        return family_of(innermost(self.model), self.processor)

    @cached_property
    def rows(self) -> dict[int, list[int]]:
        """Questions about each picture."""
        return {
            picture: [row for row, about in enumerate(self.which) if about == picture]
            for picture in self.which
        }

    @cached_property
    def prompts(self) -> dict[int, list[Tensor]]:
        """Token ids of the questions about each picture, without padding."""
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"].bool()
        return {p: [ids[row][mask[row]] for row in rows] for p, rows in self.rows.items()}

    @cached_property
    def can_share(self) -> bool:
        """Whether positions count tokens, and every picture lies in the shared beginning."""
        ids, mask = self.inputs["input_ids"].cpu(), self.inputs["attention_mask"].cpu()
        if flash_attention(self.model):  # would take gaps in positions for several sequences
            return False
        if self.family.positions(self.inputs, ids, mask) is not None:
            return False
        groups = self.prompts.values()
        rests = (prompt[_n_common(prompts) :] for prompts in groups for prompt in prompts)
        return not any((rest == self.family.image_token_id).any() for rest in rests)

    @property
    def pad(self) -> int:
        """Token id of padding."""
        return int(self.processor.tokenizer.pad_token_id)

    def generate(self, inputs: Mapping[str, Any]) -> list[str]:
        """Answer each row of some inputs greedily."""
        output = self.model.generate(**inputs, **GREEDY, max_new_tokens=self.max_new_tokens)
        return answers(self.processor, output, inputs["input_ids"].shape[1])


def answer(sheet: Sheet, variant: Variant, *, keep: int | float, seed: int) -> Answered:
    """Answer with pruning attached.

    Where positions count tokens, questions about a picture share what they have in common, unless
    the method reads them or draws anew for each. That is exact for a causal LLM.

    Args:
        sheet: the questions.
        variant: how to prune.
        keep: as in ``attach``.
        seed: for methods that draw.
    """
    if variant.inside:
        return _answer_inside(sheet, variant.schedule, keep)
    method = resolve_method(variant.method)
    options = {**variant.options, "keep": keep, "seed": seed, "processor": sheet.processor}
    encoded = sheet.encoded(method.whole_crops)
    if not (method.needs_text or method.draws) and sheet.can_share:
        return _answer_shared(sheet, encoded, options)
    with attach(sheet.model, encoded=encoded.pick(sheet.which), **options) as session:
        texts = sheet.generate(sheet.inputs)
    report = session.report
    return Answered(
        texts, [image.n_before for image in report], [image.n_after for image in report]
    )


def answer_full(sheet: Sheet) -> Answered:
    """Answer with all visual tokens; questions about a picture share what they can."""
    if not sheet.can_share:
        return Answered(sheet.generate(sheet.inputs), sheet.n_visual, list(sheet.n_visual))

    def begin(picture: int, n_shared: int) -> _Beginning:
        features = sheet.encoded().features[picture]
        outputs = {sheet.family.kind: sheet.family.outputs([features])}
        ids = sheet.prompts[picture][0][:n_shared]
        return _Beginning(ids, outputs, torch.arange(n_shared), n_shared)

    return Answered(_texts(sheet, begin), sheet.n_visual, list(sheet.n_visual))


def _answer_shared(sheet: Sheet, encoded: Encoded, options: Mapping[str, Any]) -> Answered:
    """Prune each picture once for all questions about it."""
    reports: dict[int, ImageReport] = {}

    def begin(picture: int, n_shared: int) -> _Beginning:
        with attach(sheet.model, encoded=encoded.pick([picture]), **options) as session:
            cut = session.pruner.cut(sheet.alone(sheet.rows[picture][0]), sheet.pad)
        (reports[picture],) = cut.report
        (origin,) = cut.origin
        ids = cut.inputs["input_ids"][0, origin < n_shared]
        outputs = cut.inputs["mm_encoder_outputs"]
        if session.pruner.in_place:
            return _Beginning(ids, outputs, origin[origin < n_shared], n_shared)
        return _Beginning(ids, outputs, torch.arange(len(ids)), len(ids))

    texts = _texts(sheet, begin)
    return Answered(
        texts,
        [reports[picture].n_before for picture in sheet.which],
        [reports[picture].n_after for picture in sheet.which],
    )


@dataclass(frozen=True, eq=False)
class _Beginning:
    """The beginning of a prompt, with its picture.

    Attributes:
        ids: token ids, shape (n,).
        outputs: of the encoder, as the model takes them.
        positions: of the tokens, int64, on the CPU, shape (n,).
        stop: the position of the first token behind.
    """

    ids: Tensor
    outputs: Mapping[str, Any]
    positions: Tensor
    stop: int


def _texts(sheet: Sheet, begin: Callable[[int, int], _Beginning]) -> list[str]:
    """Answers, where the questions about a picture share the beginning of their prompts.

    Args:
        sheet: the questions.
        begin: gives a picture's beginning, from the number of the picture and the length of the
            beginning before pruning.
    """
    texts = [""] * len(sheet.which)
    for picture, rows in sheet.rows.items():
        prompts = sheet.prompts[picture]
        n_shared = _n_common(prompts)
        rests = [prompt[n_shared:] for prompt in prompts]
        shared = _after(begin(picture, n_shared), sheet, rests)
        for row, text in zip(rows, sheet.generate(shared)):
            texts[row] = text
    return texts


def _answer_inside(sheet: Sheet, schedule: Schedule, keep: int | float) -> Answered:
    """Prune inside the LLM, one question at a time."""
    texts, n_kept = [], []
    for row, picture in enumerate(sheet.which):
        features = sheet.encoded().features[picture]
        given = {"mm_encoder_outputs": {sheet.family.kind: sheet.family.outputs([features])}}
        with attach_inside(sheet.model, method=schedule, keep=keep) as session:
            texts += sheet.generate(sheet.family.without_pictures(sheet.alone(row)) | given)
        assert session.report is not None
        n_kept.append(session.report.average)
    return Answered(texts, sheet.n_visual, n_kept)


@torch.no_grad()
def _after(beginning: _Beginning, sheet: Sheet, rests: Sequence[Tensor]) -> dict[str, Any]:
    """Prefill a beginning, and give the inputs of ``generate`` for all rests.

    Shorter rests are padded on the left, behind the beginning.
    """
    prefix = beginning.ids
    places = beginning.positions.to(prefix.device)
    output = sheet.model(
        input_ids=prefix[None],
        attention_mask=torch.ones_like(prefix[None]),
        position_ids=places[None],
        mm_encoder_outputs=beginning.outputs,
        use_cache=True,
        logits_to_keep=1,
    )
    cache = cache_of(output)
    cache.batch_repeat_interleave(len(rests))
    n_shared, longest = len(prefix), len(prefix) + max(map(len, rests))
    ids = prefix.new_full((len(rests), longest), sheet.pad)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    ids[:, :n_shared], mask[:, :n_shared], positions[:, :n_shared] = prefix, 1, places
    for row, rest in enumerate(rests):
        own = slice(longest - len(rest), None)
        ids[row, own], mask[row, own] = rest, 1
        positions[row, own] = beginning.stop + torch.arange(len(rest), device=ids.device)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return inputs | {name_for(sheet.family.model): cache}


def _n_common(prompts: Sequence[Tensor]) -> int:
    """Length of the beginning that all prompts share; at least one token of each is left."""
    shortest = min(map(len, prompts)) - 1
    heads = torch.stack([prompt[:shortest] for prompt in prompts])
    differs = (heads != heads[0]).any(0).cpu()
    return int(differs.int().argmax()) if differs.any() else shortest
