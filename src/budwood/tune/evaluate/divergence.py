"""How far a tuned model has moved from its base, on text and on replies to requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from budwood.checks import need_at_least
from budwood.errors import InputError
from budwood.progress import Progress, silent
from budwood.tune.base_model import adapter_off
from budwood.tune.data.batches import Padded, on_device
from budwood.tune.data.encoding import IGNORED, EncodedExample
from budwood.tune.data.self_generated import replies
from budwood.tune.data.sources import read_text
from budwood.tune.evaluate.base_results import Kept
from budwood.tune.evaluate.scores import Score
from budwood.tune.training.losses import token_kl

CHAT = "chat"
"""Name of the base model's own replies among the texts."""
PROMPTS = Path(__file__).parents[1] / "tasks" / "prompts.jsonl"
"""Shipped everyday requests."""

WINDOW = 256


def text_windows(
    path: Path, tokenizer: Any, n_windows: int, length: int = WINDOW
) -> list[EncodedExample]:
    """Cut a text into windows, spread evenly over it; all tokens but the first are supervised.

    Args:
        path: UTF-8 text.
        tokenizer: of the model.
        n_windows: number of windows; 0 for the whole text.
        length: tokens per window.

    Raises:
        InputError: the file can't be read, or is shorter than one window; a count is too low.
    """
    need_at_least(0, n_windows=n_windows)
    need_at_least(2, length=length)
    tokens = tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
    windows = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    if not windows:
        raise InputError(f"{path} has {len(tokens)} tokens; a window needs {length}")
    if n_windows and n_windows < len(windows):
        windows = [windows[i * len(windows) // n_windows] for i in range(n_windows)]
    return [{"input_ids": w, "labels": [IGNORED, *w[1:]]} for w in windows]


def chat_prompts(limit: int = 0) -> list[str]:
    """The first ``limit`` shipped prompts; 0 for all.

    Raises:
        InputError: the limit is below 0, or above their number.
    """
    need_at_least(0, limit=limit)
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    if limit > len(lines):
        raise InputError(f"there are {len(lines)} prompts, not {limit}; ask for fewer")
    return [json.loads(line)["prompt"] for line in lines[: limit or None]]


def make_texts(
    model: Any,
    tokenizer: Any,
    *,
    text: Path | None,
    n_windows: int,
    n_prompts: int,
    seed: int = 0,
    progress: Progress = silent,
    kept: Kept | None = None,
) -> dict[str, list[EncodedExample]]:
    """Windows of a text, and the base model's own replies to everyday requests.

    Args:
        model: its adapter is off while it replies.
        tokenizer: of the model.
        text: a file; None for no text.
        n_windows: of the text.
        n_prompts: requests; 0 for none.
        seed: of the replies.
        progress: called after each batch.
        kept: replies for earlier adapters on the same base.

    Raises:
        InputError: the file can't be read, is too short, or is called as the replies are; a count
            is below 0.
    """
    need_at_least(0, n_windows=n_windows, n_prompts=n_prompts)
    texts = {}
    if text is not None:
        texts[text_name(text)] = text_windows(text, tokenizer, n_windows)
    if n_prompts:
        asked = chat_prompts(n_prompts)

        def reply() -> list[EncodedExample]:
            with adapter_off(model):
                return replies(model, tokenizer, asked, seed=seed, progress=progress)

        texts[CHAT] = kept.get({"replies": asked, "seed": seed}, reply) if kept else reply()
    return texts


def text_name(text: Path) -> str:
    """Name of a file among the texts: its stem.

    Raises:
        InputError: that is the name of the replies.
    """
    if text.stem == CHAT:
        raise InputError(
            f"{text} is called {CHAT!r} in the results, as the base model's replies are; give the "
            "file another name"
        )
    return text.stem


@torch.inference_mode()
def measure_drift(
    model: Any,
    tokenizer: Any,
    rows: Sequence[EncodedExample],
    name: str,
    *,
    batch: int = 4,
    group: str = "general",
    progress: Progress = silent,
) -> tuple[list[Score], list[Score]]:
    """Measure perplexity before and after, and the divergence from the base model.

    Args:
        model: a ``PeftModel``, or a plain model, for which after equals before.
        tokenizer: its padding token is used.
        rows: tokens and labels.
        name: of the text, in the scores.
        batch: rows at a time.
        group: of the scores.
        progress: called after each batch.

    Returns:
        Scores of the base model and of the tuned one: ``perplexity`` and ``kl``.

    Raises:
        InputError: ``batch`` is below 1.
    """
    need_at_least(1, batch=batch)
    model.eval()
    collate = Padded.of(model, tokenizer, multiple=1)
    adapted = hasattr(model, "disable_adapter")
    sums: list[tuple[float, float, float, int]] = [(0.0, 0.0, 0.0, 0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
    for start in range(0, len(rows), batch):
        chosen = order[start : start + batch]
        inputs = on_device(collate([rows[i] for i in chosen]), model.device)
        labels = inputs.pop("labels")
        tuned = model(**inputs).logits
        base = tuned
        if adapted:
            with model.disable_adapter():
                base = model(**inputs).logits
        for i, one in zip(chosen, _sums(base, tuned, labels, adapted)):
            sums[i] = one
        progress(start + len(chosen), len(rows))
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
