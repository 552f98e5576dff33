"""`budwood tune push`: an adapter on the Hugging Face hub, with its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from budwood.cli import options
from budwood.cli.console import print_json, say, working


def push(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder that `budwood tune` made.")
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="ID", help="Repository on the hub, such as me/tuned.")
    ],
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Record of `budwood tune eval`, for the model card."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Hub id of the base model, if it was trained on a local folder."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Put an adapter on the Hugging Face hub.

    The model card names the base model and the data, and says how to load the adapter. With
    --scores it also says what the adapter learnt and forgot. Log in with `hf auth login` first.

    \b
    Examples:
      budwood tune eval tuned --target test.jsonl --out scores.json
      budwood tune push tuned me/tuned --scores scores.json
    """
    address = upload(adapter, repo_id, scores=scores, base_model=base, private=private or None)
    if json:
        print_json({"adapter": str(adapter), "id": repo_id, "address": address})


def upload(adapter: Path, repo_id: str, **options: Any) -> str:
    """Push, and say where it is."""
    from budwood.cli.models import be_quiet
    from budwood.tune.saved.publish import push_to_hub

    be_quiet()
    with working(f"pushing to {repo_id}"):
        address = push_to_hub(adapter, repo_id, **options)
    say(f"the adapter is at {address}")
    return address
