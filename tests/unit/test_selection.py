"""select() against the reference, the properties it promises, and what it refuses."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from budwood.errors import BudgetError, InputError, ShapeError, UnknownNameError
from budwood.prune import METHODS, select
from budwood.prune.methods.adav import AdaV
from budwood.prune.methods.adav_contrast import AdaVContrast
from budwood.prune.methods.adav_official import AdaVOfficial
from budwood.prune.methods.base import Extras, Split
from budwood.prune.methods.baselines import Random
from budwood.prune.methods.scores import Common, best_split, log_relevance
from budwood.prune.methods.t2i import T2I
from budwood.prune.selection import method_of, usable
from tests.reference import adav_reference as reference

# (n_visual, n_text, d_model, keep): tiny budgets, everything, one text token, heavy overlap
SHAPES = [
    (1, 1, 3, 1),
    (7, 3, 5, 1),
    (7, 3, 5, 2),
    (9, 2, 4, 3),
    (12, 1, 6, 4),
    (23, 5, 7, 5),
    (40, 4, 9, 11),
    (64, 6, 8, 40),
    (31, 3, 5, 30),
    (31, 3, 5, 31),
    (90, 11, 16, 17),
]

SPREAD = ("vispruner", "visionzip", "prumerge-plus")
"""Methods that space some tokens evenly, so that flat scores do not give the first ones."""

EXACT = [name for name in METHODS if METHODS.get(name).exact]


def make(n_visual, n_text, d_model, *, seed=0, sharp=2.0):
    """Random inputs; `sharp` spreads the saliency, as attention is spread."""
    rng = torch.Generator().manual_seed(seed)
    visual = torch.randn(n_visual, d_model, generator=rng)
    text = torch.randn(n_text, d_model, generator=rng)
    saliency = (sharp * torch.randn(n_visual, generator=rng)).softmax(0)
    return visual, text, saliency


def plain(*tensors):
    return [tensor.double().tolist() for tensor in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [100.0, 2.0])
def test_adav_agrees_with_reference(shape, seed, temperature):
    *sizes, keep = shape
    inputs = make(*sizes, seed=seed)
    want = reference.adav(*plain(*inputs), keep, temperature=temperature)
    got = select(*inputs, keep=keep, method=AdaV(temperature=temperature))
    assert got.indices.tolist() == want.indices
    split = (got.split.reserved, got.split.by_text, got.split.by_saliency)
    assert split == (want.n_reserved, want.by_text, want.by_saliency)
    torch.testing.assert_close(
        got.relevance.double(), torch.tensor(want.relevance).double(), rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("reserve", [0.0, 0.1, 0.5])
def test_adav_agrees_with_reference_at_other_reserves(reserve):
    inputs = make(37, 4, 6, seed=3)
    for keep in (1, 2, 5, 8, 20):
        want = reference.adav(*plain(*inputs), keep, reserve=reserve)
        assert select(*inputs, keep=keep, method=AdaV(reserve=reserve)).indices.tolist() == (
            want.indices
        )


@pytest.mark.parametrize("seed", range(3))
def test_lists_that_overlap_are_refilled(seed):
    # Saliency that follows relevance: both lists are one list, so half of the picks come twice.
    visual, text, _ = make(50, 3, 8, seed=seed)
    saliency = log_relevance(visual, text, 5.0).exp()
    saliency = saliency * (1 + 0.01 * torch.rand(50, generator=torch.Generator().manual_seed(seed)))
    want = reference.adav(*plain(visual, text, saliency), 16, temperature=5.0)
    got = select(visual, text, saliency, keep=16, method=AdaV(temperature=5.0))
    assert got.indices.tolist() == want.indices
    assert len(set(got.indices.tolist())) == 16


@pytest.mark.parametrize("keep", [5, 8, 9, 12, 14])
def test_split_is_the_argmax_of_the_equation(keep):
    # Every subset pair that the budget allows, not only the sorted prefixes, on a small problem.
    visual, text, saliency = make(15, 3, 4, seed=keep)
    log_t = reference.log_relevance(*plain(visual, text), 3.0)
    sal = saliency.double().tolist()
    n_each = math.floor(0.25 * keep)
    n_free = keep - 2 * n_each
    rest_t = sorted(log_t, reverse=True)[n_each:]
    rest_s = sorted(sal, reverse=True)[n_each:]

    def best_mass(scores, count):
        return max(sum(combo) for combo in itertools.combinations(scores, count))

    value = [
        best_mass([math.exp(x) for x in rest_t], k) * best_mass(rest_s, n_free - k)
        for k in range(n_free + 1)
    ]
    split = select(visual, text, saliency, keep=keep, method=AdaV(temperature=3.0)).split
    assert split.by_text == value.index(max(value))
    assert split.by_text + split.by_saliency == n_free


@pytest.mark.parametrize(
    "log_text",
    [
        [-150.0, -150.5, -151.0, -190.0],  # exp() of any of them is 0 in float32
        [-1.0, -1.2, -120.0, -190.0],  # and their ratio is above what float32 holds
    ],
)
def test_split_survives_scores_outside_float32(log_text):
    log_t = torch.tensor(log_text)
    saliency = torch.tensor([4e-30, 3.9e-30, 3e-30, 2e-30])
    want = reference.best_split(*plain(log_t, saliency))
    assert 0 < want < 4
    assert best_split(log_t, saliency).item() == want


def test_relevance_below_float32_still_ranks():
    # Cosines 1, .4, .3, … at temperature 1000: all but the first underflow as probabilities.
    cosines = torch.tensor([0.2, 0.4, 1.0, 0.3, -0.5])
    visual = torch.stack((cosines, (1 - cosines**2).sqrt()), dim=1)
    got = select(visual, torch.tensor([[1.0, 0.0]]), keep=3, method=T2I(temperature=1000.0))
    assert got.relevance.tolist().count(0.0) == 4
    assert got.indices.tolist() == [1, 2, 3]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n_directions", [1, 2])
def test_contrast_agrees_with_reference(shape, n_directions):
    n_visual, n_text, d_model, keep = shape
    visual, text, saliency = make(n_visual, n_text, d_model, seed=keep)
    words = torch.randn(40, d_model, generator=torch.Generator().manual_seed(1)) + text.mean(0)
    common = Common.of(words, n_directions)
    want = reference.log_contrast(
        *plain(visual, text), 10.0, *plain(common.mean, common.directions)
    )
    got = select(visual, text, saliency, keep=keep, method=AdaVContrast(common=common))
    torch.testing.assert_close(
        got.relevance.double().log(), torch.tensor(want).double(), rtol=1e-4, atol=1e-4
    )


def test_common_is_the_mean_and_the_first_principal_directions():
    rng = np.random.default_rng(0)
    words = rng.normal(size=(300, 12)) * np.linspace(4, 1, 12) + 3
    common = Common.of(torch.tensor(words), 3)
    np.testing.assert_allclose(common.mean, words.mean(0), rtol=1e-5)
    principal = np.linalg.svd(words - words.mean(0))[2][:3]
    overlap = common.directions.double().numpy() @ principal.T
    np.testing.assert_allclose(np.linalg.svd(overlap)[1], 1, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_contrast_finds_a_name_among_words_that_resemble_everything(seed):
    # Along the first axis lies what frequent words share; the background shares it too.
    rng = torch.Generator().manual_seed(seed)
    words = torch.randn(200, 64, generator=rng)
    words[:, 0] = torch.linspace(0, 24, 200)
    name, question = words[0], words[[0, -1, -2, -3, -4]]
    visual = torch.randn(60, 64, generator=rng)
    visual[:, 0] += 6.0
    shown = [3, 17, 41]
    visual[shown] += 2 * name
    visual[shown, 0] -= 3.0

    def found(text, method):
        relevance = select(visual, text, torch.ones(60), keep=3, method=method).relevance
        return relevance.topk(3).indices.sort().values.tolist()

    contrast = AdaVContrast(common=Common.of(words))
    assert found(question, contrast) == shown
    assert found(question, AdaV()) != shown
    assert found(name[None], contrast) == shown  # a question of a single word


def test_contrast_has_no_published_form():
    with pytest.raises(UnknownNameError, match="adav-contrast"):
        select(*make(8, 2, 4), keep=3, method="adav-contrast", compat="official")


def test_saliency_without_mass_leaves_the_choice_to_the_text():
    visual, text, _ = make(20, 3, 5)
    got = select(visual, text, torch.zeros(20), keep=8)
    assert (got.split.by_text, got.split.by_saliency) == (4, 0)
    # Two tokens are reserved by a saliency that knows nothing (0 and 1); the rest is the text's.
    order = reference.ranking(reference.log_relevance(*plain(visual, text), 100.0))
    want = sorted([0, 1, *[i for i in order if i not in (0, 1)][:6]])
    assert got.indices.tolist() == want


def test_tokens_of_zero_length_have_cosine_zero():
    visual, text, saliency = make(20, 3, 5)
    visual[4], text[1] = 0.0, 0.0
    want = reference.adav(*plain(visual, text, saliency), 8)
    got = select(visual, text, saliency, keep=8)
    assert got.relevance.isfinite().all()
    assert got.indices.tolist() == want.indices


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1.0, 1e6])
def test_scale_of_saliency_does_not_matter(scale):
    visual, text, saliency = make(60, 5, 8, seed=1)
    want = select(visual, text, saliency, keep=13)
    got = select(visual, text, saliency * scale, keep=13)
    assert got.indices.tolist() == want.indices.tolist()
    assert got.split.by_text == want.split.by_text


def test_order_of_text_tokens_does_not_matter():
    visual, text, saliency = make(60, 5, 8, seed=1)
    want = select(visual, text, saliency, keep=13)
    got = select(visual, text[[3, 0, 4, 1, 2]], saliency, keep=13)
    assert got.indices.tolist() == want.indices.tolist()


def test_order_of_visual_tokens_moves_with_the_choice():
    visual, text, saliency = make(60, 5, 8, seed=1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    want = select(visual, text, saliency, keep=13).indices
    got = select(visual[order], text, saliency[order], keep=13).indices
    assert sorted(order[got].tolist()) == want.tolist()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("keep", [1, 2, 3, 10, 41, 0.1, 0.999, 1.0])
def test_every_method_keeps_exactly_k_sorted_distinct_repeatable(name, keep):
    inputs = make(41, 4, 6, seed=2)
    got = select(*inputs, keep=keep, method=name)
    count = keep if isinstance(keep, int) else max(1, math.floor(keep * 41 + 0.5))
    indices = got.indices.tolist()
    assert got.indices.dtype == torch.int64
    assert len(indices) == count
    assert indices == sorted(set(indices))
    assert indices[0] >= 0 and indices[-1] < 41
    assert indices == select(*inputs, keep=keep, method=name).indices.tolist()
    total = got.split.reserved + got.split.by_text + got.split.by_saliency
    assert total in (0, count)


@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_are_float32(name, dtype):
    inputs = [tensor.to(dtype) for tensor in make(30, 4, 6)]
    got = select(*inputs, keep=7, method=name)
    for scores in (got.relevance, got.saliency):
        assert scores is None or (scores.dtype == torch.float32 and scores.shape == (30,))
    if METHODS.get(name).needs_text:
        exact = select(*[tensor.float() for tensor in inputs], keep=7, method=name)
        torch.testing.assert_close(got.relevance, exact.relevance)
        assert got.indices.tolist() == exact.indices.tolist()


@pytest.mark.parametrize("name", EXACT)
def test_ties_go_to_the_lower_index(name):
    same = torch.ones(12, 4), torch.ones(2, 4), torch.full((12,), 0.5)
    got = select(*same, keep=5, method=name).indices.tolist()
    if name in SPREAD:
        return
    if METHODS.get(name).needs_text or METHODS.get(name).needs_saliency:
        assert got == [0, 1, 2, 3, 4]


def test_autocast_does_not_reach_the_scores():
    inputs = make(50, 4, 64)
    want = select(*inputs, keep=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = select(*inputs, keep=9)
    assert torch.equal(got.relevance, want.relevance)


def test_select_builds_no_graph():
    visual, text, saliency = (x.requires_grad_() for x in make(20, 3, 5))
    assert not select(visual, text, saliency, keep=4).relevance.requires_grad


@pytest.mark.parametrize("name", EXACT)
def test_question_without_tokens(name):
    visual, _, saliency = make(24, 0, 5, seed=4)
    got = select(visual, visual[:0], saliency, keep=6, method=name)
    assert len(set(got.indices.tolist())) == 6
    if name == "adav":
        alone = select(visual, None, saliency, keep=6, method="fastervlm")
        assert got.indices.tolist() == alone.indices.tolist()
        assert (got.split.reserved, got.split.by_text, got.split.by_saliency) == (0, 0, 6)
    if METHODS.get(name).needs_text:
        torch.testing.assert_close(got.relevance, torch.full((24,), 1 / 24))


def test_single_lists_keep_the_top_of_their_score():
    visual, text, saliency = make(33, 4, 6, seed=5)
    by_saliency = select(visual, None, saliency, keep=6, method="fastervlm")
    assert by_saliency.indices.tolist() == sorted(reference.ranking(saliency.tolist())[:6])
    log_t = reference.log_relevance(*plain(visual, text), 100.0)
    by_text = select(visual, text, keep=6, method="t2i")
    assert by_text.indices.tolist() == sorted(reference.ranking(log_t)[:6])


def test_uniform_spreads_over_the_raster():
    visual = torch.zeros(10, 2)
    assert select(visual, keep=2, method="uniform").indices.tolist() == [2, 7]
    assert select(visual, keep=10, method="uniform").indices.tolist() == list(range(10))
    assert select(visual, keep=4, method="uniform").indices.tolist() == [1, 3, 6, 8]


def test_overview_is_the_raster_of_the_largest_cells():
    """Two rows of three tiles' tokens, then an overview of two by four, as Idefics3 has it."""
    tiles = [(x / 3, y / 2, (x + 1) / 3, (y + 1) / 2) for y in range(2) for x in range(3)]
    tiles = [(x0 / 2, y0 / 2, x1 / 2, y1 / 2) for x0, y0, x1, y1 in tiles]
    overview = [(x / 4, y / 2, (x + 1) / 4, (y + 1) / 2) for y in range(2) for x in range(4)]
    extras = Extras(torch.tensor(tiles + overview))
    assert extras.grids == ((2, 3), (2, 4))

    def kept(keep):
        chosen = select(torch.zeros(14, 2), keep=keep, method="overview", extras=extras)
        return chosen.indices.tolist()

    assert kept(8) == list(range(6, 14)) and kept(14) == list(range(14))
    assert kept(1) == [12] and kept(2) == [11, 13] and kept(4) == [10, 11, 12, 13]
    assert kept(6) == [6, 8, 9, 10, 12, 13] and kept(9) == [3, *range(6, 14)]
    for keep in range(1, 15):
        assert len(set(kept(keep))) == keep
    whole = select(torch.zeros(10, 2), keep=4, method="overview").indices
    assert torch.equal(whole, select(torch.zeros(10, 2), keep=4, method="uniform").indices)


