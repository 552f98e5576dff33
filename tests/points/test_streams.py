"""Methods that see earlier clouds: Uni-Adapter and Point-Cache against slow references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from budwood.bench.points import BenchConfig, run
from budwood.errors import InputError, UnsupportedModelError
from budwood.points import Curriculum, classify, embed_labels, scan
from budwood.points.adapters import ADAPTERS, load_adapter, make_adapter
from budwood.points.adapters.point_cache import CHUNK, part_means
from budwood.points.adapters.uni_adapter import n_steps, smoothed
from budwood.points.batches import encode
from budwood.points.data import CloudSet
from budwood.points.io import Cloud
from budwood.points.logits import cosine_logits, entropies
from tests.points import models, sets
from tests.reference import streams_reference as reference

STREAMS = ("uni-adapter", "point-cache")
UNI = {"n_clusters": 3, "decay": 2.0, "threshold": 0.4, "smoothing": 0.7}
CLOSE = {"rtol": 2e-5, "atol": 2e-5, "check_dtype": False}  # float32 against double precision


def texts_and_features(width=10, n_labels=4, n=40, seed=0):
    rng = torch.Generator().manual_seed(seed)
    texts = F.normalize(torch.randn(n_labels, width, generator=rng), dim=-1)
    of = torch.randint(n_labels, (n,), generator=rng)
    return texts, 2 * texts[of] + torch.randn(n, width, generator=rng)


def described(adapter, n=40, seed=1):
    """Random parts beside features that are near to one text or the other."""
    texts, features = texts_and_features(adapter.encoder.embed_dim, n=n)
    rest = torch.randn(n, adapter.width - features.shape[1], generator=torch.manual_seed(seed))
    return texts, torch.cat([features, rest], dim=1)


@pytest.mark.parametrize("n_clusters", [1, 3, 50])
@pytest.mark.parametrize("decay", [2.0, 100.0])
def test_uni_adapter_is_what_the_equations_say(n_clusters, decay):
    model = models.make("ulip")
    options = UNI | {"n_clusters": n_clusters, "decay": decay}
    texts, features = texts_and_features()
    got = make_adapter("uni-adapter", model, **options).scorer(texts)(features)
    want = reference.uni_adapter(features.tolist(), texts.tolist(), model.logit_scale, **options)
    torch.testing.assert_close(got, torch.tensor(want), **CLOSE)
    assert not torch.allclose(got, cosine_logits(features, texts, model.logit_scale), atol=0.1)


def test_weights_far_below_the_smallest_float_still_count():
    model = models.make("ulip")
    texts, features = texts_and_features(n_labels=2)
    adapter = make_adapter("uni-adapter", model, n_clusters=1, decay=1e4)
    assert adapter.scorer(texts)(features).isfinite().all()


def test_one_label_is_certain():
    for name in STREAMS:
        adapter = make_adapter(name, models.make("ulip"))
        texts, clouds = described(adapter, n=5)
        logits = adapter.scorer(texts[:1])(clouds)
        assert logits.shape == (5, 1) and logits.isfinite().all()


@pytest.mark.parametrize("smoothing", [0, 0.3, 5.0, 200.0])
def test_conjugate_gradients_solve_the_system(smoothing):
    units = F.normalize(torch.randn(30, 4, generator=torch.manual_seed(0)), dim=-1)
    graph = (units @ units.T).clamp(min=0)
    graph[3] = graph[:, 3] = 0  # alone
    root = graph.sum(1).rsqrt().nan_to_num(posinf=0)
    matrix = torch.eye(30) * (1 + smoothing) - smoothing * root[:, None] * graph * root
    values = torch.randn(30)
    got = smoothed(values, graph, smoothing, n_steps(smoothing))
    torch.testing.assert_close(got, torch.linalg.solve(matrix, values), rtol=1e-3, atol=1e-5)
    assert n_steps(smoothing) <= 100


@pytest.mark.parametrize(("n_keep", "n_parts"), [(1, 2), (2, 3), (50, 1)])
def test_point_cache_is_what_the_equations_say(n_keep, n_parts):
    model = models.make("ulip")
    weights = {"alpha_global": 2.0, "alpha_local": 5.0, "beta_global": 3.0, "beta_local": 1.5}
    adapter = make_adapter("point-cache", model, n_keep=n_keep, n_parts=n_parts, **weights)
    texts, clouds = described(adapter)
    features, rest = clouds.split([model.embed_dim, adapter.width - model.embed_dim], dim=1)
    parts = rest.unflatten(1, (n_parts, model.dim))
    want = reference.point_cache(
        features.tolist(),
        parts.tolist(),
        texts.tolist(),
        model.logit_scale,
        n_keep,
        (2.0, 5.0),
        (3.0, 1.5),
    )
    torch.testing.assert_close(adapter.scorer(texts)(clouds), torch.tensor(want), **CLOSE)


@pytest.mark.parametrize("n_tokens", [3, 9])
def test_parts_are_means_of_k_means(n_tokens):
    tokens = torch.randn(4, n_tokens, 5, generator=torch.manual_seed(2))
    want = [reference.k_means(rows, 4, 10) for rows in tokens.tolist()]
    torch.testing.assert_close(part_means(tokens, 4), torch.tensor(want), **CLOSE)


@pytest.mark.parametrize("encoder", models.MAKERS)
def test_point_cache_describes_features_and_tokens_of_the_last_block(encoder):
    model = models.make(encoder)
    rng = torch.manual_seed(0)
    xyz, rgb = torch.randn(3, 30, 3, generator=rng) * 0.4, torch.rand(3, 30, 3, generator=rng)
    adapter = make_adapter("point-cache", model, batch_norm=True)
    adapter.estimate([(xyz[:, :16], rgb[:, :16])])
    got = adapter.describe(xyz, rgb)
    assert got.shape == (3, adapter.width) == (3, model.embed_dim + 3 * model.dim)
    assert torch.equal(got[:, : model.embed_dim], adapter(xyz, rgb))
    seen = []
    adapter.encoded(xyz, rgb, 1.0, lambda i, block, x: seen.append(block(x)) or seen[-1])
    parts = part_means(seen[-1][:, 1:], 3).flatten(1)
    torch.testing.assert_close(got[:, model.embed_dim :], parts)


@pytest.mark.parametrize("name", STREAMS)
def test_answers_depend_on_earlier_clouds_alone(name):
    adapter = make_adapter(name, models.make("ulip"))
    texts, clouds = described(adapter, n=CHUNK + 9)
    whole = adapter.scorer(texts)(clouds)
    for sizes in ([1] * len(clouds), [5, len(clouds) - 5]):
        scorer = adapter.scorer(texts)
        torch.testing.assert_close(
            torch.cat([scorer(part) for part in clouds.split(sizes)]), whole, **CLOSE
        )
    assert torch.equal(adapter.scorer(texts)(clouds), whole)  # nothing is kept in the adapter
    swapped = clouds.clone()
    swapped[20:] = clouds[20:].flip(0)
    got = adapter.scorer(texts)(swapped)
    torch.testing.assert_close(got[:20], whole[:20], **CLOSE)
    assert not torch.allclose(got[20:].flip(0), whole[20:], atol=1e-2)


@pytest.mark.parametrize("name", STREAMS)
def test_classify_remembers_within_a_call(name, tmp_path):
    encoder, tower = models.make("sprout"), models.Words(12)
    words = embed_labels(["ball", "stick", "plate"], tower, cache=False)
    rng = np.random.default_rng(0)
    clouds = [Cloud(sets.shape(label, rng).astype(float)) for label in sets.CLASSES] * 2
    make_adapter(name, encoder).save(tmp_path)
    options = {"adapter": load_adapter(tmp_path, encoder), "points": 40}
    found = classify(clouds, words, **options, batch_size=3)
    prepared = [encoder.prepare(one, 40) for one in clouds]
    features = encode(encoder, prepared, options["adapter"], 3)
    wanted = options["adapter"].scorer(words.vectors)(features).softmax(-1)
    for ranking, row in zip(found, wanted, strict=True):
        for label, score in zip(words.labels, row.tolist()):
            assert dict(zip(ranking.labels, ranking.scores))[label] == pytest.approx(score, 1e-3)
    read = []
    stream = classify((read.append(one) or one for one in clouds), words, **options, batch_size=3)
    assert list(itertools.islice(stream, 3)) == found[:3] and len(read) == 3
    assert list(stream) == found[3:]


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "fused"])
def test_a_scan_takes_adapters_that_see_each_cloud_alone(name):
    model = models.make("sprout")
    adapter = make_adapter(name, model)
    if adapter.sees == "one":
        return
    words = embed_labels(["ball", "stick"], models.Words(12), cache=False)
    with pytest.raises(UnsupportedModelError, match=f"'{name}' names an object by the others"):
        scan(np.random.default_rng(0).normal(size=(200, 3)), words, adapter=adapter)


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("uni-adapter", "n_clusters", 0, "n_clusters=0 is below 1"),
        ("uni-adapter", "decay", -1, "decay=-1; give a finite number of at least 0"),
        ("uni-adapter", "smoothing", float("inf"), "smoothing=inf; give a finite number"),
        ("uni-adapter", "threshold", 1.5, "threshold=1.5; give a number from 0 to 1"),
        ("uni-adapter", "n_keep", 3, "no option 'n_keep'; it has batch_norm"),
        ("point-cache", "n_keep", 2.5, "n_keep=2.5; give a whole number"),
        ("point-cache", "n_parts", 0, "n_parts=0 is below 1"),
        ("point-cache", "alpha_local", "4", "alpha_local='4'; give a finite number"),
        ("point-cache", "beta_global", float("nan"), "beta_global=nan; give a finite number"),
    ],
)
def test_refusals(name, option, value, message):
    with pytest.raises(InputError, match=message) as caught:
        make_adapter(name, models.make("ulip"), **{option: value})
    assert "\n" not in str(caught.value)


SMALL = {"points": (8,), "lidar": (), "seeds": 1, "curriculum": Curriculum((30, 8))}


class Watched:
    """What scorers get in a benchmark, and what they say."""

    def __init__(self, monkeypatch, name):
        self.calls = []
        kind, inner = ADAPTERS.get(name), ADAPTERS.get(name).scorer

        def scorer(adapter, vectors):
            inside = inner(adapter, vectors)

            def watched(clouds):
                logits = inside(clouds)
                self.calls.append((len(vectors), clouds, logits))
                return logits

            return watched

        monkeypatch.setattr(kind, "scorer", scorer)


@pytest.mark.parametrize("name", [*STREAMS, "t3a"])
def test_the_benchmark_gives_streams_no_labels(name, monkeypatch):
    """Other labels on the same clouds: the same stream in the same order, and the same answers."""
    watched = Watched(monkeypatch, name)
    model = models.sparse_sprout()
    clouds, words = sets.clouds(), sets.texts(model.embed_dim)
    run(clouds, words, model, BenchConfig((name,), **SMALL))
    first = list(watched.calls)
    assert [len(call[1]) for call in first] == [6, 6, 3]  # test clouds of each group, none before
    watched.calls.clear()
    renamed = {"ball": "stick", "stick": "ball", "plate": "ring", "ring": "plate"}
    about = tuple(
        type(one)(renamed.get(one.label, one.label), one.group, one.use) for one in clouds.about
    )
    run(CloudSet(clouds.xyz, about), words, model, BenchConfig((name,), **SMALL))
    for before, after in zip(first, watched.calls, strict=True):
        assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])


@pytest.mark.parametrize("name", [*STREAMS, "t3a", "tokens"])
def test_the_order_is_drawn_and_warming_up_is_not_scored(name, monkeypatch):
    watched = Watched(monkeypatch, "frozen" if name == "tokens" else name)
    model = models.sparse_sprout()
    clouds, words = sets.clouds(), sets.texts(model.embed_dim)
    (row,) = run(clouds, words, model, BenchConfig((name,), **SMALL))
    (warm,) = run(clouds, words, model, BenchConfig((name,), **SMALL, warm_up=True))
    assert row["sees"] == warm["sees"] == {"t3a": "all", "tokens": "one"}.get(name, "earlier")
    n_before = 0 if name == "tokens" else 6  # clouds for adaptation
    assert [len(call[1]) for call in watched.calls] == [
        6,
        6,
        3,
        6 + n_before,
        6 + n_before,
        3 + n_before,
    ]
    plain, warmed = watched.calls[1][1], watched.calls[4][1]
    assert torch.allclose(warmed[n_before:], plain, atol=1e-5)
    tested = clouds.where(group="unseen", use="test")
    samples = [model.prepare(Cloud(xyz.astype(float))) for xyz in tested.xyz]
    assert len(samples) == len(plain)
    truth = torch.tensor([words.only(tested.classes).labels.index(one) for one in tested.labels])
    order = np.random.default_rng([0, 1]).permutation(len(tested))
    assert not np.array_equal(order, np.arange(len(tested)))
    hits = watched.calls[4][2][n_before:].argmax(-1) == truth[order]
    assert warm["unseen_top1"] == pytest.approx(hits.float().mean().item())


def test_entropies():
    logits = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    torch.testing.assert_close(entropies(logits), torch.tensor([np.log(2), 0.0]).float())
