"""Options that the tuning commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(metavar="ID|DIR", help="Hub id or directory; left out: SmolLM2-135M-Instruct."),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="ID|DIR", help="Hub id or directory; left out: what the adapter was made for."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16 or float16; auto: the checkpoint's (bfloat16 for the default)."
    ),
]
TrainingDtype = Annotated[
    str, typer.Option(help="float32 or bfloat16; auto: the checkpoint's (bfloat16 by default).")
]
Data = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder with the files of the tasks that ship."),
]
Style = Annotated[
    str, typer.Option(help="cloze: a question by itself; listed: its choices below it.")
]
Limit = Annotated[
    int,
    typer.Option(
        help="Questions of each task, drawn at random (lm-eval's own: the first); 0: all."
    ),
]
Windows = Annotated[int, typer.Option(help="Windows of 256 tokens for perplexity; 0 for all.")]
Prompts = Annotated[
    int, typer.Option(help="Everyday requests on which divergence is measured, up to 64.")
]
EvalBatch = Annotated[int, typer.Option(help="Prompts at a time.")]
