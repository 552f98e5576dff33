"""What the site needs beyond Markdown: pages from other folders, and links that work there too.

A fence "```python compile" tells the tests that the block is not to be run; the site shows it as
Python. Pages link to files as they lie in the repository, so that they read well in a checkout. On
the site, CONTRIBUTING.md and a few others are pages of their own, and a link to a file that is no
page becomes its text.
"""

from __future__ import annotations

import html
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/LOG.md": "log.md",
    "recipes/README.md": "recipes.md",
    "README.md": "index.md",
}
"""Files outside docs/, and where they are on the site."""

_TABLE = re.compile(r"<!-- (budwood bench show .+?) -->")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|mailto:|#)([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from other folders."""
    for source, target in PAGES.items():
        if target != "index.md":
            root = posixpath.dirname(config.config_file_path)
            files.append(File.generated(config, target, abs_src_path=posixpath.join(root, source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    origin = page.file.src_uri
    sources = {target: source for source, target in PAGES.items() if target != "index.md"}
    folder = posixpath.dirname(sources.get(origin, f"docs/{origin}"))

    def relink(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(folder, path))
        target = PAGES.get(path) or path.removeprefix("docs/")
        if files.get_file_from_path(target) is None:
            return text
        return f"[{text}]({posixpath.relpath(target, posixpath.dirname(origin) or '.')}{anchor})"

    markdown = markdown.replace("```python compile", "```python")
    return _TABLE.sub(_command, _LINK.sub(relink, markdown))


def _command(match: re.Match[str]) -> str:
    """The command that prints a table, to open above it."""
    return f"<details><summary>command</summary><code>{html.escape(match[1])}</code></details>"
