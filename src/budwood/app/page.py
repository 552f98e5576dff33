"""The page itself: Gradio's components around the functions of the tabs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from budwood import optional
from budwood.app import points_tab, prune_tab, tune_tab
from budwood.app.models import Models, Sources
from budwood.app.uploads import MAX_FILE
from budwood.errors import InputError

TITLE = "budwood"
LOOPBACK, PORT = "127.0.0.1", 7860
WAITING = 32
"""Requests that may wait; further ones are told to come back later."""
POLL_S = 0.02
"""How often the queue looks for a request, seconds."""
COLOURS = {
    "block_info_text_color": "*neutral_600",
    "body_text_color_subdued": "*neutral_600",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_800",
}
"""Where those of Gradio's theme have too little contrast (WCAG 2, AA)."""
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'"
)
"""A browser loads nothing from another host: no fonts, no scripts, no counters."""
CSS = """
.budwood-table {border-collapse: collapse; width: 100%}
.budwood-table caption {text-align: left; font-weight: 600; padding-bottom: .4em}
.budwood-table, .budwood-table * {border: 0 !important}
.budwood-table tr {border-bottom: 1px solid var(--border-color-primary) !important}
.budwood-table th, .budwood-table td {text-align: left; vertical-align: top;
  padding: .3em .8em .3em 0 !important}
.budwood-table th[scope=row] {white-space: nowrap}
.budwood-scroll {overflow-x: auto}
.budwood-figure {margin: 0; max-width: 520px}
.budwood-figure img {width: 100%; height: auto; max-height: 640px; object-fit: contain;
  object-position: left}
.budwood-figure figcaption {padding-top: .3em}
.budwood-tokens {line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere}
.budwood-tokens span {color: #111; border-radius: 3px; padding: .1em 0}
.budwood-scale {display: inline-block; width: 8em; height: .8em; border-radius: 3px; margin: 0 .5em}
.budwood-grid {display: grid; gap: 1em; grid-template-columns:
  repeat(auto-fill, minmax(min(160px, 45%), 1fr))}
.budwood-pair {display: grid; gap: 2em; overflow-wrap: anywhere;
  grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr))}
.budwood-pair h2 {font-size: 1.15em; margin: 0 0 .4em}
.budwood-pair h3 {font-size: 1em; margin: .6em 0 .2em}
.gradio-container :is(input, button, textarea, summary):focus-visible {
  outline: 2px solid var(--primary-600) !important; outline-offset: 1px}
footer {display: none !important}
"""


def build(sources: Sources | None = None) -> Any:
    """Build the page, without loading a model.

    Args:
        sources: which models it works with; default the embedded ones.

    Returns:
        A ``gradio.Blocks``, with its queue. :func:`serve` launches it with what keeps it apart from
        the machine's files and from other hosts.

    Raises:
        InputError: there is no such model.
        MissingPackageError: gradio or plotly is not installed.
    """
    gr = _need_gradio()
    sources = sources or Sources()
    sources.check()
    models = Models(sources)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# budwood\nNew abilities for frozen pretrained transformers.")
        with gr.Tabs():
            for title, fill in TABS.items():
                with gr.Tab(title):
                    fill(gr, models)
    page.queue(max_size=WAITING, default_concurrency_limit=1)
    page._queue.sleep_when_free = POLL_S  # of its own accord it looks 1,000 times a second
    return page


TABS: dict[str, Callable[[Any, Models], None]] = {
    "Prune": prune_tab.fill,
    "Points": points_tab.fill,
    "Tune": tune_tab.fill,
}
"""Of the page, in order."""


def serve(
    sources: Sources | None = None,
    *,
    host: str = LOOPBACK,
    port: int = PORT,
    blocking: bool = True,
) -> Any:
    """Serve the page. No file of the machine can be read through it, and it calls no other host.

    Args:
        sources: which models it works with; default the embedded ones.
        host: address to listen at; the default can be reached from this machine only.
        port: to listen at; 0 for a free one.
        blocking: return when the server stops; otherwise at once.

    Returns:
        The page; ``page.local_url`` is its address, ``page.close()`` stops it.

    Raises:
        InputError: the port is taken, or as of :func:`build`.
        MissingPackageError: gradio or plotly is not installed.
    """
    page = build(sources)
    gr = _need_gradio()
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
    try:
        page.launch(
            server_name=host,
            server_port=port or _free_port(host),
            share=False,
            show_error=False,  # only messages that are meant for users
            allowed_paths=[],
            max_file_size=MAX_FILE,
            enable_monitoring=False,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            theme=gr.themes.Default(**fonts).set(**COLOURS),
            css=CSS,
            quiet=True,
            prevent_thread_lock=True,
            app_kwargs={"middleware": _middleware()},
        )
    except OSError:
        raise InputError(
            f"cannot listen at {host}:{port}: the port is taken, or the address is of another "
            "machine; give another --port or --host"
        ) from None
    if blocking:
        page.block_thread()
    return page


def _need_gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    optional.check("plotly", "the page", extra="app")
    return optional.need("gradio", "the page")


def _free_port(host: str) -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _middleware() -> list[Any]:
    """What sends the content security policy with every response, and the front end."""
    from budwood.app.assets import FrontEnd

    wrap = optional.need("starlette.middleware", "the page").Middleware
    return [wrap(_Policy), wrap(FrontEnd)]


class _Policy:
    """Adds headers; plain ASGI, so that streams stay streams."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode())]
                more += [
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await self.app(scope, receive, with_policy)
