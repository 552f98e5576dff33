"""Which objects are none of the labels: labels of the background, and a calibrated threshold."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from budwood.errors import InputError, OutputError
from budwood.files import cache_folder, read_json, write_text
from budwood.points.adapters import Adapter, fingerprint
from budwood.points.batches import encode, thinned
from budwood.points.classification import score
from budwood.points.data import load_clouds
from budwood.points.familiar import trained_labels
from budwood.points.text import TextEmbeddings, embed_labels_for
from budwood.points.vocabulary import alike

if TYPE_CHECKING:
    from budwood.points.encoders import PointEncoder
    from budwood.points.encoders.base import PreparedCloud
    from budwood.points.towers import TextTower

BACKGROUND = (
    "ground",
    "road",
    "grass",
    "wall",
    "building",
    "house",
    "window",
    "door",
    "roof",
    "fence",
    "railing",
    "hedge",
    "bush",
    "tree",
    "tree trunk",
    "branches and leaves",
    "pole",
    "street lamp",
    "traffic light",
    "traffic sign",
    "traffic cone",
    "barrier",
    "curb",
    "stairs",
    "bridge",
    "rubbish bin",
    "box",
    "bench",
    "floor",
    "ceiling",
    "column",
    "pipe",
    "cable",
    "curtain",
    "shelf",
    "noise",
)
"""What is around the objects that people look for, on roads and indoors."""
ALIKE = 0.6
"""A background label whose text embedding has this cosine with a given label means the same."""
CALIBRATION_POINTS, CALIBRATION_CLOUDS = 128, 200
ROUNDS, LABELS_A_ROUND = 20, 5


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels given, and those of the background behind them.

    Attributes:
        texts: the embeddings of all, those given first.
        n_given: labels given.
    """

    texts: TextEmbeddings
    n_given: int

    @property
    def given(self) -> tuple[str, ...]:
        """The labels given."""
        return self.texts.labels[: self.n_given]


def with_background(given: TextEmbeddings, background: TextEmbeddings | None) -> Labels:
    """Put labels of the background behind those given, without any that means the same as one.

    Args:
        given: the labels to choose from.
        background: what else may be there; None for nothing.
    """
    if background is None:
        return Labels(given, len(given))
    alike = (background.vectors @ given.vectors.T).amax(dim=1) >= ALIKE
    names = {label.casefold() for label in given.labels}
    rest = [
        label
        for label, same in zip(background.labels, alike.tolist())
        if not same and label.casefold() not in names
    ]
    others = background.only(rest)
    vectors = torch.cat([given.vectors, others.vectors])
    return Labels(TextEmbeddings(given.labels + others.labels, vectors), len(given))


def known_mass(features: Tensor, labels: Labels, logit_scale: float) -> Tensor:
    """The probability that an object has one of the labels given, against the background.

    Source: Jiang et al., *Negative label guided OOD detection with pretrained vision-language
    models* (NegLabel), ICLR 2024, equation 4. Deviation: the negative labels are a fixed list of
    what is around objects on roads and indoors.

    Args:
        features: shape (n_objects, d).
        labels: those given, and the background.
        logit_scale: factor on the cosines.

    Returns:
        In [0, 1], shape (n_objects,).
    """
    return score(features, labels.texts.vectors, logit_scale)[:, : labels.n_given].sum(dim=1)


def threshold_for(
    encoder: PointEncoder,
    adapter: Adapter | None,
    background: TextEmbeddings,
    *,
    text: str | TextTower | None = None,
    templates: str | Sequence[str] = "short",
    embeddings: TextEmbeddings | None = None,
) -> float:
    """The calibrated threshold of an encoder, from the cache if it is there.

    Args:
        encoder: frozen.
        adapter: made for it, or None.
        background: labels of the background.
        text: a text tower instead of the encoder's.
        templates: sentences around the labels; see :func:`budwood.points.embed_labels`.
        embeddings: of a file, instead of a text tower.
    """
    file = cache_folder() / "scan" / f"{_key(encoder, adapter, background, embeddings)}.json"
    with contextlib.suppress(InputError, KeyError, TypeError, ValueError):
        return float(read_json(file)["threshold"])
    threshold = calibrate(
        encoder, adapter, background, text=text, templates=templates, embeddings=embeddings
    )
    with contextlib.suppress(OutputError):  # the answer does not depend on the cache
        write_text(file, json.dumps({"threshold": threshold}))
    return threshold


