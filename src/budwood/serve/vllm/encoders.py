"""Saliency of vLLM's vision encoders: as of transformers' (see ``prune.saliency``), but for names.

Under tensor parallelism each rank has some of the heads; :func:`mean_over_ranks` makes the mean.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from budwood.prune.saliency import (
    Recorder,
    cls_attention,
    packed_attention,
    received_attention,
    strided,
)


class FusedRecorder(Recorder):
    """Queries and keys of a CLIP or SigLIP layer with one projection for queries, keys and values.

    Args:
        module: the layer's self-attention.
        with_cls: the first token is [CLS], whose attention counts; else that which each receives.
    """

    reads: ClassVar[tuple[str, ...]] = ("qkv_proj", "num_heads_per_partition", "scale")

    def __init__(self, module: Any, with_cls: bool) -> None:
        super().__init__(module)
        self.with_cls = with_cls

    def watch(self) -> None:
        self.on_output(self.module.qkv_proj, "qkv", lambda output: output[0])

    def saliency(self) -> Tensor:
        """Mean over the heads of this rank, float32, shape (n_crops, n_patches)."""
        n_heads, scale = self.module.num_heads_per_partition, self.module.scale
        queries, keys, _ = self.seen("qkv").chunk(3, dim=-1)
        if self.with_cls:
            return cls_attention(queries[:, 0], keys, n_heads, scale)[:, 1:]
        asked = queries[:, strided(queries.shape[1], queries.device)]
        return received_attention(asked, keys, n_heads, scale)


class RotatedRecorder(Recorder):
    """Queries and keys of a packed layer after their rotation, as its inner attention gets them.

    Args:
        module: the layer's attention, in which ``attn`` is the inner one.
    """

    reads: ClassVar[tuple[str, ...]] = ("attn", "num_attention_heads_per_partition")

    def watch(self) -> None:
        self.on_call(self.module.attn, "query")
        self.on_call(self.module.attn, "key")

    def saliency(self, lengths: Sequence[int]) -> list[Tensor]:
        """Mean over the heads of this rank, one tensor per image, float32, shape (n_patches,).

        Args:
            lengths: patches of each, in the order of the sequence.
        """
        queries, keys = (self.seen(name).flatten(2)[0] for name in ("query", "key"))
        n_heads = self.module.num_attention_heads_per_partition
        scale = self.module.hidden_size_per_attention_head**-0.5
        return packed_attention(queries, keys, n_heads, scale, lengths)


def mean_over_ranks(scores: Tensor, n_ranks: int, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over all heads, of means over the heads of each rank, which all have as many.

    Args:
        scores: of this rank, any shape.
        n_ranks: of tensor parallelism.
        all_reduce: sums a tensor over them.
    """
    return scores if n_ranks == 1 else all_reduce(scores) / n_ranks


def last_layer(layers: Any, index: int | Sequence[int], depth: int) -> Any:
    """The layer whose output is hidden state ``index`` of a tower.

    vLLM builds a tower only up to the deepest layer that is asked for.

    Args:
        layers: those that are there.
        index: ``vision_feature_layer``; of several the last one counts.
        depth: layers of the whole tower.
    """
    index = index if isinstance(index, int) else index[-1]
    return layers[(index if index >= 0 else index + depth + 1) - 1]
