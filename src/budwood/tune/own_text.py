"""Text that a chat model writes by itself: replies, and the requests to reply to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from budwood.checks import need_at_least
from budwood.errors import InputError
from budwood.files import write_text
from budwood.runs import read_json
from budwood.tune.encoding import (
    IGNORED,
    Padded,
    Row,
    inner_model,
    pad_of,
    prompt_tokens,
    tokens_before_request,
)
from budwood.tune.observe import evaluating

REQUEST_TOKENS, REPLY_TOKENS = 32, 24
"""Where what the model makes up is cut."""

Advance = Callable[..., None]


def own_text(
    model: Any,
    tokenizer: Any,
    n_texts: int,
    *,
    batch: int = 16,
    seed: int = 0,
    advance: Advance | None = None,
) -> list[Row]:
    """Requests that a model makes up, and its replies to them.

    Given a user's turn that has just begun, a chat model goes on with a request such as it was
    trained on (Magpie, arXiv 2406.08464).

    Args:
        model: the base model, or a PEFT model whose adapter is fresh or off.
        tokenizer: of the model, with a chat template.
        n_texts: how many requests; an empty one gets no reply.
        batch: texts at a time.
        seed: of the draws.
        advance: a function (done, total, note), for a progress bar.

    Returns:
        Rows whose labels are the replies.

    Raises:
        InputError: the model made up nothing but empty requests, or a count is below 1.
        UnsupportedModelError: the chat template does not show where a user's turn begins.
    """
    need_at_least(1, n_texts=n_texts)
    start = tokens_before_request(tokenizer)
    said = _draw(
        model, tokenizer, [start] * n_texts, REQUEST_TOKENS, batch, seed, _part(advance, 0)
    )
    asked = [tokenizer.decode(one, skip_special_tokens=True).strip() for one in said]
    asked = [one for one in asked if one]
    if not asked:
        raise InputError("the model makes up no requests by itself; give texts of your own as rows")
    return replies(
        model,
        tokenizer,
        asked,
        n_tokens=REPLY_TOKENS,
        batch=batch,
        seed=seed,
        advance=_part(advance, 1),
    )


def kept_text(
    file: Path, model: Any, tokenizer: Any, n_texts: int, advance: Advance | None = None
) -> list[Row]:
    """The same, from a file, which is written if it is not there."""
    if not file.exists():
        made = own_text(model, tokenizer, n_texts, advance=advance)
        write_text(file, json.dumps(made))
    return read_json(file)


def replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    n_tokens: int = 48,
    batch: int = 16,
    seed: int = 0,
    advance: Advance | None = None,
) -> list[Row]:
    """What a model itself answers, drawn from its distribution: the ground where it is compared.

    Args:
        model: the base model, or a PEFT model whose adapter is off.
        tokenizer: of the model.
        prompts: what to answer.
        n_tokens: where an answer is cut.
        batch: prompts at a time.
        seed: of the draws.
        advance: a function (done, total, note), for a progress bar.

    Returns:
        Rows whose labels are the replies.

    Raises:
        InputError: a count is below 1.
    """
    asked = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    said = _draw(model, tokenizer, asked, n_tokens, batch, seed, advance)
    return [
        {"input_ids": prompt + reply, "labels": [IGNORED] * len(prompt) + reply}
        for prompt, reply in zip(asked, said)
    ]


@torch.inference_mode()
def _draw(
    model: Any,
    tokenizer: Any,
    starts: Sequence[list[int]],
    n_tokens: int,
    batch: int,
    seed: int,
    advance: Advance | None,
) -> list[list[int]]:
    """How a model goes on, up to the end of the turn and with it."""
    need_at_least(1, batch=batch, n_tokens=n_tokens)
    pad, ends = pad_of(tokenizer), _ends(model, tokenizer)
    found: list[list[int]] = []
    with torch.random.fork_rng(), evaluating(model), _own_distribution(model):
        torch.manual_seed(seed)
        for begin in range(0, len(starts), batch):
            rows = [{"input_ids": one, "labels": one} for one in starts[begin : begin + batch]]
            inputs = Padded(pad, trim=False)(rows)
            output = model.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                max_new_tokens=n_tokens,
                pad_token_id=pad,
            )
            said = output[:, inputs["input_ids"].shape[1] :].tolist()
            found += [_up_to_end(one, ends, pad) for one in said]
            if advance:
                advance(len(found), len(starts))
    return found


@contextmanager
def _own_distribution(model: Any) -> Iterator[None]:
    """Sampling without what a checkpoint asks for, such as a temperature or a penalty."""
    from transformers import GenerationConfig

    base = inner_model(model)
    asked = base.generation_config
    ends = {"bos_token_id": asked.bos_token_id, "eos_token_id": asked.eos_token_id}
    base.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, **ends
    )
    try:
        yield
    finally:
        base.generation_config = asked


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a turn."""
    known = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}


def _up_to_end(tokens: list[int], ends: set[int], pad: int) -> list[int]:
    """Tokens up to the end of the turn and with it, without padding; at least one."""
    n = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    n = next((i for i, token in enumerate(tokens[:n]) if token == pad and pad not in ends), n)
    return tokens[: max(n, 1)]


def _part(advance: Advance | None, i: int) -> Advance | None:
    """Progress of the first or the second half."""
    if advance is None:
        return None
    return lambda done, total, note="": advance(i * total + done, 2 * total, note)
