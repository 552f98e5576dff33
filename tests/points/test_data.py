"""The clouds that ship: they come back as they were written, and the split is what it says."""

from __future__ import annotations

import numpy as np
import pytest

from budwood.errors import InputError, UnknownNameError
from budwood.points.data import Split, load_clouds, write_clouds
from tests.points import sets


def test_written_clouds_come_back(tmp_path):
    given = sets.clouds()
    write_clouds(tmp_path / "a.npz", given.xyz, given.about)
    back = load_clouds([tmp_path / "a.npz"])
    assert back.about == given.about and back.xyz.dtype == np.float32
    for one, other in zip(given.xyz, back.xyz):  # in another order
        gaps = np.abs(one[:, None] - other[None]).max(axis=-1)
        assert gaps.min(axis=1).max() <= 1 / 1023 and gaps.min(axis=0).max() <= 1 / 1023
    both = load_clouds([tmp_path / "a.npz"] * 2)
    assert len(both) == 2 * len(given)


def test_corners_of_the_range(tmp_path):
    corners = np.array([[[-1, 1, 0], [1, -1, 1], [1, 1, 1], [-1, -1, -1]]], dtype=np.float32)
    write_clouds(tmp_path / "a.npz", corners, [Split("box", "seen", "test")])
    back = load_clouds([tmp_path / "a.npz"]).xyz[0]
    want = corners[0][np.lexsort(corners[0].T[::-1])]
    np.testing.assert_allclose(back[np.lexsort(back.round(1).T[::-1])], want, atol=1 / 1023)


def test_where():
    given = sets.clouds(2)
    assert given.classes == ("ball", "brick", "plate", "ring", "stick")
    seen = given.where(group="seen", use="test")
    assert len(seen) == 4 and seen.classes == ("ball", "stick")
    assert len(given.where(use="adapt")) == 4 and len(given.where()) == len(given)
    assert given.where(group="novel", use="adapt").xyz.shape == (0, 60, 3)
    for options in ({"use": "Test"}, {"group": "nope"}):
        with pytest.raises(UnknownNameError, match="unknown (use|group) .*; give one of "):
            load_clouds().where(**options)


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="missing"):
        load_clouds([tmp_path / "no.npz"])
    given = sets.clouds()
    write_clouds(tmp_path / "a.npz", given.xyz, given.about)
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated"):
        load_clouds([tmp_path / "a.npz"])
    np.savez(tmp_path / "b.npz", points=np.zeros((4, 2, 5), np.uint8), label=["x"])
    with pytest.raises(InputError, match="holds no clouds"):
        load_clouds([tmp_path / "b.npz"])
    write_clouds(tmp_path / "c.npz", given.xyz, given.about[:-1])
    with pytest.raises(InputError, match="labels"):
        load_clouds([tmp_path / "c.npz"])


def test_parts(tmp_path, monkeypatch):
    given = sets.clouds(1)
    monkeypatch.setattr("budwood.points.data.FOLDER", tmp_path)
    parts = {"indoor": ("a.npz",), "road": ("b.npz", "c.npz")}
    monkeypatch.setattr("budwood.points.data.PARTS", parts)
    write_clouds(tmp_path / "a.npz", given.xyz, given.about)
    other = [Split("brick", "seen", "adapt"), Split("ball", "unseen", "test")]
    write_clouds(tmp_path / "b.npz", given.xyz[:2], other)
    write_clouds(tmp_path / "c.npz", given.xyz[2:3], [Split("ring", "novel", "test")])
    assert load_clouds().about == load_clouds(part="indoor").about == given.about
    assert load_clouds(part="road").about == (*other, Split("ring", "novel", "test"))
    both = load_clouds(part="both")
    assert len(both) == len(given) + 3
    # Bricks are adapted to in one part, so they are seen in both.
    groups = {(one.label, one.group) for one in both.about}
    assert groups == {
        *(("ball", "seen"), ("stick", "seen"), ("plate", "unseen")),
        *(("ring", "unseen"), ("brick", "seen")),
    }
    with pytest.raises(UnknownNameError, match="unknown part 'street'; give one of indoor, road"):
        load_clouds(part="street")


@pytest.mark.parametrize("part", ["indoor", "road", "both"])
def test_what_ships(part):
    shipped = load_clouds(part=part)
    assert len(shipped) > 500 and shipped.xyz.shape[1:] == (1024, 3)
    radius = np.linalg.norm(shipped.xyz, axis=-1).max(axis=1)
    assert np.isfinite(shipped.xyz).all() and radius.min() > 0.7 and radius.max() < 1.01
    groups = {}
    for one in shipped.about:
        assert groups.setdefault(one.label, one.group) == one.group
        assert one.use == "test" or (one.group == "seen" and one.use in ("adapt", "val"))
    tested = {one.label for one in shipped.about if one.use == "test"}
    assert tested == set(groups)
    assert set(groups.values()) == {"seen", "unseen"} | ({"novel"} if part != "road" else set())
    # No cloud comes twice: adaptation and test never share a shape.
    assert len({cloud.tobytes() for cloud in shipped.xyz}) == len(shipped)
