"""The folder of a run: what it is a run of, how far it is, and its history."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from budwood.errors import InputError, OutputError
from budwood.files import write_text

_STATE, _HISTORY, _LOCK = "run.json", "history.jsonl", ".lock"


class RunFolder:
    """A folder that holds one run and no other.

    A new or empty folder becomes that of the run. One that holds the same run is gone on with.

    Args:
        path: the folder.
        config: what makes the run what it is, as JSON values.

    Raises:
        OutputError: the folder holds another run or other files, or can't be written.
    """

    def __init__(self, path: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.config = json.loads(json.dumps(config))
        found = self._read()
        if found is None:
            refuse_other_files(self.path)
            self._write("running")
            self.is_complete = False
            return
        _refuse_another(self.path, found["config"], self.config)
        self.is_complete = found.get("status") == "complete"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from this run for a while.

        Raises:
            OutputError: another process has it.
        """
        try:
            lock = FileLock(self.path / _LOCK, timeout=0).acquire()
        except Timeout as error:
            raise OutputError(
                f"another process is at the run in {self.path}; wait for it or stop it, or choose "
                "another folder"
            ) from error
        with lock:
            yield

    def complete(self) -> None:
        """Note that the run is over."""
        self._write("complete")
        self.is_complete = True

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        found = [path for path in self.checkpoints() if _is_whole(path)]
        return found[-1] if found else None

    def checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first."""
        paths = [
            path for path in self.path.glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()
        ]
        return sorted(paths, key=lambda path: int(path.name.split("-")[-1]))

    def drop_checkpoints(self, only_broken: bool = False) -> None:
        """Remove checkpoints; the trainer would stumble over broken ones."""
        for path in self.checkpoints():
            if not (only_broken and _is_whole(path)):
                shutil.rmtree(path)

    def history(self) -> list[dict[str, Any]]:
        """The rows noted so far, each with a ``step``."""
        file = self.path / _HISTORY
        if not file.exists():
            return []
        rows = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # the line that a kill cut off
                break
        return rows

    def note(self, row: Mapping[str, Any]) -> None:
        """Add a row to the history."""
        with (self.path / _HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rewind(self, step: int) -> None:
        """Forget what was noted after a step, which will be run again."""
        kept = [row for row in self.history() if row.get("step", 0) <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_text(self.path / _HISTORY, text)

    def _read(self) -> dict[str, Any] | None:
        file = self.path / _STATE
        if not file.exists():
            return None
        found = read_json(file)
        if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
            raise InputError(f"{file} says of no run of budwood what it is; choose another folder")
        return found

    def _write(self, status: str) -> None:
        state = {"format": 1, "status": status, "config": self.config}
        write_text(self.path / _STATE, json.dumps(state, indent=2) + "\n")


def refuse_other_files(path: Path) -> None:
    """Refuse a place where no run can begin or go on, as far as that takes no look at the run.

    Raises:
        OutputError: it is a file, or a folder with files that are no run's.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; give a folder")
    names = {one.name for one in path.iterdir()} if path.is_dir() else set()
    if _STATE not in names and any(not name.startswith(".") for name in names):
        raise OutputError(f"{path} is not empty and holds no run of budwood; choose another folder")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        InputError: it can't be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def _refuse_another(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    different = [
        f"{key} {theirs.get(key)!r} there and {ours.get(key)!r} here"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    ]
    if different:
        raise OutputError(
            f"{path} holds another run ({'; '.join(different[:3])}); choose another folder, or "
            "repeat its settings to go on with it"
        )


def _is_whole(checkpoint: Path) -> bool:
    """Whether the file that is written last is there and complete."""
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
