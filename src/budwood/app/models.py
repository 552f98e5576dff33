"""The models behind the page: each is loaded when it is first used, and used by one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from budwood.loading import SPROUT, check_dtype, check_source

if TYPE_CHECKING:
    from budwood.loading import Loaded

T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """Which models the page works with.

    Attributes:
        model: vision-language model of the Prune tab, a hub id or directory; None for sprout.
        device: a torch device, or ``"auto"``.
        dtype: of the models, or ``"auto"``.
    """

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """Refuse sources that are not there, without importing anything heavy.

        Raises:
            InputError: there is no such model or dtype.
        """
        check_source(self.model, SPROUT)
        check_dtype(self.dtype)


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
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.vlm: Lazy[Loaded] = Lazy(self._load_vlm)

    def _load_vlm(self) -> Loaded:
        from budwood.loading import load_vlm_model

        return load_vlm_model(self.sources.model, self.sources.device, self.sources.dtype)
