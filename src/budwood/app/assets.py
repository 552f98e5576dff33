"""Gradio's front end, served from memory so that a page is there sooner."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Any

from budwood import optional

PREFIX = "/assets/"
KINDS = {".js": b"application/javascript", ".css": b"text/css"}
KEPT = b"public, max-age=31536000, immutable"
"""A year: the names of these files change with what is in them."""


class FrontEnd:
    """Middleware that answers for the files of the front end.

    Gradio opens and compresses each of some 80 files again for each visitor, and has the browser
    ask for them again at each visit. Here they are compressed once, and a browser keeps them. Files
    are looked up in a fixed list, so that a path leads nowhere else.

    Args:
        app: what answers for all else.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self._files = {path.name: path for path in folder().iterdir() if path.suffix in KINDS}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        asked = scope.get("path", "") if scope.get("method") == "GET" else ""
        file = self._files.get(asked.removeprefix(PREFIX)) if asked.startswith(PREFIX) else None
        if file is None:
            await self.app(scope, receive, send)
        else:
            packed = any(k == b"accept-encoding" and b"gzip" in v for k, v in scope["headers"])
            await _send(file, packed, send)


def folder() -> Path:
    """Where Gradio keeps the files of its front end."""
    return Path(optional.need("gradio", "the page").__file__).parent / "templates/frontend/assets"


async def _send(file: Path, packed: bool, send: Any) -> None:
    body = _body(file, packed)
    headers = [
        (b"content-type", KINDS[file.suffix]),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", KEPT),
        (b"vary", b"accept-encoding"),
        *([(b"content-encoding", b"gzip")] if packed else []),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@cache
def _body(file: Path, packed: bool) -> bytes:
    return gzip.compress(file.read_bytes(), 6) if packed else file.read_bytes()
