"""Serving pruned models; :mod:`budwood.serve.vllm` is the plugin for vLLM."""

KEY = "budwood"
"""Where a model's configuration has the settings: ``{"budwood": {"keep": 64}}``."""
