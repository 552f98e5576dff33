"""Mixins before vLLM's models: encode, choose by the question, hand on what stays."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from budwood.errors import UnsupportedModelError
from budwood.prune.families.base import Layout
from budwood.prune.merging import kept_features
from budwood.prune.methods.base import Extras, Method, Selection
from budwood.prune.methods.scores import Common
from budwood.prune.saliency import Recorder
from budwood.prune.selection import generator_for, select
from budwood.serve.settings import Settings
from budwood.serve.vllm.encoders import mean_over_ranks
from budwood.serve.vllm.layouts import check_config
from budwood.serve.vllm.processing import PLACEHOLDERS, QUESTION


class PrunesImages:
    """A mixin before a model. What the processor says of an image comes as fields of its inputs.

    Attributes:
        layout: ``(configuration, image) -> Layout``.
        per_image: inputs with one entry an image that ``layout`` reads.
    """

    layout: ClassVar[Callable[[Any, Mapping[str, Any]], Layout]]
    per_image: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        self._refuse(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pruning = Settings.of(self.config)
        # vLLM's scheduler counts kept tokens; the encoder sees all.
        self.encoder_budget = vllm_config.scheduler_config.max_num_batched_tokens

    def _refuse(self, vllm_config: Any) -> None:
        """Refuse what would hide the encoder's attention, or spread its images over ranks."""
        check_config(vllm_config.model_config.hf_config)
        multimodal = vllm_config.model_config.get_multimodal_config()
        compilation = vllm_config.compilation_config
        if multimodal.mm_encoder_tp_mode == "data":
            raise UnsupportedModelError(
                "mm_encoder_tp_mode='data' gives each rank other images, which pruning does not "
                "read; leave --mm-encoder-tp-mode out"
            )
        for name in ("cudagraph_mm_encoder", "compile_mm_encoder"):
            if getattr(compilation, name, False):
                raise UnsupportedModelError(
                    f"{name} hides the attention that pruning reads; leave it out of "
                    "--compilation-config"
                )

    # What a family says

    def recorder(self) -> Recorder:
        """Hooks for one run of the vision encoder."""
        raise NotImplementedError

    def saliency(
        self, recorder: Any, inputs: Mapping[str, Any], layouts: Sequence[Layout]
    ) -> list[Tensor]:
        """Of the candidates, mean over this rank's heads, one tensor an image."""
        raise NotImplementedError

    def some(
        self, inputs: Mapping[str, Any], layouts: Sequence[Layout], which: slice
    ) -> dict[str, Any]:
        """The inputs of some images."""
        return {name: value[which] for name, value in inputs.items()}

    def marked(self, features: Tensor, layout: Layout, kept: Tensor | None) -> Tensor:
        """What the language model gets of an image; a family may add where its tokens are."""
        return features

    # What all families do

    def embed_multimodal(self, **kwargs: Any) -> Any:
        questions, counts = kwargs.pop(QUESTION, None), kwargs.pop(PLACEHOLDERS, None)
        if questions is None:
            return self.whole(super().embed_multimodal(**kwargs), kwargs)
        layouts = self._layouts(kwargs, len(questions))
        pruned: list[Tensor] = []
        for which in self._batches(layouts):
            given, some = self.some(kwargs, layouts, which), layouts[which]
            recorder = self.recorder()
            with recorder:
                features = list(super().embed_multimodal(**given))
            scores = (
                self.saliency(recorder, given, some)
                if self._method.needs_saliency
                else [None] * len(some)
            )
            images = zip(features, some, scores, questions[which], counts[which], strict=True)
            pruned += [self._pruned(*image) for image in images]
        return pruned

    def whole(self, embeddings: Any, kwargs: Mapping[str, Any]) -> Any:
        """What comes in no fields of ours goes through unpruned: videos, and encoded images."""
        return embeddings

    def _layouts(self, inputs: Mapping[str, Any], n_images: int) -> list[Layout]:
        fields = {name: inputs[name] for name in self.per_image}
        return [
            type(self).layout(self.config, {name: value[i] for name, value in fields.items()})
            for i in range(n_images)
        ]

    def _batches(self, layouts: Sequence[Layout]) -> Iterator[slice]:
        """Images that are encoded at once: within the budget, and at least one."""
        start, n_tokens = 0, 0
        for number, layout in enumerate(layouts):
            if number > start and n_tokens + layout.n_placeholders > self.encoder_budget:
                yield slice(start, number)
                start, n_tokens = number, 0
            n_tokens += layout.n_placeholders
        yield slice(start, len(layouts))

    def _pruned(
        self, features: Tensor, layout: Layout, scores: Tensor | None, question: Tensor, count: Any
    ) -> Tensor:
        if scores is not None:
            n_ranks = get_tensor_model_parallel_world_size()
            scores = mean_over_ranks(scores, n_ranks, tensor_model_parallel_all_reduce)
        selection = self.choose(features, layout, scores, question, int(count))
        kept = layout.kept(selection.indices)
        levels = features.unflatten(1, (-1, self.config.get_text_config().hidden_size))
        left = kept_features(levels, layout, selection, kept).flatten(1)
        return self.marked(left, layout, kept)

    def choose(
        self, features: Tensor, layout: Layout, scores: Tensor | None, question: Tensor, count: int
    ) -> Selection:
        """Choose among the candidates of one image.

        Args:
            features: projected, on all levels, shape (n_features, n_levels · d_model).
            layout: of the image.
            scores: saliency of the candidates, float32, shape (n_candidates,).
            question: token ids, int64, shape (n_text,).
            count: placeholders in the prompt, kept and fixed ones together.
        """
        visual = features[:, : self.config.get_text_config().hidden_size]
        if layout.candidates is not None:
            visual = visual[layout.candidates.to(visual.device, non_blocking=True)]
        text = self._words(question.to(visual.device)) if self._method.needs_text else None
        return select(
            visual,
            text,
            scores,
            keep=count - len(layout.fixed),
            method=self._method,
            extras=Extras(layout.boxes),
            generator=generator_for(self._method, self.pruning.seed),
            validate=False,  # a bad picture must not end the server
        )

    @cached_property
    def _method(self) -> Method:
        method = self.pruning.chosen
        if not method.needs_vocabulary:
            return method
        n_words = self.config.get_text_config().vocab_size
        device = next(self.parameters()).device
        return method.fitted(Common.of_vocabulary(self._words, n_words, device))

    def _words(self, ids: Tensor) -> Tensor:
        """Input embeddings of the language model."""
        return self.get_language_model().embed_input_ids(ids)
