"""Objects over frames: which cluster is which object, and its points accumulated.

Poses of the sensor must be known: what stands stays at its place in the world's frame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from budwood.optional import need
from budwood.points.io.cloud import Array

GATE = 2.0
"""An object is looked for this far from where it is expected, metres."""
MOVES = 1.0
"""An object that moved this far within the window is moving; its points are put together by their
middles. Those of a standing one are put together by their places, metres."""
PATIENCE = 2
"""Frames that an object may be missing before it is forgotten."""


@dataclass
class _Track:
    number: int
    views: deque[tuple[Array, Array]]  # points and their middle, in the world's frame
    missed: int = 0
    step: Array = field(default_factory=lambda: np.zeros(3))

    @property
    def expected(self) -> Array:
        return self.views[-1][1] + (1 + self.missed) * self.step

    def add(self, xyz: Array, middle: Array) -> None:
        if self.views:
            self.step = (middle - self.views[-1][1]) / (1 + self.missed)
        self.views.append((xyz, middle))
        self.missed = 0

    def points(self) -> Array:
        """All points of the window, where the object is now."""
        here = self.views[-1][1]
        moves = np.linalg.norm(here - self.views[0][1]) > MOVES
        return np.concatenate([xyz + (here - middle if moves else 0) for xyz, middle in self.views])


class Tracker:
    """Follows clusters over frames, and accumulates their points.

    Clusters are matched with the objects of earlier frames by the distance to where these are
    expected, all at once by the Hungarian algorithm of scipy.

    Args:
        window: frames whose points are accumulated.

    Attributes:
        n_followed: clusters that continue an object of an earlier frame, so far.
        n_possible: clusters that could have: the smaller number of objects and clusters, summed.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.n_followed = self.n_possible = 0
        self._tracks: list[_Track] = []
        self._next = 0

    def update(
        self,
        clusters: Sequence[Array],
        pose: Array,
        numbers: Sequence[int | None] | None = None,
    ) -> list[tuple[int, Array]]:
        """Go on to the next frame.

        Args:
            clusters: points of each, in the sensor's frame, shape (n, 3).
            pose: from the sensor's frame to the world's, shape (4, 4).
            numbers: numbers of the objects, where an earlier run has found them; None to look for
                them.

        Returns:
            Of each cluster the number of its object, and the accumulated points of it in this
            sensor's frame, its own first.
        """
        placed = [xyz @ pose[:3, :3].T + pose[:3, 3] for xyz in clusters]
        middles = [(xyz.min(axis=0) + xyz.max(axis=0)) / 2 for xyz in placed]
        found = self._match(middles) if numbers is None else self._known(numbers)
        for track in self._tracks:
            track.missed += 1
        back = np.linalg.inv(pose)
        results = []
        for track, own, xyz, middle in zip(found, clusters, placed, middles):
            track.missed = max(track.missed - 1, 0)
            track.add(xyz, middle)
            others = track.points()[: -len(xyz)] @ back[:3, :3].T + back[:3, 3]
            results.append((track.number, np.concatenate([own, others])))
        self._tracks = [track for track in self._tracks if track.missed <= PATIENCE]
        return results

    def reserve(self, numbers: Iterable[int | None]) -> None:
        """Give no new object one of these numbers."""
        self._next = max([self._next, *(number + 1 for number in numbers if number is not None)])

    def _match(self, middles: list[Array]) -> list[_Track]:
        """The track of each cluster, a new one where none is near."""
        tracks = list(self._tracks)
        found: list[_Track | None] = [None] * len(middles)
        if tracks and middles:
            self.n_possible += min(len(tracks), len(middles))
            expected = np.stack([track.expected for track in tracks])
            gaps = np.linalg.norm(np.stack(middles)[:, None] - expected, axis=2)
            assign = need("scipy.optimize", "tracking").linear_sum_assignment
            for row, column in zip(*assign(np.minimum(gaps, 2 * GATE))):
                if gaps[row, column] <= GATE:
                    found[row] = tracks[column]
                    self.n_followed += 1
        return [track or self._new(self._next) for track in found]

    def _known(self, numbers: Sequence[int | None]) -> list[_Track]:
        """The tracks of these numbers, made anew where they are not there."""
        there = {track.number: track for track in self._tracks}
        return [
            there[number]
            if number in there
            else self._new(self._next if number is None else number)
            for number in numbers
        ]

    def _new(self, number: int) -> _Track:
        track = _Track(number, deque(maxlen=self.window))
        self._tracks.append(track)
        self._next = max(self._next, number + 1)
        return track