def test_a_name_may_have_parameters():
    inputs = make(40, 3, 5)
    for spec, method in (
        ("adav:reserve=0.1+temperature=50", AdaV(reserve=0.1, temperature=50.0)),
        ("adav", AdaV()),
        ("cdpruner:negated=true", METHODS.get("cdpruner")(negated=True)),
    ):
        assert method_of(spec) == method
        by_name, given = (select(*inputs, keep=9, method=one) for one in (spec, method))
        assert torch.equal(by_name.indices, given.indices)
    official = select(*inputs, keep=9, method="adav:reserve=0", compat="official", n_crops=1)
    assert torch.equal(
        official.indices, select(*inputs, keep=9, method=AdaVOfficial(reserve=0.0)).indices
    )


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("adv:reserve=0", UnknownNameError, "did you mean 'adav'"),
        ("adav:reserv=0", InputError, "has no parameter 'reserv'; it has: reserve, temperature"),
        ("uniform:seed=1", InputError, "it has: none"),
        ("adav-contrast:common=1", InputError, "has no parameter 'common'"),
        ("adav:reserve", InputError, "write key=value"),
        ("adav:reserve=much", InputError, "reserve='much' of method 'adav' must be of type float"),
        ("adav:reserve=2", InputError, "give a number in \\[0, 0.5\\]"),
        ("cdpruner:negated=1", InputError, "must be of type bool"),
        ("random:seed=0.5", InputError, "must be of type int"),
    ],
)
def test_refuses_a_spec(spec, error, message):
    with pytest.raises(error, match=message) as raised:
        select(*make(40, 3, 5), keep=9, method=spec)
    assert "\n" not in str(raised.value)


