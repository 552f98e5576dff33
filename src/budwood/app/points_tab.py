"""The components of the Points tab."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any

from budwood.app import markup, points
from budwood.app.models import Models
from budwood.app.toasts import if_moved, toasting
from budwood.points.axes import AXES

NO_ADAPTER = (
    "There is no adapter yet: labels are those of the frozen encoder. To adapt it takes half a "
    "minute of a free core, and is kept for the next start."
)
HINT = "Press Name it: the thinned cloud appears above, and its labels here."
ADAPTED = "The encoder is adapted: labels are shown before and after."


def fill(gr: Any, models: Models) -> None:
    """Put the tab's components into the open container.

    Args:
        gr: the module gradio.
        models: of the page.
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
            buttons = gr.Column()
            note = gr.Markdown(ADAPTED if models.sources.adapter else NO_ADAPTER)
        with gr.Column(scale=3, min_width=280):
            figure = gr.Plot(label="Cloud, thinned")
            ranked = gr.HTML(markup.paragraph(HINT), label="Labels", min_height=80)
    shown = gr.State(points.POINTS)
    inputs = [file, example, labels, n_points, up]
    outputs = [figure, ranked, note, shown]
    named = partial(_named, models)
    latest = {"trigger_mode": "always_last", **_event(ranked)}
    changed = [ask.click, example.input, file.change]
    gr.on(changed, toasting(gr, named), inputs, outputs, **latest)
    moved = toasting(gr, if_moved(gr, named, inputs.index(n_points)))
    n_points.release(moved, [shown, *inputs], outputs, **latest)
    with buttons:
        _adaptation(gr, models, inputs, outputs)


def _adaptation(gr: Any, models: Models, inputs: list[Any], outputs: list[Any]) -> None:
    """The buttons that start and stop an adaptation."""
    with gr.Row():
        adapt = gr.Button("Adapt the encoder")
        stop = gr.Button("Stop", interactive=False)
    run = gr.State("")  # names the run of this visitor
    stopped: set[str] = set()
    bar = gr.Progress()

    def adapted(
        run: str,
        file: str | None,
        example: str,
        labels: str,
        n: float,
        up: str,
        progress: Any = bar,
    ) -> Any:  # gradio finds its bar by the default
        def advance(done: int, total: int, note: str = "") -> None:
            if run in stopped:
                raise _StoppedError(f"stopped at step {done} of {total}; the encoder is as it was")
            progress((done, total), desc="adapting", unit="steps")

        try:
            points.adapt(models, advance)
        except _StoppedError as error:
            gr.Info(str(error), title="budwood")
            return [gr.skip() for _ in outputs]
        finally:
            stopped.discard(run)
        return _named(models, file, example, labels, n, up)

    quick: dict[str, Any] = {"queue": False, "api_visibility": "private"}
    buttons = [adapt, stop]
    started = adapt.click(
        lambda: (uuid.uuid4().hex, *_running(gr, True)), None, [run, *buttons], **quick
    )
    ended = started.success(toasting(gr, adapted), [run, *inputs], outputs, **_event(outputs[1]))
    for end in (ended.success, ended.failure):
        end(lambda: _running(gr, False), None, buttons, **quick)
    stop.click(stopped.add, run, None, **quick)


class _StoppedError(Exception):
    """A visitor stopped the adaptation."""


def _running(gr: Any, is_running: bool) -> tuple[Any, Any]:
    return gr.Button(interactive=not is_running), gr.Button(interactive=is_running)


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
            found = gr.HTML("", label="Objects", min_height=80)
    scan = toasting(gr, partial(points.scan, models))
    ask.click(scan, [file, labels, up], [figure, found], **_event(found))


def _file(gr: Any, label: str) -> Any:
    return gr.File(label=label, file_types=[*points.SUFFIXES], type="filepath", height=140)


def _event(shown_on: Any) -> dict[str, Any]:
    """Options of an event that uses the models, with the output that shows its progress."""
    shared = {"concurrency_id": "points", "concurrency_limit": 1}
    return {**shared, "show_progress_on": shown_on, "api_visibility": "private"}


def _named(
    models: Models, file: str | None, example: str, labels: str, n_points: float, up: str
) -> tuple[Any, str, str, float]:
    named = points.name(models, file, example, labels, n_points, up)
    with models.points.held() as held:
        note = NO_ADAPTER if held.adapter is None else ADAPTED
    return named.figure, named.ranked, note, n_points
