"""Gradio's front end, served so that a page is there sooner: from memory, and all files at once."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from budwood import optional

PREFIX = "/assets/"
KINDS = {".js": ("application/javascript", "modulepreload"), ".css": ("text/css", "preload")}
KEPT = b"public, max-age=31536000, immutable"
"""A year: the names of these files change with what is in them."""


class FrontEnd:
    """Middleware that answers for the files of the front end, and announces them with the page.

    Gradio reads and compresses each file again for each visitor, has the browser ask again each
    time, and lets it find out about them step by step. Files are looked up in a fixed list, so that
    a path leads nowhere else.

    Args:
        app: what answers for all else.
        kinds: of components that the page shows first, as Gradio calls them.
    """

    def __init__(self, app: Any, kinds: Iterable[str] = ()) -> None:
        self.app = app
        self._files = {path.name: path for path in folder().iterdir() if path.suffix in KINDS}
        links = [_link(name) for name in needed(kinds) if name in self._files]
        self._links = ", ".join(links).encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        name = path.removeprefix(PREFIX)
        if scope["type"] == "http" and scope["method"] == "GET":
            if path != name and name in self._files:
                return await self._send(self._files[name], scope, send)
            if path == "/" and self._links:
                return await self.app(scope, receive, self._announcing(send))
        return await self.app(scope, receive, send)

    async def _send(self, path: Path, scope: Any, send: Any) -> None:
        packed = any(k == b"accept-encoding" and b"gzip" in v for k, v in scope["headers"])
        body = _read(path, packed)
        kind, _ = KINDS[path.suffix]
        headers = [
            (b"content-type", kind.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", KEPT),
            (b"vary", b"accept-encoding"),
        ]
        if packed:
            headers.append((b"content-encoding", b"gzip"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _announcing(self, send: Any) -> Any:
        async def announcing(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"link", self._links)]}
            await send(message)

        return announcing


def folder() -> Path:
    """Where Gradio keeps the files of its front end."""
    return Path(optional.need("gradio", "the page").__file__).parent / "templates/frontend/assets"


def needed(kinds: Iterable[str]) -> list[str]:
    """Files of the front end that a page with these components loads.

    They are read from the lists that its modules carry. Where a version of Gradio has other lists,
    none is found, and the page loads as it does without.

    Args:
        kinds: of components, as Gradio calls them.
    """
    entry = re.search(r"assets/(index-[\w-]+\.js)", _text("../index.html"))
    if entry is None:
        return []
    shell, _ = _lists(entry[1], [])
    wanted = [r"import\(`\./Blocks-[^[]*\[[\d,]*\]\)"]  # what shows the components
    wanted += [rf"[{{,]{kind}:\{{[^}}]*\}}" for kind in kinds]
    used = [name for module in shell for name in _lists(module, wanted)[1]]
    return [*dict.fromkeys([entry[1], *shell, *used])]


def _lists(module: str, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """All files that a module may load, and those that the matching parts of it do."""
    text = _text(module)
    lists = re.search(r"m\.f=\[(.*?)\]", text)
    files = re.findall(r'"\./([^"]+)"', lists[1]) if lists else []
    parts = [part for pattern in wanted for part in re.findall(pattern, text)]
    numbers = re.findall(r"\d+", ",".join(re.findall(r"__vite__mapDeps\(\[([\d,]*)", str(parts))))
    return files, [files[int(number)] for number in numbers]


def _text(name: str) -> str:
    return (folder() / name).read_text(encoding="utf-8")


def _link(name: str) -> str:
    _, relation = KINDS[Path(name).suffix]
    style = "; as=style; crossorigin" if relation == "preload" else ""
    return f"<.{PREFIX}{name}>; rel={relation}{style}"


@cache
def _read(path: Path, packed: bool) -> bytes:
    return gzip.compress(path.read_bytes(), 6) if packed else path.read_bytes()
