"""The components of the Points tab."""

from __future__ import annotations

from functools import partial
from typing import Any

from budwood.app import points
from budwood.app.models import Models
from budwood.app.toasts import toasting
from budwood.points.axes import AXES

NO_ADAPTER = "There is no adapter yet: labels are those of the frozen encoder."
ADAPTED = "The encoder is adapted: labels are shown before and after."


def fill(gr: Any, models: Models, page: Any) -> None:
    """Put the tab's components into the open container.

    Args:
        gr: the module gradio.
        models: of the page.
        page: the Blocks.
    """
    gr.Markdown(
        "An encoder that knows dense clouds names sparse ones. Adaptation needs no labels. "
        "Drag to turn a cloud, scroll to come nearer."
    )
    with gr.Tabs():
        with gr.Tab("One object"):
            _object(gr, models)
        with gr.Tab("A frame of a sensor"):
            _frame(gr, models)


def _object(gr: Any, models: Models) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            example = gr.Dropdown(
                [*points.EXAMPLES], value=points.EXAMPLES[0], label="Example cloud"
            )
            file = _file(gr, "Cloud (instead of the example)")
            labels = gr.Textbox(
                points.LABELS, label="Labels, with commas", lines=3, max_length=4000
            )
            n_points = gr.Slider(8, 1024, points.POINTS, step=8, label="Points to keep")
            up = gr.Dropdown(["auto", *AXES], value="auto", label="Axis that points up")
            ask = gr.Button("Name it", variant="primary")
            adapt = gr.Button("Adapt the encoder (about a minute)")
            note = gr.Markdown(ADAPTED if models.sources.adapter else NO_ADAPTER)
        with gr.Column(scale=3, min_width=280):
            figure = gr.Plot(label="Cloud, thinned")
            ranked = gr.HTML("", label="Labels")
    inputs = [file, example, labels, n_points, up]
    named = partial(_named, models)
    gr.on(
        [ask.click, n_points.release, example.input, file.change],
        toasting(gr, named),
        inputs,
        [figure, ranked, note],
        trigger_mode="always_last",
        **_event(),
    )

    bar = gr.Progress()

    def adapted(
        file: str | None, example: str, labels: str, n_points: float, up: str, progress: Any = bar
    ) -> Any:  # gradio finds its bar by the default
        def advance(done: int, total: int, note: str = "") -> None:
            progress((done, total), unit="steps")

        points.adapt(models, advance)
        return named(file, example, labels, n_points, up)

    adapt.click(toasting(gr, adapted), inputs, [figure, ranked, note], **_event())


def _frame(gr: Any, models: Models) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            file = _file(gr, "Frame (without one: an example room)")
            labels = gr.Textbox(
                ", ".join(points.ROOM), label="Labels of the objects, with commas", max_length=4000
            )
            up = gr.Dropdown(["auto", *AXES], value="z", label="Axis of the frame that points up")
            ask = gr.Button("Find the objects", variant="primary")
        with gr.Column(scale=3, min_width=280):
            figure = gr.Plot(label="Frame with boxes")
            found = gr.HTML("", label="Objects")
    scan = toasting(gr, partial(points.scan, models))
    ask.click(scan, [file, labels, up], [figure, found], **_event())


def _file(gr: Any, label: str) -> Any:
    return gr.File(label=label, file_types=[*points.SUFFIXES], type="filepath", height=140)


def _event() -> dict[str, Any]:
    return {"concurrency_id": "points", "concurrency_limit": 1, "api_visibility": "private"}


def _named(models: Models, *given: Any) -> tuple[Any, str, str]:
    named = points.name(models, *given)
    with models.points.held() as held:
        note = NO_ADAPTER if held.adapter is None else ADAPTED
    return named.figure, named.ranked, note
