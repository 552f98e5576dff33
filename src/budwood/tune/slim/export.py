"""Export of a SLIM adapter to an ordinary PEFT LoRA that approximates it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from budwood.errors import InputError, OutputError
from budwood.tune.base_model import evaluating, is_resized
from budwood.tune.data.encoding import IGNORED
from budwood.tune.equations import merged_scale
from budwood.tune.saved.files import WEIGHTS_FILE
from budwood.tune.slim.fused_experts import SlimExperts
from budwood.tune.slim.keeper import SlimLayer, layers_of
from budwood.tune.slim.observe import observe

REPORT_FILE = "approximation.json"
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class LoraExport:
    """The result of an export, with its losses.

    Attributes:
        path: directory of the LoRA adapter.
        rank: of the LoRA.
        loss_base: mean loss a token of the base model on the batches measured.
        loss_slim: of the SLIM adapter.
        loss_lora: of what was written.
        n_tokens: tokens with a label in these batches.
        n_calibration_tokens: tokens that the routing weights were averaged over.
        held_out: whether the batches measured are others than those averaged over.
    """

    path: str
    rank: int
    loss_base: float
    loss_slim: float
    loss_lora: float
    n_tokens: int
    n_calibration_tokens: int
    held_out: bool


def export_lora(
    model: Any,
    calibration: Iterable[Batch],
    output: str | os.PathLike[str],
    *,
    adapter: str = "default",
    held_out: Iterable[Batch] | None = None,
    rank: int | None = None,
) -> LoraExport:
    """Write an ordinary LoRA whose experts have fixed weights: their averages over some data.

    Not in the paper; ours. The LoRA is what SLIM would be if every token were routed as the tokens
    of the answers are on average. It loses the choice by token, and with it the bypass, so that it
    forgets more. ``approximation.json`` and ``README.md`` beside it call it approximate and give
    the measured losses.

    Args:
        model: a PEFT model whose one active adapter is SLIM's.
        calibration: batches as the model takes them (input_ids, attention_mask, labels), like the
            data that the LoRA will be used on.
        output: directory to write, absent or empty.
        adapter: name of the adapter.
        held_out: batches to measure the losses on; those of ``calibration`` by default.
        rank: of the LoRA; by default that of all experts together, where the average is exact.

    Returns:
        Losses and sizes.

    Raises:
        InputError: the adapter is not the active one, rank out of range, or no batch with labels.
        OutputError: the directory holds something already, or cannot be written.
    """
    layers = _exportable(model, adapter)
    full = max(layer.slim_config[adapter].rank for layer in layers)
    rank = full if rank is None else rank
    if not 1 <= rank <= full:
        raise InputError(f"rank={rank}; give 1 to {full}, the rank of all experts together")
    folder = empty_folder(output)
    averaged = list(calibration)
    measured = averaged if held_out is None else list(held_out)
    with evaluating(model):
        with observe(model, supervised=True) as seen, torch.no_grad():
            for batch in averaged:
                model(**batch)
        found = {
            layer.slim_key: _fixed(layer, adapter, seen.layers[layer.slim_key, adapter], rank)
            for layer in layers
            if (layer.slim_key, adapter) in seen.layers
        }
        if not any(seen.layers[key, adapter].n_tokens for key in found):
            raise InputError("calibration has no token that counts: give batches with labels")
        loss_slim, n_tokens = _mean_loss(model, measured)
        with model.disable_adapter():
            loss_base, _ = _mean_loss(model, measured)
        with _instead(layers, found):
            loss_lora, _ = _mean_loss(model, measured)
    report = LoraExport(
        path=str(folder),
        rank=rank,
        loss_base=loss_base,
        loss_slim=loss_slim,
        loss_lora=loss_lora,
        n_tokens=n_tokens,
        n_calibration_tokens=next(iter(seen.layers.values())).n_tokens,
        held_out=held_out is not None,
    )
    _write(folder, model, adapter, found, report)
    return report


def _exportable(model: Any, adapter: str) -> list[SlimLayer]:
    """The adapter's layers, checked."""
    layers = [one for one in layers_of(model) if adapter in one.slim_in]
    if not layers:
        there = sorted({name for one in layers_of(model) for name in one.slim_in})
        raise InputError(
            f"there is no SLIM adapter {adapter!r}; there is {', '.join(there) or 'none'}"
        )
    if layers[0].disable_adapters:
        raise InputError("the adapters are off; leave the block with disable_adapter() first")
    active = list(layers[0].active_adapters)
    if active != [adapter]:
        raise InputError(
            f"active SLIM adapters are {active or 'none'}, and {adapter!r} is to be exported by "
            f"itself; call model.set_adapter({adapter!r}) first"
        )
    fused = next((layer for layer in layers if isinstance(layer, SlimExperts)), None)
    if fused is not None:
        raise InputError(
            f"{fused.slim_key!r} is a weight of fused experts, which the export does not cover; "
            "keep the adapter as it is"
        )
    if any(layer.slim_config[adapter].expert_bias for layer in layers):
        raise InputError("the experts have biases, which a plain LoRA has no place for")
    return layers


