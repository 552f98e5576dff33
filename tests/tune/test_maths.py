"""The pure functions of SLIM against slow references; 1e-5 in float32."""

from __future__ import annotations

import math

import pytest
import torch

from budwood.tune.equations import (
    axis_rate,
    draw_keep,
    l1_slopes,
    merged_scale,
    route,
    standardise,
    standardised_distance,
    surely_bypassed,
    widest_gap,
    yield_scores,
)
from budwood.tune.slim.clustering import (
    Moments,
    channel_scale,
    seed_centres,
    slide,
    slide_distance,
    slide_whitened,
)
from budwood.tune.slim.distance import (
    discriminant,
    gap_to_other,
    measure,
    measure_along,
    measure_whitened,
    random_directions,
    whitener,
)
from tests.reference import slim_reference as slow

SHAPES = [(1, 2, 1, 1), (7, 4, 3, 2), (5, 10, 8, 2), (3, 5, 5, 5)]  # tokens, experts, LoRA, top K


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found, expected):
    return torch.allclose(found.double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n", "experts", "n_lora", "top_k"), SHAPES)
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_routing_is_the_reference(n, experts, n_lora, top_k, beta):
    logits, distance = random(n, experts), random(n, seed=1)
    weights = route(yield_scores(standardise(logits), distance, n_lora, beta), top_k)
    expected = [
        slow.route(slow.yield_scores(slow.standardise(row), d, n_lora, beta), top_k)
        for row, d in zip(logits.tolist(), distance.tolist())
    ]
    assert close(weights, expected)
    assert ((weights > 0).sum(-1) == top_k).all()


def test_equal_logits_are_all_zero_and_a_single_expert_has_all_the_weight():
    assert (standardise(torch.full((2, 4), 3.0)) == 0).all()
    assert (route(standardise(random(3, 1)), 1) == 1).all()


def test_no_two_standardised_scores_are_further_apart_than_the_widest_gap():
    extreme = torch.tensor([[1.0, -1.0, 0, 0, 0, 0]])
    scores = standardise(torch.cat([extreme, random(500, 6)]))
    gaps = scores.max(-1).values - scores.min(-1).values
    assert gaps.max() <= widest_gap(6) + 1e-4
    assert gaps[0] == pytest.approx(widest_gap(6))


@pytest.mark.parametrize(("n_identity", "top_k"), [(2, 2), (3, 2), (2, 3)])
def test_surely_bypassed_tokens_do_bypass(n_identity, top_k):
    distance = random(400, seed=2) * 4
    sure = surely_bypassed(distance, 4, n_identity, top_k, 0.8)
    if top_k > n_identity:
        assert sure is None
        return
    scores = yield_scores(standardise(random(400, 4 + n_identity)), distance, 4, 0.8)
    lora = route(scores, top_k)[:, :4]
    assert sure.any() and not sure.all()
    assert (lora[sure] == 0).all()


def test_no_token_is_sure_that_a_router_could_bring_back():
    extreme = torch.tensor([[1.0, 0, 0, 0, -1.0, 0]]).expand(2, -1)  # 4 LoRA, 2 identity experts
    distance = torch.tensor([0.99, 1.01]) * math.sqrt(12) / (2 * 0.8)
    lora = route(yield_scores(standardise(extreme), distance, 4, 0.8), 2)[:, :4]
    assert (lora > 0).any(-1).tolist() == [True, False]
    assert surely_bypassed(distance, 4, 2, 2, 0.8).tolist() == [False, True]


@pytest.mark.parametrize("kind", ["max", "rms"])
@pytest.mark.parametrize("n_clusters", [1, 3])
def test_distance_and_moments_are_the_reference(kind, n_clusters, monkeypatch):
    monkeypatch.setattr("budwood.tune.slim.distance.block_size", lambda x: 4)  # several blocks
    x, centre = random(11, 5), random(n_clusters, 5, seed=1)
    var = random(n_clusters, 5, seed=2).square() + 0.1
    keep = torch.arange(11) % 3 > 0
    x[~keep] *= float("inf")
    raw, moments = measure(x, centre, channel_scale(var), kind, gather=True, keep=keep)
    near = [slow.nearest(row, centre.tolist()) for row in x[keep].tolist()]
    expected = [
        slow.raw_distance(row, centre[k].tolist(), var[k].tolist(), kind)
        for row, k in zip(x[keep].tolist(), near)
    ]
    assert close(raw[keep], expected)
    assert moments.count.tolist() == [near.count(k) for k in range(n_clusters)]
    assert moments.distance[0] == keep.sum()
    assert moments.distance[1] == pytest.approx(sum(expected), rel=1e-5)
    flat = moments.flat()
    again = Moments.zeros(centre, centre).filled(flat)
    assert torch.equal(again.second, moments.second) and torch.equal(again.flat(), flat)


@pytest.mark.parametrize("n_clusters", [1, 4])
def test_sliding_is_the_reference(n_clusters):
    x, centre = random(23, 3), random(n_clusters, 3, seed=1)
    centre[-1] += 0 if n_clusters == 1 else 100  # a centre that gets no token
    var = random(n_clusters, 3, seed=2).square()
    _, moments = measure(x, centre, channel_scale(var), "rms", gather=True)
    new_centre, new_var = slide(centre, var, moments, 0.3)
    expected = slow.slide(x.tolist(), centre.tolist(), var.tolist(), 0.3)
    assert close(new_centre, expected[0]) and close(new_var, expected[1])
    if n_clusters > 1:
        assert torch.equal(new_centre[-1], centre[-1])


@pytest.mark.parametrize("n_clusters", [1, 3])
def test_whitened_distance_and_its_statistics_are_the_reference(n_clusters, monkeypatch):
    monkeypatch.setattr("budwood.tune.slim.distance.block_size", lambda x: 4)  # several blocks
    x, centre = random(11, 9), random(n_clusters, 5, seed=1)
    spread = random(5, 5, seed=2)
    covariance, directions, offset = spread @ spread.T, random(9, 5, seed=3), random(5, seed=4)
    keep = torch.arange(11) % 3 > 0
    x[~keep] *= float("inf")
    raw, moments = measure_whitened(
        x, directions, offset, centre, whitener(covariance), gather=True, keep=keep
    )
    z = (x[keep] @ directions - offset).tolist()
    centres = centre.tolist()
    near = [slow.nearest(row, centres) for row in z]
    expected = [
        slow.whitened_distance(row, centres[k], covariance.tolist()) for row, k in zip(z, near)
    ]
    assert torch.allclose(raw[keep].double(), torch.tensor(expected).double(), rtol=1e-3)
    assert moments.count.tolist() == [near.count(k) for k in range(n_clusters)]
    assert torch.equal(
        Moments.zeros(centre, covariance).filled(moments.flat()).flat(), moments.flat()
    )
    moved, spread = slide_whitened(centre, covariance, moments, 0.3)
    assert close(moved, slow.slide(z, centres, centres, 0.3)[0])
    assert close(spread, slow.slide_covariance(z, centres, covariance.tolist(), 0.3))


@pytest.mark.parametrize("n", [20, 2])  # more tokens than channels, and fewer
def test_discriminant_is_the_reference(n):
    own, other = random(n, 9) + 2, 3 * random(n + 3, 9, seed=1)
    direction, offset = discriminant(own, other)
    expected = slow.discriminant(own.tolist(), other.tolist())
    assert close(direction, expected[0]) and close(offset, expected[1])
    sides = [(x @ direction - offset).mean() for x in (own, other)]
    assert sides[0] < 0 < sides[1] and torch.isclose(-sides[0], sides[1], rtol=1e-3)


def test_where_other_text_begins():
    torch.manual_seed(0)
    training, other = torch.randn(3000, 6), torch.randn(2000, 6)
    other[:, 0] += 12  # standard deviations of the training data; 2 % of other text lie below −2.05
    assert gap_to_other(training, other) == pytest.approx(12 - 2.05, rel=0.03)


def test_few_tokens_leave_a_wide_gap():
    torch.manual_seed(0)
    mixed = torch.randn(64, 64) / 8
    other = torch.randn(600, 64) @ mixed + 0.3
    few, many = (torch.randn(n, 64) @ mixed for n in (12, 4000))
    assert gap_to_other(few, other) > 2 * gap_to_other(many, other)


def test_discriminant_is_the_difference_of_squared_mahalanobis_distances():
    mix = random(5, 5, seed=2)
    own, other = random(4000, 5) @ mix, random(4000, 5, seed=1) @ mix + 1
    direction, offset = discriminant(own, other)
    shared = torch.linalg.inv((own.T.cov() + other.T.cov()) / 2)
    x = random(50, 5, seed=3) @ mix

    def far(centre):
        return (x - centre) @ shared @ (x - centre).T

    expected = (far(own.mean(0)) - far(other.mean(0))).diagonal() / 2
    found, _ = measure_along(x, direction, offset)
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.98  # but for the ridge


def test_moments_along_a_direction_leave_out_what_does_not_count(monkeypatch):
    monkeypatch.setattr("budwood.tune.slim.distance.block_size", lambda x: 4)
    x, direction, offset = random(11, 6), random(6, seed=1), torch.tensor(0.3)
    keep = torch.arange(11) % 3 > 0
    x[~keep] *= float("inf")
    raw, moments = measure_along(x, direction, offset, gather=True, keep=keep)
    expected = x[keep] @ direction - 0.3
    assert torch.allclose(raw[keep], expected, atol=1e-6)
    sums = torch.stack([torch.tensor(7.0), expected.sum(), expected.square().sum()])
    assert torch.allclose(moments.distance, sums) and moments.count.tolist() == [7]
    assert measure_along(x, direction, offset)[1] is None


def test_a_step_without_tokens_moves_nothing():
    centre, covariance = random(3, 5), torch.eye(5)
    empty = Moments.zeros(centre, covariance)
    assert torch.equal(slide_whitened(centre, covariance, empty, 0.3)[1], covariance)
    assert torch.equal(slide_whitened(centre, covariance, empty, 0.3)[0], centre)


def test_random_directions_are_a_function_of_seed_and_key():
    drawn = [random_directions(400, 6, seed=s, key=k) for s, k in ((1, "a"), (1, "a"), (1, "b"))]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert (random(2000, 400) @ drawn[0]).std() == pytest.approx(1, rel=0.05)
    # Adapters hold statistics of these directions and not the directions themselves.
    assert (drawn[0][:3, :4] > 0).int().tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0]]


