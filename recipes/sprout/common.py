"""Optimisers, schedules, checkpoints and the log of the sprout recipe's stages."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


def cosine(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then one cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def trapezoid(step: int, steps: int, warmup: int, decay: float = 0.35) -> float:
    """Learning-rate factor: linear warm-up, constant, then over the last part linearly to zero."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def optimizers(
    parameters: Iterable[tuple[str, Tensor]], lr_matrix: float, lr_other: float, decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, heads, norms and biases."""
    matrices, others = [], []
    for name, p in parameters:
        inside = p.ndim == 2 and "layers." in name
        (matrices if inside else others).append(p)
    return [
        torch.optim.Muon(
            matrices, lr=lr_matrix, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=lr_other, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


class MasterWeights:
    """AdamW on float32 copies of bfloat16 parameters, which get the rounded results."""

    def __init__(self, groups: list[dict], clip: float = 1.0):
        self.live = [p for group in groups for p in group["params"]]
        copies = [
            {**g, "params": [p.detach().float().clone() for p in g["params"]]} for g in groups
        ]
        self.masters = [p for group in copies for p in group["params"]]
        self.optim = torch.optim.AdamW(copies, betas=(0.9, 0.98), weight_decay=0.0)
        self.clip = clip

    def step(self) -> None:
        for live, master in zip(self.live, self.masters, strict=True):
            master.grad, live.grad = live.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, self.clip)
        self.optim.step()
        for live, master in zip(self.live, self.masters, strict=True):
            live.data.copy_(master)

    def resume(self) -> None:
        """Copy the live parameters, which a checkpoint has set, to the float32 ones."""
        for live, master in zip(self.live, self.masters, strict=True):
            master.copy_(live.detach())


class MergedLora:
    """LoRA trained inside the frozen weights: one product a layer instead of three.

    Before each step the frozen weights become `W + s · B A`. They take the gradient, `dW`, of
    which `dA = s · Bᵀ dW` and `dB = s · dW Aᵀ`. The model computes what it computes when the LoRA
    is merged and shipped, rounding included.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
        self.weights = [layer.base_layer.weight.detach().clone() for layer in self.layers]
        for layer in self.layers:
            layer.base_layer.weight.requires_grad_(True)
            layer.merged_adapters.append("default")

    @torch.no_grad()
    def merge(self) -> None:
        """Bring the merged weights up to date."""
        for layer, weight in zip(self.layers, self.weights, strict=True):
            down, up, scale = self._parts(layer)
            merged = torch.addmm(weight.float(), up.float(), down.float(), alpha=scale)
            layer.base_layer.weight.copy_(merged)

    @torch.no_grad()
    def hand_down(self) -> None:
        """Turn the gradients of the merged weights into those of A and B."""
        for layer in self.layers:
            down, up, scale = self._parts(layer)
            merged = layer.base_layer.weight
            grad, merged.grad = merged.grad.float() * scale, None
            down.grad = (up.float().T @ grad).to(down.dtype)
            up.grad = (grad @ down.float().T).to(up.dtype)

    @staticmethod
    def _parts(layer: LoraLinear) -> tuple[Tensor, Tensor, float]:
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return down, up, layer.scaling["default"]


class Ranks:
    """The processes that share the pictures of a step: those of `torchrun`, or one alone."""

    def __init__(self) -> None:
        self.number = int(os.environ.get("WORLD_SIZE", 1))
        self.own = int(os.environ.get("RANK", 0))
        if self.number > 1:
            dist.init_process_group("gloo")

    def add_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Give every process the sum of all processes' gradients."""
        if self.number > 1:
            for p in parameters:
                dist.all_reduce(p.grad)

    def any(self, wish: bool) -> bool:
        """Whether one of the processes wishes it; all get the same answer."""
        wishes = torch.tensor(float(wish))
        if self.number > 1:
            dist.all_reduce(wishes)
        return wishes.item() > 0


class Run:
    """A resumable training run: a folder with its last checkpoint and its log (JSON lines)."""

    def __init__(
        self, folder: Path, modules: dict[str, nn.Module], optims: list[torch.optim.Optimizer]
    ):
        self.folder, self.modules, self.optims = folder, modules, optims
        self.learnt = {
            name: {k for k, v in m.named_parameters() if v.requires_grad}
            for name, m in modules.items()
        }
        self.step, self.seconds = 0, 0.0
        self.base_lrs = [[g["lr"] for g in o.param_groups] for o in optims]
        self._clock = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "last.pt"

    def scale_lr(self, factor: float) -> None:
        for optim, lrs in zip(self.optims, self.base_lrs, strict=True):
            for group, lr in zip(optim.param_groups, lrs, strict=True):
                group["lr"] = lr * factor

    def log(self, **values: float | str) -> None:
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        line = json.dumps({"step": self.step, "seconds": round(self.seconds), **values})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    def save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "modules": {
                name: {k: v for k, v in m.named_parameters() if k in self.learnt[name]}
                for name, m in self.modules.items()
            },
            "optims": [o.state_dict() for o in self.optims],
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name], strict=False)
        for optim, saved in zip(self.optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
