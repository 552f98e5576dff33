"""The folder of a run: its settings, its status, its checkpoints and its history."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from budwood.errors import InputError, OutputError
from budwood.files import read_json, write_text

_STATE, _HISTORY, _LOCK = "run.json", "history.jsonl", ".lock"


class RunFolder:
    """A folder that holds one run.

    A new or empty folder becomes that of the run. A folder that holds the same run continues it.
    So does one whose run ended before it had anything to keep, such as a checkpoint.

    Args:
        path: the folder.
        config: the settings that identify the run, as JSON values.
        notes: keys in ``config``, at any depth, in which the same run may differ.
        remade: names of files that are nothing to keep, since every run makes them anew.

    Raises:
        OutputError: the folder holds another run or other files, or can't be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        notes: Collection[str] = (),
        remade: Collection[str] = (),
    ) -> None:
        self.path, self._notes = Path(path), notes
        self.config = json.loads(json.dumps(config))
        state = self._read()
        if state and self._differences(state) and self._keeps_nothing(remade):
            self._clear(remade)
            state = None
        if state is None:
            refuse_other_files(self.path)
            self._write("running")
            self.is_complete = False
            return
        self._refuse_another(state)
        self.is_complete = state.get("status") == "complete"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Lock the run against other processes.

        The state is read again, since another process may have finished the run meanwhile, or
        begun another.

        Raises:
            OutputError: another process has it, or the folder holds another run by now.
        """
        with self._locked():
            if state := self._read():
                self._refuse_another(state)
            self.is_complete = state is not None and state.get("status") == "complete"
            yield

    def complete(self) -> None:
        """Mark the run as complete."""
        self._write("complete")
        self.is_complete = True

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        whole = [path for path in self.checkpoints() if _is_whole(path)]
        return whole[-1] if whole else None

    def checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first."""
        paths = [
            path for path in self.path.glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()
        ]
        return sorted(paths, key=lambda path: int(path.name.split("-")[-1]))

    def drop_checkpoints(self, only_broken: bool = False) -> None:
        """Remove checkpoints, or only those that are incomplete."""
        for path in self.checkpoints():
            if not (only_broken and _is_whole(path)):
                shutil.rmtree(path)

    def history(self) -> list[dict[str, Any]]:
        """The rows noted so far; each has a ``step``."""
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
        """Drop the rows after a step, which will be run again."""
        kept = [row for row in self.history() if row.get("step", 0) <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_text(self.path / _HISTORY, text)

    def _locked(self) -> AcquireReturnProxy:
        try:
            return FileLock(self.path / _LOCK, timeout=0).acquire()
        except Timeout as error:
            raise OutputError(
                f"another process works on the run in {self.path}; wait for it or stop it, or "
                "choose another folder"
            ) from error

    def _differences(self, state: Mapping[str, Any]) -> list[str]:
        """The settings in which the run in the folder is another one."""
        theirs, ours = (_without(self._notes, one) for one in (state["config"], self.config))
        return [
            f"{key} {theirs.get(key)!r} there and {ours.get(key)!r} here"
            for key in sorted({*theirs, *ours})
            if theirs.get(key) != ours.get(key)
        ]

    def _refuse_another(self, state: Mapping[str, Any]) -> None:
        if different := self._differences(state):
            raise OutputError(
                f"{self.path} holds another run ({'; '.join(different[:3])}); choose another "
                "folder, or repeat its settings to continue it"
            )

    def _keeps_nothing(self, remade: Collection[str]) -> bool:
        """Whether nothing would be lost with the run in the folder."""
        return {file.name for file in self.path.iterdir()} <= {_STATE, _HISTORY, _LOCK, *remade}

    def _clear(self, remade: Collection[str]) -> None:
        """Remove the run that is in the folder, unless a process works on it."""
        with self._locked():
            for name in (_STATE, _HISTORY, *remade):
                (self.path / name).unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        file = self.path / _STATE
        if not file.exists():
            return None
        state = read_json(file)
        if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
            raise InputError(f"{file} does not describe a run of budwood; choose another folder")
        return state

    def _write(self, status: str) -> None:
        state = {"format": 1, "status": status, "config": self.config}
        write_text(self.path / _STATE, json.dumps(state, indent=2) + "\n")


def refuse_other_files(path: Path) -> None:
    """Refuse a path that is a file, or a folder whose files are not those of a run.

    Raises:
        OutputError: it is a file, or a folder with files of no run.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; give a folder")
    names = {file.name for file in path.iterdir()} if path.is_dir() else set()
    if _STATE not in names and any(not name.startswith(".") for name in names):
        raise OutputError(f"{path} is not empty and holds no run of budwood; choose another folder")


def _without(notes: Collection[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without some keys, at any depth, and without what is empty then."""
    kept = {}
    for key, value in config.items():
        inner = _without(notes, value) if isinstance(value, Mapping) else value
        if key not in notes and inner != {}:
            kept[key] = inner
    return kept


def _is_whole(checkpoint: Path) -> bool:
    """Whether the file that the trainer writes last is there and complete."""
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
