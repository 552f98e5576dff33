"""Dense clouds from sparse frames: the points of several frames at one place.

Such a cloud is what :func:`budwood.points.adapt` needs as the teacher's, where a single frame has a
few dozen points of an object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from budwood.checks import need_kind
from budwood.errors import InputError
from budwood.points.io.cloud import Cloud


def accumulate(clouds: Sequence[Cloud], poses: ArrayLike, source: str = "accumulated") -> Cloud:
    """Join frames, each moved by its pose.

    Args:
        clouds: the frames, or one object cut out of each, with the same axis up.
        poses: of the sensor in each frame, or for a moving object the inverse of the object's
            pose: from the frame to the common place, shape (n_frames, 4, 4) or (n_frames, 3, 4), in
            the units of the clouds.
        source: name of the result.

    Returns:
        All points. Colours stay where all frames have them.

    Raises:
        InputError: no frames, another number of poses, poses that are no rigid motions, or frames
            with different axes up.
    """
    clouds = list(clouds)
    for cloud in clouds:
        need_kind(Cloud, "Cloud, such as read() gives", frame=cloud)
    moves = rigid_motions(poses, len(clouds))
    axes = {cloud.assumed.up for cloud in clouds}
    if len(axes) > 1:
        raise InputError(f"the frames have different axes up: {', '.join(map(str, axes))}")
    moved = [cloud.xyz @ move[:, :3].T + move[:, 3] for cloud, move in zip(clouds, moves)]
    colors = [cloud.rgb for cloud in clouds if cloud.rgb is not None]
    rgb = np.concatenate(colors) if len(colors) == len(clouds) else None
    dropped: Counter[str] = Counter()
    for cloud in clouds:
        dropped.update(cloud.assumed.dropped)
    notes = tuple(dict.fromkeys(note for cloud in clouds for note in cloud.assumed.notes))
    assumed = replace(clouds[0].assumed, dropped=dict(dropped), notes=notes)
    return Cloud(np.concatenate(moved), rgb, source, assumed)


def rigid_motions(poses: ArrayLike, n_frames: int) -> NDArray[np.float64]:
    """Check that poses are rotations and shifts, one a frame.

    Args:
        poses: shape (n_frames, 4, 4) or (n_frames, 3, 4).
        n_frames: how many there must be.

    Returns:
        Shape (n_frames, 3, 4).

    Raises:
        InputError: another shape or number, or poses that are no rigid motions.
    """
    try:
        moves = np.asarray(poses, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"poses are not numbers: {error}") from None
    if n_frames == 0 or moves.ndim != 3 or moves.shape[1:] not in ((3, 4), (4, 4)):
        raise InputError(
            f"poses have shape {moves.shape} for {n_frames} frames; give (n_frames, 4, 4) or "
            "(n_frames, 3, 4), and at least one frame"
        )
    if len(moves) != n_frames:
        raise InputError(f"there are {len(moves)} poses for {n_frames} frames; give one for each")
    finite = np.asarray(np.isfinite(moves).all(axis=(1, 2)))
    turns = np.where(finite[:, None, None], moves[:, :3, :3], 0.0)
    rigid = np.isclose(turns @ turns.transpose(0, 2, 1), np.eye(3), atol=1e-3).all(axis=(1, 2))
    rigid &= np.linalg.det(turns) > 0
    if not rigid.all():
        raise InputError(f"pose {int(np.argmin(rigid)) + 1} is no rotation and shift")
    return moves[:, :3]
