"""vLLM's processor: it knows the prompt, so it finds each image's question and counts its tokens.

One hash an image is the key of vLLM's processor, encoder and prefix cache. What the choice depends
on goes into it, so that an image is encoded once for each question and every cache stays right.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptUpdateDetails
from vllm.multimodal.processing.inputs import ProcessorInputs

from budwood.errors import InputError, UnknownNameError
from budwood.prune.budget import Budget
from budwood.prune.families.base import Layout, wrapping_ids
from budwood.prune.question import Question
from budwood.serve.settings import Settings

QUESTION = "budwood_question"
"""Field of an image: token ids of its question, int64, shape (n_text,)."""
PLACEHOLDERS = "budwood_placeholders"
"""Field of an image: tokens that it takes in the prompt, kept and fixed ones together."""
KEEP = "budwood_keep"
"""Of a request's ``mm_processor_kwargs``: its budget."""
_PREFIX = "budwood_"
_ASKED = "budwood_asked"


@dataclass(frozen=True)
class Asked:
    """What a request asks of its images.

    Attributes:
        keep: the budget of each.
        questions: token ids of the question about each.
        chosen_by: what else the choice depends on, as text.
    """

    keep: Budget
    questions: tuple[tuple[int, ...], ...]
    chosen_by: str

    def digest(self, image_hash: str, number: int) -> str:
        """The hash of an image with this question and budget."""
        parts = (image_hash, repr(self.keep.keep), self.chosen_by, repr(self.questions[number]))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass
class AskedInputs(ProcessorInputs):
    """A request whose images have hashes of their own for each question and budget."""

    def get_mm_hashes(self, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        asked = self.hf_processor_mm_kwargs[_ASKED]
        plain = replace(self, hf_processor_mm_kwargs=_plain(self.hf_processor_mm_kwargs))
        hashes = dict(ProcessorInputs.get_mm_hashes(plain, *args, **kwargs))
        if "image" in hashes:
            hashes["image"] = [asked.digest(one, i) for i, one in enumerate(hashes["image"])]
        return hashes


class UnprunedBudget:
    """A mixin before a model's processing information: encoding costs all of an image's tokens."""

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        most = {"image": self.get_max_image_tokens()}
        if mm_counts.get("video"):
            most["video"] = self.video_tokens(seq_len, mm_counts)
        return most

    def video_tokens(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        """Of the longest video, in models that take them."""
        raise NotImplementedError


class PruningProcessor(BaseMultiModalProcessor):
    """A mixin before a model's processor.

    Attributes:
        layout: ``(configuration, image) -> Layout``.
    """

    layout: ClassVar[Callable[[Any, Mapping[str, Any]], Layout]]

    @cached_property
    def settings(self) -> Settings:
        """The server's."""
        return Settings.of(self.info.get_hf_config())

    @cached_property
    def _question(self) -> Question:
        config = self.info.get_hf_config()
        generation = SimpleNamespace(**self.info.ctx.model_config.try_get_generation_config())
        return Question.for_configs(
            self.settings.question,
            (generation, config.get_text_config()),
            wrapping_ids(config),
            self.info.get_hf_processor(),
            config.image_token_id,
        )

    def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        return super().apply(self._asked(inputs), *args, **kwargs)

    def _asked(self, inputs: ProcessorInputs) -> AskedInputs:
        """Find the question of each image."""
        given = dict(inputs.hf_processor_mm_kwargs)
        keep = given.pop(KEEP, self.settings.keep)
        for name in given:
            if name.startswith(_PREFIX):
                raise UnknownNameError(f"unknown mm_processor_kwargs {name!r}; known: {KEEP}")
        method = self.settings.chosen
        n_images = inputs.mm_data_items.get_all_counts().get("image", 0)
        questions = self._questions(inputs.prompt, n_images) if method.needs_text else None
        asked = Asked(
            Budget.parse(keep),
            tuple(questions or [()] * n_images),
            f"{method.name} {method!r} {self.settings.seed if method.draws else ''}",
        )
        fields = {name: getattr(inputs, name) for name in inputs.__dataclass_fields__}
        return AskedInputs(**{**fields, "hf_processor_mm_kwargs": {**given, _ASKED: asked}})

    def _questions(self, prompt: Sequence[int], n_images: int) -> list[tuple[int, ...]]:
        """Token ids of the question about each image, of a prompt with one placeholder an image."""
        token = self.info.get_hf_config().image_token_id
        places = [i for i, one in enumerate(prompt) if one == token][:n_images]
        row = torch.tensor(prompt, dtype=torch.long)
        found = [
            tuple(prompt[i] for i in self._question.positions(row, (at, at + 1), len(prompt)))
            for at in places
        ]
        return found + [()] * (n_images - len(found))  # vLLM refuses what has no placeholder

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, Sequence[bool]]
    ) -> Mapping[str, object]:
        given = dict(super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached))
        asked = given[_ASKED]
        cached = mm_is_cached.get("image", ())
        left = tuple(one for one, known in zip(asked.questions, cached) if not known)
        return {**given, _ASKED: replace(asked, questions=left)}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        return super()._apply_hf_processor_main(mm_items=mm_items, hf_kwargs=_plain(hf_kwargs))

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, _plain(hf_processor_mm_kwargs)))
        if "pixel_values" not in hf_inputs:  # no images, or encoded ones, which stay whole
            return fields
        asked = hf_processor_mm_kwargs[_ASKED]
        counts = [
            asked.keep.count(layout.n_candidates, clamp=True) + len(layout.fixed)
            for layout in self._layouts(MultiModalKwargsItems.from_hf_inputs(hf_inputs, fields))
        ]
        hf_inputs[QUESTION] = [torch.tensor(ids, dtype=torch.long) for ids in asked.questions]
        hf_inputs[PLACEHOLDERS] = torch.tensor(counts)
        return {
            **fields,
            QUESTION: MultiModalFieldConfig.batched("image"),
            PLACEHOLDERS: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _layouts(self, items: Any) -> list[Layout]:
        config = self.info.get_hf_config()
        return [type(self).layout(config, item.get_data()) for item in items["image"]]

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(
            mm_items=mm_items,
            hf_processor_mm_kwargs=_plain(hf_processor_mm_kwargs),
            out_mm_kwargs=out_mm_kwargs,
        )
        return [
            replace(update, replacement=partial(self._shorter, update.replacement, out_mm_kwargs))
            if update.modality == "image"
            else update
            for update in updates
        ]

    def _shorter(self, replacement: Any, items: Any, number: int) -> Any:
        """The placeholders of an image, less those of its dropped tokens."""
        full: Any = replacement(number) if callable(replacement) else replacement
        image = items["image"][number]
        if PLACEHOLDERS not in image:
            return full
        config = self.info.get_hf_config()
        ids = full.full if isinstance(full, PromptUpdateDetails) else full
        n_given = ids.count(config.image_token_id)
        n_whole = type(self).layout(config, image.get_data()).n_placeholders
        if n_given != n_whole:
            raise InputError(
                f"vLLM gives image {number} {n_given} placeholders and budwood {n_whole}; use a "
                "version of vLLM that budwood is tested with"
            )
        n_less = n_whole - int(image[PLACEHOLDERS].data)
        stop = len(ids) - ids[::-1].index(config.image_token_id)
        less = [*ids[: stop - n_less], *ids[stop:]]
        return replace(full, full=less) if isinstance(full, PromptUpdateDetails) else less


def _plain(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Without what is budwood's."""
    return {name: value for name, value in kwargs.items() if not name.startswith(_PREFIX)}
