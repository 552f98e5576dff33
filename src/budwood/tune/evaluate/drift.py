"""How far a tuned model has moved from its base: on text, and on replies to chat prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from budwood.errors import InputError
from budwood.tune.encoding import (
    IGNORED,
    LeftPadded,
    Row,
    pad_of,
    prompt_tokens,
    takes_logits_to_keep,
)
from budwood.tune.evaluate.scores import Score
from budwood.tune.losses import token_kl

PROMPTS = Path(__file__).parents[1] / "tasks" / "prompts.jsonl"
"""Everyday requests that ship."""

WINDOW = 256


def text_windows(path: Path, tokenizer: Any, n_windows: int, length: int = WINDOW) -> list[Row]:
    """Windows of a text, spread evenly over it; all tokens but the first count.

    Args:
        path: UTF-8 text.
        tokenizer: of the model.
        n_windows: how many; 0 for the whole text.
        length: tokens in each.

    Raises:
        InputError: the file can't be read, or is shorter than one window.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read {path}: {reason}") from error
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    if not windows:
        raise InputError(f"{path} has {len(tokens)} tokens; a window needs {length}")
    if n_windows and n_windows < len(windows):
        windows = [windows[i * len(windows) // n_windows] for i in range(n_windows)]
    return [{"input_ids": w, "labels": [IGNORED, *w[1:]]} for w in windows]


def chat_prompts(limit: int = 0) -> list[str]:
    """The prompts that ship, the first ``limit`` of them; 0 for all."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines][: limit or None]


@torch.inference_mode()
def replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    n_tokens: int = 48,
    batch: int = 16,
    seed: int = 0,
    advance: Callable[..., None] | None = None,
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
    """
    pad = pad_of(tokenizer)
    found: list[Row] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch):
            asked = [prompt_tokens(tokenizer, prompt) for prompt in prompts[start : start + batch]]
            rows = [{"input_ids": one, "labels": one} for one in asked]
            inputs = LeftPadded(pad, trim=False)(rows)
            output = model.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                max_new_tokens=n_tokens,
                pad_token_id=pad,
            )
            said = output[:, inputs["input_ids"].shape[1] :].tolist()
            found += [_reply(one, tokens, tokenizer) for one, tokens in zip(asked, said)]
            if advance:
                advance(len(found), len(prompts))
    return found


@torch.inference_mode()
def measure_drift(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    name: str,
    *,
    batch: int = 4,
    group: str = "general",
    advance: Callable[..., None] | None = None,
) -> tuple[list[Score], list[Score]]:
    """Perplexity before and after, and divergence from the base model, token by token.

    Args:
        model: a ``PeftModel``, or a plain model, for which after equals before.
        tokenizer: its padding token is used.
        rows: tokens and labels.
        name: of the text, in the scores.
        batch: rows at a time.
        group: of the scores.
        advance: a function (done, total, note), for a progress bar.

    Returns:
        Scores of the base model and of the tuned one: ``perplexity`` and ``kl``.
    """
    model.eval()
    collate = LeftPadded(pad_of(tokenizer), multiple=1, trim=takes_logits_to_keep(model))
    adapted = hasattr(model, "disable_adapter")
    sums: list[tuple[float, float, float, int]] = [(0.0, 0.0, 0.0, 0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
    for start in range(0, len(rows), batch):
        chosen = order[start : start + batch]
        inputs = {
            key: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for key, value in collate([rows[i] for i in chosen]).items()
        }
        labels = inputs.pop("labels")
        tuned = model(**inputs).logits
        base = tuned
        if adapted:
            with model.disable_adapter():
                base = model(**inputs).logits
        for i, one in zip(chosen, _sums(base, tuned, labels, adapted)):
            sums[i] = one
        if advance:
            advance(start + len(chosen), len(rows))
    befores, afters, divergences, counts = zip(*sums)
    weights = tuple(float(count) for count in counts)
    nothing = (0.0,) * len(weights)
    return (
        [
            Score(name, "perplexity", group, befores, weights),
            Score(name, "kl", group, nothing, weights),
        ],
        [
            Score(name, "perplexity", group, afters, weights),
            Score(name, "kl", group, divergences, weights),
        ],
    )


def _sums(
    base: torch.Tensor, tuned: torch.Tensor, labels: torch.Tensor, adapted: bool
) -> list[tuple[float, float, float, int]]:
    """Per row: negative log-likelihood of base and tuned model, divergence, number of tokens."""
    found = []
    for b, t, wanted in zip(base[:, :-1], tuned[:, :-1], labels[:, 1:]):
        at = wanted != IGNORED
        after = F.cross_entropy(t[at].float(), wanted[at], reduction="sum")
        before, divergence = after, after.new_zeros(())
        if adapted:
            before = F.cross_entropy(b[at].float(), wanted[at], reduction="sum")
            divergence = token_kl(b[at], t[at]).sum()
        found.append((float(before), float(after), float(divergence), int(at.sum())))
    return found


def _reply(asked: list[int], said: list[int], tokenizer: Any) -> Row:
    ends = {tokenizer.eos_token_id, pad_of(tokenizer)}
    n_said = next((i + 1 for i, token in enumerate(said) if token in ends), len(said))
    said = said[:n_said]
    return {"input_ids": asked + said, "labels": [IGNORED] * len(asked) + said}
