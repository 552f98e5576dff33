"""Files are written whole or not at all."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from budwood.errors import OutputError
from budwood.files import write_text, write_whole


def test_folders_are_made_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "folder" / "ä.txt"
    write_text(path, "one")
    write_text(path, "zwei ä")
    assert path.read_text(encoding="utf-8") == "zwei ä"
    assert list(path.parent.iterdir()) == [path]
    other = path.with_name("plain")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode  # not for its owner alone


def test_links_and_permissions_stay(tmp_path):
    target, link = tmp_path / "deep" / "real.txt", tmp_path / "link.txt"
    link.symlink_to(target)
    write_text(link, "one")  # what it leads to is made
    target.chmod(0o600)
    write_text(link, "two")
    assert link.is_symlink() and target.read_text() == "two"
    assert target.stat().st_mode & 0o777 == 0o600
    around = tmp_path / "around"
    around.symlink_to(around)
    with pytest.raises(OutputError, match="around is a link that leads to itself"):
        write_text(around, "three")


def test_a_file_stays_as_it_was_when_writing_fails(tmp_path):
    path = tmp_path / "picture.png"
    path.write_text("before")

    def half(part):
        assert part.suffix == ".png"
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "below.txt"
    with pytest.raises(OutputError, match=r"^cannot write .*below\.txt: [^\n]+$"):
        write_text(path, "")

    def full(part):
        raise OutputError(f"cannot write {part}: No space left") from OSError(28, "No space left")

    with pytest.raises(OutputError, match=r"^cannot write \S*above\.png: No space left$"):
        write_whole(tmp_path / "above.png", full)
    tensors = {"a": torch.zeros(2)}
    gone = tmp_path / "gone" / "below.safetensors"
    with pytest.raises(OutputError, match=r"^cannot write .*: [^\n]+$"):
        write_whole(gone, lambda part: save_file(tensors, part / "no folder"))
    write_whole(gone, lambda part: save_file(tensors, part))
    assert load_file(gone).keys() == {"a"}
