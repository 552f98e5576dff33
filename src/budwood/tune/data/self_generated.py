"""Self-generated text: requests that a chat model makes up, and its replies to them.

A model without a chat template writes plain text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from budwood.checks import need_at_least
from budwood.errors import InputError, UnsupportedModelError
from budwood.files import digest, read_json, write_text
from budwood.fingerprint import fingerprint_of
from budwood.progress import Progress, silent
from budwood.tune.base_model import evaluating
from budwood.tune.data.batches import Padded, pad_of
from budwood.tune.data.encoding import IGNORED, EncodedExample, token_rows
from budwood.tune.data.template import (
    around_request,
    prompt_tokens,
    tokens_before_request,
)
from budwood.tune.data.tokens import n_common, tokens_behind
from budwood.unwrap import innermost

REQUEST_TOKENS, REPLY_TOKENS = 32, 24
"""Longest request and reply, in tokens; of plain text both together."""
_FEWEST_OF = 0.5
"""Least fraction of the texts in a file that does not say how many were asked for."""


def self_generate(
    model: Any,
    tokenizer: Any,
    n_texts: int,
    *,
    batch: int = 16,
    seed: int = 0,
    progress: Progress = silent,
) -> list[EncodedExample]:
    """Let a model make up requests, and reply to them.

    Given the beginning of a user's turn, a chat model continues with a request like those that it
    was trained on (Magpie, arXiv 2406.08464). Without a chat template it writes plain text instead,
    from the token on with which texts begin.

    Args:
        model: the base model, or a PEFT model whose adapter is fresh or off.
        tokenizer: of the model.
        n_texts: number of requests, or of plain texts; an empty request gets no reply.
        batch: texts at a time.
        seed: seed of the draws.
        progress: called after each batch.

    Returns:
        Examples whose labels are the replies, or the plain texts.

    Raises:
        InputError: all requests are empty, or a count is below 1.
        UnsupportedModelError: the chat template does not show where a user's turn begins, or there
            is neither a template nor a token with which texts begin or end.
    """
    need_at_least(1, n_texts=n_texts)
    start, is_chat = start_of_text(tokenizer)
    if not is_chat:
        starts = [start] * n_texts
        n_tokens = REQUEST_TOKENS + REPLY_TOKENS
        drawn = _draw(model, tokenizer, starts, n_tokens, batch, seed, progress)
        return [
            {"input_ids": start + tokens, "labels": [IGNORED] * len(start) + tokens}
            for tokens in drawn
        ]

    def part(i: int) -> Progress:
        return lambda done, total, note="": progress(i * total + done, 2 * total, note)

    starts = [start] * n_texts
    drawn = _draw(model, tokenizer, starts, REQUEST_TOKENS, batch, seed, part(0))
    requests = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in drawn]
    requests = [request for request in requests if request]
    if not requests:
        raise InputError("the model makes up no requests; give texts of your own as rows")
    return replies(
        model,
        tokenizer,
        requests,
        n_tokens=REPLY_TOKENS,
        batch=batch,
        seed=seed,
        progress=part(1),
    )


def start_of_text(tokenizer: Any) -> tuple[list[int], bool]:
    """The tokens that self-generated text begins with, and whether it is a chat.

    Raises:
        UnsupportedModelError: as :func:`self_generate`.
    """
    if getattr(tokenizer, "chat_template", None):
        return tokens_before_request(tokenizer), True
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token], False
    raise UnsupportedModelError(
        "the tokenizer has neither a chat template nor a token with which texts begin or end, from "
        "which self-generated text starts; train with slim:texts=0"
    )


def cached_texts(
    file: Path, model: Any, tokenizer: Any, n_texts: int, progress: Progress = silent
) -> list[EncodedExample]:
    """Read self-generated texts from a file; generate and write them if there is none.

    Args:
        file: holds the texts, and what they were made with.
        model: the base model, or a PEFT model whose adapter is fresh or off.
        tokenizer: of the model.
        n_texts: number of texts.
        progress: called after each batch.

    Raises:
        InputError: the file is none of self-generated texts, or its texts are of another model,
            tokenizer or number.
    """
    made_with = {
        "model": fingerprint_of(innermost(model)),
        "tokenizer": digest(tokenizer.get_vocab()),
        "n": n_texts,
    }
    if not file.exists():
        texts = self_generate(model, tokenizer, n_texts, progress=progress)
        write_text(file, json.dumps({**made_with, "texts": texts}))
    return _texts_of(read_json(file), file, made_with)


def _texts_of(saved: Any, file: Path, made_with: dict[str, Any]) -> list[EncodedExample]:
    """The texts in a file; older files hold a plain list."""
    if isinstance(saved, list):
        n = made_with["n"]
        if not n * _FEWEST_OF <= len(saved) <= n:  # requests that came out empty were left out
            saved = {**made_with, "n": len(saved)}
        else:
            saved = {**made_with, "texts": saved}
    if not isinstance(saved, dict):
        raise InputError(f"{file} holds no self-generated texts; give another file, or remove it")
    for key, value in made_with.items():
        if saved.get(key) != value:
            raise InputError(
                f"{file} holds texts with {key}={saved.get(key)!r}, and {key}={value!r} is needed; "
                "give another file, or remove it"
            )
    return token_rows(saved.get("texts") or [], f"the texts in {file}")


def replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    n_tokens: int = 48,
    batch: int = 16,
    seed: int = 0,
    progress: Progress = silent,
) -> list[EncodedExample]:
    """Draw a model's own replies, on which its tuned version is compared with it.

    Args:
        model: the base model, or a PEFT model whose adapter is off.
        tokenizer: of the model.
        prompts: requests to reply to.
        n_tokens: longest reply, in tokens.
        batch: prompts at a time.
        seed: seed of the draws.
        progress: called after each batch.

    Returns:
        Examples whose labels are the replies.

    Raises:
        InputError: a count is below 1.
    """
    asked = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    drawn = _draw(model, tokenizer, asked, n_tokens, batch, seed, progress)
    return [
        {"input_ids": prompt + reply, "labels": [IGNORED] * len(prompt) + reply}
        for prompt, reply in zip(asked, drawn)
    ]


def in_forms_of(
    rows: Sequence[EncodedExample], texts: Sequence[EncodedExample], tokenizer: Any
) -> Sequence[EncodedExample]:
    """Self-generated texts, also without the chat template if some rows are without it.

    Otherwise the template alone would tell training data from other text, and other plain text
    would count as training data.

    Args:
        rows: training data, ``input_ids`` and ``labels``.
        texts: of :func:`self_generate`.
        tokenizer: of the model.
    """
    if not getattr(tokenizer, "chat_template", None):
        return texts
    _, behind = around_request(tokenizer)
    if all(_ends_as(_prompt(row), behind) for row in rows):
        return texts
    begin = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
    line = tokens_behind(tokenizer, "a", "\n")
    special = set(tokenizer.all_special_ids)
    plain = []
    for row in with_asked(texts, tokenizer):
        said = [label for label in row["labels"] if label != IGNORED and label not in special]
        asked = [token for token, mark in zip(row["input_ids"], row.get("asked", ())) if mark]
        text = asked + line + said
        plain.append({"input_ids": begin + text, "labels": [IGNORED] * len(begin) + text})
    return [*texts, *plain]


def with_asked(rows: Sequence[EncodedExample], tokenizer: Any) -> list[EncodedExample]:
    """Rows with ``asked``: what is between the template's parts of the first prompt.

    Args:
        rows: ``input_ids`` and ``labels``, as of :func:`self_generate`. Rows with ``asked``, as
            those of :func:`budwood.tune.data.encoding.encode`, stay as they are, and so do rows
            that the template does not begin.
        tokenizer: of the model.

    Raises:
        UnsupportedModelError: the chat template does not show where a user's turn begins.
    """
    before, behind = around_request(tokenizer)
    return [row if "asked" in row else _with_asked(row, before, behind) for row in rows]


def _prompt(row: EncodedExample) -> list[int]:
    """The tokens before the first that has a label."""
    n = next((i for i, label in enumerate(row["labels"]) if label != IGNORED), 0)
    return row["input_ids"][:n]


def _ends_as(prompt: list[int], behind: list[int]) -> bool:
    """Whether a prompt ends as the template ends it.

    The token at the seam may differ, where the tokenizer joins it with the request's characters.
    """
    return len(prompt) >= len(behind) and prompt[len(prompt) - len(behind) + 1 :] == behind[1:]


def _with_asked(row: EncodedExample, before: list[int], behind: list[int]) -> EncodedExample:
    prompt = _prompt(row)
    first, last = n_common(before, prompt), len(prompt) - len(behind)
    if first < len(before) - 1 or not _ends_as(prompt, behind) or first > last:
        return row
    asked = [0] * first + [1] * (last - first)
    return {**row, "asked": asked + [0] * (len(row["labels"]) - last)}


@torch.inference_mode()
def _draw(
    model: Any,
    tokenizer: Any,
    starts: Sequence[list[int]],
    n_tokens: int,
    batch: int,
    seed: int,
    progress: Progress,
) -> list[list[int]]:
    """Continuations of some beginnings, up to and with the end of the turn."""
    need_at_least(1, batch=batch, n_tokens=n_tokens)
    pad, ends = pad_of(tokenizer), _ends(model, tokenizer)
    drawn: list[list[int]] = []
    with torch.random.fork_rng(), evaluating(model), _own_distribution(model):
        torch.manual_seed(seed)
        for first in range(0, len(starts), batch):
            rows = [{"input_ids": ids, "labels": ids} for ids in starts[first : first + batch]]
            inputs = Padded(pad, trim=False)(rows)
            output = model.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                max_new_tokens=n_tokens,
                pad_token_id=pad,
            )
            continuations = output[:, inputs["input_ids"].shape[1] :].tolist()
            drawn += [_up_to_end(tokens, ends, pad) for tokens in continuations]
            progress(len(drawn), len(starts), "writing self-generated text")
    return drawn


@contextmanager
def _own_distribution(model: Any) -> Iterator[None]:
    """Sample without the checkpoint's own settings, such as a temperature or a penalty."""
    from transformers import GenerationConfig

    base = innermost(model)
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
