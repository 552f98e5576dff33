"""Benchmarks of fine-tuning."""

from __future__ import annotations

from budwood.bench.tune.speed import METHODS, TARGETS, SpeedConfig, measure_speed

__all__ = ["METHODS", "TARGETS", "SpeedConfig", "measure_speed"]
