"""Makes tests quicker; there are no fixtures here."""

from __future__ import annotations

import gc


def pytest_collection_finish():
    """Keep what is imported out of garbage collection.

    By now a process holds a million objects of libraries. Each call of ``gc.collect`` goes through
    all of them, and Trainer makes one a run. Objects of the tests are collected as ever.
    """
    gc.collect()
    gc.freeze()
