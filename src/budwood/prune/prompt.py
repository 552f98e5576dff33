"""Images in a batch of prompts: where they are, and the prompts without the dropped tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from budwood.errors import InputError


@dataclass(frozen=True)
class Placed:
    """Where an image or video is: its placeholders stand in one run, or in several between text.

    Attributes:
        row: row of the batch.
        runs: position of each run's first placeholder and the one after its last, increasing.
    """

    row: int
    runs: tuple[tuple[int, int], ...]

    @property
    def start(self) -> int:
        """Position of the first placeholder."""
        return self.runs[0][0]

    @property
    def stop(self) -> int:
        """Position after the last placeholder."""
        return self.runs[-1][1]

    def places(self, some: Tensor) -> Tensor:
        """Positions in the row of some placeholders.

        Args:
            some: placeholders, counted from the image's first one, int64, shape (n,).

        Returns:
            On the same device, int64, shape (n,).
        """
        if len(self.runs) == 1:
            return some + self.start
        table = torch.cat([torch.arange(*run) for run in self.runs])
        return table.to(some.device, non_blocking=True)[some]


def locate_images(
    ids: Tensor, token_id: int, lengths: Sequence[Sequence[int]], kind: str = "image"
) -> list[Placed]:
    """Find the placeholders of each image or video, which are in the order of the batch.

    Args:
        ids: prompts, int64, on the CPU, shape (batch, n_tokens).
        token_id: the placeholder.
        lengths: for each image, placeholders of each of its runs.
        kind: what messages call them, ``"image"`` or ``"video"``.

    Raises:
        InputError: the prompts have other placeholders than the images need.
    """
    rows, columns = (ids == token_id).nonzero(as_tuple=True)
    needed = sum(map(sum, lengths))
    if len(rows) != needed:
        raise InputError(
            f"the prompts have {len(rows)} {kind} placeholders, the {len(lengths)} {kind}s need "
            f"{needed}; prepare both with the processor that belongs to the model"
        )
    placed, first = [], 0
    for number, runs in enumerate(lengths):
        row, found = int(rows[first]), []
        for length in runs:
            last = first + length - 1
            found.append((int(columns[first]), int(columns[last]) + 1))
            if not int(rows[first]) == int(rows[last]) == row or _length(found[-1]) != length:
                raise InputError(_in_other_pieces(f"{kind} {number}", runs, row, found[0][0]))
            first += length
        placed.append(Placed(row, tuple(found)))
    return placed


def _length(run: tuple[int, int]) -> int:
    return run[1] - run[0]


def _in_other_pieces(name: str, runs: Sequence[int], row: int, start: int) -> str:
    pieces = "in one piece" if len(runs) == 1 else f"in pieces of {', '.join(map(str, runs))}"
    return (
        f"the {sum(runs)} placeholders of {name} are not {pieces}, from row {row} position "
        f"{start} on; leave no other text inside and truncate no prompt"
    )


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
        # New padding in front holds any tokens; padding at the end is the prompt's own.
        there = self.valid.cumsum(1) > 0
        matches = (self.index[:, None] == wanted[:, None]) & there[:, None]  # (batch, n, n_kept)
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

    def with_padding(self) -> Pruned:
        """The same with one more column of padding in front."""
        index = torch.nn.functional.pad(self.index, (1, 0))
        return Pruned(index, torch.nn.functional.pad(self.valid, (1, 0)), self.n_tokens)

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
    n_held: int = 0,
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
        n_held: first columns that a cache holds, which the result leaves out.
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
    stays[:, :n_held] = False
    counts = stays.sum(1)
    for image, some in zip(images, kept, strict=True):
        counts[image.row] += len(some)
        for run in image.runs:
            counts[image.row] -= stays[image.row, slice(*run)].sum()
            stays[image.row, slice(*run)] = False
    length = int(counts.max())
    stays = stays.to(device, non_blocking=True)
    for image, some in zip(images, kept, strict=True):
        stays[image.row].index_fill_(0, image.places(some), True)
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
