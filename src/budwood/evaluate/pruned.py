"""Load a model and attach pruning, from the arguments of an evaluation harness."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from budwood.checks import need_seed
from budwood.errors import InputError, UnknownNameError
from budwood.loading import SPROUT, load_vlm_model
from budwood.prune.budget import Budgets
from budwood.prune.selection import resolve_method
from budwood.prune.session import PruneSession, attach, check_positions

LOADING = ("pretrained", "device", "dtype", "device_map", "attn_implementation")
PRUNING = ("method", "keep", "compat", "question", "seed", "patches", "positions")
"""Arguments of :func:`load_pruned`."""

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True, eq=False)
class PrunedModel:
    """A model with pruning attached until the object is deleted.

    Attributes:
        model: the transformers model.
        processor: its processor, which pads on the left.
        session: of ``attach``.
    """

    model: Any
    processor: Any
    session: PruneSession


def load_pruned(
    pretrained: str = SPROUT,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    attn_implementation: str | None = None,
    **pruning: Any,
) -> PrunedModel:
    """Load a vision-language model and attach pruning to it.

    Args:
        pretrained: ``"sprout"``, ``"sprout-256"``, a directory or a hub id.
        device: a torch device, or ``"auto"`` for the first GPU, else the CPU.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``, as in
            :func:`budwood.load`.
        device_map: as in ``from_pretrained``, in place of ``device``; needs accelerate.
        attn_implementation: one of ``ATTENTION``; None for transformers' choice.
        pruning: options of ``budwood.prune.attach``: ``method``, ``keep``, ``question``, ….

    Raises:
        InputError: there is no such model, device, dtype or implementation of attention.
        BudwoodError: an option of ``attach`` is wrong.
    """
    if attn_implementation not in (None, *ATTENTION):
        raise UnknownNameError(
            f"unknown attn_implementation {attn_implementation!r}; known: {', '.join(ATTENTION)}"
        )
    _check_early(pruning)
    loaded = load_vlm_model(pretrained, device, dtype, device_map=device_map)
    if attn_implementation is not None:
        try:
            loaded.model.set_attn_implementation(attn_implementation)
        except (ImportError, ValueError) as error:
            raise InputError(f"attn_implementation={attn_implementation}: {error}") from error
    tokenizer = loaded.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    session = attach(loaded.model, processor=loaded.processor, **pruning)
    return PrunedModel(loaded.model, loaded.processor, session)


def _check_early(pruning: Mapping[str, Any]) -> None:
    """Refuse wrong options before the weights are read; ``attach`` checks the rest."""
    Budgets.parse(pruning.get("keep", 1))
    resolve_method(pruning.get("method", "adav"), pruning.get("compat"))
    need_seed(pruning.get("seed", 0))
    check_positions(pruning.get("positions"))


def refuse_unknown(given: Iterable[str], known: Collection[str], what: str) -> None:
    """Refuse arguments that do not exist, and suggest the nearest.

    Args:
        given: names.
        known: names that exist.
        what: what takes them, for the message.

    Raises:
        UnknownNameError: a name is not known.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f", did you mean {near[0]!r}" if near else ""
            raise UnknownNameError(f"{what} has no {name!r}{hint}; it has {', '.join(known)}")


def need_batch(size: Any) -> int:
    """A batch size from a command line.

    Raises:
        InputError: it is no whole number of at least 1, such as ``"auto"``.
    """
    if not str(size).isdigit() or int(size) < 1:
        raise InputError(f"batch_size={size!r}; give a whole number of at least 1")
    return int(size)
