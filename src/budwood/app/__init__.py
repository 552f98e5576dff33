"""A page for a browser that shows all three abilities; needs the extra ``app``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from budwood.lazy import lazy_exports

if TYPE_CHECKING:
    from budwood.app.models import Sources as Sources
    from budwood.app.page import build as build
    from budwood.app.page import serve as serve

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {"Sources": "models", "build": "page", "serve": "page"}
)
