"""Files that a command will write: found to be writable before the slow work begins."""

from __future__ import annotations

import tempfile
from pathlib import Path

from budwood.errors import OutputError


def reserve(path: Path, force: bool = False) -> Path:
    """Check that a file can be written, and make the directories that it needs.

    Raises:
        OutputError: it exists and ``force`` is off, or it cannot be written.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a directory; give a file")
    if path.exists() and not force:
        raise OutputError(f"{path} exists; choose another name, or overwrite it with --force")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Trying is the only test that sees read-only file systems and full disks as well.
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(b"budwood")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def reserve_picture(path: Path, force: bool = False) -> Path:
    """The same for a picture, whose format follows from the suffix.

    Raises:
        OutputError: as above, or the suffix is that of no format.
    """
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise OutputError(f"{path} must end in .png, .jpg or .webp, which gives the format")
    return reserve(path, force)
