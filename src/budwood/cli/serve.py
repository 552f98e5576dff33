"""`budwood serve`: a server that prunes each image's tokens by the question."""

from __future__ import annotations

from typing import Annotated

import typer

from budwood.cli import options
from budwood.cli.console import print_text, say
from budwood.errors import InputError

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Options that are not ours are vLLM's."""


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id or a directory, as vllm serve takes.")
    ],
    keep: options.Keep = "0.1",
    method: options.Method = "adav",
    question: options.Question = "current",
    seed: options.Seed = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the vllm serve command and start nothing.")
    ] = False,
) -> None:
    """Serve a vision-language model with pruned images, through vLLM.

    All other options are vLLM's own. Ctrl-C ends the server and all its processes.

    \b
    Examples:
      budwood serve llava-hf/llava-1.5-7b-hf --keep 64
      budwood serve Qwen/Qwen2.5-VL-3B-Instruct --keep 0.1 --tensor-parallel-size 2 --port 9000
      budwood serve llava-hf/llava-v1.6-vicuna-7b-hf --keep 0.1 --dry-run
    """
    if model.startswith("-"):
        raise InputError(f"MODEL is {model!r}; give the model first, then vLLM's options")
    from budwood.serve import launch

    if not dry_run:
        launch.check_vllm()
    from budwood.loading import config_of
    from budwood.serve.settings import Settings

    settings = Settings(options.keep_of(keep), method, question, seed)
    line = launch.line_for(model, config_of(model), settings, context.args)
    if dry_run:
        print_text(str(line))
        return
    say(str(line))
    launch.run(line)