def test_random_follows_seed_and_generator():
    visual = torch.zeros(200, 2)

    def draw(**kwargs):
        return select(visual, keep=20, method=kwargs.pop("method", "random"), **kwargs).indices

    stream = torch.Generator().manual_seed(7)
    first, second = draw(generator=stream), draw(generator=stream)
    assert not torch.equal(first, second)
    assert torch.equal(first, draw(generator=torch.Generator().manual_seed(7)))
    assert torch.equal(draw(), draw(method=Random(seed=0)))
    assert not torch.equal(draw(), draw(method=Random(seed=1)))


def test_random_does_not_touch_the_global_stream():
    before = torch.random.get_rng_state()
    select(torch.zeros(9, 2), keep=3, method="random")
    assert torch.equal(before, torch.random.get_rng_state())


# --- adav-official, and compat="official" as an alias --------------------------------------------


@pytest.mark.parametrize("n_crops", [1, 2, 5])
@pytest.mark.parametrize("keep", [11, 16, 24, 31])
@pytest.mark.parametrize("seed", range(3))
def test_official_agrees_with_reference(n_crops, keep, seed):
    inputs = make(60, 4, 7, seed=seed)
    want = reference.adav_official(*plain(*inputs), keep, n_crops)
    got = select(*inputs, keep=keep, method="adav-official", n_crops=n_crops)
    assert got.indices.tolist() == want
    for alias in ({}, {"method": "adav-official"}, {"method": AdaVOfficial(n_crops=9)}):
        same = select(*inputs, keep=keep, compat="official", n_crops=n_crops, **alias)
        assert same.indices.tolist() == want
    mine = select(*inputs, keep=keep, method=AdaVOfficial(n_crops=n_crops))
    assert mine.indices.tolist() == want
    split = got.split
    assert split.reserved + split.by_text + split.by_saliency == len(want)


