"""Encode the images of a call, choose, and cut what was dropped out of the call's inputs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from budwood.errors import BudgetError
from budwood.prune.budget import Budget
from budwood.prune.families.base import Family, Layout
from budwood.prune.methods.base import Method
from budwood.prune.prompt import Placed, Pruned, locate_images, prune_rows
from budwood.prune.question import Question
from budwood.prune.report import ImageReport, Timing
from budwood.prune.selection import Selection, select, usable

_IGNORED_LABEL = -100
_FILLS = {
    "attention_mask": 0,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "labels": _IGNORED_LABEL,
}


@dataclass(frozen=True, eq=False)
class Cut:
    """A call after pruning.

    Attributes:
        inputs: what to call the model with.
        origin: position in the given prompt of each token, -1 for padding, int64,
            shape (batch, n_kept).
        report: one entry per image.
        usable: where the device is not waited for, whether each image's features were finite.
        timing: what it took.
    """

    inputs: dict[str, Any]
    origin: Tensor
    report: list[ImageReport]
    usable: list[Tensor]
    timing: Timing


@dataclass(frozen=True, eq=False)
class Pruner:
    """How the calls of one model are pruned.

    Attributes:
        model: the model.
        family: where things are in it.
        method: chooses.
        budget: how many.
        question: finds the text to choose by.
        compat: None, or ``"official"``.
        seed: for methods that draw.
        exact_timing: wait for the GPU before looking at the clock.
    """

    model: Any
    family: Family
    method: Method
    budget: Budget
    question: Question
    compat: str | None = None
    seed: int = 0
    exact_timing: bool = False

    def cut(self, inputs: dict[str, Any], pad: int) -> Cut:
        """Encode the images once, choose, and shorten everything that has an entry per token.

        Prompts are read before the encoder runs, so that reading does not wait for it.

        Args:
            inputs: keyword arguments of ``generate`` or ``forward``, with ``input_ids``,
                ``attention_mask`` and images.
            pad: token id for new padding.

        Raises:
            InputError: placeholders and images do not match, or features have NaN (CPU).
            BudgetError: ``compat="official"`` keeps more than the prompt has placeholders.
        """
        ids, mask = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu()
        answers = _answers(inputs.get("labels"), len(ids))

        started = self._now()
        recorder = self.family.recorder(inputs) if self.method.needs_saliency else None
        with recorder or nullcontext():
            features = self.family.features(inputs)
        encoded = self._now()

        layouts = self.family.layouts(inputs, features)
        lengths = [layout.n_placeholders for layout in layouts]
        images = locate_images(ids, self.family.image_token_id, lengths)
        with torch.no_grad():
            asked = self._questions(ids, mask, images, answers)
            visual = list(map(_candidates, features, layouts))
            texts = self._embed(inputs["input_ids"], images, asked)
            saliency = self.family.saliency(recorder, layouts) if recorder else [None] * len(images)
            given = [_beside(*one) for one in zip(visual, texts, saliency)]
            chosen = [
                self._select(number, layout, *one)
                for number, (layout, one) in enumerate(zip(layouts, given))
            ]
        kept = [_all_kept(layout, one.indices) for layout, one in zip(layouts, chosen)]
        device = inputs["input_ids"].device
        places = [_places(layout, some, device) for layout, some in zip(layouts, kept)]
        pruned = prune_rows(mask, images, places, device)
        positions = self.family.positions(inputs, ids, mask)
        shorter = self._shorten(inputs, pruned, pad, positions)
        left = [image[some] for image, some in zip(features, kept)]
        shorter["mm_encoder_outputs"] = {
            "image": BaseModelOutputWithPooling(pooler_output=left)  # type: ignore[arg-type]
        }
        checks = [usable(*one) for one in given if one[0].device.type != "cpu"]
        described = zip(images, layouts, chosen, asked)
        return Cut(
            shorter,
            pruned.origin,
            [self._describe(number, *one) for number, one in enumerate(described)],
            checks,
            Timing(1e3 * (encoded - started), 1e3 * (self._now() - encoded)),
        )

    def _questions(
        self, ids: Tensor, mask: Tensor, images: Sequence[Placed], answers: Sequence[set[int]]
    ) -> list[list[int]]:
        """Positions of the text about each image."""
        ends = [int(row.nonzero().max()) + 1 if row.any() else len(row) for row in mask]
        return [
            self.question.positions(
                ids[image.row], (image.start, image.stop), ends[image.row], answers[image.row]
            )
            for image in images
        ]

    def _embed(
        self, ids: Tensor, images: Sequence[Placed], asked: Sequence[list[int]]
    ) -> Sequence[Tensor | None]:
        """LLM input embeddings of the questions, in one go."""
        if not self.method.needs_text:
            return [None] * len(images)
        length = ids.shape[1]
        flat = [image.row * length + place for image, some in zip(images, asked) for place in some]
        where = torch.tensor(flat, dtype=torch.long).to(ids.device, non_blocking=True)
        embed = self.model.get_input_embeddings()
        tokens = ids.flatten()[where]
        if embed.weight.device.type != "meta":  # offloaded weights: accelerate moves the input
            tokens = tokens.to(embed.weight.device, non_blocking=True)
        return embed(tokens).split([len(some) for some in asked])

    def _select(
        self,
        number: int,
        layout: Layout,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
    ) -> Selection:
        """Choose among the candidates of one image."""
        keep = self.budget.count(layout.n_candidates, clamp=True)
        if layout.crop_ordered and keep > layout.n_placeholders:
            raise BudgetError(
                f"keep={keep} exceeds the {layout.n_placeholders} placeholders that image {number} "
                "has in the prompt; compat='official' cannot add any, so keep fewer"
            )
        return select(
            visual,
            text,
            saliency,
            keep=keep,
            method=self.method,
            compat=self.compat,
            n_crops=layout.n_crops,
            # On the CPU, so that every device draws the same.
            generator=torch.Generator().manual_seed(self.seed * 1_000_003 + number),
            validate=visual.device.type == "cpu",
        )

    def _shorten(
        self, inputs: dict[str, Any], pruned: Pruned, pad: int, positions: Tensor | None
    ) -> dict[str, Any]:
        """Everything the model is called with but the pictures, cut where it counts tokens."""
        shorter = {
            name: value for name, value in inputs.items() if name not in self.family.encoder_inputs
        }
        for name, fill in {"input_ids": pad, **_FILLS}.items():
            if shorter.get(name) is not None:
                shorter[name] = pruned.take(shorter[name], fill)
        if positions is not None:
            device = pruned.index.device
            positions = pruned.take(positions.to(device, non_blocking=True), 0)
            seen = shorter["attention_mask"]
            self.family.placed(positions, seen)
            # Counted positions go in front: the model builds its mask from those, and gaps in them
            # would pass for several packed sequences.
            counted = (seen.long().cumsum(-1) - 1).clamp(min=0)
            shorter["position_ids"] = torch.cat((counted[None], positions))
        return shorter

    def _describe(
        self, number: int, image: Placed, layout: Layout, one: Selection, asked: list[int]
    ) -> ImageReport:
        return ImageReport(
            kept=one.indices,
            n_before=layout.n_candidates,
            n_after=len(one.indices),
            n_fixed=len(layout.fixed),
            split=one.split,
            saliency=one.saliency,
            relevance=one.relevance,
            row=image.row,
            image=number,
            grid=layout.grid,
            question=tuple(asked),
            boxes=layout.boxes,
            view=self.family.view,
        )

    def _now(self) -> float:
        if self.exact_timing and self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def _answers(labels: Tensor | None, n_rows: int) -> list[set[int]]:
    """Supervised positions of each row."""
    if labels is None:
        return [set()] * n_rows
    return [set(row.nonzero().flatten().tolist()) for row in labels.cpu() != _IGNORED_LABEL]


def _candidates(features: Tensor, layout: Layout) -> Tensor:
    """Features that may be dropped."""
    if layout.candidates is None:
        return features
    return features[layout.candidates.to(features.device, non_blocking=True)]


def _beside(
    visual: Tensor, text: Tensor | None, saliency: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All on the device of the features, where a model is spread over several."""
    text = None if text is None else text.to(visual.device)
    saliency = None if saliency is None else saliency.to(visual.device)
    return visual, text, saliency


def _all_kept(layout: Layout, indices: Tensor) -> Tensor:
    """Features that go to the LLM: the chosen candidates and those that always stay."""
    if layout.candidates is None:
        return indices
    chosen = layout.candidates.to(indices.device, non_blocking=True)[indices]
    fixed = layout.fixed.to(indices.device, non_blocking=True)
    return torch.cat((chosen, fixed)).sort().values


def _places(layout: Layout, kept: Tensor, device: torch.device) -> Tensor:
    """Placeholders that stay for the kept features, counted from the image's first."""
    if layout.crop_ordered:  # features may repeat and are not placed: the first ones will do
        return torch.arange(len(kept), device=device)
    return kept.to(device)
