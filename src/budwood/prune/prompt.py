"""Images in a batch of prompts: where they are, and the prompts without the dropped tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from budwood.errors import InputError


@dataclass(frozen=True)
class Placed:
    """Where one image or video is.

    Attributes:
        row: row of the batch.
        start: position of its first placeholder.
        stop: position after its last.
        runs: first position of each piece and the one after its last, if there are several; empty
            if all from ``start`` to ``stop`` are placeholders.
    """

    row: int
    start: int
    stop: int
    runs: tuple[tuple[int, int], ...] = ()

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """Each run of placeholders, at least one."""
        return self.runs or ((self.start, self.stop),)

    def positions(self, kept: Tensor) -> Tensor:
        """Positions in the row of placeholders that are counted from the first one.

        Args:
            kept: int64, shape (n_kept,), on any device.
        """
        if not self.runs:
            return kept + self.start
        places = torch.cat([torch.arange(*run) for run in self.runs])
        return places.to(kept.device, non_blocking=True)[kept]


def locate_images(
    ids: Tensor,
    token_id: int,
    lengths: Sequence[int],
    runs: Sequence[Sequence[int]] | None = None,
    kind: str = "image",
) -> list[Placed]:
    """Find the placeholders of each image or video, which are in the order of the batch.

    Args:
        ids: prompts, int64, on the CPU, shape (batch, n_tokens).
        token_id: the placeholder.
        lengths: placeholders per image.
        runs: placeholders of each of its pieces; None, or empty for one image, if it is in one.
        kind: what messages call it.

    Raises:
        InputError: the prompts have other placeholders than the images need.
    """
    rows, columns = (ids == token_id).nonzero(as_tuple=True)
    if len(rows) != sum(lengths):
        raise InputError(
            f"the prompts have {len(rows)} {kind} placeholders, the {len(lengths)} {kind}s need "
            f"{sum(lengths)}; prepare both with the processor that belongs to the model"
        )
    placed, first = [], 0
    for number, length in enumerate(lengths):
        row = int(rows[first])
        pieces = []
        for piece in (runs[number] if runs else ()) or (length,):
            last = first + piece - 1
            start, stop = int(columns[first]), int(columns[last]) + 1
            if int(rows[last]) != row or stop - start != piece:
                raise InputError(
                    f"the {piece} placeholders of {kind} {number} are not in one piece, from row "
                    f"{row} position {start} on; leave no text inside and truncate no prompt"
                )
            pieces.append((start, stop))
            first += piece
        spread = tuple(pieces) if len(pieces) > 1 else ()
        placed.append(Placed(row, pieces[0][0], pieces[-1][1], spread))
    return placed


@dataclass(frozen=True, eq=False)
class Pruned:
    """Which tokens of a batch of prompts stay, and how any tensor beside them is cut.

    Attributes:
        index: position in the original prompt of each token, int64, shape (batch, n_kept).
        valid: whether there is a token; the rest is padding. Bool, same shape.
        n_tokens: length of the original prompt.
    """

    index: Tensor
    valid: Tensor
    n_tokens: int

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

    def moved(self, positions: Tensor) -> Tensor:
        """Where tokens of the original prompt are now.

        Args:
            positions: in the original prompt, negative ones from its end, int64, shape (n,).

        Returns:
            Their columns, the same in every row of the batch, int64, shape (n,).

        Raises:
            InputError: a token was dropped, or is in another column in each row.
        """
        n_tokens = self.n_tokens
        wanted = torch.where(positions < 0, positions + n_tokens, positions).to(self.index.device)
        matches = self.index[:, None] == wanted[:, None]  # (batch, n, n_kept)
        columns = matches.byte().argmax(-1)
        fine = matches.any(-1).all(0) & (columns == columns[:1]).all(0)
        if not bool(fine.all()):
            first = int(positions[~fine.to(positions.device)][0])
            raise InputError(
                f"logits_to_keep asks for position {first}, which pruning drops, or moves to a "
                "different column in each row; give a number of last positions (int), or one row "
                "at a time"
            )
        return columns[0]

    @property
    def origin(self) -> Tensor:
        """Position in the original prompt, -1 for padding, int64, shape (batch, n_kept)."""
        return self.index.where(self.valid, -1)


def prune_rows(
    mask: Tensor,
    images: Sequence[Placed],
    kept: Sequence[Tensor],
    device: torch.device,
    keep_end: bool = False,
) -> Pruned:
    """Drop placeholders and pad anew, on the side that was padded and no more than needed.

    Without any padding the new one goes to the left. Rows that are padded on both sides, as TRL's
    GRPO makes them (prompt padded on the left, completion on the right), keep their padding on the
    right: the last columns hold the same tokens as before. Waits for no device: what is kept may
    stay there, only how much must be known here.

    Args:
        mask: attention mask of the prompts, on the CPU, shape (batch, n_tokens).
        images: where the images are.
        kept: for each image the placeholders that stay, counted from its first one, int64, shape
            (n_kept,), distinct, on ``device``.
        device: where the result goes.
        keep_end: keep the padding on the right in any case.
    """
    n_tokens = mask.shape[1]
    seen = mask.bool()
    seen[~seen.any(1)] = True  # a row that is masked throughout has no padding to speak of
    from_first = seen.long().cumsum(1).bool()
    to_last = seen.flip(1).long().cumsum(1).flip(1).bool()
    keep_end = keep_end or not (from_first.all() or to_last.all())
    on_right = not (keep_end or to_last.all())
    # From the first to the last token that is attended: a gap inside is the user's and stays.
    stays = from_first.clone() if keep_end else from_first & to_last
    counts = stays.sum(1)
    for image, some in zip(images, kept, strict=True):
        counts[image.row] += len(some)
        for start, stop in image.pieces:
            counts[image.row] -= int(stays[image.row, start:stop].sum())
            stays[image.row, start:stop] = False
    length = int(counts.max())
    stays = stays.to(device, non_blocking=True)
    for image, some in zip(images, kept, strict=True):
        stays[image.row].index_fill_(0, image.positions(some), True)
    # A stable sort moves what stays to one end, in order.
    column = torch.arange(length)
    if on_right:
        index = torch.argsort((~stays).byte(), dim=1, stable=True)[:, :length]
        valid = column < counts[:, None]
    else:
        index = torch.argsort(stays.byte(), dim=1, stable=True)[:, n_tokens - length :]
        padding = (~to_last).sum(1, keepdim=True) if keep_end else 0
        valid = (column >= length - counts[:, None]) & (column < length - padding)
    return Pruned(index, valid.to(device, non_blocking=True), n_tokens)