def reduce_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of lower rank to B·A, in the Frobenius norm.

    Args:
        a: shape (full_rank, d_in).
        b: shape (d_out, full_rank).
        rank: 1 ≤ rank ≤ full_rank.

    Returns:
        A of shape (rank, d_in) and B of shape (d_out, rank), float32.
    """
    a, b = a.float(), b.float()
    if rank == len(a):
        return a, b
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    short_a, short_b = root.unsqueeze(-1) * (v[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root
    missing = rank - len(root)  # d_in or d_out below the rank
    return F.pad(short_a, (0, 0, 0, missing)), F.pad(short_b, (0, missing))


@torch.no_grad()
def _fixed(layer: SlimLayer, adapter: str, routing: Any, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of a layer with the average routing weights in B."""
    config = layer.slim_config[adapter]
    weights = routing.mean_weights()[: config.n_experts].float()
    a, b = (weight.float().cpu() for weight in layer.weights(adapter))
    a = a[: config.rank]
    scale = config.scale
    if adapter in layer.slim_mask:
        mask: Any = layer.slim_mask[adapter]
        masked = config.merge_inference == "mask"
        scale *= merged_scale(config.merge_p, rescale=config.merge_rescale, masked=masked)
        if masked:
            a, b = a * mask.columns.cpu(), b * mask.rows.cpu().unsqueeze(-1)
    return reduce_rank(a, b * (scale * weights.repeat_interleave(config.r)), rank)


@contextmanager
def _instead(layers: list[SlimLayer], found: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Fixed low-rank products in place of the experts inside."""
    before = [layer._disable_adapters for layer in layers]
    hooks = []
    for layer in layers:
        layer._disable_adapters = True
        if layer.slim_key in found:
            hooks.append(layer.register_forward_hook(_Low(*found[layer.slim_key])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, was in zip(layers, before):
            layer._disable_adapters = was


class _Low:
    """A forward hook that adds B·A·x."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].float()
        delta = F.linear(F.linear(x, self.a.to(x.device)), self.b.to(x.device))
        return output + delta.to(output.dtype)


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, int]:
    """Mean loss per supervised token, and the number of these tokens."""
    total, n_tokens = 0.0, 0
    for batch in batches:
        labels = batch.get("labels")
        if labels is None:
            raise InputError("a batch has no labels; give input_ids, attention_mask and labels")
        n = int((labels[:, 1:] != IGNORED).sum())
        if n:
            total += float(model(**batch).loss) * n
            n_tokens += n
    if not n_tokens:
        raise InputError("no token has a label; the losses can't be measured")
    return total / n_tokens, n_tokens


def empty_folder(output: str | os.PathLike[str]) -> Path:
    """Check that a folder is absent or empty.

    Raises:
        OutputError: something is there already, or one of the folders above it is a file.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not an empty directory; choose another name")
    above = next(one for one in folder.absolute().parents if one.exists())
    if not above.is_dir():
        raise OutputError(f"cannot write {folder}: {above} is a file; choose another place")
    return folder


def _write(
    folder: Path,
    model: Any,
    adapter: str,
    found: Mapping[str, tuple[Tensor, Tensor]],
    report: LoraExport,
) -> None:
    slim: Any = model.peft_config[adapter]
    config = LoraConfig(
        r=report.rank,
        lora_alpha=report.rank,
        target_modules=sorted(found),
        modules_to_save=slim.modules_to_save,
        trainable_token_indices=slim.trainable_token_indices,
        task_type=slim.task_type,
        base_model_name_or_path=slim.base_model_name_or_path,
        inference_mode=True,
    )
    tensors = {
        key: value.contiguous().cpu()
        for key, value in get_peft_model_state_dict(
            model,
            adapter_name=adapter,
            save_embedding_layers=is_resized(model.get_base_model()),
        ).items()
        if ".slim_" not in key
    }
    for name, (a, b) in found.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    facts = {"approximate": True, "made_from": "SLIM", **dataclasses.asdict(report)}
    del facts["path"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / REPORT_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(report), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error


def _card(report: LoraExport) -> str:
    data = "held-out data" if report.held_out else "the calibration data"
    return f"""---
library_name: peft
---

# Approximate LoRA of a SLIM adapter

An approximation, written by budwood: the routing weights of the SLIM adapter are fixed to their
averages over {report.n_calibration_tokens} tokens. No token bypasses this adapter.

Mean loss a token on {data} ({report.n_tokens} tokens):

| model | loss |
|---|---:|
| base | {report.loss_base:.4f} |
| SLIM | {report.loss_slim:.4f} |
| this LoRA | {report.loss_lora:.4f} |
"""
