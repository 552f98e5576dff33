"""The state of an unfinished adaptation, in the folder where the adapter will go."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from budwood.errors import InputError, OutputError, first_line
from budwood.files import write_whole
from budwood.points.adapters import Adapter, fingerprint
from budwood.points.encoders.base import PreparedCloud
from budwood.points.text import TextEmbeddings

FILE = "unfinished.pt"


class Unfinished:
    """Saves an adaptation between steps, and resumes it.

    Args:
        folder: where the adapter will go.
        settings: a digest of everything that the result depends on; see :func:`digest`.
    """

    def __init__(self, folder: Path, settings: str) -> None:
        self.path, self.settings = folder / FILE, settings

    def save(self, step: int, adapter: Adapter, optimizer: torch.optim.Optimizer) -> None:
        """Save the state after a step.

        Raises:
            OutputError: it cannot be written.
        """
        state = {
            "settings": self.settings,
            "step": step,
            "adapter": adapter.state_dict(),
            "optim": optimizer.state_dict(),
        }
        write_whole(self.path, lambda part: torch.save(state, part))

    def resume(self, adapter: Adapter, optimizer: torch.optim.Optimizer) -> int | None:
        """Load the state of an earlier run, if there is one.

        Returns:
            The number of steps that it did; None without an earlier run.

        Raises:
            InputError: the file is damaged.
            OutputError: it is of a run with other settings or clouds.
        """
        if not self.path.exists():
            return None
        device = next(adapter.encoder.parameters()).device
        try:
            state = torch.load(self.path, map_location=device, weights_only=True)
        except Exception as error:  # torch's readers raise errors of any kind
            raise InputError(f"{self.path} is damaged, delete it: {first_line(error)}") from None
        if state.get("settings") != self.settings:
            raise OutputError(
                f"{self.path} is of a run with other settings or clouds; delete it or choose "
                "another folder"
            )
        adapter.load_state_dict(state["adapter"])
        optimizer.load_state_dict(state["optim"])
        return state["step"]

    def remove(self) -> None:
        """Delete the state, once the adapter is saved."""
        self.path.unlink(missing_ok=True)


def digest(
    config: Any, adapter: Adapter, texts: TextEmbeddings | None, clouds: Sequence[PreparedCloud]
) -> str:
    """A digest of everything that an adaptation depends on.

    Args:
        config: an ``AdaptConfig``.
        adapter: its encoder counts, and not its own parameters.
        texts: embeddings of the labels, or None.
        clouds: xyz and rgb (or None) of each.
    """
    about = json.dumps(
        [
            dataclasses.asdict(config),
            dataclasses.asdict(config.resolved),
            fingerprint(adapter.encoder),
            None if texts is None else texts.labels,
        ],
        default=str,
        sort_keys=True,
    )
    sha = hashlib.sha256(about.encode())
    if texts is not None:
        sha.update(texts.vectors.numpy().tobytes())
    for tensor in itertools.chain(*clouds):
        sha.update(b"" if tensor is None else tensor.numpy().tobytes())
    return sha.hexdigest()