def test_whitened_distance_sees_what_channels_by_themselves_do_not():
    first = random(500, 1)
    x = torch.cat([first, first + 0.01 * random(500, 1, seed=1)], 1)  # two channels, nearly equal
    odd = torch.tensor([[1.0, -1.0]])  # usual in each channel, never seen together
    zero, eye = torch.zeros(1, 2), torch.eye(2)
    white = whitener(x.T @ x / len(x))
    assert measure(odd, zero, zero + 1, "rms")[0] < measure(x, zero, zero + 1, "rms")[0].max()
    far = measure_whitened(odd, eye, zero[0], zero, white)[0]
    assert far > 5 * measure_whitened(x, eye, zero[0], zero, white)[0].max()


def test_sums_of_parts_are_the_sum():
    x, centre = random(12, 4), random(3, 4, seed=1)
    whole = measure(x, centre, torch.ones(3, 4), "rms", gather=True)[1].flat()
    parts = [measure(p, centre, torch.ones(3, 4), "rms", gather=True)[1].flat() for p in x.chunk(5)]
    assert torch.allclose(sum(parts), whole, atol=1e-5)


def test_centres_start_around_the_mean():
    x = random(200, 6) * 2 + 5
    zeros = torch.zeros(4, 6)
    _, moments = measure(x, zeros, zeros + 1, "rms", gather=True)
    centre, var = seed_centres(moments, torch.Generator().manual_seed(0))
    assert torch.allclose(var[0], x.var(0, correction=0), rtol=1e-3)
    assert (centre - x.mean(0)).abs().max() < 1
    _, after = measure(x, centre, channel_scale(var), "rms", gather=True)
    assert (after.count > 10).all()


