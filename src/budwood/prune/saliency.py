"""How much the vision encoder attends to each patch: one attention row of one layer.

The first half is pure mathematics on tensors. The second half reads a layer's own queries and keys
through hooks while the encoder runs, so that no projection is computed twice, attention itself
stays whatever it is (SDPA, FlashAttention, eager), and nothing of size heads × N × N is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from budwood.errors import AttachError, UnsupportedModelError

# A prime, so that the stride is no whole number of patches on the usual grids: with a stride that
# divides the width of the raster all queries would sit in a few of its columns.
N_QUERIES = 61
_QUERIES_AT_ONCE = 16
_TOKENS_AT_ONCE = 4096


def cls_attention(query: Tensor, keys: Tensor, n_heads: int, scale: float) -> Tensor:
    """Compute the attention of the [CLS] query to every key, mean over heads.

    Source: AdaV, step 1 (FasterVLM has the same signal). Computed in float32.

    Args:
        query: projected [CLS] query, shape (n_crops, n_heads · d_head).
        keys: projected keys, [CLS] included, shape (n_crops, n_keys, n_heads · d_head).
        n_heads: attention heads.
        scale: factor on the logits, usually d_head ** -0.5.

    Returns:
        Attention probabilities, float32, shape (n_crops, n_keys); rows sum to 1.
    """
    n_crops, n_keys, _ = keys.shape
    per_head = query.float().view(n_crops, n_heads, -1, 1)
    # (n_crops, n_keys, n_heads, d_head) · (n_crops, n_heads, d_head) without a copy of the keys.
    keys = keys.float().view(n_crops, n_keys, n_heads, -1).transpose(1, 2)
    logits = (keys @ per_head).squeeze(-1) * scale
    return logits.softmax(-1).mean(1)


def received_attention(
    queries: Tensor, keys: Tensor, n_heads: int, scale: float, seen: Tensor | None = None
) -> Tensor:
    """Compute the attention that each key receives, mean over heads and sampled queries.

    For towers without [CLS]; :func:`strided` says which queries to ask. Source: none, this is
    budwood's choice and not the paper's.

    Args:
        queries: projected queries, shape (n_crops, n_asked, n_heads · d_head).
        keys: projected keys, shape (n_crops, n_tokens, n_heads · d_head).
        n_heads: attention heads.
        scale: factor on the logits, usually d_head ** -0.5.
        seen: which keys may be attended to, bool, shape (n_crops, n_tokens); None if all.

    Returns:
        Mean attention probability, float32, shape (n_crops, n_tokens); rows sum to 1.
    """
    n_crops, n_tokens, _ = keys.shape
    n_asked = queries.shape[1]
    queries = queries.float().view(n_crops, n_asked, n_heads, -1).transpose(1, 2)
    keys = keys.float().view(n_crops, n_tokens, n_heads, -1).permute(0, 2, 3, 1)
    received = torch.zeros(n_crops, n_tokens, device=keys.device)
    for some in queries.split(_QUERIES_AT_ONCE, dim=2):  # bounds memory
        logits = (some @ keys) * scale
        if seen is not None:
            logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
        received += logits.softmax(-1).sum((1, 2))
    return received / (n_heads * n_asked)


def packed_attention(
    queries: Tensor,
    keys: Tensor,
    n_heads: int,
    scale: float,
    lengths: Sequence[int],
    read: Callable[[Tensor, Any], Tensor] = lambda x, rows: x[rows],
) -> list[Tensor]:
    """Compute :func:`received_attention` in a sequence that packs images of any size.

    Args:
        queries: projected queries, shape (n_patches, n_heads · d_head).
        keys: projected keys, same shape.
        n_heads: attention heads.
        scale: factor on the logits, usually d_head ** -0.5.
        lengths: patches of each image, in the order of the sequence; each attends to itself alone.
        read: takes rows of queries or keys, such as with a rotation.

    Returns:
        Mean attention probability, one tensor per image, float32, shape (length,).
    """
    scores, start = [], 0
    for length, count in _of_equal_length(lengths):
        asked = strided(length, keys.device)
        first = start + length * torch.arange(count, device=keys.device)[:, None]
        images = slice(start, start + count * length)
        q = read(queries, (first + asked).flatten()).view(count, len(asked), -1)
        k = read(keys, images).view(count, length, -1)
        scores += received_attention(q, k, n_heads, scale).unbind()
        start = images.stop
    return scores


def strided(n_tokens: int, device: torch.device, n_queries: int = N_QUERIES) -> Tensor:
    """Sample queries evenly, so that the cost grows with N and not with N².

    Returns:
        Indices, int64, shape (min(n_tokens, n_queries),), each in the middle of its stretch.
    """
    if n_tokens <= n_queries:
        return torch.arange(n_tokens, device=device)
    steps = torch.arange(n_queries, device=device)
    return (2 * steps + 1) * n_tokens // (2 * n_queries)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, n_heads: int) -> Tensor:
    """Apply rotary position embedding of the rotate-half kind, in float32.

    Args:
        x: projected queries or keys, shape (n_tokens, n_heads · d_head).
        cos: cosines, shape (n_tokens, d_head).
        sin: sines, shape (n_tokens, d_head).
        n_heads: attention heads.

    Returns:
        Rotated ``x``, float32, same shape.
    """
    heads = x.float().view(len(x), n_heads, -1)
    low, high = heads.chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return (heads * cos.float()[:, None] + turned * sin.float()[:, None]).view(x.shape)


_RECORDING: ContextVar[tuple[Recorder, ...]] = ContextVar("budwood_recording", default=())
"""The recorders of the current call. Each thread has its own, so that calls do not mix."""


class Recorder(ExitStack):
    """Hooks that live for one run of the encoder: ``with recorder: encode()``, then the saliency.

    A subclass registers its hooks in :meth:`watch`; they are gone on exit, whatever happened. The
    hooks record only in the context (thread) that entered the recorder, so that several threads may
    call one model at the same time.

    Attributes:
        reads: what the module must have.

    Args:
        module: what :meth:`watch` registers hooks on, or in.

    Raises:
        UnsupportedModelError: the module is another one than transformers' own.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module: Any = module
        missing = [name for name in self.reads if not hasattr(module, name)]
        if missing:
            raise UnsupportedModelError(
                f"the vision tower's {type(module).__name__} has no {', '.join(missing)} to read "
                "saliency from; give a model whose vision tower was not replaced, or choose a "
                "method without saliency (budwood ls methods)"
            )
        self._seen: dict[str, Any] = {}

    def watch(self) -> None:
        """Register hooks with :meth:`on_output` and :meth:`on_call`."""
        raise NotImplementedError

    def __enter__(self) -> Recorder:
        super().__enter__()
        with ExitStack() as undo:  # a failure half-way must not leave the first hooks behind
            undo.push(self)
            self.callback(_RECORDING.reset, _RECORDING.set((*_RECORDING.get(), self)))
            self.watch()
            undo.pop_all()
        return self

    def on_output(
        self, module: nn.Module, name: str, part: Callable[[Any], Tensor] | None = None
    ) -> None:
        """Remember what ``module`` returns, or a part of it, without its gradient."""

        def record(_args: Any, output: Any) -> None:
            self._seen[name] = (part(output) if part else output).detach()

        hook = _Hook(self, record)
        self.callback(module.register_forward_hook(hook).remove)

    def on_call(self, module: nn.Module, argument: str) -> None:
        """Remember the keyword argument that ``module`` is called with."""

        def record(_args: Any, kwargs: dict[str, Any]) -> None:
            self._seen[argument] = kwargs.get(argument)

        hook = _Hook(self, record)
        self.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def seen(self, name: str, release: bool = True) -> Any:
        """What was remembered, by default released from here.

        Raises:
            AttachError: the hook did not run: a compiled or replaced vision tower.
        """
        value = self._seen.pop(name, None) if release else self._seen.get(name)
        if value is None:
            raise AttachError(
                f"the vision encoder ran without showing its {name}; attach to a model whose "
                "vision tower is neither compiled nor replaced"
            )
        return value


