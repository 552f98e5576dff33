"""What pruning saves and what it costs, as ratios of times measured side by side."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from budwood.checks import need_at_least
from budwood.errors import InputError
from budwood.prune.budget import Budget
from budwood.prune.chat import GREEDY
from budwood.prune.families import family_of
from budwood.prune.families.base import Layout
from budwood.prune.latency import Timed, generate_timed
from budwood.prune.question import PUBLISHED, Question
from budwood.prune.selection import select
from budwood.prune.session import PruneSession, attach
from budwood.timing import median_ratio, seconds, side_by_side
from budwood.unwrap import innermost

Row = dict[str, Any]

PREFILL_TARGET = 1.05
"""Prefill with pruning over that of the same LLM given as long a prompt without it."""
SELECT_TARGET = 0.01
"""Selector with saliency row over prefill with all tokens."""

ATTACH_TARGET_MS = 1.0
"""Attaching, and detaching."""

_MIB = 2**20


@dataclass(frozen=True)
class SpeedConfig:
    """What to time.

    Attributes:
        keeps: budgets, each a count or a fraction as in ``attach``.
        method: what chooses.
        repeats: timed rounds, after a warm-up.
        n_new: tokens to decode, of which all but the first are timed.
        seed: of the prompt and of random weights.

    Raises:
        InputError: a number is too small, or there is no budget.
        BudgetError: a budget is neither a count nor a fraction.
    """

    keeps: tuple[int | float, ...] = (0.11, 0.055)
    method: str = "adav"
    repeats: int = 7
    n_new: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.keeps:
            raise InputError("nothing to time: give at least one budget")
        for keep in self.keeps:
            Budget.parse(keep)
        if len(set(self.keeps)) < len(self.keeps):
            raise InputError(f"keep has the same budget twice: {', '.join(map(str, self.keeps))}")
        need_at_least(1, repeats=self.repeats)
        need_at_least(2, n_new=self.n_new)

    @property
    def lengths(self) -> dict[str, int]:
        """Arguments of ``generate`` by which all answers have ``n_new`` tokens."""
        return {"max_new_tokens": self.n_new, "min_new_tokens": self.n_new}


def measure(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    config: SpeedConfig,
    threads: Sequence[int] = (),
) -> list[Row]:
    """Everything that is measured of one model.

    Args:
        model: a model of a known family, with nothing attached.
        processor: its processor; None if there is none.
        inputs: one row with one image.
        config: what to time.
        threads: how many at once.

    Returns:
        The rows of :func:`measure_speed`, of which the first pruned one has those of
        :func:`largest_allocation` and :func:`attach_times` too; then those of
        :func:`measure_load`.
    """
    rows = measure_speed(model, processor, inputs, config)
    first = next(row for row in rows if row["method"] == config.method)
    first |= largest_allocation(model, processor, inputs, config.keeps[0])
    first |= attach_times(model, processor, config)
    return rows + measure_load(model, processor, inputs, config, threads)


def measure_speed(
    model: Any, processor: Any, inputs: Mapping[str, Any], config: SpeedConfig
) -> list[Row]:
    """Time one prompt with all visual tokens, pruned, and as a plain prompt of the pruned length.

    In each round everything runs once, in turn. Ratios are taken within a round, and their medians
    reported: of prefill to that of the plain prompt (``prefill_over_plain``), of the selector with
    the saliency row to the full prefill (``select_over_full``), and of decoding speed to that with
    all tokens (``decode_over_full``). Prefill is what the first token takes beyond encoder and
    selector, ``generate`` itself included on both sides.

    Args:
        model: a model of a known family, with nothing attached.
        processor: its processor; None if there is none.
        inputs: one row with one image.
        config: what to time.

    ``kv_mib`` are the keys and values of prompt and answer. ``peak_mib`` is the most memory that a
    call takes on a GPU beyond what is there before it; None elsewhere.

    Returns:
        A row ``full``, then per budget a row ``plain`` and a row for the method.
    """
    length = inputs["input_ids"].shape[1]
    plans: dict[str, Callable[[int], Timed]] = {"full": lambda _: _timed(model, inputs, config)}
    counts: dict[float, tuple[int, int]] = {}
    for keep in config.keeps:
        n_visual, n_kept, n_prompt = _lengths(model, processor, inputs, keep, config)
        counts[keep] = n_visual, n_kept
        plain = _plain_prompt(innermost(model), n_prompt, config.seed)
        plans[f"plain {keep}"] = functools.partial(_time_plain, model, plain, config)
        plans[f"pruned {keep}"] = functools.partial(
            _time_pruned, model, processor, inputs, keep, config
        )
    times = side_by_side(plans, config.repeats)
    full = times["full"]
    n_visual = next(iter(counts.values()))[0]
    rows = [_row("full", 1.0, n_visual, n_visual, length, full, full)]
    rows[0] |= memory(model, inputs, config)
    for keep, (n_visual, n_kept) in counts.items():
        plain, pruned = times[f"plain {keep}"], times[f"pruned {keep}"]
        n_prompt = plain[0].sequences.shape[1] - config.n_new
        text = _plain_prompt(innermost(model), n_prompt, config.seed)
        rows.append(_row("plain", keep, 0, 0, n_prompt, plain, full) | memory(model, text, config))
        row = _row(config.method, keep, n_visual, n_kept, n_prompt, pruned, full)
        row["prefill_over_plain"] = _ratio(pruned, plain, _prefill_ms)
        with attach(model, method=config.method, keep=keep, processor=processor):
            row |= memory(model, inputs, config)
        rows.append(row)
    return rows


@torch.no_grad()
def memory(model: Any, inputs: Mapping[str, Any], config: SpeedConfig) -> Row:
    """What one call takes: ``kv_mib`` and ``peak_mib``."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device) if on_gpu else 0
    output = model.generate(**inputs, **GREEDY, **config.lengths, return_dict_in_generate=True)
    layers = output.past_key_values.layers
    n_bytes = sum(x.nbytes for layer in layers for x in (layer.keys, layer.values))
    peak = torch.cuda.max_memory_allocated(model.device) - before if on_gpu else None
    return {
        "kv_mib": round(n_bytes / _MIB, 3),
        "peak_mib": None if peak is None else round(peak / _MIB, 1),
    }