def calibrate(
    encoder: PointEncoder,
    adapter: Adapter | None,
    background: TextEmbeddings,
    *,
    text: str | TextTower | None = None,
    templates: str | Sequence[str] = "short",
    embeddings: TextEmbeddings | None = None,
    seed: int = 0,
) -> float:
    """Find the threshold of :func:`known_mass` that tells objects with a label from others best.

    The clouds that ship are seen as a LiDAR sees them, those of roads too, unless the encoder was
    trained on none (:func:`budwood.points.trained_labels`). In each of several rounds a few of
    their classes are the labels, and the clouds of all other classes must be rejected. The
    threshold has the largest sum of the fraction of objects that are kept rightly and of those
    rejected rightly (Youden's J). The clouds are those for validation; evaluation uses others.

    Args:
        encoder: frozen.
        adapter: made for it, or None.
        background: labels of the background.
        text: a text tower instead of the encoder's.
        templates: sentences around the labels.
        embeddings: of a file, instead of a text tower. The labels are those classes that it has.
        seed: of the draws.

    Returns:
        In [0, 1]; 0 if there is nothing to tell apart.
    """
    rng = np.random.default_rng(seed)
    trained = trained_labels(encoder)
    on_roads = trained is None or "road" in trained
    clouds = load_clouds(part="both" if on_roads else "indoor").where(use="val")
    chosen = rng.permutation(len(clouds))[:CALIBRATION_CLOUDS]
    truth = np.array(clouds.labels)[chosen]
    features = encode(encoder, [_seen(clouds.xyz[i], int(i)) for i in chosen], adapter)
    meaning = {label: alike([label])[0] for label in set(truth)}
    classes = sorted(meaning if embeddings is None else meaning.keys() & {*embeddings.labels})
    if not classes or len(meaning) < 2:
        return 0.0
    if embeddings is None:
        texts = embed_labels_for(encoder, classes, text=text, templates=templates)
    else:
        texts = embeddings.only(classes)
    masses, rightly = [], []
    most = min(len(classes), len(meaning) - 1)  # one is left to be rejected
    for _ in range(ROUNDS):
        given = rng.choice(classes, min(LABELS_A_ROUND, most), replace=False).tolist()
        labels = with_background(texts.only(given), background)
        masses.append(known_mass(features, labels, encoder.logit_scale).numpy())
        wanted = {meaning[label] for label in given}
        rightly.append(np.array([meaning[label] in wanted for label in truth]))
    return best_threshold(np.concatenate(masses), np.concatenate(rightly))


def best_threshold(values: np.ndarray, is_known: np.ndarray) -> float:
    """The value from which on to keep, so that rates of right decisions are largest (Youden's J).

    Args:
        values: in [0, 1], shape (n,).
        is_known: which should be kept, shape (n,).

    Returns:
        Halfway between the two neighbouring values; 0 if nothing is there to tell apart.
    """
    if is_known.all() or not is_known.any():
        return 0.0
    order = np.argsort(values, kind="stable")
    ranked, known = values[order], is_known[order]
    lost, rejected = np.cumsum(known) / known.sum(), np.cumsum(~known) / (~known).sum()
    cut = int((rejected - lost).argmax())
    if rejected[cut] <= lost[cut]:
        return 0.0
    above = ranked[cut + 1] if cut + 1 < len(ranked) else 1.0
    return float((ranked[cut] + above) / 2)


def _seen(xyz: np.ndarray, seed: int) -> PreparedCloud:
    """A cloud as a LiDAR sees it, with as many points as others have, for batches."""
    cloud = torch.from_numpy(xyz).float(), None
    return thinned(
        thinned(cloud, 2 * CALIBRATION_POINTS, "lidar", seed), CALIBRATION_POINTS, "random", seed
    )


def _key(
    encoder: PointEncoder,
    adapter: Adapter | None,
    background: TextEmbeddings,
    embeddings: TextEmbeddings | None,
) -> str:
    about = [2, fingerprint(encoder), background.labels, encoder.grouping.density_aware]
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    sha.update(background.vectors.numpy().tobytes())
    if embeddings is not None:
        sha.update(json.dumps(embeddings.labels).encode() + embeddings.vectors.numpy().tobytes())
    if adapter is not None:
        sha.update(digest_of(adapter).encode())
    return sha.hexdigest()[:24]


def digest_of(adapter: Adapter) -> str:
    """A digest of an adapter's weights."""
    sha = hashlib.sha256()
    for name, value in sorted(adapter.state_dict().items()):
        sha.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    return sha.hexdigest()[:16]