class _Hook:
    """A hook that records for one recorder and in its context alone.

    Args:
        recorder: must be active in the context that runs the module.
        record: called with the module's arguments, and its output or keyword arguments.
    """

    def __init__(self, recorder: Recorder, record: Callable[[Any, Any], None]) -> None:
        self.recorder, self.record = recorder, record

    def __call__(self, _module: nn.Module, args: Any, last: Any) -> None:
        if any(active is self.recorder for active in _RECORDING.get()):
            self.record(args, last)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model, made while another thread runs it, does not record."""
        return getattr, (_Hook, "nothing")

    @staticmethod
    def nothing(_module: nn.Module, _args: Any, _last: Any) -> None:
        """Record nothing."""


class ClsRecorder(Recorder):
    """[CLS] attention over the patches in a CLIP-like layer.

    Args:
        module: the layer's, with ``q_proj``, ``k_proj``, ``num_heads`` and ``scale``.
        query: name of the module that gives the queries.
        keys: name of the module that gives the keys.
    """

    reads: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "num_heads", "scale")

    def __init__(self, module: nn.Module, query: str = "q_proj", keys: str = "k_proj") -> None:
        super().__init__(module)
        self._query, self._keys = query, keys

    def watch(self) -> None:
        self.on_output(getattr(self.module, self._query), "query", lambda output: output[:, 0])
        self.on_output(getattr(self.module, self._keys), "keys")

    def saliency(self) -> Tensor:
        """Attention over the patches, float32, shape (n_crops, n_patches)."""
        attention = self.module
        query, keys = self.seen("query"), self.seen("keys")
        return cls_attention(query, keys, attention.num_heads, attention.scale)[:, 1:]

    def keys(self) -> Tensor:
        """Keys of the patches, shape (n_crops, n_patches, n_heads, d_head); before the saliency."""
        return _by_head(self.seen("keys", release=False), self.module.num_heads)[:, 1:]


class OutputRecorder(Recorder):
    """What a module returns, as it is.

    Args:
        module: any module that returns one tensor.
    """

    def watch(self) -> None:
        self.on_output(self.module, "output")

    def output(self) -> Tensor:
        """The output of the last run, without its gradient."""
        return self.seen("output")


class ReceivedRecorder(Recorder):
    """Mean attention received in a SigLIP-like layer, which has no [CLS].

    Args:
        module: the layer's, with ``q_proj``, ``k_proj``, ``num_heads`` and ``scale``.
    """

    reads: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "num_heads", "scale")

    def watch(self) -> None:
        self.on_output(self.module.q_proj, "queries")
        self.on_output(self.module.k_proj, "keys")

    def saliency(self) -> Tensor:
        """Mean attention received, float32, shape (n_crops, n_patches)."""
        attention = self.module
        queries, keys = self.seen("queries"), self.seen("keys")
        asked = queries[:, strided(queries.shape[1], queries.device)]
        seen = self.seen_keys()
        return received_attention(asked, keys, attention.num_heads, attention.scale, seen)

    def seen_keys(self) -> Tensor | None:
        """Which keys may be attended to, bool, shape (n_crops, n_patches); None if all."""
        return None

    def keys(self) -> Tensor:
        """Keys of the patches, shape (n_crops, n_patches, n_heads, d_head); before the saliency."""
        return _by_head(self.seen("keys", release=False), self.module.num_heads)


class PackedRecorder(Recorder):
    """Mean attention received in a layer that packs images of any size into one sequence.

    Args:
        module: a self-attention with a fused ``qkv``, rotary ``position_embeddings``,
            ``num_heads`` and ``scaling``, as in Qwen2.5-VL's full-attention blocks.
    """

    reads: ClassVar[tuple[str, ...]] = ("qkv", "num_heads", "scaling")

    def watch(self) -> None:
        self.on_output(self.module.qkv, "qkv")
        self.on_call(self.module, "position_embeddings")

    def saliency(self, lengths: Sequence[int]) -> list[Tensor]:
        """Mean attention received, one tensor per image or frame, float32, shape (n_patches,).

        Args:
            lengths: patches of each, in the order of the sequence; each attends to itself alone.
        """
        n_heads, scale = self.module.num_heads, self.module.scaling
        cos, sin = self.seen("position_embeddings")

        def turned(x: Tensor, rows: Tensor | slice) -> Tensor:
            return rotate(x[rows], cos[rows], sin[rows], n_heads)

        return packed_attention(*self.projected(), n_heads, scale, lengths, turned)

    def projected(self) -> tuple[Tensor, Tensor]:
        """Queries and keys of all images before the rotation, shape (n_patches, width) each."""
        queries, keys, _ = self.seen("qkv").chunk(3, dim=-1)
        return queries, keys


class PixtralRecorder(PackedRecorder):
    """The same in a layer with a projection each for queries and keys.

    Args:
        module: a self-attention with ``q_proj``, ``k_proj``, rotary ``position_embeddings``,
            ``num_heads`` and ``scaling``, as in Pixtral.
    """

    reads: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "num_heads", "scaling")

    def watch(self) -> None:
        self.on_output(self.module.q_proj, "queries")
        self.on_output(self.module.k_proj, "keys")
        self.on_call(self.module, "position_embeddings")

    def projected(self) -> tuple[Tensor, Tensor]:
        return self.seen("queries")[0], self.seen("keys")[0]


def _of_equal_length(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Lengths and counts of neighbours that are as long, as many as are computed together."""
    for length, group in groupby(lengths):
        left, at_once = len(list(group)), max(1, _TOKENS_AT_ONCE // length)
        while left:
            yield length, min(left, at_once)
            left -= min(left, at_once)


def _by_head(keys: Tensor, n_heads: int) -> Tensor:
    return keys.unflatten(-1, (n_heads, -1))
