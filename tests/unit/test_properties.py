"""Properties that hold for any input: of a selection, and of a prompt that is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.errors import InputError
from budwood.prune import METHODS, Extras, select
from budwood.prune.methods.adav import AdaV
from budwood.prune.methods.adav_contrast import AdaVContrast
from budwood.prune.methods.fastervlm import FasterVLM
from budwood.prune.methods.t2i import T2I
from budwood.prune.prompt import Placed, prune_rows

some = settings(derandomize=True, database=None, deadline=None, max_examples=30)
many = settings(some, max_examples=150)

EXACT = [name for name in METHODS if METHODS.get(name).exact]
BY_CONTENT = (AdaV(temperature=1.0), AdaVContrast(), FasterVLM(), T2I(temperature=1.0))
"""Methods that choose by what tokens are and not by where they stand.

At a low temperature no two scores round to the same number: of equal ones the first is chosen.
"""

LARGE = 2.0**100
NUMBERS = st.floats(-LARGE, LARGE, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e-30])


@st.composite
def tensors(draw, *shape, numbers=NUMBERS):
    n = int(torch.tensor(shape).prod())
    values = draw(st.lists(numbers, min_size=n, max_size=n))
    return torch.tensor(values, dtype=torch.float32).view(shape)


@st.composite
def images(draw):
    """Visual tokens, text, saliency and extras of one small image."""
    rows, columns, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    n = rows * columns
    y, x = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
    corners = (x, y, x + 1 / columns, y + 1 / rows)
    return (
        draw(tensors(n, width)),
        draw(tensors(draw(st.integers(0, 3)), width)),
        draw(tensors(n, numbers=st.floats(0, LARGE, width=32))),
        Extras(torch.stack(corners, -1).view(-1, 4)),
    )


@pytest.mark.parametrize("method", EXACT)
@some
@given(images(), st.data())
def test_exactly_k_distinct_sorted_indices(method, image, data):
    visual, text, saliency, extras = image
    keep = data.draw(st.integers(1, len(visual)))
    got = select(visual, text, saliency, keep=keep, method=method, extras=extras).indices.tolist()
    assert len(got) == keep
    assert got == sorted(set(got))
    assert got[0] >= 0 and got[-1] < len(visual)
    whole = select(visual, text, saliency, keep=1.0, method=method, extras=extras).indices
    assert whole.tolist() == list(range(len(visual)))


@pytest.mark.parametrize("method", BY_CONTENT, ids=lambda method: method.name)
@some
@given(st.integers(2, 24), st.integers(1, 4), st.integers(0, 10_000), st.data())
def test_shuffled_tokens_are_chosen_alike(method, n, n_text, seed, data):
    draw = torch.Generator().manual_seed(seed)
    visual = torch.randn(n, 5, generator=draw)
    text, saliency = torch.randn(n_text, 5, generator=draw), torch.rand(n, generator=draw)
    shuffled = torch.tensor(data.draw(st.permutations(range(n))))
    keep = data.draw(st.integers(1, n))
    plain = select(visual, text, saliency, keep=keep, method=method).indices
    other = select(visual[shuffled], text, saliency[shuffled], keep=keep, method=method).indices
    assert sorted(shuffled[other].tolist()) == plain.tolist()


@st.composite
def prompts(draw):
    """Masks padded on either side, images in one run or several, and what is kept of them."""
    n_rows, n_tokens = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    mask = torch.zeros(n_rows, n_tokens, dtype=torch.long)
    placed, kept = [], []
    for row in range(n_rows):
        first = draw(st.integers(0, n_tokens - 1))
        last = draw(st.integers(first, n_tokens - 1))
        mask[row, first : last + 1] = 1
        cuts = draw(st.sets(st.integers(first, last + 1), max_size=8))
        runs = [(a, b) for a, b in zip(sorted(cuts)[::2], sorted(cuts)[1::2])]
        while runs:
            n_runs = draw(st.integers(1, len(runs)))
            image, runs = runs[:n_runs], runs[n_runs:]
            length = sum(stop - start for start, stop in image)
            stay = draw(st.sets(st.integers(0, length - 1), min_size=1))
            placed.append(Placed(row, tuple(image)))
            kept.append(torch.tensor(sorted(stay), dtype=torch.long))
        gap = draw(st.none() | st.integers(first, last))
        if gap is not None and first < gap < last:
            mask[row, gap] = 0
    return mask, placed, kept


def left_of(mask, placed, kept, row):
    """Positions of a row that stay, from its first attended token to its last, one by one."""
    seen = mask[row].nonzero().flatten().tolist()
    positions = set(range(seen[0], seen[-1] + 1))
    for image, some_kept in zip(placed, kept):
        if image.row == row:
            inside = [i for run in image.runs for i in range(*run)]
            positions -= {i for n, i in enumerate(inside) if n not in some_kept.tolist()}
    return sorted(positions)


@many
@given(prompts(), st.booleans())
def test_only_dropped_placeholders_are_lost(prompt, keep_end):
    mask, placed, kept = prompt
    n_tokens = mask.shape[1]
    pruned = prune_rows(mask, placed, kept, torch.device("cpu"), keep_end)
    last = [int(row.nonzero().max()) for row in mask]
    first = [int(row.nonzero().min()) for row in mask]
    on_left, on_right = any(first), any(i < n_tokens - 1 for i in last)
    ids = torch.arange(mask.numel()).view_as(mask)
    taken = pruned.take(ids, -7)
    for row in range(len(mask)):
        expected = left_of(mask, placed, kept, row)
        columns = pruned.valid[row].nonzero().flatten().tolist()
        assert pruned.origin[row][columns].tolist() == expected
        assert taken[row][columns].tolist() == [row * n_tokens + i for i in expected]
        assert (taken[row][~pruned.valid[row]] == -7).all()
        assert columns == list(range(columns[0], columns[0] + len(columns)))
        if keep_end or (on_left and on_right):  # the right end stands still
            n_padding = n_tokens - 1 - last[row]
            assert columns[-1] == pruned.index.shape[1] - 1 - n_padding
        elif on_right:
            assert columns[0] == 0
        else:
            assert columns[-1] == pruned.index.shape[1] - 1
    if not keep_end and not (on_left and on_right):  # no more padding than needed
        assert pruned.valid.all(1).any()


@many
@given(prompts(), st.data())
def test_positions_are_translated_or_refused(prompt, data):
    mask, placed, kept = prompt
    n_tokens = mask.shape[1]
    pruned = prune_rows(mask, placed, kept, torch.device("cpu"), keep_end=True)
    wanted = data.draw(st.integers(0, n_tokens - 1))
    columns = set()
    for row in range(len(mask)):
        last = int(mask[row].nonzero().max())
        stays = [*left_of(mask, placed, kept, row), *range(last + 1, n_tokens)]
        behind = len(stays) - stays.index(wanted) if wanted in stays else None
        columns.add(None if behind is None else pruned.index.shape[1] - behind)
    for given_as in (wanted, wanted - n_tokens):
        if columns - {None} and len(columns) == 1:
            assert pruned.moved(torch.tensor([given_as])).tolist() == list(columns)
        else:
            with pytest.raises(InputError, match="logits_to_keep"):
                pruned.moved(torch.tensor([given_as]))