def test_official_rounds_down_per_crop():
    inputs = make(5 * 60, 4, 7)
    got = select(*inputs, keep=144, compat="official", n_crops=5)
    assert len(got.indices) == 140  # the published figure


def test_official_offsets_by_the_crop_and_feeds_twice():
    # Worked by hand: 2 crops of 10, flat relevance, saliency that stands out at tokens 3, 13, 18
    # and 19. Of 8 tokens, 2 of each list are reserved: 0, 1 by text, 3, 0 by saliency. The split
    # is 2 and 2: tokens 2, 3 by text; by saliency 13 and 18, which the offset turns into 4 and 9.
    saliency = torch.full((20,), 0.001)
    saliency[[3, 13, 18, 19]] = torch.tensor([0.9, 0.8, 0.7, 0.6])
    inputs = torch.ones(20, 5), torch.ones(2, 5), saliency
    got = select(*inputs, keep=8, compat="official", n_crops=2)
    assert (got.split.by_text, got.split.by_saliency) == (2, 2)
    assert got.indices.tolist() == [0, 0, 1, 2, 3, 3, 4, 9]
    # Corrected: one ranking over both crops reserves 3 and 13, and nothing comes twice.
    assert select(*inputs, keep=8).indices.tolist() == [0, 1, 2, 3, 4, 13, 18, 19]


