"""Which visual tokens to keep: the pure tensor function behind every way of pruning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from budwood.errors import InputError, ShapeError, UnknownNameError
from budwood.prune.budget import Budget
from budwood.prune.methods import METHODS
from budwood.prune.methods.base import Method


@dataclass(frozen=True)
class Split:
    """How a budget was divided.

    Reading a number waits for the device the first time; creating and passing one on does not.

    Attributes:
        counts: reserved, by text, by saliency; ints, or int64 of shape (3,) on any device.
    """

    counts: Tensor | tuple[int, int, int] = (0, 0, 0)

    @cached_property
    def _ints(self) -> tuple[int, int, int]:
        counts = self.counts.tolist() if isinstance(self.counts, Tensor) else self.counts
        reserved, by_text, by_saliency = counts
        return reserved, by_text, by_saliency

    @property
    def reserved(self) -> int:
        """Tokens that either list kept outright, both lists together."""
        return self._ints[0]

    @property
    def by_text(self) -> int:
        """Further tokens chosen by relevance to the text."""
        return self._ints[1]

    @property
    def by_saliency(self) -> int:
        """Further tokens chosen by saliency."""
        return self._ints[2]

    def __repr__(self) -> str:
        reserved, by_text, by_saliency = self._ints
        return f"Split(reserved={reserved}, by_text={by_text}, by_saliency={by_saliency})"


@dataclass(frozen=True, eq=False)
class Selection:
    """Visual tokens chosen for one image.

    Attributes:
        indices: kept tokens in the order in which the LLM sees them, int64, shape (n_kept,),
            sorted. Distinct and exactly as many as asked for; only under ``compat="official"``
            may indices repeat, and be fewer.
        relevance: text-to-image score per token, float32, shape (n_visual,); None if the method
            does not compute it.
        saliency: saliency per token, float32, shape (n_visual,); None if the method does not
            use it.
        split: reserved, by text and by saliency, as chosen before overlaps are refilled; zeros
            for a method that scores nothing.
    """

    indices: Tensor
    relevance: Tensor | None
    saliency: Tensor | None
    split: Split


@torch.no_grad()
def select(
    visual: Tensor,
    text: Tensor | None = None,
    saliency: Tensor | None = None,
    *,
    keep: int | float | Budget,
    method: str | Method = "adav",
    compat: str | None = None,
    n_crops: int = 1,
    generator: torch.Generator | None = None,
    validate: bool = True,
) -> Selection:
    """Choose the visual tokens of one image that are worth feeding to the LLM.

    Computes in float32 on the device of ``visual``; differentiates through nothing.

    Args:
        visual: projected visual tokens in LLM embedding space, floating point,
            shape (n_visual, d_model); all crops of the image, in the LLM's order.
        text: LLM input embeddings of the question, shape (n_text, d_model), n_text ≥ 0; may be
            None for a method that needs no text.
        saliency: importance per visual token, such as [CLS] attention, non-negative,
            shape (n_visual,), in the order of ``visual``; may be None for a method that needs none.
        keep: tokens to keep, an int in [1, n_visual], or a ratio of them, a float in (0, 1].
        method: a name in ``METHODS``, or an instance with parameters of its own.
        compat: ``"official"`` reproduces what the method's authors published, faults included.
        n_crops: crops of equal size in ``visual``, one after the other in the encoder's order;
            read only under ``compat="official"``.
        generator: source of randomness for the methods that draw; on any device.
        validate: look for NaN, infinities and negative saliency, which waits for the device.
            Without it bad values give a legal but meaningless selection; see :func:`usable`.

    Returns:
        The selection; see :class:`Selection`.

    Raises:
        ShapeError: wrong shape, dtype or device, or a tensor that the method needs is missing.
        BudgetError: ``keep`` is not a count or a ratio, or is above n_visual.
        UnknownNameError: unknown method or ``compat``.
        InputError: NaN, infinite or negative values (``validate`` only).
    """
    chosen = resolve_method(method, compat, n_crops)
    _check_shapes(visual, text, saliency, chosen)
    n_keep = Budget.parse(keep).count(len(visual))
    if validate:
        _check_values(visual=visual, text=text, saliency=saliency)
    # Under autocast the cosine would fall to half precision, and temperature multiplies its error.
    with torch.autocast(visual.device.type, enabled=False):
        choice = chosen.choose(visual, text, saliency, n_keep, generator)
    return Selection(
        choice.indices.sort().values, choice.relevance, choice.saliency, Split(choice.split)
    )


def resolve_method(method: str | Method, compat: str | None = None, n_crops: int = 1) -> Method:
    """The method behind what a user gives.

    Args:
        method: a name in ``METHODS``, or an instance.
        compat: None, or ``"official"`` for the published behaviour.
        n_crops: crops of the image, for ``compat="official"``.

    Raises:
        UnknownNameError: unknown name or ``compat``, or no published behaviour is known.
        ShapeError: ``n_crops`` is below 1.
    """
    chosen = method if isinstance(method, Method) else METHODS.get(method)()
    if compat is None:
        return chosen
    if compat != "official":
        raise UnknownNameError(f"unknown compat {compat!r}; give 'official', or None to correct it")
    if n_crops < 1:
        raise ShapeError(f"n_crops={n_crops} is below 1; give the number of crops of the image")
    return chosen.official(n_crops)


def usable(visual: Tensor, text: Tensor | None = None, saliency: Tensor | None = None) -> Tensor:
    """Whether all values are finite and saliency is non-negative, as a bool of shape ().

    Left on the device, so that the hot path need not wait: read it later, with the results.
    """
    # A sum is finite only if every term is, and is one cheap pass without a mask in memory.
    given = [visual, *(x for x in (text, saliency) if x is not None)]
    fine = torch.stack([x.sum(dtype=torch.float32).isfinite() for x in given]).all()
    return fine if saliency is None else fine & (saliency >= 0).all()


def _check_shapes(
    visual: Tensor, text: Tensor | None, saliency: Tensor | None, method: Method
) -> None:
    if visual.ndim != 2 or 0 in visual.shape:
        raise ShapeError(
            f"visual has shape {tuple(visual.shape)}, expected (n_visual, d_model), not empty; "
            "give one image at a time"
        )
    n_visual, d_model = visual.shape
    if text is None and method.needs_text:
        raise ShapeError(f"method {method.name!r} needs text, shape (n_text, {d_model}); got None")
    if saliency is None and method.needs_saliency:
        raise ShapeError(f"method {method.name!r} needs saliency, shape ({n_visual},); got None")
    if text is not None and (text.ndim != 2 or text.shape[1] != d_model):
        raise ShapeError(
            f"text has shape {tuple(text.shape)}, expected (n_text, {d_model}) to match visual "
            f"{tuple(visual.shape)}"
        )
    if saliency is not None and saliency.shape != (n_visual,):
        raise ShapeError(
            f"saliency has shape {tuple(saliency.shape)}, expected ({n_visual},): one score for "
            "each visual token"
        )
    for name, tensor in (("visual", visual), ("text", text), ("saliency", saliency)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ShapeError(f"{name} has dtype {tensor.dtype}, expected a floating-point one")
        if tensor.device != visual.device:
            raise ShapeError(f"{name} is on {tensor.device}, visual on {visual.device}; move one")


def _check_values(**tensors: Tensor | None) -> None:
    if usable(**tensors):  # type: ignore[arg-type]
        return
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        n_bad = int((~tensor.isfinite()).sum())
        if n_bad:
            raise InputError(
                f"{name} has {n_bad} NaN or infinite of {tensor.numel()} values; check the image, "
                "the dtype (float16 overflows) and the weights"
            )
    saliency = tensors["saliency"]
    n_negative = 0 if saliency is None else int((saliency < 0).sum())
    if n_negative:
        raise InputError(f"saliency has {n_negative} negative values; it must be 0 or more")
