"""Small pieces of HTML, with all text escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image


def picture(image: Image.Image, alt: str, caption: str = "") -> str:
    """A picture inside the page itself, so that no file is served.

    Args:
        image: RGB.
        alt: what it shows, for screen readers.
        caption: below it.
    """
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    source = f'src="data:image/webp;base64,{data}" alt="{escape(alt)}"'
    size = f'width="{image.width}" height="{image.height}"'
    return f'<figure class="budwood-figure"><img {source} {size}>{below}</figure>'


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a caption; the first cell of a row names it."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="budwood-scroll"><table class="budwood-table"><caption>{escape(caption)}'
        f"</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{escape(text)}</p>"


def grid(parts: Iterable[str]) -> str:
    """Pieces side by side, as many as there is room for."""
    return f'<div class="budwood-grid">{"".join(parts)}</div>'


def pair(left: str, right: str) -> str:
    """Two pieces of equal width, one above the other where there is no room."""
    return f'<div class="budwood-pair"><div>{left}</div><div>{right}</div></div>'


def status(inner: str) -> str:
    """A result that screen readers announce when it changes."""
    return f'<div role="status" aria-live="polite">{inner}</div>'
