"""What SLIM costs beside a plain LoRA of equal rank, as ratios of times measured side by side."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from budwood.bench.tune.decoding import Decoding, measure_decoding
from budwood.bench.tune.speed_models import METHODS, PROJECTIONS, GatedMLP, adapted, start
from budwood.errors import InputError
from budwood.progress import Progress, silent
from budwood.records import Row
from budwood.timing import median_ratio, seconds, side_by_side, synchronize
from budwood.tune.config import SlimConfig
from budwood.tune.slim.keeper import keeper_of
from budwood.tune.slim.observe import observe

TARGETS = {
    "over_lora_wide": 1.10,
    "over_lora_narrow": 1.20,
    "decode_over_lora": 1.10,
    "memory_over_lora": 1.10,
    "bypass_over_frozen": 1.10,
}
"""Target ratios, at most; wide is 2,048 channels or more."""


@dataclass(frozen=True)
class SpeedConfig:
    """What to time: training one gated MLP, and generation by a small Llama.

    Adapters are on the three projections of each MLP.

    Attributes:
        widths: model widths.
        n_tokens: tokens a batch.
        methods: of ``METHODS``; all ratios need ``"lora"`` and ``"frozen"``.
        repeats: timed rounds, after a warm-up.
        r: rank of an expert; the LoRA beside it has the rank of all LoRA experts together.
        distance: of SLIM.
        dtype: name of the base model's dtype; adapters are float32, as PEFT makes them.
        device: where to run.
        seed: of weights and inputs.
        decode: time generation too.

    Raises:
        InputError: a number is too small, or a method is unknown.
    """

    widths: tuple[int, ...] = (576, 2048, 4096)
    n_tokens: tuple[int, ...] = (256, 1024, 4096)
    methods: tuple[str, ...] = METHODS
    repeats: int = 7
    r: int = 16
    distance: str = "discriminant"
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    decode: bool = True

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise InputError(f"unknown method {unknown[0]!r}; known: {', '.join(METHODS)}")
        if not {"frozen", "lora"} <= set(self.methods):
            raise InputError("ratios need the methods frozen and lora; add them")
        for name in ("widths", "n_tokens"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise InputError(f"{name}={getattr(self, name)}; give counts of at least 1")
        if self.repeats < 1 or self.r < 1:
            raise InputError(f"repeats={self.repeats} and r={self.r}; give at least 1")
        _ = self.slim  # refuses what it does not know
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise InputError(f"unknown dtype {self.dtype!r}; give float32 or bfloat16")

    @property
    def slim(self) -> SlimConfig:
        """Config of SLIM."""
        return SlimConfig(r=self.r, distance=self.distance, target_modules=PROJECTIONS)


def measure_speed(config: SpeedConfig, progress: Progress = silent) -> list[Row]:
    """Time each method: forward and backward by width and number of tokens, generation by width.

    In a round every method runs once, in turn; which goes first changes from round to round. Ratios
    are taken within a round and their medians reported. SLIM's time includes gathering and
    committing the statistics and drawing masks, once a pass, as in training without accumulation;
    an optimiser's own work is in none. ``bypass`` gathers but does not commit, so that its tokens
    stay far away.

    Args:
        config: what to time.
        progress: called before each group of measurements, and at the end.

    Returns:
        One row per width, number of tokens and method: ``ms`` (median), ``over_lora``,
        ``over_frozen``, ``peak_mib`` (weights included), ``memory_over_lora``, ``n_params``
        trainable, ``bypassed_share``, and ``within_target`` (None where there is none). Of
        generation, the same for every number of tokens: ``decode_ms`` for a token,
        ``decode_over_lora``, ``decode_over_frozen`` and ``decode_bypassed_share``.
    """
    rows: list[Row] = []
    groups = [(width, n_tokens) for width in config.widths for n_tokens in config.n_tokens]
    decoding: dict[int, dict[str, Decoding]] = {}
    for i, (width, n_tokens) in enumerate(groups):
        if config.decode and width not in decoding:
            progress(i, len(groups), f"width {width}, generation")
            decoding[width] = _measure_decoding(config, width)
            gc.collect()
        progress(i, len(groups), f"width {width}, {n_tokens} tokens")
        rows += [
            _judged({**row, **_of_decoding(row["method"], decoding.get(width))})
            for row in _measure_one(config, width, n_tokens)
        ]
        gc.collect()
    progress(len(groups), len(groups))
    return rows


@dataclass
class _Case:
    """A method ready to run: one pass, and what goes before it outside the timing."""

    model: nn.Module
    run: Callable[[], None]
    before: Callable[[], None]
    bypassed: float | None = None


def _measure_decoding(config: SpeedConfig, width: int) -> dict[str, Decoding]:
    return measure_decoding(
        config.methods,
        width,
        config.slim,
        repeats=config.repeats,
        dtype=getattr(torch, config.dtype),
        device=config.device,
        seed=config.seed,
    )


def _measure_one(config: SpeedConfig, width: int, n_tokens: int) -> list[Row]:
    cases = {name: _case(name, config, width, n_tokens) for name in config.methods}
    clocks = {name: _clock(case, config.device) for name, case in cases.items()}
    times = side_by_side(clocks, config.repeats)
    peaks = {name: _peak_mib(case, config.device) for name, case in cases.items()}
    return [_row(name, config, width, n_tokens, cases, times, peaks) for name in cases]


def _case(name: str, config: SpeedConfig, width: int, n_tokens: int) -> _Case:
    torch.manual_seed(config.seed)
    dtype, device = getattr(torch, config.dtype), torch.device(config.device)
    base = GatedMLP(width).to(device, dtype).requires_grad_(False)
    shape = (1, n_tokens, width)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    model = adapted(name, base, config.slim)
    model.train()
    if name not in ("slim", "bypass"):
        return _Case(model, lambda: _pass(model, x), lambda: model.zero_grad())
    return _slim_case(model, x, far=name == "bypass")


def _slim_case(model: Any, x: Tensor, *, far: bool) -> _Case:
    keeper = keeper_of(model)
    start(model, lambda: _pass(model, x), far=far)

    def before() -> None:
        model.zero_grad()
        if far:
            keeper.forget_gathered()

    def run() -> None:
        _pass(model, x)
        if not far:
            keeper.commit()

    with observe(model) as seen, torch.no_grad():
        model(x)
    return _Case(model, run, before, seen.mean("bypassed_share"))


def _pass(model: Any, x: Tensor) -> None:
    x.grad = None
    model(x).sum().backward()


def _clock(case: _Case, device: str) -> Callable[[int], float]:
    """Milliseconds of one pass."""

    def run(_: int) -> float:
        case.before()
        return 1e3 * seconds(case.run, device)

    return run


def _peak_mib(case: _Case, device: str) -> float:
    """Peak memory of weights and one pass, in MiB."""
    case.before()
    gc.collect()
    tensors = [*case.model.parameters(), *case.model.buffers()]
    held = sum(one.untyped_storage().nbytes() for one in tensors)
    if torch.device(device).type == "cuda":
        synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        case.run()
        return (held + torch.cuda.max_memory_allocated(device) - start) / 2**20
    with _allocations() as deltas:
        case.run()
    level = peak = 0
    for delta in deltas:
        level += delta
        peak = max(peak, level)
    return (held + peak) / 2**20


@contextmanager
def _allocations() -> Iterator[list[int]]:
    """Bytes of each allocation (positive) and release (negative) on the CPU, in order of time."""
    found: list[int] = []
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as prof:
        yield found
    inner: Any = prof.profiler
    events = [one for one in inner.kineto_results.events() if one.name() == "[memory]"]
    found += [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]


def _row(
    name: str,
    config: SpeedConfig,
    width: int,
    n_tokens: int,
    cases: dict[str, _Case],
    times: dict[str, list[float]],
    peaks: dict[str, float],
) -> Row:
    over_lora, over_frozen = (_ratio(times[name], times[other]) for other in ("lora", "frozen"))
    memory = round(peaks[name] / peaks["lora"], 4)
    model, bypassed = cases[name].model, cases[name].bypassed
    return {
        "method": name,
        "width": width,
        "n_tokens": n_tokens,
        "dtype": config.dtype,
        "distance": config.distance,
        "ms": round(statistics.median(times[name]), 3),
        "over_lora": over_lora,
        "over_frozen": over_frozen,
        "peak_mib": round(peaks[name], 2),
        "memory_over_lora": memory,
        "n_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "bypassed_share": None if bypassed is None else round(bypassed, 4),
        "repeats": config.repeats,
    }


def _of_decoding(name: str, found: dict[str, Decoding] | None) -> Row:
    """What a row says of generation."""
    if found is None:
        return {}
    own = found[name]
    return {
        "decode_ms": round(statistics.median(own.ms), 3),
        "decode_over_lora": _ratio(own.ms, found["lora"].ms),
        "decode_over_frozen": _ratio(own.ms, found["frozen"].ms),
        "decode_bypassed_share": None if own.bypassed is None else round(own.bypassed, 4),
    }


def ratios_with_targets(row: Row) -> dict[str, float]:
    """The ratios of a row for which there is a target, by its name in ``TARGETS``."""
    if row["method"] == "bypass":
        return {"bypass_over_frozen": row["over_frozen"]}
    if row["method"] != "slim":
        return {}
    kind = "over_lora_wide" if row["width"] >= 2048 else "over_lora_narrow"
    found = {kind: row["over_lora"], "memory_over_lora": row["memory_over_lora"]}
    if "decode_over_lora" in row:
        found["decode_over_lora"] = row["decode_over_lora"]
    return found


def _judged(row: Row) -> Row:
    found = ratios_with_targets(row)
    within = all(value <= TARGETS[name] for name, value in found.items()) if found else None
    return {**row, "within_target": within}


def _ratio(own: list[float], other: list[float]) -> float:
    return round(median_ratio(own, other), 4)