def test_official_of_an_instance_keeps_its_parameters():
    inputs = make(40, 4, 6, seed=8)
    got = select(*inputs, keep=10, method=AdaV(reserve=0.5), compat="official")
    assert got.split.reserved == 10
    assert got.indices.tolist() == (
        select(*inputs, keep=10, method=AdaVOfficial(reserve=0.5)).indices.tolist()
    )


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"n_crops": 7}, ShapeError, "40 visual tokens do not divide into n_crops=7"),
        ({"n_crops": 0}, ShapeError, "n_crops=0 is below 1"),
        ({"keep": 9, "n_crops": 5}, BudgetError, "give at least 10"),
        ({"method": "random"}, UnknownNameError, "not known for method 'random'"),
        ({"compat": "offical"}, UnknownNameError, "unknown compat 'offical'"),
    ],
)
def test_official_refuses(kwargs, error, message):
    with pytest.raises(error, match=message):
        select(*make(40, 3, 5), **{"keep": 10, "compat": "official", **kwargs})


# --- no host syncs -------------------------------------------------------------------------------

SYNCS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten._unique2.default,
    torch.ops.aten.bincount.default,
)


class NoHostSync(TorchDispatchMode):
    """Raises on every operator that would wait for a GPU, on any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func is torch.ops.aten.index.Tensor else ()
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        if func in SYNCS or by_mask:
            raise AssertionError(f"{func} syncs with the host")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Steps that a CPU takes another way are those of a GPU."""
    monkeypatch.setattr("budwood.prune.methods.greedy._READS_VALUES", ())


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("n_text", [0, 3])
def test_no_host_sync(name, n_text, as_on_a_gpu):
    inputs = make(40, n_text, 5)
    with NoHostSync():
        selection = select(*inputs, keep=9, method=name, validate=False)
        usable(*inputs)
    assert len(selection.indices) == 9


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("keep", [1, 9, 40])
def test_runs_without_any_values(name, keep, as_on_a_gpu):
    # A fake tensor has no values: whatever would read one on the host raises.
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(tensor) for tensor in make(40, 3, 5)]
        assert select(*inputs, keep=keep, method=name, validate=False).indices.shape == (keep,)


