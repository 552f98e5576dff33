"""The components of the Prune tab."""

from __future__ import annotations

from functools import partial
from typing import Any

from budwood.app import prune
from budwood.app.models import Models
from budwood.app.toasts import toasting

LAYER = "kept"


def fill(gr: Any, models: Models, page: Any) -> None:
    """Put the tab's components into the open container.

    Args:
        gr: the module gradio.
        models: of the page.
        page: the Blocks.
    """
    event: dict[str, Any] = {"concurrency_id": "vlm", "concurrency_limit": 1}
    event["api_visibility"] = "private"
    gr.Markdown(
        "A vision-language model answers from a few of its visual tokens, chosen for each question "
        "without training."
    )
    layers = gr.State({})
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            choices = [(f"Scene {i}", seed) for i, seed in enumerate(prune.EXAMPLES, 1)]
            example = gr.Dropdown(choices, value=prune.EXAMPLES[0], label="Example picture")
            picture = gr.Image(
                label="Picture",
                type="filepath",
                image_mode=None,
                sources=["upload", "webcam", "clipboard"],
                height=300,
            )
            # The file as it is: read_picture refuses what is no picture with one line.
            picture.preprocess = lambda payload: payload and payload.path
            question = gr.Textbox(label="Question", max_length=500, lines=1)
            start = "adav-contrast"
            method = gr.Dropdown(
                [*prune.METHODS], value=start, label="Method", info=prune.summary(start)
            )
            percent = gr.Slider(1, 100, prune.PERCENT, step=1, label="Visual tokens to keep, %")
            ask = gr.Button("Answer", variant="primary")
        with gr.Column(scale=3, min_width=280):
            summary = gr.HTML("", label="Answers")
            layer = gr.Radio([*prune.LAYERS], value=LAYER, label="Layer over the picture")
            drawn = gr.HTML("", label="Picture with the layer")
    with gr.Accordion("Several methods side by side", open=False):
        several = gr.CheckboxGroup(
            [*prune.METHODS], value=[*prune.SIDE_BY_SIDE], label="Methods to compare"
        )
        compare = gr.Button("Compare")
        compared = gr.HTML("", label="Comparison")

    chosen: dict[str, Any] = {"fn": toasting(gr, prune.example), "inputs": example}
    example.input(**chosen, outputs=[picture, question], api_visibility="private")
    page.load(**chosen, outputs=[picture, question], api_visibility="private")
    asked = toasting(gr, partial(_answer, gr, models))
    gr.on(
        [ask.click, question.submit, percent.release],
        asked,
        [picture, question, method, percent, layer],
        [summary, layers, layer, drawn],
        trigger_mode="always_last",
        **event,
    )
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
) -> tuple[str, dict[str, str], Any, str]:
    """The outputs of the tab; of a layer that the method lacks, the kept tokens."""
    answered = prune.answer(models, picture, question, method, percent)
    layer = layer if layer in answered.layers else LAYER
    choices = gr.Radio(choices=[*answered.layers], value=layer)
    return answered.summary, answered.layers, choices, answered.layers[layer]


def _shown(layers: dict[str, str], layer: str) -> str:
    return layers.get(layer, "")
