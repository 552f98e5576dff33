"""What SLIM costs beside a plain LoRA of equal rank, as ratios of times measured side by side."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from budwood.errors import InputError
from budwood.progress import Progress, silent
from budwood.records import Row
from budwood.timing import median_ratio, seconds, side_by_side, synchronize
from budwood.tune.config import SlimConfig
from budwood.tune.equations import route, standardise
from budwood.tune.slim.keeper import keeper_of
from budwood.tune.slim.observe import observe

METHODS = ("frozen", "lora", "slim", "loop", "bypass")
"""``bypass`` is SLIM on a batch whose tokens all bypass."""
TARGETS = {
    "over_lora_wide": 1.15,
    "over_lora_narrow": 1.30,
    "memory_over_lora": 1.10,
    "bypass_over_frozen": 1.10,
}
"""Target ratios, at most; wide is 2,048 channels or more."""
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
HIDDEN = {576: 1536, 2048: 5632, 4096: 11008}
"""MLP width by model width, of SmolLM2-135M, a 1B and a 7B Llama; elsewhere 8/3 of it."""


@dataclass(frozen=True)
class SpeedConfig:
    """What to time: one gated MLP with adapters on its three projections.

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
        SlimConfig(r=self.r, distance=self.distance)  # refuses what it does not know
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise InputError(f"unknown dtype {self.dtype!r}; give float32 or bfloat16")


class GatedMLP(nn.Module):
    """The MLP of a Llama: down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = HIDDEN.get(width, -(-8 * width // 3))
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class LoopedExperts(nn.Module):
    """The same mixture as a loop over experts with layers of their own, for comparison only.

    Args:
        base: the frozen layer.
        r: rank of one expert.
        n_experts: LoRA experts.
        n_identity: identity experts.
        top_k: experts kept.
        scale: factor on the experts' output.
    """

    def __init__(
        self, base: nn.Linear, r: int, n_experts: int, n_identity: int, top_k: int, scale: float
    ) -> None:
        super().__init__()
        self.base = base
        self.top_k, self.scale = top_k, scale
        d_in, d_out = base.in_features, base.out_features
        self.router = nn.Linear(d_in, n_experts + n_identity, bias=False)
        self.a = nn.ModuleList(nn.Linear(d_in, r, bias=False) for _ in range(n_experts))
        self.b = nn.ModuleList(nn.Linear(r, d_out, bias=False) for _ in range(n_experts))
        for layer in self.b:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        result = self.base(flat)
        weights = route(standardise(F.linear(flat, self.router.weight).float()), self.top_k)
        for i, (a, b) in enumerate(zip(self.a, self.b)):
            rows = (weights[:, i] > 0).nonzero().squeeze(-1)
            update = b(a(flat[rows])) * (self.scale * weights[rows, i]).unsqueeze(-1).to(x.dtype)
            result = torch.index_add(result, 0, rows, update)
        return result.view(*x.shape[:-1], -1)


def measure_speed(config: SpeedConfig, progress: Progress = silent) -> list[Row]:
    """Time forward and backward of each method at each width and number of tokens.

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
        trainable, ``bypassed_share``, and ``within_target`` (None where there is none).
    """
    rows: list[Row] = []
    groups = [(width, n_tokens) for width in config.widths for n_tokens in config.n_tokens]
    for i, (width, n_tokens) in enumerate(groups):
        progress(i, len(groups), f"width {width}, {n_tokens} tokens")
        rows += _measure_one(config, width, n_tokens)
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
    slim = SlimConfig(r=config.r, distance=config.distance, target_modules=PROJECTIONS)
    if name == "frozen":
        model: Any = base
    elif name == "lora":
        model = get_peft_model(base, _lora(slim))  # type: ignore[arg-type]
    elif name == "loop":
        model = _looped(base, slim)
    else:
        model = get_peft_model(base, slim)  # type: ignore[arg-type]
    model.train()
    if name not in ("slim", "bypass"):
        return _Case(model, lambda: _pass(model, x), lambda: model.zero_grad())
    return _slim_case(model, x, far=name == "bypass")


def _slim_case(model: PeftModel, x: Tensor, *, far: bool) -> _Case:
    keeper = keeper_of(model)
    for layer in keeper.layers():  # B = 0 would be a special case of the arithmetic
        nn.init.normal_(layer.weights("default")[1], std=1e-3)
    directed = [fitted for layer in keeper.layers() for fitted in layer.discriminants().values()]
    for fitted in directed:  # any direction takes as long
        fitted.set_direction(torch.randn_like(fitted.direction), fitted.offset, 1)
    for _ in range(3):  # yielding starts with the third step
        _pass(model, x)
        keeper.commit()
    if far:
        x = (x.detach() * 20).requires_grad_()
        for fitted in directed:
            fitted.offset.sub_(1e6)

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


def _lora(slim: SlimConfig) -> LoraConfig:
    return LoraConfig(r=slim.rank, lora_alpha=2 * slim.rank, target_modules=PROJECTIONS)


def _looped(base: GatedMLP, slim: SlimConfig) -> nn.Module:
    for name in PROJECTIONS:
        layer = LoopedExperts(
            getattr(base, name),
            slim.r,
            slim.n_experts,
            slim.n_identity,
            slim.top_k,
            slim.scale,
        )
        dtype = next(base.parameters()).dtype
        setattr(base, name, layer.to(next(base.parameters()).device, dtype))
    return base


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
    within = None
    if name == "slim":
        kind = "over_lora_wide" if width >= 2048 else "over_lora_narrow"
        within = over_lora <= TARGETS[kind] and memory <= TARGETS["memory_over_lora"]
    elif name == "bypass":
        within = over_frozen <= TARGETS["bypass_over_frozen"]
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
        "within_target": within,
    }


def _ratio(own: list[float], other: list[float]) -> float:
    return round(median_ratio(own, other), 4)