def test_no_host_sync_under_official():
    with NoHostSync():
        select(*make(40, 3, 5), keep=9, compat="official", n_crops=2, validate=False)


def test_guard_notices_a_sync():
    with NoHostSync(), pytest.raises(AssertionError, match="syncs"):
        torch.ones(1).item()
    with NoHostSync(), pytest.raises(AssertionError, match="syncs"):
        torch.ones(3)[torch.tensor([True, False, True])]


def test_split_reads_its_tensor_once():
    split = Split(torch.tensor([4, 1, 3]))
    assert (split.reserved, split.by_text, split.by_saliency) == (4, 1, 3)
    assert repr(split) == "Split(reserved=4, by_text=1, by_saliency=3)"
    with NoHostSync():
        assert split.by_text == 1


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual": torch.zeros(1, 40, 5)}, r"visual has shape \(1, 40, 5\), expected \(n_visual"),
        ({"visual": torch.zeros(0, 5)}, "not empty"),
        ({"text": torch.zeros(3, 6)}, r"text has shape \(3, 6\), expected \(n_text, 5\)"),
        ({"text": torch.zeros(5)}, r"text has shape \(5,\)"),
        ({"text": None}, "method 'adav' needs text"),
        ({"saliency": None}, r"method 'adav' needs saliency, shape \(40,\)"),
        ({"saliency": torch.zeros(39)}, r"saliency has shape \(39,\), expected \(40,\)"),
        ({"saliency": torch.zeros(40, 1)}, r"saliency has shape \(40, 1\)"),
        ({"visual": torch.zeros(40, 5, dtype=torch.int64)}, "visual has dtype torch.int64"),
        ({"text": torch.zeros(3, 5, device="meta")}, "text is on meta, visual on cpu"),
    ],
)
def test_refuses_wrong_shapes(change, message):
    inputs = dict(zip(("visual", "text", "saliency"), make(40, 3, 5), strict=True))
    with pytest.raises(ShapeError, match=message):
        select(**{**inputs, **change}, keep=4)


