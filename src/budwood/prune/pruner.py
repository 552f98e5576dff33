"""Encode images and videos of a call, choose tokens, and cut the others out of its inputs."""

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
from budwood.prune.families.base import Family, Layout, Visuals
from budwood.prune.merging import kept_features
from budwood.prune.methods.base import Extras, Method
from budwood.prune.prompt import Placed, Pruned, locate_images, prune_rows
from budwood.prune.question import Question
from budwood.prune.report import ImageReport, Timing
from budwood.prune.selection import Selection, generator_for, select, usable
from budwood.prune.turns import (
    CachedPrompt,
    Counts,
    count_visuals,
    counted,
    misfit,
    new_pictures,
    position_ids,
)

_Optional = Sequence[Tensor | None]
_SignalsOf = Callable[[Sequence[Layout]], tuple[_Optional, _Optional]]
"""Layouts → saliency and keys of each image or video."""
_IGNORED_LABEL = -100
FILLS = {
    "attention_mask": 0,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "labels": _IGNORED_LABEL,
}
"""Inputs with an entry per token beside the ids, and what padding gets."""


@dataclass(frozen=True, eq=False)
class Cut:
    """A call after pruning.

    Attributes:
        inputs: what to call the model with.
        origin: position in the given prompt of each token, -1 for padding, int64,
            shape (batch, n_kept).
        report: one entry per image and video.
        usable: where the device is not waited for, whether the features of each were finite.
        timing: what it took.
        n_visuals: images and videos in each row, with those that the cache held before.
    """

    inputs: dict[str, Any]
    origin: Tensor
    report: list[ImageReport]
    usable: list[Tensor]
    timing: Timing
    n_visuals: Counts


@dataclass(frozen=True, eq=False)
class _Kind:
    """The images of a call, or its videos, encoded."""

    visuals: Visuals
    features: list[Tensor]
    layouts: list[Layout]
    signals_of: _SignalsOf


@dataclass(frozen=True, eq=False)
class _Found:
    """One image or video of a call."""

    visuals: Visuals
    features: Tensor
    layout: Layout
    placed: Placed
    saliency: Tensor | None
    keys: Tensor | None

    @property
    def candidates(self) -> Tensor:
        """Features that may be dropped, as the LLM's embedding layer gives words."""
        features = self.features if self.features.ndim == 2 else self.features[:, 0]
        if self.layout.candidates is None:
            return features
        return features[self.layout.candidates.to(features.device, non_blocking=True)]


