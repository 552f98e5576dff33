"""``lmms-eval --model budwood``: any supported chat model with pruning attached."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import (  # pyright: ignore[reportMissingImports]
    GenerationResult,
    TokenCounts,
)
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.model_utils.gen_metrics import (  # pyright: ignore[reportMissingImports]
    log_metrics,
)
from lmms_eval.protocol import ChatMessages  # pyright: ignore[reportMissingImports]
from tqdm import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from budwood.errors import InputError
from budwood.evaluate.pruned import LOADING, PRUNING, load_pruned, need_batch, refuse_unknown

_OWN = ("batch_size", "max_batch_size", "max_new_tokens", "system_prompt")
ARGUMENTS = (*LOADING, *PRUNING, *_OWN)
"""What ``--model_args`` may have."""

_SEPARATOR = "\n\n"
"""lmms-eval gives it as ``until`` to every task that has none. Its own models ignore it."""


class PrunedChat(lmms):
    """A chat model that answers from few visual tokens.

    Args:
        pretrained: ``"sprout"``, ``"sprout-256"``, a directory or a hub id.
        batch_size: questions at a time.
        max_new_tokens: where an answer is cut, for tasks that do not say.
        system_prompt: text, or a file with it, in front of every question.
        given: see ``ARGUMENTS``; those of ``budwood.prune.attach`` have its defaults.

    Raises:
        BudwoodError: an argument does not exist or has a wrong value.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "sprout",
        batch_size: Any = 1,
        max_new_tokens: int = 1024,
        system_prompt: str = "",
        **given: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(given, ARGUMENTS, "lmms-eval's model 'budwood'")
        self.batch_size = need_batch(batch_size)
        given.pop("max_batch_size", None)  # of batch_size=auto, which is refused
        self._join_others(given)
        loaded = load_pruned(pretrained, **given)
        self.model, self.processor, self.session = loaded.model, loaded.processor, loaded.session
        self._max_new_tokens = max_new_tokens
        self._system_prompt = self._resolve_system_prompt(system_prompt)

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers results from there."""
        return self.model.device

    def _join_others(self, given: dict[str, Any]) -> None:
        """Take this process's share of the questions, under ``accelerate launch``."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
            given["device"] = str(self.accelerator.device)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not available: tasks of chat models generate.

        Raises:
            InputError: always.
        """
        raise InputError("lmms-eval's model 'budwood' generates; choose a task that does so too")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not available.

        Raises:
            InputError: always.
        """
        raise InputError("lmms-eval's model 'budwood' answers single questions; choose such a task")

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer questions in batches.

        Args:
            requests: of lmms-eval, in its format for chat models.

        Returns:
            A ``GenerationResult`` for each.

        Raises:
            InputError: a question has a video or sound.
        """
        found: dict[int, Any] = {}
        n_tokens, started = 0, time.perf_counter()
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="budwood")
        for numbers, chats, options in self._batches(requests):
            for number, (text, count) in zip(numbers, self._answer(chats, options)):
                found[number] = GenerationResult(text, TokenCounts(output_tokens=count))
                context, _, given, *_ = requests[number].args
                self.cache_hook.add_partial("generate_until", (context, given), text)
                n_tokens += count
                progress.update()
        progress.close()
        seconds = time.perf_counter() - started
        log_metrics(
            total_gen_tokens=n_tokens,
            total_elapsed_time=seconds,
            avg_speed=n_tokens / max(seconds, 1e-9),
        )
        return [found[number] for number in range(len(requests))]

    def _batches(
        self, requests: Sequence[Any]
    ) -> Iterator[tuple[list[int], list[Any], dict[str, Any]]]:
        """Numbers, chats and options of questions that share options, and have pictures or not."""
        groups: dict[tuple[str, bool], list[int]] = defaultdict(list)
        chats = []
        for number, request in enumerate(requests):
            _, to_messages, options, doc_id, task, split = request.args
            messages = to_messages(self.task_dict[task][split][doc_id])
            messages = self._apply_system_prompt(messages, self._system_prompt)
            chat = ChatMessages(messages=messages)
            images, videos, sounds = chat.extract_media()
            if videos or sounds:
                raise InputError(f"task {task!r} has a video or sound; give a task with pictures")
            chats.append(chat.to_hf_messages())
            groups[repr(sorted(options.items())), bool(images)].append(number)
        for numbers in groups.values():
            for start in range(0, len(numbers), self.batch_size):
                some = numbers[start : start + self.batch_size]
                yield some, [chats[number] for number in some], requests[some[0]].args[2]

    def _answer(self, chats: list[Any], options: dict[str, Any]) -> list[tuple[str, int]]:
        """Texts and how many tokens each has."""
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        inputs = inputs.to(self.model.device, self.model.dtype)
        n_prompt = inputs["input_ids"].shape[1]
        tokenizer = self.processor.tokenizer
        stops = stop_strings(options)
        generating = {"max_new_tokens": self._max_new_tokens, **generation_options(options)}
        if stops:
            rule = _Stop(tokenizer, n_prompt, stops)
            generating["stopping_criteria"] = StoppingCriteriaList([rule])
        pad = tokenizer.pad_token_id
        with torch.inference_mode():
            output = self.model.generate(**inputs, pad_token_id=pad, **generating)
        answers = output[:, n_prompt:]
        counts = (answers != pad).sum(1).tolist()
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [(cut_at(text, stops).strip(), count) for text, count in zip(texts, counts)]


def generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """Options of ``generate`` among those of a task.

    Temperature 0 means greedy decoding. So does ``do_sample: false``, whatever the temperature.

    Args:
        given: a task's ``generation_kwargs``.
    """
    known = GenerationConfig().to_dict()
    options = {name: value for name, value in given.items() if name in known and value is not None}
    sample = options.get("do_sample", bool(options.get("temperature")))
    options["do_sample"] = bool(sample and options.get("temperature", 1.0))
    if not options["do_sample"]:  # generate would warn of them
        options |= {"temperature": None, "top_p": None, "top_k": None}
    return options


def stop_strings(given: dict[str, Any]) -> list[str]:
    """Strings that end an answer, without lmms-eval's default."""
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else until
    return [text for text in until if text and text != _SEPARATOR]


def cut_at(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of some strings."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


class _Stop(StoppingCriteria):
    """Ends a row whose answer contains one of some strings."""

    def __init__(self, tokenizer: Any, n_prompt: int, stops: Sequence[str]) -> None:
        self.tokenizer, self.n_prompt, self.stops = tokenizer, n_prompt, stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.n_prompt :])
        ended = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)