@pytest.mark.parametrize("name", ["visual", "text", "saliency"])
def test_refuses_what_is_no_tensor(name):
    inputs = dict(zip(("visual", "text", "saliency"), make(40, 3, 5), strict=True))
    for value, message in (
        (inputs[name].numpy(), f"{name} is a numpy.ndarray, .* give torch.from_numpy\\({name}\\)"),
        (inputs[name].tolist(), f"{name} is a list, .* give torch.tensor\\({name}\\)"),
    ):
        with pytest.raises(ShapeError, match=message):
            select(**{**inputs, name: value}, keep=4)
    with pytest.raises(ShapeError, match="visual is a NoneType"):
        select(None, keep=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("method", ["adav", "uniform"])
def test_refuses_values_that_are_not_finite(value, which, method):
    inputs = make(40, 3, 5)
    inputs[which].view(-1)[2] = value
    name = ("visual", "text", "saliency")[which]
    with pytest.raises(InputError, match=f"{name} has 1 NaN or infinite of"):
        select(*inputs, keep=4, method=method)
    assert not usable(*inputs)
    assert len(select(*inputs, keep=4, method=method, validate=False).indices) == 4


def test_refuses_negative_saliency():
    visual, text, saliency = make(40, 3, 5)
    saliency[7] = -0.1
    with pytest.raises(InputError, match="saliency has 1 negative"):
        select(visual, text, saliency, keep=4)


def test_float16_at_its_limit_is_usable():
    # A sum in float16 would overflow here; the values themselves are fine.
    visual = torch.full((40, 5), 60000.0, dtype=torch.float16)
    select(visual, None, torch.ones(40, dtype=torch.float16), keep=4, method="fastervlm")
    assert usable(visual)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "keep=0 is below 1"),
        (-3, "keep=-3 is below 1"),
        (41, "keep=41 exceeds the 40 visual tokens"),
        (0.0, r"outside \(0, 1\]"),
        (-0.5, r"outside \(0, 1\]"),
        (1.01, r"outside \(0, 1\]"),
        (math.nan, r"keep=nan is outside"),
        (math.inf, r"keep=inf is outside"),
        (64.0, "for a count write keep=64"),
        (True, "keep=True is a bool"),
        ("64", "keep='64' is a str"),
        (None, "keep=None is a NoneType"),
    ],
)
def test_refuses_budgets(keep, message):
    with pytest.raises(BudgetError, match=message):
        select(*make(40, 3, 5), keep=keep)


def test_numpy_numbers_are_budgets():
    inputs = make(40, 3, 5)
    assert len(select(*inputs, keep=np.int64(6)).indices) == 6
    assert len(select(*inputs, keep=np.float32(0.25)).indices) == 10


def test_refuses_unknown_methods():
    with pytest.raises(UnknownNameError, match="unknown method 'adv', did you mean 'adav'?"):
        select(*make(40, 3, 5), keep=4, method="adv")
    with pytest.raises(UnknownNameError, match="unknown method"):
        select(*make(40, 3, 5), keep=4, method=AdaV)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "parameters",
    [{"reserve": 0.6}, {"reserve": -0.1}, {"reserve": math.nan}, {"temperature": 0.0}],
)
def test_refuses_parameters(parameters):
    with pytest.raises(InputError, match=next(iter(parameters))):
        AdaV(**parameters)
    with pytest.raises(InputError, match="temperature"):
        T2I(temperature=math.inf)
