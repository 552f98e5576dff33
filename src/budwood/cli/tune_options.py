"""Options that the tuning commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from budwood.cli.options import known_dtype

Model = Annotated[
    str | None,
    typer.Option(
        metavar="ID|DIR", help="Hub id or directory of the model; by default SmolLM2-135M-Instruct."
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="ID|DIR",
        help="Hub id or directory of the base model; by default the one that the adapter names.",
    ),
]
TrainingDtype = Annotated[
    str,
    typer.Option(
        callback=known_dtype,
        help="float32 or bfloat16; auto takes the checkpoint's own, and float32 for the embedded "
        "model on a CPU without bfloat16.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder with the files of the shipped tasks."),
]
Style = Annotated[
    str,
    typer.Option(help="How multiple choice is asked. cloze: no choices shown; listed: all shown."),
]
Limit = Annotated[
    int,
    typer.Option(
        help="Questions per task, drawn at random (of lm-eval's own tasks the first); 0: all."
    ),
]
Windows = Annotated[int, typer.Option(help="Windows of 256 tokens for perplexity; 0: all.")]
Prompts = Annotated[
    int, typer.Option(help="Everyday requests on which the divergence is measured, at most 64.")
]
EvalBatch = Annotated[int, typer.Option(help="Prompts in one forward pass.")]