def test_few_tokens_do_not_say_how_channels_vary():
    x = random(64, 6) * torch.arange(1.0, 7)
    zero = torch.zeros(1, 6)
    variances = {}
    for n in (1, 2, 8, 64):
        _, moments = measure(x[:n], zero, zero + 1, "rms", gather=True)
        variances[n] = seed_centres(moments, torch.Generator())[1][0]
    assert torch.allclose(variances[1], (7 * (x[0] ** 2).mean() / 8).expand(6), rtol=1e-4)
    plain = x[:2].var(0, correction=0)
    assert (variances[2] > 0.7 * (x[:2] ** 2).mean()).all() and variances[
        2
    ].argmax() == plain.argmax()
    for n in (8, 64):
        assert torch.allclose(variances[n], x[:n].var(0, correction=0), rtol=1e-3)


def test_whitening_takes_one_huge_token():
    token = random(1, 40) * 1e6
    covariance = 0.5 * torch.eye(40) + 0.5 * token.T @ token
    white = whitener(covariance)
    assert white.isfinite().all()
    usual = torch.eye(40) + 0.1 * random(40, 40) @ random(40, 40).T / 40
    lower = torch.linalg.cholesky(usual.double() + 1e-3 * torch.eye(40))
    torch.testing.assert_close(whitener(usual), torch.linalg.inv(lower).T.float())


