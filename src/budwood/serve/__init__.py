"""Serving pruned models; :mod:`budwood.serve.vllm` is the plugin for vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from budwood.lazy import lazy_exports

if TYPE_CHECKING:
    from budwood.serve.launch import Line as Line
    from budwood.serve.launch import check_vllm as check_vllm
    from budwood.serve.launch import line_for as line_for
    from budwood.serve.launch import run as run
    from budwood.serve.settings import Settings as Settings

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Line": "launch",
        "Settings": "settings",
        "check_vllm": "launch",
        "line_for": "launch",
        "run": "launch",
    },
)
