"""Images in a batch of prompts: where they are, and the prompts without the dropped tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from budwood.errors import InputError


@dataclass(frozen=True)
class Placed:
    """Where one image is.

    Attributes:
        row: row of the batch.
        start: position of its first placeholder.
        stop: position after its last.
    """

    row: int
    start: int
    stop: int


def locate_images(ids: Tensor, image_token_id: int, lengths: Sequence[int]) -> list[Placed]:
    """Find each image's placeholders, images being in the order of the batch.

    Args:
        ids: prompts, int64, on the CPU, shape (batch, n_tokens).
        image_token_id: the placeholder.
        lengths: placeholders per image.

    Raises:
        InputError: the prompts have other placeholders than the images need.
    """
    rows, columns = (ids == image_token_id).nonzero(as_tuple=True)
    if len(rows) != sum(lengths):
        raise InputError(
            f"the prompts have {len(rows)} image placeholders, the {len(lengths)} images need "
            f"{sum(lengths)}; prepare both with the processor that belongs to the model"
        )
    placed, first = [], 0
    for number, length in enumerate(lengths):
        last = first + length - 1
        row, start, stop = int(rows[first]), int(columns[first]), int(columns[last]) + 1
        if int(rows[last]) != row or stop - start != length:
            raise InputError(
                f"the {length} placeholders of image {number} are not in one piece, from row {row} "
                f"position {start} on; leave no text inside an image and truncate no prompt"
            )
        placed.append(Placed(row, start, stop))
        first += length
    return placed


@dataclass(frozen=True, eq=False)
class Pruned:
    """Which tokens of a batch of prompts stay, and how any tensor beside them is cut.

    Attributes:
        index: position in the original prompt of each token, int64, shape (batch, n_kept).
        valid: whether there is a token; the rest is padding. Bool, same shape.
    """

    index: Tensor
    valid: Tensor

    def take(self, tensor: Tensor, fill: int) -> Tensor:
        """Cut a tensor that has one entry per token.

        Args:
            tensor: shape (..., batch, n_tokens).
            fill: what padding gets.

        Returns:
            Shape (..., batch, n_kept).
        """
        index = self.index.expand(*tensor.shape[:-1], -1)
        return tensor.gather(-1, index).where(self.valid, fill)

    @property
    def origin(self) -> Tensor:
        """Position in the original prompt, -1 for padding, int64, shape (batch, n_kept)."""
        return self.index.where(self.valid, -1)


def prune_rows(
    mask: Tensor, images: Sequence[Placed], kept: Sequence[Tensor], device: torch.device
) -> Pruned:
    """Drop placeholders and pad anew, on the side that was padded and no more than needed.

    Padding on the right is kept only where there is some; without any the new one is on the left.
    Waits for no device: what is kept may stay there, only how much must be known here.

    Args:
        mask: attention mask of the prompts, on the CPU, shape (batch, n_tokens).
        images: where the images are.
        kept: for each image the placeholders that stay, counted from its first one, int64, shape
            (n_kept,), distinct, on ``device``.
        device: where the result goes.
    """
    n_tokens = mask.shape[1]
    seen = mask.bool()
    seen[~seen.any(1)] = True  # a row that is masked throughout has no padding to speak of
    on_right = not bool(seen[:, -1].all())
    # From the first to the last token that is attended: a gap inside is the user's and stays.
    stays = seen.long().cumsum(1).bool() & seen.flip(1).long().cumsum(1).flip(1).bool()
    counts = stays.sum(1)
    for image, some in zip(images, kept, strict=True):
        counts[image.row] += len(some) - int(stays[image.row, image.start : image.stop].sum())
        stays[image.row, image.start : image.stop] = False
    length = int(counts.max())
    stays = stays.to(device, non_blocking=True)
    for image, some in zip(images, kept, strict=True):
        stays[image.row].index_fill_(0, some + image.start, True)
    # A stable sort moves what stays to one end, in order.
    column = torch.arange(length)
    if on_right:
        index = torch.argsort((~stays).byte(), dim=1, stable=True)[:, :length]
        valid = column < counts[:, None]
    else:
        index = torch.argsort(stays.byte(), dim=1, stable=True)[:, n_tokens - length :]
        valid = column >= length - counts[:, None]
    return Pruned(index, valid.to(device, non_blocking=True))