@dataclass(frozen=True, eq=False)
class Pruner:
    """How the calls of one model are pruned.

    Attributes:
        model: the model.
        family: where things are in it.
        method: chooses.
        budgets: how many tokens to keep of each image or video.
        question: finds the text to choose by.
        seed: for methods that draw.
        exact_timing: wait for the GPU before looking at the clock.
        encoded: the pictures of every call; None encodes those that a call brings.
        in_place: what is kept stays at its position in the whole prompt.
    """

    model: Any
    family: Family
    method: Method
    budgets: Budgets
    question: Question
    seed: int = 0
    exact_timing: bool = False
    encoded: Encoded | None = None
    in_place: bool = False

    def cut(
        self,
        inputs: dict[str, Any],
        pad: int,
        held: CachedPrompt | None = None,
        masked: bool = False,
    ) -> Cut:
        """Encode the visuals once, choose, and shorten everything that has an entry per token.

        Prompts are read before the encoder runs, so that reading does not wait for it. In a later
        turn the tokens that the cache holds stay as they are, and the new images are pruned.

        Args:
            inputs: keyword arguments of ``generate`` or ``forward``, with ``input_ids``,
                ``attention_mask`` and images.
            pad: token id for new padding.
            held: what the cache holds, the first tokens of ``input_ids``; None if it is empty.
            masked: where positions have gaps, put a masked token in front. Without any,
                transformers drops the mask, and then may take gaps for several packed sequences.

        Raises:
            InputError: placeholders and images do not match, features have NaN (CPU), or an input
                has not one entry per token.
            BudgetError: ``adav-official`` keeps more than the prompt has placeholders.
        """
        _check_shapes(inputs)
        ids, mask = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu()
        answers = _answers(inputs.get("labels"), len(ids))

        n_held = held.n_seen if held else 0
        fresh = ids.clone()  # what families read of the prompts is on the CPU
        fresh[:, :n_held] = -1  # no placeholders, whatever stands there

        started = self._now()
        read, kinds = self._read({**inputs, "input_ids": fresh}, ids, held)
        inputs = {**read, "input_ids": inputs["input_ids"]}
        encoded_at = self._now()

        found = self._found(kinds, fresh)
        with torch.no_grad():
            asked = self._questions(ids, mask, found, answers)
            texts = self._embed(inputs["input_ids"], found, asked)
            signals = [
                _beside(one.candidates, text, one.saliency) for one, text in zip(found, texts)
            ]
            budgets = self.budgets.of_images(len(found))
            chosen = [
                self._select(number, one, budget, *three)
                for number, (one, budget, three) in enumerate(zip(found, budgets, signals))
            ]
        kept = [one.layout.kept(choice.indices) for one, choice in zip(found, chosen)]
        device = inputs["input_ids"].device
        places = [_places(one.layout, indices, device) for one, indices in zip(found, kept)]
        placed = [one.placed for one in found]
        from_end = _reads_from_end(inputs, placed, answers)
        pruned = prune_rows(mask, placed, places, device, from_end, n_held)
        positions = self._positions(inputs, ids, mask, held)
        if masked and positions is not None and len(positions) == 1:
            pruned = pruned.with_padding()
        shorter = self._shorten(inputs, pruned, pad, positions, held)
        shorter["mm_encoder_outputs"] = _outputs(found, chosen, kept)
        checks = [usable(*three) for three in signals if three[0].device.type != "cpu"]
        described = zip(found, chosen, asked)
        return Cut(
            shorter,
            pruned.origin,
            [self._describe(number, *one) for number, one in enumerate(described)],
            checks,
            Timing(1e3 * (encoded_at - started), 1e3 * (self._now() - encoded_at)),
            count_visuals([(one.visuals.kind, one.placed.row) for one in found], len(ids), held),
        )

    def _read(
        self, inputs: dict[str, Any], whole: Tensor, held: CachedPrompt | None
    ) -> tuple[dict[str, Any], list[_Kind]]:
        """Encode what has placeholders in ``input_ids``; the inputs come back with that alone.

        Inputs of a later turn may have images that the cache holds; those are not encoded.
        """
        kinds = self.family.visuals(inputs)
        if self.encoded is not None:
            return inputs, _encoded_before(self.encoded, kinds, inputs, self.method)
        made = []
        for visuals in kinds:
            is_new = inputs["input_ids"] == visuals.token_id
            if held is None:
                made.append(self._encode(visuals, inputs))
            elif is_new.any():
                inputs, kind = self._fitting(visuals, inputs, whole, held)
                made.append(kind)
        return inputs, made

    def _fitting(
        self, visuals: Visuals, inputs: dict[str, Any], whole: Tensor, held: CachedPrompt
    ) -> tuple[dict[str, Any], _Kind]:
        """Encode the images of a later turn that fit its placeholders."""
        is_new = inputs["input_ids"] == visuals.token_id
        for given in new_pictures(visuals, inputs, whole, held, is_new.any(1)):
            kind = self._encode(visuals, given)
            if sum(layout.n_placeholders for layout in kind.layouts) == is_new.sum():
                return given, kind
        raise misfit(visuals.kind, int(is_new.sum()))

    def _encode(self, visuals: Visuals, inputs: dict[str, Any]) -> _Kind:
        """Encode the images or the videos."""
        if not self.method.needs_saliency:
            features, signals_of = visuals.features(inputs), _no_signals
        else:
            recorder = visuals.recorder(inputs)
            with recorder:
                features = visuals.features(inputs)
            signals_of = partial(self._signals, visuals, recorder)
        return _Kind(visuals, features, visuals.layouts(inputs, features), signals_of)

    def _signals(
        self, visuals: Visuals, recorder: Any, layouts: Sequence[Layout]
    ) -> tuple[_Optional, _Optional]:
        # Keys first: the saliency releases what was recorded.
        keys = visuals.keys(recorder, layouts) if self.method.needs_keys else _none(layouts)
        return visuals.saliency(recorder, layouts), keys

    def _found(self, kinds: Sequence[_Kind], ids: Tensor) -> list[_Found]:
        """Every image and video of the call, in prompt order."""
        found = []
        for kind in kinds:
            visuals, layouts = kind.visuals, kind.layouts
            lengths = [layout.run_lengths for layout in layouts]
            placed = locate_images(ids, visuals.token_id, lengths, visuals.kind)
            with torch.no_grad():
                signals = kind.signals_of(layouts)
            parts = zip(kind.features, layouts, placed, *signals, strict=True)
            found += [_Found(visuals, *part) for part in parts]
        return sorted(found, key=lambda one: (one.placed.row, one.placed.start))

    def _questions(
        self, ids: Tensor, mask: Tensor, found: Sequence[_Found], answers: Sequence[set[int]]
    ) -> list[list[int]]:
        """Positions of the text about each image or video. What marks these is no text."""
        ends = [int(row.nonzero().max()) + 1 if row.any() else len(row) for row in mask]
        inside: list[list[tuple[int, int]]] = [[] for _ in ends]
        for one in found:
            row, start, stop = one.placed.row, one.placed.start, one.placed.stop
            extent = one.visuals.extent(ids[row], start, stop)
            if len(one.placed.runs) > 1 or extent != (start, stop):
                inside[row].append(extent)
        return [
            self.question.positions(
                ids[placed.row],
                (placed.start, placed.stop),
                ends[placed.row],
                answers[placed.row],
                inside[placed.row],
            )
            for placed in (one.placed for one in found)
        ]

    def _embed(
        self, ids: Tensor, found: Sequence[_Found], asked: Sequence[list[int]]
    ) -> Sequence[Tensor | None]:
        """LLM input embeddings of the questions, all looked up at once."""
        if not self.method.needs_text:
            return [None] * len(found)
        length = ids.shape[1]
        flat = [one.placed.row * length + i for one, places in zip(found, asked) for i in places]
        where = torch.tensor(flat, dtype=torch.long).to(ids.device, non_blocking=True)
        embed = self.model.get_input_embeddings()
        tokens = ids.flatten()[where]
        if embed.weight.device.type != "meta":  # offloaded weights: accelerate moves the input
            tokens = tokens.to(embed.weight.device, non_blocking=True)
        return embed(tokens).split([len(places) for places in asked])

    def _select(
        self,
        number: int,
        one: _Found,
        budget: Budget,
        visual: Tensor,
        text: Tensor | None,
        saliency: Tensor | None,
    ) -> Selection:
        """Choose among the candidates of one image."""
        layout, keys = one.layout, one.keys
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
            generator=generator_for(self.method, self.seed, number),
            validate=visual.device.type == "cpu",
        )

    def _positions(
        self, inputs: dict[str, Any], ids: Tensor, mask: Tensor, held: CachedPrompt | None
    ) -> Tensor | None:
        """Coordinates of the whole prompt, shape (n_axes, batch, n); None to count what is left.

        Behind what a cache holds they continue after its largest; there they are zeros.
        """
        if held is None:
            return self._coordinates(inputs, ids, mask, self.in_place)
        inputs = inputs | {
            name: inputs[name][:, held.n_seen :]
            for name in ("token_type_ids", "mm_token_type_ids")
            if inputs.get(name) is not None
        }
        in_place = self.in_place or "position_ids" in held.inputs
        new = slice(held.n_seen, None)
        behind = self._coordinates(inputs, ids[:, new], mask[:, new], in_place)
        if behind is None:
            return None
        start = held.next_position.to(behind.device)
        return torch.nn.functional.pad(behind + start, (held.n_seen, 0))

    def _coordinates(
        self, inputs: dict[str, Any], ids: Tensor, mask: Tensor, in_place: bool
    ) -> Tensor | None:
        """The family's; for others one axis, which counts the tokens of the whole prompt."""
        positions = self.family.positions(inputs, ids, mask)
        return counted(mask)[None] if positions is None and in_place else positions

    def _shorten(
        self,
        inputs: dict[str, Any],
        pruned: Pruned,
        pad: int,
        positions: Tensor | None,
        held: CachedPrompt | None,
    ) -> dict[str, Any]:
        """Drop the pictures from the inputs, and cut every tensor with an entry per token."""
        shorter = self.family.without_pictures(inputs)
        for name, fill in {"input_ids": pad, **FILLS}.items():
            if shorter.get(name) is not None:
                shorter[name] = pruned.take(shorter[name], fill)
        if isinstance(inputs.get("logits_to_keep"), Tensor):
            shorter["logits_to_keep"] = pruned.moved(_position_list(inputs["logits_to_keep"]))
        if positions is not None:
            device = pruned.index.device
            positions = pruned.take(positions.to(device, non_blocking=True), 0)
        if held is not None:
            shorter |= held.followed(shorter, positions)
        elif positions is not None:
            shorter["position_ids"] = position_ids(positions, shorter["attention_mask"])
        if positions is not None and len(positions) > 1:
            self.family.placed(shorter["position_ids"][1:], shorter["attention_mask"])
        return shorter

    def _describe(
        self, number: int, one: _Found, selection: Selection, asked: list[int]
    ) -> ImageReport:
        layout = one.layout
        return ImageReport(
            kept=selection.indices,
            n_before=layout.n_candidates,
            n_after=len(selection.indices),
            n_fixed=len(layout.fixed),
            n_unpruned=layout.n_placeholders - len(layout.fixed),
            split=selection.split,
            saliency=selection.saliency,
            relevance=selection.relevance,
            row=one.placed.row,
            image=number,
            grid=layout.grid,
            question=tuple(asked),
            boxes=layout.boxes,
            placed=one.visuals.placing(layout),
            kind=one.visuals.kind,
            frames=layout.frames,
        )

    def _now(self) -> float:
        if self.exact_timing and self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def _check_shapes(inputs: dict[str, Any]) -> None:
    """Refuse inputs that cannot be cut in step with the ids."""
    shape = tuple(inputs["input_ids"].shape)
    for name in FILLS:
        value = inputs.get(name)
        if value is not None and tuple(getattr(value, "shape", ())) != shape:
            what = tuple(value.shape) if hasattr(value, "shape") else type(value).__name__
            raise InputError(f"{name} is of shape {what}, input_ids of {shape}; give the same")


