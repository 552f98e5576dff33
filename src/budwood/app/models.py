"""The models behind the page: each is loaded when it is first used, and used by one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import budwood
from budwood.errors import BudwoodError, InputError
from budwood.files import cache_folder, digest
from budwood.loading import EMBEDDED_VLMS, check_adapter_source, check_dtype, check_source

if TYPE_CHECKING:
    from budwood.loading import Loaded
    from budwood.points import AdaptConfig, Adapter, PointEncoder, TextEmbeddings
    from budwood.progress import Progress

T = TypeVar("T")

STEPS, COUNTS = 60, (128, 64, 32)
"""Of the adaptation that the page offers: half a minute on two cores."""
LISTS = 8
"""Lists of labels whose embeddings are kept."""


@dataclass(frozen=True)
class Sources:
    """Which models the page works with.

    Attributes:
        model: vision-language model of the Prune tab: a hub id, a directory or `sprout-256`; None
            for sprout.
        adapter: adapter of the Points tab, a folder that `budwood points adapt` made; None for one
            that the page makes on request.
        tuned: adapter of the Tune tab, a folder or hub id; None leaves that part of the tab empty.
        device: a torch device, or ``"auto"``.
        dtype: of the models, or ``"auto"``.
    """

    model: str | None = None
    adapter: str | None = None
    tuned: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """Refuse sources that are not there, before a model is loaded.

        Raises:
            InputError: there is no such model, adapter or dtype.
        """
        check_source(self.model, *EMBEDDED_VLMS)
        check_dtype(self.dtype)
        if self.adapter is not None:
            from budwood.points.adapters.base import read_description

            read_description(self.adapter)
        if self.tuned is not None:
            check_adapter_source(self.tuned)


class Lazy(Generic[T]):
    """Something that is made on first use, and held by one thread at a time.

    Args:
        make: makes it. If it raises, the next use tries again.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._value: list[T] = []

    @contextmanager
    def held(self) -> Iterator[T]:
        """Wait for it, and keep others out inside the block."""
        with self._lock:
            if not self._value:
                self._value.append(self._make())
            yield self._value[0]

    @property
    def is_made(self) -> bool:
        """Whether it is there already."""
        return bool(self._value)


class Models:
    """The models of a page.

    Args:
        sources: which.

    Attributes:
        vlm: vision-language model and processor.
        points: point encoder and adapter.
        tuned: a language model with the adapter on it, and its tokenizer.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.vlm: Lazy[Loaded] = Lazy(self._load_vlm)
        self.points: Lazy[Points] = Lazy(self._load_points)
        self.tuned: Lazy[Loaded] = Lazy(self._load_tuned)

    def _load_vlm(self) -> Loaded:
        from budwood.loading import load_vlm_model

        return load_vlm_model(self.sources.model, self.sources.device, self.sources.dtype)

    def _load_points(self) -> Points:
        from budwood.points.classification import load_adapted

        return Points(*load_adapted(device=self.sources.device, adapter=self.sources.adapter))

    def _load_tuned(self) -> Loaded:
        if self.sources.tuned is None:
            raise InputError(
                "there is no tuned model; make one with `budwood tune DATA --output DIR`, and "
                "start the page with --tuned DIR"
            )
        from budwood.tune.saved.loading import load_adapted

        return load_adapted(
            self.sources.tuned, device=self.sources.device, dtype=self.sources.dtype
        )


class Points:
    """A point encoder, its adapter, and embeddings of labels.

    Args:
        encoder: frozen.
        adapter: to sparse clouds; None: the one that an earlier :meth:`adapt` kept, if there is
            one.
    """

    def __init__(self, encoder: PointEncoder, adapter: Adapter | None) -> None:
        self.encoder = encoder
        self.adapter = adapter or self._kept()
        self._texts: dict[tuple[str, ...], TextEmbeddings] = {}

    def texts(self, labels: Sequence[str]) -> TextEmbeddings:
        """Embed labels; the last few lists are kept."""
        from budwood.points.text import embed_labels_for

        key = tuple(labels)
        if key not in self._texts:
            if len(self._texts) >= LISTS:
                self._texts.pop(next(iter(self._texts)))
            self._texts[key] = embed_labels_for(self.encoder, labels)
        return self._texts[key]

    def adapt(self, progress: Progress) -> None:
        """Make the adapter, on the clouds that ship; nothing happens where there is one.

        Args:
            progress: called with the steps done and all steps.
        """
        if self.adapter is not None:
            return
        from budwood.points import adapt, load_clouds

        progress(0, STEPS)
        cache_folder().mkdir(parents=True, exist_ok=True)
        dense = list(load_clouds().where(use="adapt").xyz)
        self.adapter = adapt(
            dense, None, self.encoder, self._config(), output=self._folder(), progress=progress
        )

    def _config(self) -> AdaptConfig:
        from budwood.points import AdaptConfig, Curriculum

        return AdaptConfig(steps=STEPS, curriculum=Curriculum(COUNTS))

    def _folder(self) -> Path:
        """Where the adapter is kept; its name changes with the encoder and the version."""
        from budwood.points.adapters import fingerprint

        made_from = [budwood.__version__, STEPS, COUNTS, fingerprint(self.encoder)]
        return cache_folder() / f"app-points-{digest(made_from)}"

    def _kept(self) -> Adapter | None:
        from budwood.points import load_adapter

        try:
            return load_adapter(self._folder(), self.encoder)
        except BudwoodError:  # not made yet, or damaged
            return None
