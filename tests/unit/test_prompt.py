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
                places = [place for run in image.runs for place in range(*run)]
                gone = set(places) - {places[k] for k in some.tolist()}
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
            runs = []
            for _ in range(draw(1, 3)):  # one piece, or two with text between them
                stop = position + draw(1, 4)
                runs.append((position, stop))
                ids[row, position:stop] = IMAGE
                position = stop + draw(0, 2)
            images.append(Placed(row, tuple(runs)))
    mask[1, 12] = 0  # a gap of the user's own stays where it is
    lengths = [[stop - start for start, stop in image.runs] for image in images]
    kept = [
        torch.randperm(n, generator=generator)[: draw(1, n + 1)].sort().values
        for n in map(sum, lengths)
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
    pruned = prune_rows(mask, [Placed(0, ((1, 3),))], [torch.tensor([1])], mask.device)
    assert pruned.origin.tolist() == [[-1, 0, 2, 3], [0, 1, 2, 3]]


def test_images_side_by_side_are_told_apart():
    ids = torch.tensor([[1, 3, 3, 3, 3, 3, 9], [9, 9, 3, 3, 9, 3, 9]])
    found = locate_images(ids, IMAGE, [[2], [3], [2], [1]])
    runs = [(0, (1, 3)), (0, (3, 6)), (1, (2, 4)), (1, (5, 6))]
    assert found == [Placed(row, (run,)) for row, run in runs]


def test_an_image_in_several_runs_is_one_image():
    ids = torch.tensor([[1, 3, 3, 8, 3, 3, 3, 9], [9, 3, 3, 9, 9, 9, 3, 9]])
    found = locate_images(ids, IMAGE, [[2, 3], [1], [1, 1]])
    expected = [Placed(0, ((1, 3), (4, 7))), Placed(1, ((1, 2),)), Placed(1, ((2, 3), (6, 7)))]
    assert found == expected
    assert (found[0].start, found[0].stop) == (1, 7)
    assert found[0].places(torch.tensor([0, 1, 2, 4])).tolist() == [1, 2, 4, 6]
    kept = [torch.tensor([1, 3]), torch.tensor([0]), torch.tensor([1])]
    pruned = prune_rows(torch.ones_like(ids), found, kept, ids.device)
    assert pruned.origin.tolist() == [[-1, -1, 0, 2, 3, 5, 7], [0, 1, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([[2], [3]], "8 image placeholders, the 2 images need 5"),
        ([[2], [4], [2]], "image 1"),
        ([[2, 4], [2]], "image 0 are not in pieces of 2, 4"),
        ([], "8 image"),
    ],
)
def test_placeholders_of_other_images_say_so(lengths, message):
    ids = torch.tensor([[1, 3, 3, 3, 3, 3, 9], [9, 9, 3, 3, 9, 3, 9]])
    with pytest.raises(InputError, match=message):
        locate_images(ids, IMAGE, lengths)


def test_an_image_in_pieces_says_so():
    with pytest.raises(InputError, match="not in one piece"):
        locate_images(torch.tensor([[3, 9, 3]]), IMAGE, [[2]])
