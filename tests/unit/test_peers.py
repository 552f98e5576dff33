"""Peers of AdaV against slow references, on random and adversarial inputs; parameters; memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from budwood.errors import InputError, ShapeError
from budwood.prune import METHODS, Extras, select
from budwood.prune.methods import greedy
from budwood.prune.methods.adav_plus import AdaVPlus
from budwood.prune.methods.base import rasters
from budwood.prune.methods.cdpruner import CDPruner
from budwood.prune.methods.eadp import EADP, smooth
from budwood.prune.methods.mmtok import MMTok
from budwood.prune.methods.prumerge import PruMergePlus
from budwood.prune.methods.prunesid import PruneSID, loadings
from budwood.prune.methods.scope import Scope
from budwood.prune.methods.tops import Tops
from budwood.prune.methods.visionzip import VisionZip
from budwood.prune.methods.vispruner import VisPruner
from tests.reference import peers_reference as reference

GRIDS = [(3, 4), (5, 6)]
"""An overview and tiles: 42 tokens."""

REFERENCES = {
    "divprune": lambda v, t, s, k, keep: reference.divprune(v, keep),
    "cdpruner": lambda v, t, s, k, keep: reference.cdpruner(v, t, keep),
    "adav+": lambda v, t, s, k, keep: reference.adav_plus(v, t, s, keep, boxes().tolist()),
    "scope": lambda v, t, s, k, keep: reference.scope(v, s, keep),
    "mmtok": lambda v, t, s, k, keep: reference.mmtok(v, t, keep),
    "tops": lambda v, t, s, k, keep: reference.tops(v, s, keep),
    "eadp": lambda v, t, s, k, keep: reference.eadp(v, t, keep, GRIDS),
    "prunesid": lambda v, t, s, k, keep: reference.prunesid(v, s, keep),
    "vispruner": lambda v, t, s, k, keep: reference.vispruner(v, s, keep),
    "visionzip": lambda v, t, s, k, keep: reference.visionzip(v, s, mean_heads(k), keep),
    "prumerge-plus": lambda v, t, s, k, keep: reference.prumerge_plus(v, s, flat(k), keep),
    "cen-divprune": lambda v, t, s, k, keep: reference.divprune(
        reference.centre(v), keep, reference.unlike(v)
    ),
    "cen-cdpruner": lambda v, t, s, k, keep: reference.cen_cdpruner(v, t, keep),
    "cen-scope": lambda v, t, s, k, keep: reference.scope(
        reference.centre(v), s, keep, quality=reference.unlike(v)
    ),
}


def mean_heads(keys):
    return [reference.mean(heads) for heads in keys]


def flat(keys):
    return [[x for head in heads for x in head] for heads in keys]


def boxes():
    parts = []
    for rows, columns in GRIDS:
        for y in range(rows):
            parts += [[x, y, x + 1, y + 1] for x in range(columns)]
    return torch.tensor(parts, dtype=torch.float32)


def make(kind, seed=0, d_model=9):
    """Inputs of 42 tokens in two rasters."""
    rng = torch.Generator().manual_seed(seed)
    n = sum(rows * columns for rows, columns in GRIDS)
    visual = torch.randn(n, d_model, generator=rng)
    text = torch.randn(5, d_model, generator=rng)
    saliency = (2 * torch.randn(n, generator=rng)).softmax(0)
    keys = torch.randn(n, 3, 4, generator=rng)
    if kind == "duplicates":  # every token several times, with its key and its saliency
        which = torch.randint(0, 15, (n,), generator=rng)
        visual, keys, saliency = visual[which], keys[which], saliency[which]
    elif kind == "constant":
        visual, keys = torch.ones(n, d_model), torch.ones(n, 3, 4)
    elif kind == "zeros":  # some tokens of length 0
        visual[::3], keys[1::3] = 0.0, 0.0
    elif kind == "flat saliency":
        saliency = torch.full((n,), 0.25)
    elif kind == "zero saliency":
        saliency = torch.zeros(n)
    elif kind == "no text":
        text = text[:0]
    elif kind == "one word":
        text = text[:1]
    elif kind == "shared direction":  # as projected tokens have it
        visual = visual + 4.0
    return visual, text, saliency, keys


KINDS = (
    "random",
    "duplicates",
    "constant",
    "zeros",
    "flat saliency",
    "zero saliency",
    "no text",
    "one word",
    "shared direction",
)


def check(name, inputs, keep, up_to_copies=False):
    visual, text, saliency, keys = inputs
    extras = Extras(boxes(), keys)
    got = select(visual, text, saliency, keep=keep, method=name, extras=extras)
    plain = [x.double().tolist() for x in (visual, text, saliency, keys)]
    want = REFERENCES[name](*plain, keep)
    if up_to_copies:  # which copies are kept can hang on the last bit of a cosine
        first = [plain[0].index(row) for row in plain[0]]
        assert {first[i] for i in got.indices.tolist()} == {first[i] for i in want}
        assert len(got.indices) == keep
        return
    assert got.indices.tolist() == sorted(want)
    if isinstance(want, dict) and got.features is not None:
        features = torch.tensor([want[i] for i in got.indices.tolist()])
        torch.testing.assert_close(got.features, features, rtol=1e-5, atol=1e-5)
    elif isinstance(want, dict):
        assert all(want[i] == plain[0][i] for i in want)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("keep", [1, 2, 5, 13, 20, 41, 42])
def test_random_inputs(name, keep):
    for seed in range(3 if keep < 40 else 1):
        check(name, make("random", seed), keep)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_adversarial_inputs(name, kind):
    if name == "prunesid" and kind in ("constant", "duplicates", "zeros"):
        pytest.skip("principal components that tie are any basis of their space")
    # Tokens of 9 dimensions have a determinant of 0 from the tenth on, and rounding decides.
    beyond = 9 if name.endswith("cdpruner") else 16
    for seed, keep in ((0, 1), (1, 7), (2, beyond), (3, 42)):
        copies = kind == "duplicates" and name in ("divprune", "cdpruner", "tops")
        check(name, make(kind, seed), keep, up_to_copies=copies)


def test_every_peer_has_a_reference():
    known = {
        "adav",
        "adav-official",
        "adav-contrast",
        "fastervlm",
        "t2i",
        "random",
        "uniform",
        "overview",
    }
    assert set(METHODS) - known == set(REFERENCES)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_unvalidated_give_a_legal_choice(name, value):
    visual, text, saliency, keys = make("random")
    visual[3, 2], saliency[5], text[1, 1], keys[2, 1, 1] = value, value, value, value
    extras = Extras(boxes(), keys)
    got = select(visual, text, saliency, keep=9, method=name, extras=extras, validate=False)
    assert len(set(got.indices.tolist())) == 9
    assert got.indices[0] >= 0 and got.indices[-1] < 42


@pytest.mark.parametrize("method", [VisionZip(0.5), PruMergePlus(neighbours=3), EADP()], ids=repr)
def test_extras_may_be_missing(method):
    visual, text, saliency, _ = make("random")
    got = select(visual, text, saliency, keep=9, method=method)
    stands_in = Extras(None, visual.unsqueeze(1))
    same = select(visual, text, saliency, keep=9, method=method, extras=stands_in)
    assert torch.equal(got.indices, same.indices)
    with_keys = select(visual, text, saliency, keep=9, method=method, extras=make_extras())
    if got.features is not None:
        assert torch.equal(got.features, same.features)
        assert not torch.equal(got.features, with_keys.features)
    else:
        assert not torch.equal(got.indices, with_keys.indices)


def make_extras():
    return Extras(boxes(), make("random", 7)[3])


def test_extras_of_other_tokens_are_refused():
    visual, text, saliency, keys = make("random")
    for extras, message in (
        (Extras(boxes()[1:]), r"boxes have shape \(41, 4\), expected \(42, 4\)"),
        (Extras(boxes(), keys[1:]), r"keys have shape \(41, 3, 4\), expected \(42, n_heads"),
        (Extras(boxes(), keys[:, 0]), r"keys have shape \(42, 4\)"),
        (Extras(boxes(), keys.to("meta")), "keys are on meta, visual on cpu"),
    ):
        with pytest.raises(ShapeError, match=message):
            select(visual, text, saliency, keep=3, extras=extras)


@pytest.mark.parametrize(
    ("extras", "error", "message"),
    [
        ({"keys": 1}, ShapeError, "extras is a dict; give budwood.prune.Extras"),
        (Extras(keys=[1.0]), ShapeError, "keys is a list, expected a torch.Tensor"),
        (Extras(boxes=np.zeros((12, 4))), ShapeError, "boxes is a numpy.ndarray"),
        (Extras(keys=torch.full((12, 2, 4), torch.nan)), InputError, "keys has 96 NaN"),
    ],
)
def test_extras_of_another_kind_are_refused(extras, error, message):
    visual, saliency = torch.randn(12, 8), torch.rand(12)
    with pytest.raises(error, match=message):
        select(visual, None, saliency, keep=3, method="visionzip", extras=extras)


@pytest.mark.parametrize("negated", [False, True])
def test_cdpruner_can_negate_relevance(negated):
    visual, text, _, _ = make("random", 5)
    got = select(visual, text, keep=8, method=CDPruner(negated=negated))
    plain = [x.double().tolist() for x in (visual, text)]
    assert got.indices.tolist() == reference.cdpruner(*plain, 8, negated)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_scope_follows_alpha(alpha):
    visual, _, saliency, _ = make("random", 6)
    got = select(visual, None, saliency, keep=8, method=Scope(alpha=alpha))
    plain = [x.double().tolist() for x in (visual, saliency)]
    assert got.indices.tolist() == reference.scope(*plain, 8, alpha)


@pytest.mark.parametrize(
    "parameters",
    [
        {"text_weight": 0.0},
        {"text_weight": 0.3},
        {"text_weight": 1.0},
        {"reserve": 0.0},
        {"reserve": 0.5},
        {"reserve": 0.5, "focus": 4},
        {"focus": 0},
        {"focus": 1},
        {"focus": 100},
        {"blur": 0.4, "reach": 1.5},
        {"blur": 2.0, "reach": 20.0, "temperature": 3.0},
        {"merge": 0.0},
        {"merge": 1.0, "alike": 0.0},
        {"merge": 0.3, "alike": 1.0},
        {"alike": 0.2, "reach": 1.0},
    ],
)
@pytest.mark.parametrize("with_boxes", [True, False])
def test_adav_plus_follows_its_parameters(parameters, with_boxes):
    visual, text, saliency, _ = make("random", 7)
    extras = Extras(boxes() if with_boxes else None)
    method = AdaVPlus(**parameters)
    got = select(visual, text, saliency, keep=8, method=method, extras=extras)
    plain = [x.double().tolist() for x in (visual, text, saliency)]
    places = boxes().tolist() if with_boxes else None
    want = reference.adav_plus(*plain, 8, places, **parameters)
    assert got.indices.tolist() == sorted(want)
    features = visual[got.indices] if got.features is None else got.features
    torch.testing.assert_close(features, torch.tensor([want[i] for i in sorted(want)]))


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("text_weight", -0.1),
        ("text_weight", 1.1),
        ("reserve", 1.0),
        ("temperature", 0.0),
        ("blur", 0.0),
        ("reach", -1.0),
        ("focus", -1),
        ("focus", 0.5),
        ("merge", 1.5),
        ("alike", float("nan")),
    ],
)
def test_adav_plus_refuses_parameters_out_of_range(parameter, value):
    with pytest.raises(InputError, match=f"{parameter}={value}"):
        AdaVPlus(**{parameter: value})


def test_smoothing_stays_within_a_raster():
    scores = torch.zeros(42)
    scores[11] = 1.0  # the last of the first raster
    got = smooth(scores, GRIDS)
    assert got[12:].abs().sum() == 0
    assert got[:12].sum() == pytest.approx(1.0)
    assert rasters(boxes()) == tuple(GRIDS)


def test_loadings_are_the_principal_ones():
    x = torch.randn(60, 40, generator=torch.Generator().manual_seed(0)).sigmoid()
    got = loadings(x, 5).double()
    centred = (x - x.mean(1, keepdim=True)).double()
    want = torch.linalg.svd(centred).U[:, :5]
    torch.testing.assert_close((got * want).sum(0).abs(), torch.ones(5).double(), atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (Scope, {"alpha": -1.0}),
        (Scope, {"alpha": math.nan}),
        (MMTok, {"text_temperature": 0.0}),
        (MMTok, {"visual_temperature": math.inf}),
        (MMTok, {"alpha": -0.1}),
        (Tops, {"coverage": -1}),
        (Tops, {"diversity": "much"}),
        (EADP, {"words": 0.0}),
        (EADP, {"words": 1.5}),
        (EADP, {"sharpness": 0}),
        (PruneSID, {"components": 0}),
        (PruneSID, {"threshold": -1}),
        (VisPruner, {"important": 1.1}),
        (VisionZip, {"dominant": 0.0}),
        (PruMergePlus, {"neighbours": -1}),
        (PruMergePlus, {"neighbours": 1.5}),
    ],
)
def test_parameters_out_of_range_are_refused(method, parameters):
    (name,) = parameters
    with pytest.raises(InputError, match=f"{name}=.*give a"):
        method(**parameters)


# --- memory --------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operator returns, in bytes."""

    def __init__(self):
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.n_bytes = max(self.n_bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("name", REFERENCES)
def test_many_tokens_make_no_large_tensor(name):
    """10,000 tokens have 10⁸ pairs, 400 MB of floats; the documented bound is 256 MiB."""
    rng = torch.Generator().manual_seed(0)
    visual = torch.randn(10_000, 8, generator=rng)
    keys = torch.randn(10_000, 2, 4, generator=rng)
    saliency = torch.rand(10_000, generator=rng)
    with Largest() as largest:
        got = select(visual, visual[:5], saliency, keep=4, method=name, extras=Extras(None, keys))
    assert len(got.indices) == 4
    assert largest.n_bytes <= 4 * greedy.MOST_FLOATS


def test_bounds_find_the_same_as_all_gains():
    """With equal tokens, so that ties go to the lower index either way."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(120, 6, generator=rng)[torch.randint(0, 120, (400,), generator=rng)]
    table = greedy.cosines(greedy.unit(tokens), greedy.unit(tokens))
    for quality in (torch.rand(400, generator=rng), torch.rand(400, generator=rng).round(), None):
        whole = greedy.Coverage(table)

        def score(whole=whole, quality=quality):
            return whole.gains() if quality is None else quality * whole.gains()

        expected = greedy.greedy(400, 300, table.device, score, whole.add)
        assert torch.equal(greedy.most_gaining(greedy.Coverage(table), 300, quality), expected)