def _outputs(
    found: Sequence[_Found], chosen: Sequence[Selection], kept: Sequence[Tensor]
) -> dict[str, Any]:
    """Kept features as ``generate`` and ``forward`` take them, by kind."""
    left: dict[Visuals, list[Tensor]] = {}
    for one, selection, indices in zip(found, chosen, kept):
        features = kept_features(one.features, one.layout, selection, indices)
        left.setdefault(one.visuals, []).append(features)
    return {visuals.kind: visuals.outputs(features) for visuals, features in left.items()}


def _encoded_before(
    encoded: Encoded, kinds: Sequence[Visuals], inputs: dict[str, Any], method: Method
) -> list[_Kind]:
    """What was encoded before, which has all images first and then all videos.

    Raises:
        InputError: the call has others, or in another order.
    """
    pictures = [visuals.pictures(inputs) for visuals in kinds]
    samples = [sample(picture) for some in pictures for picture in some]
    if len(samples) != len(encoded) or not all(map(torch.equal, samples, encoded.samples)):
        raise InputError(
            f"the call's {len(samples)} pictures are not the {len(encoded)} encoded ones, in this "
            "order; encode them with encode(), or arrange them with encoded.pick(...)"
        )
    made, start = [], 0
    for visuals, some in zip(kinds, pictures):
        part = slice(start, start + len(some))
        features = encoded.features[part]
        saliency = encoded.saliency[part] if method.needs_saliency else _none(features)
        keys = encoded.keys[part] if method.needs_keys else _none(features)
        layouts = visuals.layouts(inputs, features)
        made.append(_Kind(visuals, features, layouts, lambda _, given=(saliency, keys): given))
        start = part.stop
    return made


