"""Answers to many questions about few pictures, each picture encoded once.

The benchmark measures ``attach`` and ``generate`` themselves. It shares only work that comes out
the same each time: the encoded pictures, between questions, methods and budgets; and, without
pruning, the keys and values of the prompt up to where the questions begin to differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from budwood.bench.prune.plan import Variant
from budwood.caches import cache_of, name_for
from budwood.prune.chat import GREEDY, answers
from budwood.prune.encoded import Encoded
from budwood.prune.families import Family, family_of
from budwood.prune.session import attach
from budwood.unwrap import innermost


@dataclass(frozen=True)
class Answered:
    """Answers of one call.

    Attributes:
        texts: one per row.
        n_visual: visual tokens of each row's picture before pruning.
        n_kept: visual tokens that the LLM saw.
    """

    texts: list[str]
    n_visual: list[int]
    n_kept: list[int]


def answer_pruned(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    encoded: Encoded,
    variant: Variant,
    *,
    keep: int | float,
    seed: int,
    max_new_tokens: int,
) -> Answered:
    """Answer a batch with pruning attached.

    Args:
        model: the model, with nothing attached.
        processor: its processor.
        inputs: one row per question, one picture in each.
        encoded: the picture of each row.
        variant: how to prune.
        keep: as in ``attach``.
        seed: for methods that draw.
        max_new_tokens: where an answer is cut.
    """
    options: dict[str, Any] = {**variant.options, "keep": keep, "seed": seed, "encoded": encoded}
    with attach(model, processor=processor, **options) as session:
        output = model.generate(**inputs, **GREEDY, max_new_tokens=max_new_tokens)
    report = session.report
    return Answered(
        answers(processor, output, inputs["input_ids"].shape[1]),
        [image.n_before for image in report],
        [image.n_after for image in report],
    )


@torch.no_grad()
def answer_full(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    encoded: Encoded,
    which: Sequence[int],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Answer a batch with all visual tokens.

    Where positions simply count tokens, rows about one picture share the keys and values of the
    beginning of their prompts, which is exact for a causal LLM. Other families answer as one
    plain batch.

    Args:
        model: the model, with nothing attached.
        processor: its processor.
        inputs: one row per question, one picture in each.
        encoded: the pictures.
        which: picture of each row.
        max_new_tokens: where an answer is cut.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {**GREEDY, "max_new_tokens": max_new_tokens}
    groups = {
        picture: [row for row, about in enumerate(which) if about == picture] for picture in which
    }
    prompts = {
        picture: [ids[row][mask[row].bool()] for row in rows] for picture, rows in groups.items()
    }
    family = family_of(innermost(model), processor)
    if not _can_share(family, inputs, list(prompts.values())):
        return answers(processor, model.generate(**inputs, **options), ids.shape[1])
    texts = [""] * len(ids)
    pad = int(processor.tokenizer.pad_token_id)
    for picture, rows in groups.items():
        shared = _after_prefix(family, prompts[picture], encoded.features[picture], pad)
        output = model.generate(**shared, **options)
        for row, text in zip(rows, answers(processor, output, shared["input_ids"].shape[1])):
            texts[row] = text
    return texts


def _can_share(family: Family, inputs: Mapping[str, Any], groups: list[list[Tensor]]) -> bool:
    """Whether positions count tokens, and every picture lies in the shared beginning."""
    ids, mask = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu()
    if family.positions(inputs, ids, mask) is not None:
        return False
    rests = (prompt[_n_common(prompts) :] for prompts in groups for prompt in prompts)
    return not any((rest == family.image_token_id).any() for rest in rests)


def _after_prefix(
    family: Family, prompts: list[Tensor], features: Tensor, pad: int
) -> dict[str, Any]:
    """Prefill what the prompts share, and give the inputs of ``generate`` for the rest.

    Shorter rests are padded on the left, behind the shared beginning.
    """
    n_shared = _n_common(prompts)
    prefix = prompts[0][:n_shared]
    output = family.model(
        input_ids=prefix[None],
        attention_mask=torch.ones_like(prefix[None]),
        mm_encoder_outputs={family.kind: family.outputs([features])},
        use_cache=True,
        logits_to_keep=1,
    )
    cache = cache_of(output)
    cache.batch_repeat_interleave(len(prompts))
    longest = max(map(len, prompts))
    ids = prefix.new_full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    ids[:, :n_shared], mask[:, :n_shared] = prefix, 1
    for row, prompt in enumerate(prompts):
        rest = len(prompt) - n_shared
        ids[row, longest - rest :], mask[row, longest - rest :] = prompt[n_shared:], 1
    return {"input_ids": ids, "attention_mask": mask, name_for(family.model): cache}


def _n_common(prompts: list[Tensor]) -> int:
    """Length of the beginning that all prompts share; at least one token of each is left."""
    shortest = min(map(len, prompts)) - 1
    heads = torch.stack([prompt[:shortest] for prompt in prompts])
    differs = (heads != heads[0]).any(0).cpu()
    return int(differs.int().argmax()) if differs.any() else shortest
