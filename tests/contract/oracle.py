"""The slow way to run a pruned model: embeddings and positions by hand, no cache, no batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.contract.models import IMAGE, VIDEO, Case, onevision_places

PER_VISUAL = {
    "image": (
        "pixel_values",
        "image_sizes",
        "image_grid_thw",
        "batch_num_images",
        "pixel_attention_mask",
    ),
    "video": ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"),
}
TOKENS = {"image": IMAGE, "video": VIDEO}
NONE = slice(0, 0)


def row_of(
    batch: dict[str, Tensor], case: Case, row: int, images: slice, videos: slice = NONE
) -> dict[str, Tensor]:
    """One row of a batch without its padding, with the images and videos that are its."""
    seen = batch["attention_mask"][row].bool()
    per_visual = {name for names in PER_VISUAL.values() for name in names}
    single = {
        name: tensor[row : row + 1, seen]
        for name, tensor in batch.items()
        if name not in per_visual
    }
    for kind, some in (("image", images), ("video", videos)):
        if some.stop > some.start and kind == "image" and case.pixels_of is not None:
            single |= case.pixels_of(batch, row, some)
        elif some.stop > some.start:
            single |= _visuals_of(batch, kind, some)
    return single


def _visuals_of(batch: dict[str, Tensor], kind: str, some: slice) -> dict[str, Tensor]:
    pixels, *others = PER_VISUAL[kind]
    inputs = {name: batch[name][some] for name in others if name in batch}
    grids = batch.get(f"{kind}_grid_thw")
    if grids is None:
        return inputs | {pixels: batch[pixels][some]}
    ends = [0, *grids.prod(-1).cumsum(0).tolist()]  # patches stand one after the other
    return inputs | {pixels: batch[pixels][ends[some.start] : ends[some.stop]]}


@torch.no_grad()
def encoded(case: Case, single: dict[str, Tensor]) -> dict[str, Any]:
    """What the model's own encoder makes of images and videos of a row."""
    made = {}
    for kind, (pixels, *others) in PER_VISUAL.items():
        if pixels in single:
            names = (pixels, *(name for name in others if name != "second_per_grid_ts"))
            given = {name: single[name] for name in names if name in single}
            made[kind] = getattr(case.model, f"get_{kind}_features")(**given)
    return made


@torch.no_grad()
def embeddings(case: Case, single: dict[str, Tensor]) -> Tensor:
    """Input embeddings of the unpruned row, shape (n_tokens, d_model)."""
    ids = single["input_ids"][0]
    rows = case.model.get_input_embeddings()(ids)
    for kind, output in encoded(case, single).items():
        rows[ids == TOKENS[kind]] = torch.cat(list(output.pooler_output))
    return rows


def coordinates(
    case: Case, single: dict[str, Tensor], kept: Tensor, in_place: bool = False
) -> Tensor:
    """Position ids of the kept tokens, shape (1, n_kept) or (3, 1, n_kept)."""
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    given = {name: single[name] for name in names if name in single}
    if not given:
        n_kept = len(kept)
        shape = (3, 1, n_kept) if "mm_token_type_ids" in single else (1, n_kept)
        return (kept if in_place else torch.arange(n_kept)).expand(shape)
    positions, _ = case.model.model.get_rope_index(
        single["input_ids"], mm_token_type_ids=single["mm_token_type_ids"], **given
    )
    return positions[..., kept]


def kinds_of(case: Case, single: dict[str, Tensor], kept: Tensor, n_tokens: int = 0) -> Tensor:
    """Token types of the kept tokens, and of an answer that fills up `n_tokens`."""
    if case.types is None:
        return torch.zeros(max(n_tokens, len(kept)))
    answer = torch.zeros(1, max(n_tokens - len(kept), 0), dtype=torch.long)
    return torch.cat((single[case.types][0][kept], case.typed(answer, suffix=0)[case.types][0]))


@torch.no_grad()
def deepstack(case: Case, single: dict[str, Tensor], kept: Tensor) -> dict[str, Any]:
    """What the LLM takes beside embeddings, for kept tokens."""
    outputs = encoded(case, single)
    if not outputs or not hasattr(next(iter(outputs.values())), "deepstack_features"):
        return {}
    ids = single["input_ids"][0]
    levels = []
    for level in range(len(next(iter(outputs.values())).deepstack_features)):
        rows = torch.zeros(len(ids), case.model.get_input_embeddings().embedding_dim)
        for kind, output in outputs.items():
            rows[ids == TOKENS[kind]] = torch.cat(list(output.deepstack_features[level]))
        levels.append(rows[kept])
    visual = ((ids == IMAGE) | (ids == VIDEO))[kept]
    return {
        "visual_pos_masks": visual[None],
        "deepstack_visual_embeds": [rows[visual] for rows in levels],
    }


