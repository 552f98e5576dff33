"""Which visual tokens to keep: the pure tensor function behind every way of pruning."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from budwood.errors import InputError, ShapeError, UnknownNameError
from budwood.prune.budget import Budget
from budwood.prune.methods import METHODS
from budwood.prune.methods.base import Extras, Method, Selection
from budwood.spec import build


@torch.no_grad()
def select(
    visual: Tensor,
    text: Tensor | None = None,
    saliency: Tensor | None = None,
    *,
    keep: int | float | Budget,
    method: str | Method = "adav",
    compat: str | None = None,
    n_crops: int | None = None,
    extras: Extras | None = None,
    generator: torch.Generator | None = None,
    validate: bool = True,
) -> Selection:
    """Choose the visual tokens of one image that are worth feeding to the LLM.

    Computes in float32 on the device of ``visual``, without gradients.

    Args:
        visual: projected visual tokens in LLM embedding space, floating point,
            shape (n_visual, d_model); all crops of the image, in the LLM's order.
        text: LLM input embeddings of the question, shape (n_text, d_model), n_text ≥ 0; may be
            None for a method that needs no text.
        saliency: importance per visual token, such as [CLS] attention, non-negative,
            shape (n_visual,), in the order of ``visual``; may be None for a method that needs none.
        keep: tokens to keep, an int in [1, n_visual], or a fraction of them, a float in (0, 1].
        method: a name in ``METHODS``, or an instance with parameters of its own.
        compat: ``"official"`` is an alias: ``method="adav"`` with it is ``method="adav-official"``.
        n_crops: crops of equal size in ``visual``, one after the other in the encoder's order, for
            methods that read whole crops (``adav-official``). None: as the method has it.
        extras: where the tokens are and the encoder's keys, for methods that read them.
        generator: source of randomness for the methods that draw; on any device.
        validate: look for NaN, infinities and negative saliency, which waits for the device.
            Without it bad values give a legal but meaningless selection; see :func:`usable`.

    Returns:
        The selection, its indices sorted and its features, where the method merges tokens, in the
        same order and the dtype of ``visual``; see :class:`Selection`.

    Raises:
        ShapeError: not a tensor, wrong shape, dtype or device, or a tensor that the method needs is
            missing.
        BudgetError: ``keep`` is not a count or a fraction, or is above n_visual.
        UnknownNameError: unknown method or ``compat``.
        InputError: NaN, infinite or negative values (``validate`` only).
    """
    chosen = resolve_method(method, compat)
    if n_crops is not None:
        chosen = chosen.for_crops(n_crops)
    _check_tensors(visual=visual, text=text, saliency=saliency)
    _check_shapes(visual, text, saliency, chosen)
    _check_extras(extras, visual)
    if not isinstance(generator, torch.Generator | None):
        raise InputError(f"generator is a {type(generator).__name__}; give a torch.Generator")
    n_keep = Budget.parse(keep).count(len(visual))
    if validate:
        _check_values(visual=visual, text=text, saliency=saliency)
        if extras is not None and extras.keys is not None and chosen.needs_keys:
            _check_finite("keys", extras.keys)
    # Under autocast the cosine would fall to half precision, and temperature multiplies its error.
    more: dict[str, Any] = {"extras": extras} if chosen.needs_keys or chosen.needs_grid else {}
    with torch.autocast(visual.device.type, enabled=False):
        selection = chosen.choose(visual, text, saliency, n_keep, generator, **more)
    indices, order = selection.indices.sort()
    features = selection.features
    if features is not None:
        features = features[order].to(visual.dtype)
    return dataclasses.replace(selection, indices=indices, features=features)


def generator_for(method: Method, seed: int, number: int = 0) -> torch.Generator:
    """Source of a method's draws for one image of a call.

    It is on the CPU, so that every device draws the same.

    Args:
        method: its own seed is added to ``seed``.
        seed: of ``attach``.
        number: of the image in the call.
    """
    return torch.Generator().manual_seed((seed + method.own_seed) * 1_000_003 + number)


def resolve_method(method: str | Method, compat: str | None = None) -> Method:
    """Turn what a user gives as a method into an instance.

    Args:
        method: a name in ``METHODS``, also with parameters behind it, such as
            ``"adav:reserve=0.1+temperature=50"``, or an instance.
        compat: None, or ``"official"`` for the method ``NAME-official`` with the same parameters.

    Raises:
        UnknownNameError: unknown name or ``compat``, or there is no ``NAME-official``.
        InputError: an unknown parameter, or a value that it does not take.
    """
    chosen = method if isinstance(method, Method) else method_of(method)
    if compat is None:
        return chosen
    if compat != "official":
        raise UnknownNameError(f"unknown compat {compat!r}; give 'official' or leave it out")
    name = f"{chosen.name.removesuffix('-official')}-official"
    if name not in METHODS:
        raise UnknownNameError(
            f"compat='official' is not known for method {chosen.name!r}; leave compat out"
        )
    return METHODS.get(name)(**vars(chosen))  # the fields of a dataclass


def published_form(spec: str) -> str:
    """The name of the published form of a method, with the same parameters.

    >>> published_form("adav:reserve=0.1")
    'adav-official:reserve=0.1'

    Raises:
        UnknownNameError: unknown name, or there is no ``NAME-official``.
        InputError: an unknown parameter, or a value that it does not take.
    """
    _, colon, options = spec.partition(":")
    form = f"{resolve_method(spec, 'official').name}{colon}{options}"
    resolve_method(form)
    return form


def method_of(spec: str) -> Method:
    """Make a method from its name and parameters, ``NAME:parameter=value+parameter=value``.

    >>> method_of("adav:reserve=0.1+temperature=50.0")
    AdaV(reserve=0.1, temperature=50.0)

    Raises:
        UnknownNameError: unknown name.
        InputError: an unknown parameter, or a value that it does not take.
    """
    return build(spec, METHODS)


def usable(visual: Tensor, text: Tensor | None = None, saliency: Tensor | None = None) -> Tensor:
    """Check that all values are finite and saliency is non-negative, without waiting.

    Returns:
        A bool of shape (), left on the device: read it later, with the results.
    """
    # A sum is finite only if every term is, and is one cheap pass without a mask in memory.
    given = [visual, *(x for x in (text, saliency) if x is not None)]
    fine = torch.stack([x.sum(dtype=torch.float32).isfinite() for x in given]).all()
    return fine if saliency is None else fine & (saliency >= 0).all()


def _check_tensors(**given: object) -> None:
    for name, value in given.items():
        if value is None and name != "visual":  # whether the method needs it is checked later
            continue
        if not isinstance(value, Tensor):
            kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
            convert = "torch.from_numpy" if hasattr(value, "__array__") else "torch.tensor"
            raise ShapeError(f"{name} is a {kind}, expected a torch.Tensor; give {convert}({name})")


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


def _check_extras(extras: Extras | None, visual: Tensor) -> None:
    if extras is None:
        return
    if not isinstance(extras, Extras):
        raise ShapeError(f"extras is a {type(extras).__name__}; give budwood.prune.Extras")
    _check_tensors(visual=visual, boxes=extras.boxes, keys=extras.keys)
    n_visual, boxes, keys = len(visual), extras.boxes, extras.keys
    if boxes is not None and boxes.shape != (n_visual, 4):
        raise ShapeError(
            f"boxes have shape {tuple(boxes.shape)}, expected ({n_visual}, 4): one for each "
            "visual token"
        )
    if keys is not None and (keys.ndim != 3 or len(keys) != n_visual):
        raise ShapeError(
            f"keys have shape {tuple(keys.shape)}, expected ({n_visual}, n_heads, d_head)"
        )
    if keys is not None and keys.device != visual.device:
        raise ShapeError(f"keys are on {keys.device}, visual on {visual.device}; move one")


def _check_values(**tensors: Tensor | None) -> None:
    if usable(**tensors):  # type: ignore[arg-type]
        return
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_finite(name, tensor)
    saliency = tensors["saliency"]
    n_negative = 0 if saliency is None else int((saliency < 0).sum())
    if n_negative:
        raise InputError(f"saliency has {n_negative} negative values; it must be 0 or more")


def _check_finite(name: str, tensor: Tensor) -> None:
    n_bad = int((~tensor.isfinite()).sum())
    if n_bad:
        raise InputError(
            f"{name} has {n_bad} NaN or infinite of {tensor.numel()} values; check the image, "
            "the dtype (float16 overflows) and the weights"
        )