def _none(images: Sequence[Any]) -> list[None]:
    return [None] * len(images)


def _no_signals(layouts: Sequence[Layout]) -> tuple[_Optional, _Optional]:
    return _none(layouts), _none(layouts)


def _answers(labels: Tensor | None, n_rows: int) -> list[set[int]]:
    """Supervised positions of each row."""
    if labels is None:
        return [set()] * n_rows
    return [set(row.nonzero().flatten().tolist()) for row in labels.cpu() != _IGNORED_LABEL]


def _reads_from_end(
    inputs: dict[str, Any], images: Sequence[Placed], answers: Sequence[set[int]]
) -> bool:
    """Whether the caller finds tokens by their distance from the end of the prompt.

    It does if it asks for logits that way. So does TRL's GRPO, which asks for none: there the
    supervised tokens of all rows begin in one column, behind the images.
    """
    wanted = inputs.get("logits_to_keep")
    if isinstance(wanted, Tensor) or bool(wanted):
        return True
    starts = {min(row) for row in answers if row}
    return len(starts) == 1 and all(image.stop <= min(starts) for image in images)


def _position_list(wanted: Tensor) -> Tensor:
    if wanted.ndim != 1 or wanted.is_floating_point() or wanted.dtype == torch.bool:
        raise InputError(
            f"logits_to_keep is a tensor of shape {tuple(wanted.shape)} and {wanted.dtype}; give "
            "an int, or positions as a 1-D integer tensor"
        )
    return wanted.long()


def _beside(
    visual: Tensor, text: Tensor | None, saliency: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Move all to the device of the features: a model may be spread over several."""
    text = None if text is None else text.to(visual.device)
    saliency = None if saliency is None else saliency.to(visual.device)
    return visual, text, saliency


def _places(layout: Layout, kept: Tensor, device: torch.device) -> Tensor:
    """Placeholders that stay for the kept features, counted from the image's first."""
    if layout.whole_crops:  # features may repeat and have no places: take the first ones
        return torch.arange(len(kept), device=device)
    return kept.to(device)
