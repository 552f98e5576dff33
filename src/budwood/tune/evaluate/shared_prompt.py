"""lm-eval's model for transformers, which reads a prompt once for all of its answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from budwood.errors import InputError
from budwood.tune.encoding import (
    dated_template,
    is_stateful,
    positions,
    takes,
    takes_logits_to_keep,
)

Request = tuple[tuple[str, str], list[int], list[int]]
Advance = Callable[..., None]

_Base: Any = HFLM
"""Untyped: what lm-eval puts around the class hides it from type checkers."""


class SharedPromptLM(_Base):
    """``HFLM`` whose log-likelihoods cost one pass over each prompt, and not one a choice.

    The answers are read from the prompt's key-value cache, and logits are computed for answers
    alone. Prompts are sorted by length. The numbers are HFLM's but for rounding, and for two things
    that are as in training here: the line break that ends a chat prompt is part of the prompt,
    where HFLM scores it as the beginning of each answer, and so is what the chat template writes
    before an answer, which HFLM leaves out. Models that keep a state are read as HFLM reads them.

    Args:
        pretrained: a causal language model of transformers or PEFT.
        tokenizer: of the model.
        batch_size: prompts at a time.
        advance: a function (done, total, note), for a progress bar.
        kwargs: HFLM's.

    Attributes:
        lead: what the chat template writes before an answer.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any,
        batch_size: int = 16,
        advance: Advance | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            pretrained=pretrained,
            tokenizer=tokenizer,
            batch_size=batch_size,
            chat_template_args=_template_args(tokenizer),
            **kwargs,
        )
        self.lead = ""
        self._n_prompts = batch_size
        self._advance = advance or (lambda done, total, note="": None)
        self._last_alone = {"logits_to_keep": 1} if takes_logits_to_keep(pretrained) else {}
        self._takes_positions = takes(pretrained, "position_ids")
        self._is_stateful = is_stateful(pretrained)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context += self.lead
        if not context.endswith("\n"):
            return super()._encode_pair(context, continuation)
        answer = self.tokenizer.encode(continuation, add_special_tokens=False)
        return self.tok_encode(context), answer

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        if self._is_stateful:  # there is no cache that answers could share
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        answers: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, prompt, answer) in enumerate(requests):
            answers[tuple(prompt[-self._room(answer) :])].append(i)
        prompts = sorted(answers, key=len, reverse=True)
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(prompts), self._n_prompts):
            chosen = prompts[start : start + self._n_prompts]
            rows = [(k, i) for k, prompt in enumerate(chosen) for i in answers[prompt]]
            pairs = self._score(chosen, [(k, requests[i][2]) for k, i in rows])
            for (_, i), pair in zip(rows, pairs):
                found[i] = pair
                self.cache_hook.add_partial("loglikelihood", requests[i][0], pair)
            self._advance(len(found), len(requests))
        return [found[i] for i in range(len(requests))]

    def _room(self, answer: list[int]) -> int:
        """Tokens of a prompt that there is room for; an answer's last one is not read."""
        room = self.max_length - len(answer) + 1
        if room < 1:
            raise InputError(
                f"an answer of {len(answer)} tokens is longer than the {self.max_length} that the "
                "model reads; leave it out"
            )
        return room

    @torch.inference_mode()
    def _score(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[tuple[int, list[int]]]
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of answers.

        Args:
            prompts: tokens.
            answers: number of the prompt, and tokens.
        """
        tokens, mask = _padded(prompts, left=True)
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        first = self.model(
            input_ids=tokens,
            attention_mask=mask,
            use_cache=True,
            **self._placed(positions(mask)),
            **self._last_alone,
        )
        owner = torch.tensor([k for k, _ in answers], device=self.device)
        wanted, real = _padded([answer for _, answer in answers], left=False)
        wanted, real = wanted.to(self.device), real.to(self.device)
        heads = first.logits[:, -1][owner][:, None]
        if wanted.shape[1] > 1:
            cache = first.past_key_values
            cache.batch_select_indices(owner)
            whole = torch.cat([mask[owner], real[:, 1:]], dim=1)  # read where another follows
            later = self.model(
                input_ids=wanted[:, :-1],
                attention_mask=whole,
                past_key_values=cache,
                use_cache=True,
                **self._placed(positions(whole)[:, mask.shape[1] :]),
            )
            heads = torch.cat([heads, later.logits], dim=1)
        return _sums(heads, wanted, real)

    def _placed(self, positions: Tensor) -> dict[str, Tensor]:
        """Positions for a model that takes them; others find them by themselves."""
        return {"position_ids": positions} if self._takes_positions else {}


def _template_args(tokenizer: Any) -> dict[str, str]:
    has_one = bool(getattr(tokenizer, "chat_template", None))
    return {"chat_template": dated_template(tokenizer)} if has_one else {}


def _sums(logits: Tensor, wanted: Tensor, real: Tensor) -> list[tuple[float, bool]]:
    """Log-likelihood of each row, and whether greedy decoding would have written it.

    Args:
        logits: of the token at each place, shape (n, length, vocabulary).
        wanted: the tokens, shape (n, length).
        real: 1 where there is one, same shape.
    """
    logits = logits.float()
    picked = logits.gather(-1, wanted[..., None])[..., 0] - logits.logsumexp(-1)
    greedy = ((logits.argmax(-1) == wanted) | ~real.bool()).all(-1)
    totals = (picked * real).sum(-1)
    return [(float(total), bool(same)) for total, same in zip(totals, greedy)]


def _padded(rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Rows as one tensor, and where it is no padding, both of shape (n, longest)."""
    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, place] = torch.tensor(list(row))
        mask[i, place] = 1
    return tokens, mask