def test_distance_statistics_start_and_slide():
    moments = Moments(*[torch.zeros(1)] * 3, torch.tensor([4.0, 8.0, 24.0]))  # mean 2, variance 2
    mean, var = slide_distance(torch.tensor(9.0), torch.tensor(1.0), moments, 1.0)
    assert (mean, var) == (2, 2)
    mean, var = slide_distance(torch.tensor(0.0), torch.tensor(1.0), moments, 0.5)
    assert mean == 1 and var == pytest.approx(0.5 + 1 + 0.25 * 4)
    empty = Moments(*[torch.zeros(1)] * 3, torch.zeros(3))
    assert slide_distance(mean, var, empty, 0.5) == (mean, var)
    assert standardised_distance(torch.tensor([4.0]), mean, torch.tensor(4.0), 0.5) == 1


def test_masks_are_functions_of_their_arguments():
    drawn = [draw_keep(4000, 0.5, seed=1, key="a", step=s) for s in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert (~drawn[0]).float().mean() == pytest.approx(1 - math.sqrt(0.5), abs=0.03)
    assert (1 - axis_rate(0.5)) ** 2 == pytest.approx(0.5)


def test_scales_of_masked_and_expected_weights():
    assert merged_scale(0.5, rescale=False, masked=True) == 1
    assert merged_scale(0.5, rescale=False, masked=False) == 0.5
    assert merged_scale(0.5, rescale=True, masked=True) == 2
    assert merged_scale(0.5, rescale=True, masked=False) == 1


def test_slopes_are_those_of_the_penalty():
    a, b = random(6, 5).tolist(), random(7, 6, seed=1).tolist()
    slopes = l1_slopes(0.3, 2, 5, 7)
    before = slow.l1(a, b, 3, 2)
    for weights, slope in zip((a, b), slopes):
        for row, column in ((0, 0), (2, 3), (5, 4)):
            value = weights[row][column]
            weights[row][column] += math.copysign(0.5, value)
            assert 0.3 * (slow.l1(a, b, 3, 2) - before) == pytest.approx(0.5 * slope, rel=1e-5)
            weights[row][column] = value
