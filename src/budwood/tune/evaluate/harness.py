"""Run tasks through lm-eval, reading each prompt once for all of its answers."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from budwood.caches import cache_of, name_for
from budwood.checks import need_at_least
from budwood.errors import InputError, UnsupportedModelError, first_line
from budwood.progress import Progress, silent
from budwood.tune.data.batches import is_stateful, positions, takes
from budwood.tune.data.examples import Example, styled
from budwood.tune.data.template import dated_template, end_of_turn, lead_of, need_place, render
from budwood.tune.data.tokens import n_common, tokens_behind
from budwood.tune.evaluate.scores import Score
from budwood.tune.evaluate.tasks import Task, expanded, quiet_harness, task_manager

Request = tuple[tuple[str, str], list[int], list[int]]
_Base: Any = HFLM
"""Untyped: what lm-eval puts around the class hides it from type checkers."""


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    style: str = "cloze",
    batch: int = 16,
    limit: int = 0,
    progress: Progress = silent,
) -> list[Score]:
    """Score a model on tasks.

    Args:
        model: a causal language model, of transformers or PEFT.
        tokenizer: of the model, with a chat template.
        tasks: to score the model on.
        style: one of ``budwood.tune.data.examples.STYLES``, for multiple choice through the chat
            template.
        batch: prompts at a time.
        limit: questions of tasks that are lm-eval's own; 0 for all.
        progress: called after each batch.

    Returns:
        For multiple choice ``accuracy`` and the ``loss`` of the right answer, where there is one;
        for other answers ``loss``, or ``accuracy`` if they are generated.

    Raises:
        InputError: lm-eval is not installed, or can't run a task; two tasks have the same name, or
            a count is too low.
        UnknownNameError: lm-eval has no such task.
        UnsupportedModelError: a task is asked through the chat template, and there is none.
    """
    need_at_least(1, batch=batch)
    need_at_least(0, limit=limit)
    if not tasks:
        return []
    tasks = expanded(tasks)
    if any(task.asked != "text" for task in tasks) and not getattr(
        tokenizer, "chat_template", None
    ):
        raise UnsupportedModelError(
            "the tokenizer has no chat template, through which the tasks are asked; use an "
            "instruct model, or set tokenizer.chat_template"
        )
    with quiet_harness(), tempfile.TemporaryDirectory(prefix="budwood-tasks-") as folder:
        model.eval()
        lm = SharedPromptLM(model, tokenizer, batch, progress)
        files = {task.name: Path(folder, f"{i}.jsonl") for i, task in enumerate(tasks)}
        found: dict[str, list[Score]] = {}
        for asked in ("chat", "rendered", "text"):
            mine = [task for task in tasks if task.asked == asked]
            if mine:
                # A template writes the token that texts begin with, or means to have none.
                lm.add_bos_token = None if asked == "text" else False
                lm.lead = "" if asked == "text" else lead_of(tokenizer)
                samples = _evaluate(lm, mine, files, style, limit, asked == "chat")
                for task in mine:
                    found[task.name] = _scores(task, samples[task.name], lm)
    return [score for task in tasks for score in found[task.name]]


def _evaluate(
    lm: Any, tasks: Sequence[Task], files: dict[str, Path], style: str, limit: int, chat: bool
) -> dict[str, list[dict[str, Any]]]:
    own = any(task.config is None for task in tasks)
    manager = task_manager() if own else TaskManager(include_defaults=False)
    specs: list[Any] = [
        task.name
        if task.config is None
        else _with_data(task, files[task.name], style, lm.tokenizer)
        for task in tasks
    ]
    try:
        loaded = manager.load(specs)
    except Exception as error:  # whatever data sets and the hub's client raise
        names = ", ".join(task.name for task in tasks)
        raise InputError(f"lm-eval cannot load {names}: {first_line(error)}") from error
    found: Any = evaluate(
        lm=lm,
        task_dict=loaded,
        limit=limit if own and limit else None,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
    )
    if found is None or "samples" not in found:
        raise InputError("lm-eval gave no samples; run it on one rank")
    samples = found["samples"]
    for name, task in loaded["tasks"].items():
        for sample in samples[name]:
            sample["gold"] = _gold(task, sample["doc"])
    return samples


def _with_data(task: Task, file: Path, style: str, tokenizer: Any) -> dict[str, Any]:
    """The config with its questions in a file, since lm-eval reads datasets."""
    examples = task.examples or ()
    if task.rendered:
        rows = [_conversation(example, tokenizer) for example in examples]
    else:
        rows = [_row(example, style if task.chat else "cloze") for example in examples]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "cache")}
    return {**(task.config or {}), "task": task.name, "dataset_kwargs": data}


def _row(example: Example, style: str) -> dict[str, Any]:
    if not example.choices:
        return {"question": example.question, "answer": example.messages[-1]["content"]}
    asked = styled(example, style).question
    return {"question": asked, "choices": list(example.choices), "answer": example.answer}


def _conversation(example: Example, tokenizer: Any) -> dict[str, Any]:
    *before, last = example.messages
    prompt = render(tokenizer, before, True, example.where, example.tools)
    if not example.has_more_than_content:
        return {"question": prompt, "answer": last["content"]}
    whole = render(tokenizer, example.messages, False, example.where, example.tools)
    need_place(tokenizer, example, whole)
    return {
        "question": prompt,
        "answer": whole.removeprefix(prompt).removesuffix(end_of_turn(tokenizer)),
    }


def _scores(task: Task, samples: list[dict[str, Any]], lm: Any) -> list[Score]:
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    found = []
    for name in filters:
        mine = sorted(
            (sample for sample in samples if sample["filter"] == name), key=lambda s: s["doc_id"]
        )
        label = task.name if len(filters) == 1 else f"{task.name}/{name}"
        found += _scores_of(Task(label, task.group, None, None), mine, lm)
    return found


def _scores_of(task: Task, samples: list[dict[str, Any]], lm: Any) -> list[Score]:
    metric = next((m for m in _ACCURACIES if m in samples[0]), None)
    found = []
    if metric:
        values = tuple(float(sample[metric]) for sample in samples)
        found.append(Score(task.name, "accuracy", task.group, values, (1.0,) * len(values)))
    pairs = [_right_answer(sample) for sample in samples]
    if all(pairs):
        losses = tuple(-pair[0] for pair in pairs if pair)
        counts = tuple(float(_n_tokens(lm, *pair[1])) for pair in pairs if pair)
        found.append(Score(task.name, "loss", task.group, losses, counts))
    if not found:
        raise InputError(f"task {task.name!r} has neither accuracy nor likelihoods")
    return found


_ACCURACIES = ("acc_norm", "acc", "exact_match")


def _right_answer(sample: dict[str, Any]) -> tuple[float, tuple[str, str]] | None:
    """Log-likelihood of the right answer, and prompt and answer; None where it is not known."""
    gold = sample["gold"]
    if gold is None:
        return None
    prompt, answer = map(str, sample["arguments"][gold])
    return float(sample["filtered_resps"][gold][0]), (prompt, answer)


def _gold(task: Any, doc: dict[str, Any]) -> int | None:
    """Index of the request with the right answer, as lm-eval itself determines it.

    None where answers are generated, where none or several are right, and where a task has a
    function of its own that scores them.
    """
    config = task.config
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0
    if task.OUTPUT_TYPE != "multiple_choice" or not config.doc_to_choice or config.process_results:
        return None
    found = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = list(task.doc_to_choice(doc))
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, str):
        return choices.index(found) if found in choices else None
    return int(found) if isinstance(found, int) and 0 <= found < len(choices) else None


def _n_tokens(lm: Any, prompt: str, answer: str) -> int:
    """Number of tokens that are scored."""
    return max(1, len(lm._encode_pair(prompt, answer)[1]))


class SharedPromptLM(_Base):
    """An ``HFLM`` that reads each prompt once, and not once per choice.

    The answers are read from the prompt's key-value cache, and logits are computed for answers
    alone. Prompts are sorted by length. The numbers are HFLM's but for rounding, and for two things
    that are as in training here: white space that ends a prompt is part of the prompt, where HFLM
    scores it as the beginning of each answer, and so is what the chat template writes before an
    answer, which HFLM leaves out. Models that keep a state are read as HFLM reads them.

    Args:
        pretrained: a causal language model of transformers or PEFT.
        tokenizer: of the model.
        batch_size: prompts at a time.
        progress: called after each batch.
        kwargs: HFLM's.

    Attributes:
        lead: what the chat template writes before an answer.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any,
        batch_size: int = 16,
        progress: Progress = silent,
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
        self._progress = progress
        self._last_alone = {"logits_to_keep": 1} if takes(pretrained, "logits_to_keep") else {}
        self._takes_positions = takes(pretrained, "position_ids")
        self._is_stateful = is_stateful(pretrained)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # A space that the template writes before an answer is mostly the first word's.
        lead = self.lead.rstrip(" ")
        turn = tokens_behind(self.tokenizer, context, self.lead + continuation)
        n_lead = n_common(tokens_behind(self.tokenizer, context, lead), turn) if lead else 0
        return self.tok_encode(context) + turn[:n_lead], turn[n_lead:]

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        if self._is_stateful:  # there is no cache that answers could share
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        answers: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self._say_cut(requests)
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
            self._progress(len(found), len(requests))
        return [found[i] for i in range(len(requests))]

    def _say_cut(self, requests: list[Request]) -> None:
        """Warn of prompts whose beginning the model cannot read."""
        n_cut = sum(len(prompt) > self._room(answer) for _, prompt, answer in requests)
        if n_cut:
            warnings.warn(
                f"{n_cut} of {len(requests)} prompts with their answers are longer than the "
                f"{self.max_length} tokens that the model reads, and lose their beginnings",
                stacklevel=2,
            )

    def _room(self, answer: list[int]) -> int:
        """Longest prompt beside an answer, in tokens; the answer's last token is not read."""
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
            cache = cache_of(first)
            cache.batch_select_indices(owner)
            whole = torch.cat([mask[owner], real[:, 1:]], dim=1)  # read where another follows
            later = self.model(
                input_ids=wanted[:, :-1],
                attention_mask=whole,
                use_cache=True,
                **{name_for(self.model): cache},
                **self._placed(positions(whole)[:, mask.shape[1] :]),
            )
            heads = torch.cat([heads, later.logits], dim=1)
        return _sums(heads, wanted, real)

    def _placed(self, positions: Tensor) -> dict[str, Tensor]:
        """Position ids for a model that takes them; other models count by themselves."""
        return {"position_ids": positions} if self._takes_positions else {}


def _template_args(tokenizer: Any) -> dict[str, str]:
    has_one = bool(getattr(tokenizer, "chat_template", None))
    return {"chat_template": dated_template(tokenizer)} if has_one else {}


def _sums(logits: Tensor, wanted: Tensor, real: Tensor) -> list[tuple[float, bool]]:
    """Log-likelihood of each row, and whether greedy decoding gives the same.

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
    """Rows as one tensor and its mask, both of shape (n, longest)."""
    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, place] = torch.tensor(list(row))
        mask[i, place] = 1
    return tokens, mask
