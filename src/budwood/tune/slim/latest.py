"""What a module has just measured, for the modules that come later in the same pass."""

from __future__ import annotations

import threading
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """The latest value of each thread, so that threads may pass through one model at a time.

    Backward may run in a thread of its own, and gradient checkpointing may repeat there a later
    module alone. So a thread that has set nothing gets what another one set last.

    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._of_any: T | None = None

    def set(self, value: T) -> None:
        """Keep a value for this thread, in place of its former one."""
        self._own.value = self._of_any = value

    def get(self) -> T | None:
        """Return what this thread has set; None if no thread has set anything."""
        return getattr(self._own, "value", self._of_any)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
