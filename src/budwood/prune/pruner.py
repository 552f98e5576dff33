"""Encode the images of a call, choose tokens, and cut the others out of the call's inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from budwood.errors import BudgetError, InputError
from budwood.prune.budget import Budget, Budgets
from budwood.prune.encoded import Encoded, sample
from budwood.prune.families.base import Family, Layout
from budwood.prune.methods.base import Extras, Method
from budwood.prune.prompt import Placed, Pruned, locate_images, prune_rows
from budwood.prune.question import Question
from budwood.prune.report import ImageReport, Timing
from budwood.prune.selection import Selection, select, usable

_Optional = Sequence[Tensor | None]
_SignalsOf = Callable[[Sequence[Layout]], tuple[_Optional, _Optional]]
"""Layouts → saliency and keys of each image."""
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
        budgets: how many tokens to keep of each image.
        question: finds the text to choose by.
        seed: for methods that draw.
        exact_timing: wait for the GPU before looking at the clock.
        encoded: the pictures of every call; None encodes those that a call brings.
    """

    model: Any
    family: Family
    method: Method
    budgets: Budgets
    question: Question
    seed: int = 0
    exact_timing: bool = False
    encoded: Encoded | None = None

    def cut(self, inputs: dict[str, Any], pad: int) -> Cut:
        """Encode the images once, choose, and shorten everything that has an entry per token.

        Prompts are read before the encoder runs, so that reading does not wait for it.

        Args:
            inputs: keyword arguments of ``generate`` or ``forward``, with ``input_ids``,
                ``attention_mask`` and images.
            pad: token id for new padding.

        Raises:
            InputError: placeholders and images do not match, or features have NaN (CPU).
            BudgetError: ``adav-official`` keeps more than the prompt has placeholders.
        """
        ids, mask = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu()
        answers = _answers(inputs.get("labels"), len(ids))

        started = self._now()
        features, signals_of = self._encode(inputs)
        encoded_at = self._now()

        layouts = self.family.layouts(inputs, features)
        lengths = [layout.run_lengths for layout in layouts]
        images = locate_images(ids, self.family.image_token_id, lengths)
        with torch.no_grad():
            asked = self._questions(ids, mask, images, answers)
            visual = list(map(_candidates, features, layouts))
            texts = self._embed(inputs["input_ids"], images, asked)
            saliency, keys = signals_of(layouts)
            signals = [_beside(*three) for three in zip(visual, texts, saliency)]
            budgets = self.budgets.of_images(len(images))
            chosen = [
                self._select(number, layout, budget, key, *three)
                for number, (layout, budget, key, three) in enumerate(
                    zip(layouts, budgets, keys, signals)
                )
            ]
        kept = [_all_kept(layout, image.indices) for layout, image in zip(layouts, chosen)]
        device = inputs["input_ids"].device
        places = [_places(layout, indices, device) for layout, indices in zip(layouts, kept)]
        pruned = prune_rows(mask, images, places, device, _counts_from_end(inputs))
        positions = self.family.positions(inputs, ids, mask)
        shorter = self._shorten(inputs, pruned, pad, positions)
        left = list(map(_left, features, layouts, chosen, kept))
        shorter["mm_encoder_outputs"] = {"image": self.family.outputs(left)}
        checks = [usable(*three) for three in signals if three[0].device.type != "cpu"]
        described = zip(images, layouts, chosen, asked)
        return Cut(
            shorter,
            pruned.origin,
            [self._describe(number, *image) for number, image in enumerate(described)],
            checks,
            Timing(1e3 * (encoded_at - started), 1e3 * (self._now() - encoded_at)),
        )

    def _encode(self, inputs: dict[str, Any]) -> tuple[list[Tensor], _SignalsOf]:
        """Features of each image, and a function that gives their saliency and keys."""
        if self.encoded is not None:
            _refuse_other_pictures(self.encoded, self.family.pictures(inputs))
            features = self.encoded.features
            saliency = self.encoded.saliency if self.method.needs_saliency else _none(features)
            keys = self.encoded.keys if self.method.needs_keys else _none(features)
            return features, lambda _: (saliency, keys)
        if not self.method.needs_saliency:
            return self.family.features(inputs), lambda layouts: (_none(layouts), _none(layouts))
        recorder = self.family.recorder(inputs)
        with recorder:
            features = self.family.features(inputs)
        return features, partial(self._signals, recorder)

    def _signals(self, recorder: Any, layouts: Sequence[Layout]) -> tuple[_Optional, _Optional]:
        # Keys first: the saliency releases what was recorded.
        keys = self.family.keys(recorder, layouts) if self.method.needs_keys else _none(layouts)
        return self.family.saliency(recorder, layouts), keys

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
        """LLM input embeddings of the questions, all looked up at once."""
        if not self.method.needs_text:
            return [None] * len(images)
        length = ids.shape[1]
        flat = [image.row * length + i for image, places in zip(images, asked) for i in places]
        where = torch.tensor(flat, dtype=torch.long).to(ids.device, non_blocking=True)
        embed = self.model.get_input_embeddings()
        tokens = ids.flatten()[where]
        if embed.weight.device.type != "meta":  # offloaded weights: accelerate moves the input
            tokens = tokens.to(embed.weight.device, non_blocking=True)
        return embed(tokens).split([len(places) for places in asked])

    def _select(
        self,
        number: int,
        layout: Layout,
        budget: Budget,
        keys: Tensor | None,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
    ) -> Selection:
        """Choose among the candidates of one image."""
        keep = budget.count(layout.n_candidates, clamp=True)
        if layout.whole_crops and keep > layout.n_placeholders:
            raise BudgetError(
                f"keep={keep} exceeds the {layout.n_placeholders} placeholders that image {number} "
                f"has in the prompt; {self.method.name} cannot add any, so keep fewer"
            )
        return select(
            visual,
            text,
            saliency,
            keep=keep,
            method=self.method,
            n_crops=layout.n_crops,
            extras=Extras(layout.boxes, None if keys is None else keys.to(visual.device)),
            # On the CPU, so that every device draws the same.
            generator=torch.Generator().manual_seed(self.seed * 1_000_003 + number),
            validate=visual.device.type == "cpu",
        )

    def _shorten(
        self, inputs: dict[str, Any], pruned: Pruned, pad: int, positions: Tensor | None
    ) -> dict[str, Any]:
        """Drop the pictures from the inputs, and cut every tensor with an entry per token."""
        shorter = {
            name: value for name, value in inputs.items() if name not in self.family.encoder_inputs
        }
        for name, fill in {"input_ids": pad, **_FILLS}.items():
            if shorter.get(name) is not None:
                shorter[name] = pruned.take(shorter[name], fill)
        if isinstance(inputs.get("logits_to_keep"), Tensor):
            shorter["logits_to_keep"] = pruned.moved(_position_list(inputs["logits_to_keep"]))
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
        self, number: int, image: Placed, layout: Layout, selection: Selection, asked: list[int]
    ) -> ImageReport:
        return ImageReport(
            kept=selection.indices,
            n_before=layout.n_candidates,
            n_after=len(selection.indices),
            n_fixed=len(layout.fixed),
            split=selection.split,
            saliency=selection.saliency,
            relevance=selection.relevance,
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


def _refuse_other_pictures(encoded: Encoded, pictures: Sequence[Tensor]) -> None:
    """Check that the call has the pictures that were encoded before, in their order."""
    samples = list(map(sample, pictures))
    if len(samples) != len(encoded) or not all(map(torch.equal, samples, encoded.samples)):
        raise InputError(
            f"the call's {len(samples)} pictures are not the {len(encoded)} encoded ones, in this "
            "order; encode them with encode(), or arrange them with encoded.pick(...)"
        )


def _none(images: Sequence[Any]) -> list[None]:
    return [None] * len(images)


def _answers(labels: Tensor | None, n_rows: int) -> list[set[int]]:
    """Supervised positions of each row."""
    if labels is None:
        return [set()] * n_rows
    return [set(row.nonzero().flatten().tolist()) for row in labels.cpu() != _IGNORED_LABEL]


def _counts_from_end(inputs: dict[str, Any]) -> bool:
    """Whether the call asks for logits by their distance from the end of the prompt."""
    wanted = inputs.get("logits_to_keep")
    return isinstance(wanted, Tensor) or bool(wanted)


def _position_list(wanted: Tensor) -> Tensor:
    if wanted.ndim != 1 or wanted.is_floating_point() or wanted.dtype == torch.bool:
        raise InputError(
            f"logits_to_keep is a tensor of shape {tuple(wanted.shape)} and {wanted.dtype}; give "
            "an int, or positions as a 1-D integer tensor"
        )
    return wanted.long()


def _candidates(features: Tensor, layout: Layout) -> Tensor:
    """Features that may be dropped."""
    if layout.candidates is None:
        return features
    return features[layout.candidates.to(features.device, non_blocking=True)]


def _beside(
    visual: Tensor, text: Tensor | None, saliency: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Move all to the device of the features: a model may be spread over several."""
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


def _left(image: Tensor, layout: Layout, selection: Selection, kept: Tensor) -> Tensor:
    """Features that go to the LLM, shape (n_kept + n_fixed, d_model).

    Choosing is not differentiated through: a merged feature passes its gradient on to the kept
    token's own.
    """
    left = image[kept]
    if selection.features is None:
        return left
    where = selection.indices
    if layout.candidates is not None:
        chosen = layout.candidates.to(kept.device, non_blocking=True)[where]
        where = torch.searchsorted(kept, chosen)
    else:
        where = torch.arange(len(kept), device=kept.device)
    merged = left.index_copy(0, where, selection.features)
    return left + (merged - left).detach() if left.requires_grad else merged


def _places(layout: Layout, kept: Tensor, device: torch.device) -> Tensor:
    """Placeholders that stay for the kept features, counted from the image's first."""
    if layout.whole_crops:  # features may repeat and have no places: take the first ones
        return torch.arange(len(kept), device=device)
    return kept.to(device)
