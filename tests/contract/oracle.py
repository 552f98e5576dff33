"""The slow way to run a pruned model: embeddings and positions by hand, no cache, no batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.contract.models import IMAGE, Case


def row_of(batch: dict[str, Tensor], case: Case, row: int, images: slice) -> dict[str, Tensor]:
    """One row of a batch without its padding, with the images that are its."""
    seen = batch["attention_mask"][row].bool()
    per_image = ("pixel_values", "image_sizes", "image_grid_thw")
    single = {
        name: tensor[row : row + 1, seen] for name, tensor in batch.items() if name not in per_image
    }
    n_images = images.stop - images.start
    if n_images:
        single |= {name: batch[name][images] for name in per_image[1:] if name in batch}
        if "image_grid_thw" in batch:  # patches of all images stand one after the other
            ends = [0, *batch["image_grid_thw"].prod(-1).cumsum(0).tolist()]
            single["pixel_values"] = batch["pixel_values"][ends[images.start] : ends[images.stop]]
        else:
            single["pixel_values"] = batch["pixel_values"][images]
    return single


@torch.no_grad()
def embeddings(case: Case, single: dict[str, Tensor]) -> Tensor:
    """Input embeddings of the unpruned row, shape (n_tokens, d_model)."""
    ids = single["input_ids"][0]
    rows = case.model.get_input_embeddings()(ids)
    if "pixel_values" not in single:
        return rows
    given = {k: single[k] for k in ("pixel_values", "image_sizes", "image_grid_thw") if k in single}
    features = torch.cat(list(case.model.get_image_features(**given).pooler_output))
    rows[ids == IMAGE] = features
    return rows


def coordinates(case: Case, single: dict[str, Tensor], kept: Tensor) -> Tensor:
    """Position ids of the kept tokens, shape (1, n_kept) or (3, 1, n_kept)."""
    if "image_grid_thw" not in single:
        n_kept = len(kept)
        shape = (3, 1, n_kept) if "mm_token_type_ids" in single else (1, n_kept)
        return torch.arange(n_kept).expand(shape)
    positions, _ = case.model.model.get_rope_index(
        single["input_ids"],
        mm_token_type_ids=single["mm_token_type_ids"],
        image_grid_thw=single["image_grid_thw"],
    )
    return positions[..., kept]


def kinds_of(case: Case, single: dict[str, Tensor], kept: Tensor) -> Tensor:
    """Token types of the kept tokens, shape (n_kept,)."""
    return single.get(case.types, torch.zeros_like(single["input_ids"]))[0][kept]


@torch.no_grad()
def greedy(
    case: Case, single: dict[str, Tensor], kept: Tensor, n_new: int
) -> tuple[Tensor, Tensor]:
    """Greedy answer and its logits from the tokens at `kept` positions of the row."""
    model: Any = case.model
    embeds = embeddings(case, single)[kept][None]
    positions = coordinates(case, single, kept)
    kinds = kinds_of(case, single, kept)
    answer, logits = [], []
    for _ in range(n_new):
        hidden = model.model.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=case.masks(kinds),
            use_cache=False,
        ).last_hidden_state
        logits.append(model.lm_head(hidden[:, -1]))
        answer.append(logits[-1].argmax(-1))
        new = case.typed(answer[-1][None], suffix=0).get(case.types, torch.zeros(1, 1))
        kinds = torch.cat((kinds, new[0]))
        embeds = torch.cat((embeds, model.get_input_embeddings()(answer[-1])[:, None]), dim=1)
        positions = torch.cat((positions, positions.max() + 1 + positions[..., -1:] * 0), dim=-1)
    return torch.cat(answer), torch.cat(logits)


def packed_places(case: Case, size: Tensor, n_crops: int) -> Tensor:
    """What the model's own packing makes of numbered patches: crop-ordered numbers, -1 newlines."""
    numbers = torch.arange(n_crops * 16.0).view(n_crops, 16, 1)
    packed, _ = case.model.pack_image_features([numbers], size[None], "default", -torch.ones(1))
    return packed[0].flatten().long()


def kept_positions(case: Case, single: dict[str, Tensor], reports: list) -> Tensor:
    """Positions in an unpadded row that stay: the text, what the report has, and newlines."""
    row = single["input_ids"][0]
    stays = row != IMAGE
    first, start = (row == IMAGE).nonzero().flatten(), 0
    for number, report in enumerate(reports):
        n_features = report.n_before + report.n_fixed
        newline = torch.zeros(n_features, dtype=torch.bool)
        if case.model.config.model_type == "llava_next":
            size = single["image_sizes"][number]
            n_crops = 5 if int(size[0]) == 30 else 3
            newline = packed_places(case, size, n_crops) < 0
        chosen = (~newline).nonzero().flatten()[report.kept]
        stays[first[start + chosen]] = True
        stays[first[start + newline.nonzero().flatten()]] = True
        start += n_features
    return stays.nonzero().flatten()
