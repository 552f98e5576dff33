"""`budwood tune export-lora`: an ordinary LoRA that comes near a SLIM adapter."""

from __future__ import annotations

from typing import Annotated

import typer


def export_lora(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a SLIM adapter.")],
) -> None:
    r"""Placeholder."""
