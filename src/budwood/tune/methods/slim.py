"""SLIM as finetune and the benchmarks train it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from budwood.checks import need_int
from budwood.errors import InputError, UnsupportedModelError
from budwood.progress import Progress, silent
from budwood.tune.config import LORA_NAMES, SlimConfig
from budwood.tune.data.encoding import EncodedExample
from budwood.tune.data.self_generated import in_forms_of, start_of_text
from budwood.tune.methods.base import Tuner, check_options, refuse_unknown
from budwood.tune.slim.fitting import N_TEXTS, fit_discriminant

PLENTY = 1_280
"""Supervised tokens from which ``N_TEXTS`` texts are written."""
FEWER_TEXTS = 64
"""Self-generated texts beside fewer; they take half as long to write."""
_MANY = 10**6
"""Supervised tokens that a SLIM tuner counts on until it is fitted to the data."""


@dataclass(frozen=True)
class Slim(Tuner):
    """SLIM with the config of :meth:`SlimConfig.recommended`, and options set in ``extra``.

    Attributes:
        texts: self-generated texts that the discriminant tells the training data from. 0 for the
            whitened distance, None to decide by the amount of data.
        n_supervised_tokens: amount of training data, set by :meth:`fitted_to`.
    """

    texts: int | None = None
    n_supervised_tokens: int = _MANY

    defaults: ClassVar[str] = "2026-11-30"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.texts is not None:
            need_int(0, texts=self.texts)
        config = self.config(1, None, 0)  # refuses unknown options before a model is loaded
        if self.texts == 0 and _needs_texts(config):
            raise InputError(
                f"texts=0 and distance={config.distance!r}, which needs self-generated texts; give "
                "more texts, or another distance"
            )
        if self.texts and not _needs_texts(config):
            raise InputError(
                f"texts={self.texts} and distance={config.distance!r}, which takes no "
                "self-generated text; leave texts out, or take distance=discriminant"
            )

    def config(self, rank: int, model: Any, seed: int) -> SlimConfig:
        options = dict(self.extra)
        if self.texts is not None:
            options.setdefault("distance", "discriminant" if self.texts else "whitened")
        refuse_unknown(self, SlimConfig, "SLIM", [one for one in options if one not in LORA_NAMES])
        try:
            config = SlimConfig.recommended(self.n_supervised_tokens, r=rank, seed=seed, **options)
        except TypeError as error:  # an option of LoRA's
            raise InputError(f"SLIM: {error}") from error
        check_options(SlimConfig, "SLIM", options)
        return config

    def fitted_to(self, n_supervised_tokens: int) -> Slim:
        return dataclasses.replace(self, n_supervised_tokens=n_supervised_tokens)

    def suited_to(self, tokenizer: Any) -> Slim:
        chosen = self.texts is not None or "distance" in self.extra
        if chosen or not (self._few and self.n_texts):
            return self
        try:
            start_of_text(tokenizer)
        except UnsupportedModelError as error:
            warnings.warn(
                f"SLIM takes the whitened distance, with which it learns less, since {error}",
                stacklevel=3,
            )
            return dataclasses.replace(self, texts=0)
        return self

    @property
    def n_texts(self) -> int:
        if not _needs_texts(self.config(1, None, 0)):
            return 0
        if self.texts is not None:
            return self.texts
        return FEWER_TEXTS if self._few else N_TEXTS

    @property
    def _few(self) -> bool:
        return self.n_supervised_tokens < PLENTY

    def prepare(
        self,
        adapted: Any,
        tokenizer: Any,
        rows: Sequence[EncodedExample],
        texts: Sequence[EncodedExample],
        progress: Progress = silent,
    ) -> None:
        if texts:
            other = in_forms_of(rows, texts, tokenizer)
            fit_discriminant(adapted, tokenizer, rows, other, progress=progress)


def _needs_texts(config: SlimConfig) -> bool:
    """Whether the distance is fitted to self-generated texts as well."""
    return config.yielding and config.distance == "discriminant"
