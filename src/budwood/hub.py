"""The Hugging Face hub: its cache alone, and no long wait, when it does not answer."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from budwood.errors import InputError

TIMEOUT_S = 3.0
"""How long the hub may take to answer before budwood goes on without it."""
_VALID_S = {True: 60.0, False: 10.0}
"""How long an answer holds, and how long none does."""

_checked: tuple[str, float, bool] | None = None  # endpoint, time, whether it answered

_lock = threading.Lock()
_n_offline = 0
"""Contexts, in any thread, that read the cache alone."""
_offline_before = False
"""What HF_HUB_OFFLINE was before the first of them."""


@contextmanager
def hub_or_cache(
    repo: str,
    file: str | None = None,
    *,
    kind: str = "model",
    what: str = "model",
    instead: str = "give a directory",
) -> Iterator[None]:
    """Load something from the hub, or from its cache alone if the hub does not answer.

    The hub's client tries every file six times before it gives up, which takes 40 seconds. Inside
    this context it is asked for nothing when one short request has failed.

    Args:
        repo: id on the hub.
        file: a file of ``repo`` without which it is not in the cache, such as ``"config.json"``;
            None for any file.
        kind: ``"model"`` or ``"dataset"``.
        what: what ``repo`` is, for the message.
        instead: what else a user can do, for the message.

    Raises:
        InputError: the hub does not answer, and the cache does not have it.
    """
    if check_repo(repo, file, kind=kind, what=what, instead=instead):
        yield
        return
    with _offline():
        yield


def check_repo(
    repo: str,
    file: str | None = None,
    *,
    kind: str = "model",
    what: str = "model",
    instead: str = "give a directory",
) -> bool:
    """Fail before slow work if the hub does not answer and its cache lacks something.

    Args:
        repo: as in :func:`hub_or_cache`, and so are the others.
        file: a file of ``repo``.
        kind: ``"model"`` or ``"dataset"``.
        what: what ``repo`` is.
        instead: what else a user can do.

    Returns:
        Whether the hub answers.

    Raises:
        InputError: the hub does not answer, and the cache does not have it.
    """
    reason = why_offline()
    if reason is None:
        return True
    if not is_cached(repo, file, kind):
        raise InputError(
            f"cannot load {what} {repo}: {reason}, and the cache does not have it; {instead}"
        )
    return False


def is_available(repo: str, file: str) -> bool:
    """Whether a file of a model is in the cache, or the hub answers."""
    return is_cached(repo, file) or why_offline() is None


def why_offline() -> str | None:
    """Why the hub cannot be asked, in a few words; None if it answers."""
    from huggingface_hub import constants

    with _lock:
        offline = _offline_before if _n_offline else constants.HF_HUB_OFFLINE
    if offline:
        return "HF_HUB_OFFLINE is set"
    if _answers(constants.ENDPOINT):
        return None
    return (
        f"the hub ({constants.ENDPOINT}) does not answer within {_timeout():g} s "
        "(HF_HUB_ETAG_TIMEOUT)"
    )


def is_cached(repo: str, file: str | None, kind: str = "model") -> bool:
    """Whether the hub's cache has a file; with None, whether it has anything of ``repo``.

    Raises:
        InputError: ``repo`` is not an id of the hub.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if file is None:
        owner_and_name = repo.split("/")
        datasets = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")
        return (
            Path(constants.HF_HUB_CACHE, "--".join([f"{kind}s", *owner_and_name])).exists()
            or Path(datasets, "___".join(owner_and_name).lower()).exists()
        )

    try:
        return isinstance(try_to_load_from_cache(repo, file, repo_type=kind), str)
    except HFValidationError:
        raise InputError(
            f"{repo!r} is neither a directory nor an id of the hub such as org/name"
        ) from None


def _answers(endpoint: str) -> bool:
    """Whether the hub answers one request in time; remembered for a while."""
    global _checked
    from huggingface_hub.utils import get_session  # its import does not count

    now = time.monotonic()
    if _checked and _checked[0] == endpoint and now - _checked[1] < _VALID_S[_checked[2]]:
        return _checked[2]
    timeout = _timeout()
    answered: list[bool] = []
    # A thread, because the time that a name server takes has no limit of its own.
    asking = threading.Thread(
        target=lambda: answered.append(_ask(get_session, endpoint)), daemon=True
    )
    asking.start()
    asking.join(timeout)
    _checked = endpoint, now, any(answered)
    return _checked[2]


def _timeout() -> float:
    """Seconds to wait; the hub's own setting where a user has given it."""
    return float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or TIMEOUT_S)


def _ask(get_session: Any, endpoint: str) -> bool:
    try:
        # The client waits and tries again on errors of the server, as if there were no answer.
        return get_session().head(endpoint, timeout=_timeout()).status_code < 500
    except Exception:  # of the HTTP client, which differs between versions
        return False


@contextmanager
def _offline() -> Iterator[None]:
    """What HF_HUB_OFFLINE does, for a while; threads may overlap."""
    global _n_offline, _offline_before
    from huggingface_hub import constants

    with _lock:
        if not _n_offline:
            _offline_before = constants.HF_HUB_OFFLINE
        _n_offline += 1
        _set_offline(True)
    try:
        yield
    finally:
        with _lock:
            _n_offline -= 1
            # Also inside: datasets may have been imported in between.
            _set_offline(True if _n_offline else _offline_before)


def _set_offline(offline: bool) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = offline
    datasets: Any = sys.modules.get("datasets.config")
    if datasets:
        datasets.HF_HUB_OFFLINE = offline
