"""The vision towers that families share: CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from budwood.errors import UnsupportedModelError
from budwood.prune.saliency import ClsRecorder, ReceivedRecorder

_RECORDERS = {"clip_vision_model": ClsRecorder, "siglip_vision_model": ReceivedRecorder}


class Tower:
    """A CLIP or SigLIP tower inside a model.

    Args:
        model: the model; without a ``vision_feature_layer`` in its configuration it projects the
            last layer's output.

    Raises:
        UnsupportedModelError: the tower is of another kind, or its layer does not exist.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config.vision_config
        refuse_tower(model, *_RECORDERS)
        self.attention({})  # a wrong layer shows now and not at the first picture

    @property
    def has_cls(self) -> bool:
        """Whether the first token is [CLS]."""
        return _RECORDERS[self.config.model_type] is ClsRecorder

    @property
    def side(self) -> int:
        """Patches along a side of one crop."""
        return self.config.image_size // self.config.patch_size

    def drops_first(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the model drops the tower's first token before it projects the others."""
        strategy = inputs.get("vision_feature_select_strategy")
        return (strategy or self.model.config.vision_feature_select_strategy) == "default"

    def attention(self, inputs: Mapping[str, Any]) -> Any:
        """Self-attention of the layer whose output is the selected hidden state.

        Of several feature layers the last one counts.
        """
        index = inputs.get("vision_feature_layer")
        index = getattr(self.model.config, "vision_feature_layer", -1) if index is None else index
        index = index if isinstance(index, int) else index[-1]
        tower = self.model.model.vision_tower
        layers = getattr(tower, "vision_model", tower).encoder.layers
        return output_layer(layers, index).self_attn

    def recorder(self, inputs: Mapping[str, Any]) -> ClsRecorder | ReceivedRecorder:
        """Hooks on the attention of that layer."""
        return _RECORDERS[self.config.model_type](self.attention(inputs))


def output_layer(layers: Any, index: int) -> Any:
    """The layer whose output is the tower's hidden state ``index``.

    ``hidden_states[0]`` are the embeddings, so ``hidden_states[i]`` is the output of layer
    ``i - 1``; counted from the end both agree.

    Raises:
        UnsupportedModelError: there is no such layer.
    """
    where = index - 1 if index > 0 else index + len(layers)
    if index == 0 or not 0 <= where < len(layers):
        raise UnsupportedModelError(
            f"vision_feature_layer={index} is the output of none of the tower's {len(layers)} "
            "layers; saliency is read from that layer's attention"
        )
    return layers[where]


def refuse_tower(model: Any, *known: str) -> None:
    """Refuse a vision tower whose ``model_type`` is none of the known ones.

    Raises:
        UnsupportedModelError: it is none of them.
    """
    given = model.config.vision_config.model_type
    if given not in known:
        raise UnsupportedModelError(
            f"vision tower {given!r} of {model.config.model_type!r} is not supported; known: "
            f"{', '.join(known)}"
        )
