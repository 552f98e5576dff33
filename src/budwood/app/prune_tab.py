"""The components of the Prune tab."""

from __future__ import annotations

from functools import partial
from typing import Any

from budwood.app import markup, prune
from budwood.app.models import Models
from budwood.app.toasts import if_moved, toasting

LAYER = "kept"
HINT = (
    "Press Answer: both answers and their times to the first token appear here, and the kept "
    "tokens over the picture. The first answer takes longer, since it loads the model."
)


def fill(gr: Any, models: Models) -> None:
    """Put the tab's components into the open container.

    Args:
        gr: the module gradio.
        models: of the page.
    """
    event: dict[str, Any] = {"concurrency_id": "vlm", "concurrency_limit": 1}
    event["api_visibility"] = "private"
    gr.Markdown(
        "A vision-language model answers from a few of its visual tokens, chosen for each question "
        "without training."
    )
    layers, answered = gr.State({}), gr.State(prune.PERCENT)
    scene, asked = prune.example(prune.START)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            example = gr.Dropdown([*prune.EXAMPLES], value=prune.START, label="Example picture")
            picture = gr.Image(
                scene,
                label="Picture",
                type="filepath",
                image_mode=None,
                sources=["upload", "webcam", "clipboard"],
                height=300,
            )
            # The file as it is: read_picture refuses what is no picture with one line.
            picture.preprocess = lambda payload: payload and payload.path
            question = gr.Textbox(asked, label="Question", max_length=500, lines=1)
            start = "adav+"
            method = gr.Dropdown(
                [*prune.METHODS], value=start, label="Method", info=prune.summary(start)
            )
            percent = gr.Slider(1, 100, prune.PERCENT, step=1, label="Visual tokens to keep, %")
            ask = gr.Button("Answer", variant="primary")
        with gr.Column(scale=3, min_width=280):
            summary = gr.HTML(markup.paragraph(HINT), label="Answers", min_height=80)
            layer = gr.Radio(
                [*prune.LAYERS], value=LAYER, label="Layer over the picture", visible=False
            )
            drawn = gr.HTML("", label="Picture with the layer")
    with gr.Accordion("Several methods side by side", open=False):
        several = gr.CheckboxGroup(
            [*prune.METHODS], value=[*prune.SIDE_BY_SIDE], label="Methods to compare"
        )
        compare = gr.Button("Compare")
        compared = gr.HTML("", label="Comparison")

    example.input(
        toasting(gr, prune.example), example, [picture, question], api_visibility="private"
    )
    inputs = [picture, question, method, percent, layer]
    outputs = [summary, layers, layer, drawn, answered]
    answer = partial(_answer, gr, models)
    latest: dict[str, Any] = {"trigger_mode": "always_last", "show_progress_on": summary, **event}
    gr.on([ask.click, question.submit], toasting(gr, answer), inputs, outputs, **latest)
    moved = toasting(gr, if_moved(gr, answer, inputs.index(percent)))
    percent.release(moved, [answered, *inputs], outputs, **latest)
    method.input(
        lambda name: gr.Dropdown(info=prune.summary(name)),
        method,
        method,
        api_visibility="private",
        queue=False,
    )
    layer.input(_shown, [layers, layer], drawn, api_visibility="private", queue=False)
    compare.click(
        toasting(gr, partial(prune.side_by_side, models)),
        [picture, question, several, percent],
        compared,
        **event,
    )


def _answer(
    gr: Any,
    models: Models,
    picture: str | None,
    question: str,
    method: str,
    percent: float,
    layer: str,
) -> tuple[str, dict[str, str], Any, str, float]:
    """The outputs of the tab; of a layer that the method lacks, the kept tokens."""
    answered = prune.answer(models, picture, question, method, percent)
    layer = layer if layer in answered.layers else LAYER
    choices = gr.Radio(choices=[*answered.layers], value=layer, visible=True)
    return answered.summary, answered.layers, choices, answered.layers[layer], percent


def _shown(layers: dict[str, str], layer: str) -> str:
    return layers.get(layer, "")
