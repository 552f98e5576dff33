"""Nothing stale in ``torch.inference_mode()``, where tensors do not count their changes."""

from __future__ import annotations

import pytest
import torch

from budwood.tune import SlimLinear
from tests import tiny_llm as tiny


def layers(model):
    return [module for module in model.modules() if isinstance(module, SlimLinear)]


@pytest.mark.parametrize("distance", ["whitened", "rms", "max"])
def test_a_buffer_that_is_filled_again(distance):
    layer = layers(tiny.trained(distance=distance))[1]
    near, far = torch.randn(2, 3, 5, tiny.D_MODEL)
    far = far * 100
    with torch.no_grad():
        expected = [layer(near.clone()), layer(far.clone())]
    with torch.inference_mode():
        buffer = near.clone()
        first = layer(buffer)
        buffer.copy_(far)
        second = layer(buffer)
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
    assert not torch.equal(expected[0], layer.base_layer(near))


def test_a_buffer_is_measured_anew_by_each_layer_that_reads_it():
    gate, up = layers(tiny.trained())[:2]
    near, far = torch.randn(2, 3, 5, tiny.D_MODEL)
    with torch.no_grad():
        expected = up(far * 100)
    with torch.inference_mode():
        buffer = near.clone()
        gate(buffer)
        buffer.copy_(far * 100)
        assert torch.equal(up(buffer), expected)


def test_a_buffer_that_is_filled_again_without_gradients():
    gate, up = layers(tiny.trained())[:2]
    near, far = torch.randn(2, 3, 5, tiny.D_MODEL)
    with torch.no_grad():
        expected = up(far * 100)
        buffer = near.clone()
        gate(buffer)
        buffer.copy_(far * 100)
        assert torch.equal(up(buffer), expected)


@pytest.mark.parametrize("distance", ["whitened", "rms"])
def test_statistics_that_are_loaded_again(distance):
    """Values derived from buffers, such as the whitener, follow them in inference mode too."""
    other = tiny.trained(distance=distance)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    expected = tiny.logits(other)
    with torch.inference_mode():
        model = tiny.slim(distance=distance).eval()
        for layer in layers(model):
            for statistics in layer.slim_clusters.values():
                statistics.n_steps.fill_(5)
        tiny.logits(model)
        model.load_state_dict(state)
        found = tiny.logits(model)
    assert torch.equal(found, expected)
