"""The components of the Tune tab."""

from __future__ import annotations

from functools import partial
from typing import Any

from budwood.app import tune
from budwood.app.models import Models
from budwood.app.toasts import toasting


def fill(gr: Any, models: Models) -> None:
    """Put the tab's components into the open container.

    Args:
        gr: the module gradio.
        models: of the page.
    """
    gr.Markdown(
        "A tuned model answers beside its base model. The colour of a token says how much of it "
        "goes around the experts, where the base model stays as it was."
    )
    if models.sources.tuned is None:
        gr.Markdown(
            "Start the page with `--tuned DIR` to see an adapter that `budwood tune` made. The "
            "curve below needs a record alone."
        )
    event = {"concurrency_id": "tuned", "concurrency_limit": 1, "api_visibility": "private"}
    first = next(iter(tune.PROMPTS.values()))
    example = gr.Dropdown([*tune.PROMPTS.items()], value=first, label="Example prompt")
    prompt = gr.Textbox(first, label="Prompt", lines=2, max_lines=8, max_length=2000)
    example.input(str, example, prompt, queue=False, api_visibility="private")
    n_tokens = gr.Slider(8, tune.MOST_TOKENS, 48, step=8, label="Longest reply, tokens")
    ask = gr.Button("Reply", variant="primary", interactive=models.sources.tuned is not None)
    replies = gr.HTML("", label="Replies")
    ask.click(toasting(gr, partial(tune.reply, models)), [prompt, n_tokens], replies, **event)

    with gr.Accordion("Learning against forgetting, from a record", open=True):
        record = gr.File(
            label="Record of budwood bench tune (JSON)", file_types=[".json"], height=140
        )
        figure = gr.Plot(label="Learning against forgetting")
        numbers = gr.HTML("", label="Numbers of the record")
        curve = toasting(gr, tune.curve)
        record.upload(curve, record, [figure, numbers], api_visibility="private")