def measure_load(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    config: SpeedConfig,
    threads: Sequence[int],
    n_requests: int = 16,
) -> list[Row]:
    """Requests a second from several threads at once, with all visual tokens and pruned.

    Every request is one call of ``generate`` with the same prompt, encoder included, on one model
    to which pruning is attached once. Both are measured in turn, round by round.

    Args:
        model: a model of a known family, with nothing attached.
        processor: its processor; None if there is none.
        inputs: one row with one image.
        config: what to time.
        threads: how many at once.
        n_requests: of a round.

    Returns:
        For each number of threads a row ``full`` and one for the method at each budget, with
        ``threads``, ``requests_per_s`` and ``requests_over_full``, the median ratio of the rounds.
    """

    def ask(_: int) -> None:
        model.generate(**inputs, **GREEDY, **config.lengths)

    def rate(n_threads: int) -> float:
        with ThreadPoolExecutor(n_threads) as pool:
            spent = seconds(lambda: list(pool.map(ask, range(n_requests))), model.device)
        return n_requests / spent

    def pruned(keep: float, n_threads: int) -> float:
        with attach(model, method=config.method, keep=keep, processor=processor):
            return rate(n_threads)

    rows = []
    for n_threads in threads:
        need_at_least(1, threads=n_threads)
        plans = {"full": lambda _, n=n_threads: rate(n)} | {
            str(keep): lambda _, keep=keep, n=n_threads: pruned(keep, n) for keep in config.keeps
        }
        rates = side_by_side(plans, config.repeats)
        names = [
            ("full", 1.0, "full"),
            *((config.method, keep, str(keep)) for keep in config.keeps),
        ]
        rows += [
            {
                "method": method,
                "keep": keep,
                "threads": n_threads,
                "requests_per_s": round(statistics.median(rates[name]), 4),
                "requests_over_full": round(median_ratio(rates[name], rates["full"]), 4),
            }
            for method, keep, name in names
        ]
    return rows


def attach_times(model: Any, processor: Any, config: SpeedConfig, repeats: int = 50) -> Row:
    """Milliseconds to attach and to detach, medians, after a first time."""
    attach(model, method=config.method, keep=config.keeps[0], processor=processor).detach()
    attached, detached = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        session = attach(model, method=config.method, keep=config.keeps[0], processor=processor)
        between = time.perf_counter()
        session.detach()
        attached.append(between - start)
        detached.append(time.perf_counter() - between)
    return {
        "attach_ms": round(1e3 * statistics.median(attached), 4),
        "detach_ms": round(1e3 * statistics.median(detached), 4),
    }


def largest_allocation(model: Any, processor: Any, inputs: Mapping[str, Any], keep: float) -> Row:
    """Find the largest tensor that saliency row and selection (AdaV) produce.

    Returns:
        ``largest_shape`` and ``largest_numel``, and ``limit_numel``: encoder heads × N × N, times
        the number of crops: the size of the attention maps of one layer.
    """
    inner = innermost(model)
    family = family_of(inner, processor)
    with torch.no_grad():
        recorder = family.recorder(inputs)
        with recorder:
            features = family.features(inputs)
        layouts = family.layouts(inputs, features)
        text = inner.get_input_embeddings()(_question_ids(inner, processor, inputs, family))
        with _Largest() as seen:
            saliency = family.saliency(recorder, layouts)
            for image, layout, scores in zip(features, layouts, saliency):
                image = image if image.ndim == 2 else image[:, 0]  # the level of the input
                visual = image if layout.candidates is None else image[layout.candidates]
                select(visual, text, scores, keep=keep)
    heads, per_crop = _encoder_size(inner.config.vision_config, layouts[0])
    return {
        "largest_shape": list(seen.shape),
        "largest_numel": seen.numel,
        "limit_numel": layouts[0].n_crops * heads * per_crop**2,
    }


