"""Finding images in prompts and cutting tokens out, against loops over lists."""

from __future__ import annotations

import pytest
import torch

from budwood.errors import InputError
from budwood.prune.prompt import Placed, locate_images, prune_rows

IMAGE = 3


def slow(ids, mask, images, kept, on_right):
    """Rows as lists: drop, strip padding, pad again."""
    rows = []
    for row in range(len(ids)):
        stays = list(range(ids.shape[1]))
        for image, some in zip(images, kept):
            if image.row == row:
                gone = set(range(image.start, image.stop)) - {
                    image.start + k for k in some.tolist()
                }
                stays = [position for position in stays if position not in gone]
        seen = [position for position in range(ids.shape[1]) if mask[row, position]]
        rows.append([position for position in stays if seen[0] <= position <= seen[-1]])
    length = max(map(len, rows))
    if on_right:
        return torch.tensor([row + [-1] * (length - len(row)) for row in rows])
    return torch.tensor([[-1] * (length - len(row)) + row for row in rows])


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("seed", range(8))
def test_cutting_equals_lists(side, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    n_rows, n_tokens = 4, 30
    ids = torch.randint(10, 60, (n_rows, n_tokens), generator=generator)
    mask = torch.ones_like(ids)
    images = []
    for row in range(n_rows):
        n_pad = 0 if side == "none" or row == 1 else draw(0, 6)
        if n_pad:
            mask[row, slice(0, n_pad) if side == "left" else slice(-n_pad, None)] = 0
        position = 7
        for _ in range(draw(0, 3)):
            length = draw(1, 6)
            images.append(Placed(row, position, position + length))
            ids[row, position : position + length] = IMAGE
            position += length + draw(0, 3)
    mask[1, 12] = 0  # a gap of the user's own stays where it is
    lengths = [image.stop - image.start for image in images]
    kept = [
        torch.randperm(length, generator=generator)[: draw(1, length + 1)].sort().values
        for length in lengths
    ]
    assert locate_images(ids, IMAGE, lengths) == images
    on_right = side == "right" and bool((mask[:, -1] == 0).any())
    pruned = prune_rows(mask, images, kept, ids.device)
    expected = slow(ids, mask, images, kept, on_right)
    assert torch.equal(pruned.origin, expected)
    padded = torch.cat((ids, torch.full((n_rows, 1), 7)), dim=1)
    taken = padded.gather(1, expected.where(expected >= 0, n_tokens))
    assert torch.equal(pruned.take(ids, 7), taken)
    three = torch.stack((ids, ids + 1, ids + 2))
    assert torch.equal(pruned.take(three, 7)[2], (taken + 2).where(expected >= 0, 7))


def test_a_row_masked_throughout_stays_whole():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    pruned = prune_rows(mask, [Placed(0, 1, 3)], [torch.tensor([1])], mask.device)
    assert pruned.origin.tolist() == [[-1, 0, 2, 3], [0, 1, 2, 3]]


def test_images_side_by_side_are_told_apart():
    ids = torch.tensor([[1, 3, 3, 3, 3, 3, 9], [9, 9, 3, 3, 9, 3, 9]])
    found = locate_images(ids, IMAGE, [2, 3, 2, 1])
    expected = [Placed(0, 1, 3), Placed(0, 3, 6), Placed(1, 2, 4), Placed(1, 5, 6)]
    assert found == expected


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([2, 3], "8 image placeholders, the 2 images need 5"),
        ([2, 4, 2], "image 1"),
        ([], "8 image"),
    ],
)
def test_placeholders_of_other_images_say_so(lengths, message):
    ids = torch.tensor([[1, 3, 3, 3, 3, 3, 9], [9, 9, 3, 3, 9, 3, 9]])
    with pytest.raises(InputError, match=message):
        locate_images(ids, IMAGE, lengths)


def test_an_image_in_pieces_says_so():
    with pytest.raises(InputError, match="not in one piece"):
        locate_images(torch.tensor([[3, 9, 3]]), IMAGE, [2])
