"""Pruning inside the LLM, after some of its layers: FastV and PyramidDrop, for comparison only."""

from __future__ import annotations

from budwood.prune.inside.schedules import FastV, PyramidDrop, Schedule
from budwood.prune.inside.session import SCHEDULES, InsideReport, InsideSession, attach_inside

__all__ = [
    "SCHEDULES",
    "FastV",
    "InsideReport",
    "InsideSession",
    "PyramidDrop",
    "Schedule",
    "attach_inside",
]