def _encoder_size(vision: Any, layout: Layout) -> tuple[int, int]:
    """Attention heads, and patches of one crop."""
    heads = getattr(vision, "num_attention_heads", None) or vision.num_heads
    image_size = getattr(vision, "image_size", None)
    if image_size is None or vision.model_type == "pixtral":  # any size; Pixtral has the largest
        return heads, layout.n_candidates
    sizes = image_size, vision.patch_size
    side, patch = (size if isinstance(size, int) else size[0] for size in sizes)
    return heads, (side // patch) ** 2


class _Largest(TorchDispatchMode):
    """Notes the largest storage behind any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = ()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in result if isinstance(result, list | tuple) else [result]:
            # A view allocates nothing.
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                numel = x.untyped_storage().nbytes() // max(x.element_size(), 1)
                if numel > self.numel:
                    self.numel, self.shape = numel, tuple(x.shape)
        return result


def _question_ids(model: Any, processor: Any, inputs: Mapping[str, Any], family: Any) -> Tensor:
    """Token ids of the question in the first row."""
    ids = inputs["input_ids"][0]
    rule = Question.for_model(PUBLISHED, model, family.wrapping_ids, processor)
    places = (ids == family.image_token_id).nonzero().flatten()
    span = int(places[0]), int(places[-1]) + 1
    return ids[rule.positions(ids.cpu(), span, len(ids))]


def _lengths(
    model: Any, processor: Any, inputs: Mapping[str, Any], keep: float, config: SpeedConfig
) -> tuple[int, int, int]:
    """Visual tokens before and after, and tokens of the pruned prompt."""
    with attach(model, method=config.method, keep=keep, processor=processor) as session:
        model.generate(**inputs, do_sample=False, max_new_tokens=1)
    assert session.origin is not None
    report = session.report[0]
    return report.n_before, report.n_after, session.origin.shape[1]


def _plain_prompt(model: Any, length: int, seed: int) -> dict[str, Any]:
    """A random text of this many tokens, without placeholders."""
    generator = torch.Generator().manual_seed(seed)
    n_words = min(model.get_input_embeddings().weight.shape[0], model.config.image_token_id)
    ids = torch.randint(n_words, (1, length), generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _time_plain(model: Any, prompt: Mapping[str, Any], config: SpeedConfig, _: int) -> Timed:
    return _timed(model, prompt, config)


def _time_pruned(
    model: Any, processor: Any, inputs: Mapping[str, Any], keep: float, config: SpeedConfig, _: int
) -> Timed:
    options: dict[str, Any] = {"method": config.method, "keep": keep, "timing": True}
    with attach(model, processor=processor, **options) as session:
        return _timed(model, inputs, config, session)


def _timed(
    model: Any, inputs: Mapping[str, Any], config: SpeedConfig, session: PruneSession | None = None
) -> Timed:
    return generate_timed(model, inputs, session, **config.lengths)


def _row(
    name: str,
    keep: float,
    n_visual: int,
    n_kept: int,
    n_prompt: int,
    calls: list[Timed],
    full: list[Timed],
) -> Row:
    def median(of: Callable[[Timed], float]) -> float:
        return round(statistics.median(map(of, calls)), 3)

    return {
        "method": name,
        "keep": keep,
        "n_visual": n_visual,
        "n_kept": n_kept,
        "n_prompt": n_prompt,
        "ttft_ms": median(_total_ms),
        "encode_ms": median(lambda call: call.first.encode_ms),
        "select_ms": median(_select_ms),
        "prefill_ms": median(_prefill_ms),
        "decode_tokens_per_s": median(_decode_speed),
        "ttft_over_full": _ratio(calls, full, _total_ms),
        "prefill_over_full": _ratio(calls, full, _prefill_ms),
        "select_over_full": round(
            median_ratio(list(map(_select_ms, calls)), list(map(_prefill_ms, full))), 5
        ),
        "decode_over_full": _ratio(calls, full, _decode_speed),
        "prefill_over_plain": None,
    }


def _total_ms(call: Timed) -> float:
    return call.first.total_ms


def _select_ms(call: Timed) -> float:
    return call.first.select_ms


def _prefill_ms(call: Timed) -> float:
    return call.first.prefill_ms


def _decode_speed(call: Timed) -> float:
    """Tokens per second."""
    return 1e3 * len(call.step_ms) / sum(call.step_ms)


def _ratio(calls: list[Timed], baseline: list[Timed], of: Callable[[Timed], float]) -> float:
    """The median of the ratio within each round."""
    return round(median_ratio(list(map(of, calls)), list(map(of, baseline))), 4)
