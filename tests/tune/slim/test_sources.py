"""Layers that a model reads and does not call, in the branches that it can come to."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from budwood.errors import UnsupportedModelError
from budwood.tune.slim.sources import reads_weight
from tests import tiny_llm as tiny


class Reads(nn.Module):
    """Reads of some layers that count, and of others that do not."""

    def __init__(self, n_parts=1, exact=False):
        super().__init__()
        self.n_parts, self.exact = n_parts, exact
        for name in ("parts", "other", "late", "fused", "either", "clamped", "shaped", "plain"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x, fast=False):
        if self.n_parts > 1 and self.exact:
            x = x + F.linear(x, self.parts.weight)
        else:
            for _ in range(2):
                x = self.parts(x)
        x = self.other(x) if not self.exact else F.linear(x, self.other.weight)
        if self.is_late:
            x = F.linear(x, self.late.weight)
        if self.training or x.sum() > 0:
            x = F.linear(x, self.fused.weight)
        if fast and self.n_parts == 1:
            x = x @ self.either.weight
        self.clamped.weight.data.clamp_(-1, 1)
        if isinstance(self.plain.weight, nn.Parameter):
            x = x.to(self.shaped.weight.dtype).view(-1, self.shaped.weight.shape[0])
        return self.plain(self.clamped(x))


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ({}, "late fused either"),
        ({"n_parts": 2}, "late fused"),
        ({"exact": True}, "other late fused either"),
        ({"n_parts": 2, "exact": True}, "parts other late fused"),
    ],
    ids=str,
)
def test_branches_that_settings_close_do_not_count(settings, read):
    module = Reads(**settings)
    for training in (True, False):
        module.train(training)
        found = [name for name, _ in module.named_children() if reads_weight(module, name)]
        assert set(found) == set(read.split())


@pytest.mark.parametrize("n_devices", [1, 2])
@pytest.mark.parametrize("exact", [False, True])
def test_bloom_is_refused_only_where_it_reads(n_devices, exact):
    sizes = {"vocab_size": tiny.N_WORDS, "hidden_size": 24, "n_layer": 2, "n_head": 4}
    config = BloomConfig(pretraining_tp=n_devices, slow_but_exact=exact, **sizes)
    base = BloomForCausalLM(config).eval()
    if n_devices == 1 or not exact:
        assert any("dense_4h_to_h" in name for name in tiny.slim(base).targeted_module_names)
        return
    with pytest.raises(UnsupportedModelError, match="dense_4h_to_h.*instead of calling it"):
        tiny.slim(base)
