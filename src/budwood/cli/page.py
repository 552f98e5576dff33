"""`budwood app`: a page for a browser that shows all three abilities."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from budwood import optional
from budwood.cli import options
from budwood.cli.console import say, working
from budwood.loading import EMBEDDED_VLMS, check_source


def page(
    model: options.Model = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Adapter of the Points tab, by `budwood points adapt`."),
    ] = None,
    tuned: Annotated[
        str | None,
        typer.Option(metavar="DIR|ID", help="Adapter of the Tune tab, by `budwood tune`."),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Where to listen. By default only this machine can reach the page; with 0.0.0.0 "
            "others can too.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")
    ] = 7860,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Serve a page that shows pruning, points and fine-tuning in a browser.

    Works offline with the embedded models. Models are loaded when they are first used. Visitors can
    upload files of at most 50 MB, and cannot read files of this machine. Ctrl-C stops the page.

    \b
    Example:
      budwood app --model llava-hf/llava-1.5-7b-hf
    """
    optional.check("gradio", "the page")
    optional.check("plotly", "the page", extra="app")
    check_source(model, *EMBEDDED_VLMS)

    from budwood.app import Sources, serve
    from budwood.cli.models import be_quiet

    be_quiet()
    sources = Sources(model, adapter and str(adapter), tuned, device, dtype)
    with working("starting"):
        served = serve(sources, host=host, port=port, blocking=False)
    say(f"serving at {served.local_url} (Ctrl-C stops it)")
    served.block_thread()
