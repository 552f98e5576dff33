"""Translate arguments of ``generate`` that depend on the prompt to the pruned one and back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import utils as generation

from budwood.errors import AttachError, InputError
from budwood.unwrap import signature

_VIDEO = "pixel_values_videos"


class PromptSwap:
    """Puts the original prompt back in front of what was generated after the pruned one.

    Args:
        original: the prompts as the user gave them, int64, shape (batch, n_tokens).
        n_pruned: length of the pruned prompts.
    """

    def __init__(self, original: Tensor, n_pruned: int) -> None:
        self.original = original
        self.n_pruned = n_pruned

    def restore(self, sequences: Tensor) -> Tensor:
        """Sequences of shape (batch · n, n_pruned + n_new) to (batch · n, n_tokens + n_new).

        Beams and returned sequences of one prompt stand together, n of them.
        """
        each = len(sequences) // len(self.original)
        prompts = self.original.to(sequences.device).repeat_interleave(each, dim=0)
        return torch.cat((prompts, sequences[:, self.n_pruned :]), dim=1)

    def restored(self, output: Any) -> Any:
        """What ``generate`` returned, sequences or a dict that holds them, with whole prompts."""
        if isinstance(output, Tensor):
            return self.restore(output)
        if isinstance(getattr(output, "sequences", None), Tensor):
            output.sequences = self.restore(output.sequences)
        return output

    def restore_row(self, row: int, sequence: Tensor) -> Tensor:
        """Restore one sequence, shape (n_pruned + n_new,), of the prompt ``row``."""
        prompt = self.original[row].to(sequence.device)
        return torch.cat((prompt, sequence[self.n_pruned :]))

    def wrap(self, kwargs: dict[str, Any]) -> None:
        """Let a user's own criteria, processors and streamer see the original prompt."""
        if kwargs.get("stopping_criteria") is not None:
            wrapped = [_Criteria(criterion, self) for criterion in kwargs["stopping_criteria"]]
            kwargs["stopping_criteria"] = StoppingCriteriaList(wrapped)
        if kwargs.get("logits_processor") is not None:
            wrapped = [_Processor(processor, self) for processor in kwargs["logits_processor"]]
            kwargs["logits_processor"] = LogitsProcessorList(wrapped)
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _Streamer(kwargs["streamer"], self)
        allowed = kwargs.get("prefix_allowed_tokens_fn")
        if allowed is not None:
            kwargs["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
                row, self.restore_row(row, ids)
            )


class _Criteria(StoppingCriteria):
    def __init__(self, inner: Any, swap: PromptSwap) -> None:
        self.inner, self.swap = inner, swap

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return self.inner(self.swap.restore(input_ids), scores, **kwargs)


class _Processor(LogitsProcessor):
    def __init__(self, inner: Any, swap: PromptSwap) -> None:
        self.inner, self.swap = inner, swap

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.inner(self.swap.restore(input_ids), scores)


class _Streamer:
    """Passes tokens on, with the original prompt in place of the pruned one."""

    def __init__(self, inner: Any, swap: PromptSwap) -> None:
        self.inner, self.swap, self.at_prompt = inner, swap, True

    def put(self, value: Tensor) -> None:
        value, self.at_prompt = (self.swap.original.cpu() if self.at_prompt else value), False
        self.inner.put(value)

    def end(self) -> None:
        self.inner.end()


def effective(name: str, kwargs: dict[str, Any], model: Any) -> Any:
    """Look up a generation option as ``generate`` does; None if it is not set."""
    for source in (kwargs.get("generation_config"), model.generation_config):
        if (
            kwargs.get(name) is None
            and source is not None
            and getattr(source, name, None) is not None
        ):
            return getattr(source, name)
    return kwargs.get(name)