@torch.no_grad()
def pruned_inputs(case: Case, single: dict[str, Tensor], kept: Tensor) -> dict[str, Any]:
    """What `generate` takes for the kept tokens: embeddings, or ids and features with deepstack."""
    if not deepstack(case, single, kept):
        return {"inputs_embeds": embeddings(case, single)[kept][None]}
    ids, outputs = single["input_ids"][0], encoded(case, single)
    for kind, output in outputs.items():
        some = torch.isin((ids == TOKENS[kind]).nonzero().flatten(), kept)
        output.pooler_output = [torch.cat(output.pooler_output)[some]]
        output.deepstack_features = [[torch.cat(f)[some]] for f in output.deepstack_features]
    return {"input_ids": ids[kept][None], "mm_encoder_outputs": outputs}


@torch.no_grad()
def hidden(
    case: Case,
    single: dict[str, Tensor],
    kept: Tensor,
    embeds: Tensor,
    positions: Tensor,
    beside: dict[str, Any] | None = None,
) -> Tensor:
    """Last hidden states of kept tokens and an answer after them; `beside` is their deepstack."""
    beside = dict(deepstack(case, single, kept) if beside is None else beside)
    if beside:
        n_new = embeds.shape[1] - len(kept)
        beside["visual_pos_masks"] = F.pad(beside["visual_pos_masks"], (0, n_new))
    return case.llm(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=case.masks(kinds_of(case, single, kept, embeds.shape[1])),
        use_cache=False,
        **beside,
    ).last_hidden_state


@torch.no_grad()
def logits(case: Case, single: dict[str, Tensor], kept: Tensor, in_place: bool = False) -> Tensor:
    """Logits of the tokens at `kept` positions of the row, shape (n_kept, vocabulary)."""
    embeds = embeddings(case, single)[kept][None]
    positions = coordinates(case, single, kept, in_place)
    return case.model.lm_head(hidden(case, single, kept, embeds, positions))[0]


@torch.no_grad()
def greedy(
    case: Case, single: dict[str, Tensor], kept: Tensor, n_new: int, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Greedy answer and its logits from the tokens at `kept` positions of the row."""
    model: Any = case.model
    embeds = embeddings(case, single)[kept][None]
    positions = coordinates(case, single, kept, in_place)
    beside = deepstack(case, single, kept)
    answer, logits = [], []
    for _ in range(n_new):
        last = hidden(case, single, kept, embeds, positions, beside)[:, -1]
        logits.append(model.lm_head(last))
        answer.append(logits[-1].argmax(-1))
        embeds = torch.cat((embeds, model.get_input_embeddings()(answer[-1])[:, None]), dim=1)
        positions = torch.cat((positions, positions.max() + 1 + positions[..., -1:] * 0), dim=-1)
    return torch.cat(answer), torch.cat(logits)


def packed_places(case: Case, size: Tensor, n_crops: int) -> Tensor:
    """What the model's own packing makes of numbered patches: crop-ordered numbers, -1 newlines."""
    numbers = torch.arange(n_crops * 16.0).view(n_crops, 16, 1)
    packed, _ = case.model.pack_image_features([numbers], size[None], "default", -torch.ones(1))
    return packed[0].flatten().long()


def newlines(case: Case, single: dict[str, Tensor], kind: str, number: int, n: int) -> Tensor:
    """Which of an image's or video's `n` features are newlines, bool, shape (n,)."""
    if kind == "video" and case.model.config.model_type == "llava_onevision":
        return torch.arange(n) == n - 1
    if kind == "video" or case.model.config.model_type not in ("llava_next", "llava_onevision"):
        return torch.zeros(n, dtype=torch.bool)
    size = single["image_sizes"][number]
    n_crops = 5 if int(size[0]) == 30 else 3
    if "batch_num_images" not in single:
        return packed_places(case, size, n_crops) < 0
    alone = [count == 1 for count in single["batch_num_images"].tolist() for _ in range(count)]
    n_crops = n_crops if alone[number] else 1
    return onevision_places(case.model, size, n_crops) < 0


def kept_positions(case: Case, single: dict[str, Tensor], reports: list) -> Tensor:
    """Positions in an unpadded row that stay: the text, what the report has, and newlines."""
    row = single["input_ids"][0]
    stays = (row != IMAGE) & (row != VIDEO)
    start, counted = dict.fromkeys(TOKENS, 0), dict.fromkeys(TOKENS, 0)
    for report in reports:
        places = (row == TOKENS[report.kind]).nonzero().flatten()[start[report.kind] :]
        n_features = report.n_before + report.n_fixed
        newline = newlines(case, single, report.kind, counted[report.kind], n_features)
        chosen = (~newline).nonzero().flatten()[report.kept]
        stays[places[chosen]] = True
        stays[places[newline.nonzero().flatten()]] = True
        start[report.kind] += n_features
        counted[report.kind] += 1
    return stays.nonzero().flatten()
