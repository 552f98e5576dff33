"""Every image-text-to-text class that transformers knows: attached, or refused by name.

Models are built on the meta device, so that their size costs nothing.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, ViTConfig
from transformers.models.auto import modeling_auto as auto

from budwood.errors import UnsupportedModelError
from budwood.prune import FAMILIES, attach
from budwood.prune.families import family_class

pytestmark = pytest.mark.versions

CLASSES = {
    **getattr(auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {}),
    **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
DEPTHS = (
    "num_hidden_layers",
    "num_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
    "n_layers",
)
NEEDS_PARTS = {
    "vision-encoder-decoder": {
        "encoder": ViTConfig().to_dict(),
        "decoder": transformers.GPT2Config().to_dict(),
    }
}


def default_config(model_type):
    return CONFIG_MAPPING[model_type](**NEEDS_PARTS.get(model_type, {}))


def shallow_config(model_type):
    """The default configuration, with eight layers a stack at most."""
    config = default_config(model_type)
    pending = [config]
    while pending:
        part = pending.pop()
        for name, value in vars(part).items():
            if isinstance(value, transformers.PreTrainedConfig):
                pending.append(value)
            elif name in DEPTHS and isinstance(value, int):
                setattr(part, name, min(value, 8))
    return config


def class_of(model_type):
    names = CLASSES[model_type]
    return getattr(transformers, names if isinstance(names, str) else names[0])


def built(model_type, config):
    with torch.device("meta"):
        return class_of(model_type)(config)


def empty(model_type):
    """An object of the class with its configuration and nothing else."""
    kind = class_of(model_type)
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.config = default_config(model_type)
    return model


@pytest.mark.parametrize("model_type", [name for name in CLASSES if name not in FAMILIES])
def test_any_other_class_is_refused_by_name(model_type):
    try:
        model = built(model_type, shallow_config(model_type))
    except Exception:  # it needs a package that is not here, or more than a default configuration
        model = empty(model_type)
    with pytest.raises(UnsupportedModelError) as caught:
        attach(model)
    line = str(caught.value)
    assert repr(model.config.model_type) in line
    assert type(model).__name__ in line
    assert all(name in line for name in FAMILIES)
    assert "\n" not in line
    assert "generate" not in vars(model)


@pytest.mark.parametrize("model_type", [name for name in CLASSES if name in FAMILIES])
def test_every_supported_class_is_attached(model_type):
    model = built(model_type, default_config(model_type))
    assert family_class(model.config, "it") is FAMILIES.get(model_type)
    with attach(model) as session:
        assert session.pruner.family.model_type == model_type


def test_all_families_are_among_the_classes():
    assert {name.partition("-")[0] for name in FAMILIES} <= set(CLASSES)