def shorten_limits(kwargs: dict[str, Any], model: Any, n_removed: int) -> None:
    """Correct ``max_length`` and ``min_length``, which count the prompt, for the shorter one.

    ``max_new_tokens`` and ``min_new_tokens`` do not count it, go first where given, and stay.
    """
    for name, new, least in (
        ("max_length", "max_new_tokens", 1),
        ("min_length", "min_new_tokens", 0),
    ):
        length = effective(name, kwargs, model)
        if not length or effective(new, kwargs, model) is not None:
            continue
        length = max(length - n_removed, least)
        if kwargs.get("generation_config") is None or kwargs.get(name) is not None:
            kwargs[name] = length
        else:  # as a keyword beside a config it would be deprecated
            kwargs["generation_config"] = copy.copy(kwargs["generation_config"])
            setattr(kwargs["generation_config"], name, length)


def prompt_mask(ids: Tensor, kwargs: dict[str, Any], model: Any) -> Tensor:
    """Infer the attention mask as ``generate`` does: from padding, if that is safe."""
    pad, eos = effective("pad_token_id", kwargs, model), effective("eos_token_id", kwargs, model)
    ends = eos if isinstance(eos, list | tuple) else [eos]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return ids.ne(pad).long()


def pad_token(kwargs: dict[str, Any], model: Any) -> int:
    """The token of new padding: masked, so any token but a placeholder will do."""
    pad = effective("pad_token_id", kwargs, model)
    if pad is None:
        pad = effective("eos_token_id", kwargs, model)
    pad = pad[0] if isinstance(pad, list | tuple) else pad
    return 0 if pad is None else int(pad)


def flash_attention(model: Any) -> bool:
    """Whether the LLM attends by FlashAttention, which drops a mask that masks nothing."""
    return "flash" in str(model.config.get_text_config()._attn_implementation)


def loses_mask(kwargs: dict[str, Any], model: Any) -> bool:
    """Whether ``generate`` drops a mask that masks nothing, and then looks at gaps in positions."""
    return flash_attention(model) or effective("use_cache", kwargs, model) is False


def refuse_impossible(kwargs: dict[str, Any], model: Any) -> None:
    """Refuse options of ``generate`` that cannot work with a pruned prompt.

    Raises:
        AttachError: one of them is given; the message says what to do instead.
    """
    if kwargs.get("assistant_model") is not None:
        raise AttachError(
            "assistant_model cannot see the pruned image features; use prompt_lookup_num_tokens, "
            "or detach for this call"
        )
    if isinstance(kwargs.get("custom_generate"), str):
        raise AttachError(
            f"custom_generate={kwargs['custom_generate']!r} replaces generate() as a whole; pass a "
            "function that decodes, or detach for this call"
        )
    if effective("prefill_chunk_size", kwargs, model) and not hasattr(
        generation, "_slice_mm_encoder_output"
    ):
        raise AttachError(
            "prefill_chunk_size loses the images in this version of transformers; leave it out, or "
            "update transformers to 5.23"
        )
    if effective("cache_implementation", kwargs, model) == "paged":
        raise AttachError(
            "cache_implementation='paged' takes text alone; choose another cache, or detach"
        )


def refuse_inputs(inputs: dict[str, Any], whole_video: bool) -> None:
    """Refuse inputs that cannot be cut in step with the prompt.

    Args:
        inputs: keyword arguments of ``generate`` or ``forward``.
        whole_video: there is a video that cannot be pruned.

    Raises:
        AttachError: a video beside images.
    """
    if whole_video:
        raise AttachError("images with a video cannot be pruned; give one of them, or detach")


def refuse_unknown_video(inputs: dict[str, Any], model: Any) -> None:
    """Refuse a video for a model that takes none, whose forward would ignore it.

    Raises:
        InputError: there is one.
    """
    if inputs.get(_VIDEO) is not None and _VIDEO not in signature(model.forward).parameters:
        raise InputError(
            f"{model.config.model_type} takes no videos, and {_VIDEO} is given; leave it out"
        )


def refuse_explicit(inputs: dict[str, Any]) -> None:
    """Refuse inputs that pruning computes itself.

    Raises:
        InputError: explicit positions, or an attention mask that is not 2-D.
    """
    if inputs.get("position_ids") is not None:
        raise InputError("position_ids are worked out from the pruned prompt; leave them out")
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, expected (batch, n_tokens)"
        )
