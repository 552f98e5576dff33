"""Benchmarks of fine-tuning."""

from __future__ import annotations

from budwood.tune.bench.speed import METHODS, TARGETS, SpeedConfig, measure_speed

__all__ = ["METHODS", "TARGETS", "SpeedConfig", "measure_speed"]
