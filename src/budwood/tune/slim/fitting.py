"""Fitting the discriminant between training data and text on which the model should not change.

Ours. The distance to the training data alone does not know what other text looks like. The model's
self-generated text shows it, and takes no other data: the model also makes up the requests that it
answers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from budwood.checks import need_at_least
from budwood.errors import InputError, UnsupportedModelError
from budwood.progress import Progress, silent
from budwood.tune.base_model import evaluating
from budwood.tune.data.batches import Padded, on_device
from budwood.tune.data.encoding import IGNORED, EncodedExample, n_supervised, told_labels
from budwood.tune.data.self_generated import in_forms_of, self_generate, with_asked
from budwood.tune.slim.architectures import layer_number, n_blocks
from budwood.tune.slim.distance import discriminant, gap_to_other
from budwood.tune.slim.keeper import keeper_of, layers_of
from budwood.tune.slim.state import DiscriminantStatistics, InputStatistics

N_TEXTS = 128
"""Self-generated texts, where no other text is given."""
N_EXAMPLES = 256
"""Fewest training examples that are read; more until ``MOST_TOKENS`` count."""
MOST_TOKENS = 4096
"""Tokens of each text whose inputs are kept in wide layers, evenly drawn if there are more."""
MOST_VALUES = 2**23
"""Values of each text that are kept of a narrower layer: 14,563 tokens of 576 channels."""
CONTENT_UNTIL = 0.7
"""Fraction of the model's layers, from the input on, in which what the user wrote may count."""
LEAST_TOKENS = 32
WAY = 0.5
"""Where a fixed boundary lies, as a fraction of the way from training data to other text."""


@torch.no_grad()
def fit_discriminant(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[EncodedExample],
    other: Sequence[EncodedExample] | None = None,
    *,
    batch: int = 16,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[int, int]:
    """Fit a fresh SLIM adapter's discriminant to training data and other text, before training.

    ``distance="discriminant"`` requires it.

    Args:
        model: from ``peft.get_peft_model``; its adapters that are trained are SLIM's and fresh.
        tokenizer: of the model.
        rows: training data, ``input_ids`` and ``labels``. Rows are drawn until they have enough
            supervised tokens (:func:`most_tokens`), and at least ``N_EXAMPLES``. A token counts if
            its next token's label is not −100; with ``fit_on="content"`` also what the user wrote
            (``asked``), and with ``"all"`` every token. The first token of a row never counts,
            unless with ``"all"``.
        other: text on which the model should not change, in the same form. None for ``N_TEXTS``
            self-generated texts; where some rows have no chat template around them, also without
            it.
        batch: rows at a time.
        seed: of the draws.
        progress: called after each batch of text that is generated, and each that is read.

    Returns:
        The number of supervised tokens of both.

    Raises:
        AttachError: the model has no SLIM layers.
        InputError: the adapter has no discriminant or was trained; there is too little text; the
            text does not reach a layer; or the model's values on it are NaN or infinite.
        UnsupportedModelError: the chat template does not show where a user's turn begins.
    """
    fresh = _fresh_statistics(model)
    need_at_least(1, batch=batch)
    _check_rows("training data", rows)
    if other is None:
        own = self_generate(model, tokenizer, N_TEXTS, batch=batch, seed=seed, progress=progress)
        other = in_forms_of(rows, own, tokenizer)
    _check_rows("other text", other)
    early = _reading_content(model, fresh)
    if early:
        rows, other = (_marked(text, tokenizer) for text in (rows, other))
    most = max(most_tokens(layer.d_in) for layer in fresh)
    rows = [_without_first(row) for row in _draw(rows, most, seed)]
    inputs = _inputs(model, tokenizer, fresh, early, (rows, other), batch, progress)
    fitted = {layer: _fit(layer, *texts) for layer, texts in inputs.items()}  # before any is set
    for layer, direction in fitted.items():
        texts = inputs[layer]
        layer.set_direction(*direction, sum(map(len, texts)))
        if layer.config.boundary == "fixed":
            layer.set_boundary(*_midway(layer, *texts))
    return n_supervised(rows), n_supervised(other)


def _inputs(
    model: nn.Module,
    tokenizer: Any,
    layers: Sequence[DiscriminantStatistics],
    early: Sequence[DiscriminantStatistics],
    texts: tuple[Sequence[EncodedExample], Sequence[EncodedExample]],
    batch: int,
    progress: Progress,
) -> dict[DiscriminantStatistics, tuple[Tensor, Tensor]]:
    """What layers read at the tokens that count, of training data and of other text."""
    surveys = []
    for text in texts:
        survey = Survey(early, 1 + len(text) // batch)
        n_before, n_all = (sum(len(one) for one in some) for some in (texts[: len(surveys)], texts))
        for n_read in _read(model, tokenizer, text, batch, survey):
            progress(n_before + n_read, n_all, "reading training data and other text")
        surveys.append(survey)
    _check_reached(layers, surveys)
    training, other = surveys
    return {layer: (training.inputs_of(layer), other.inputs_of(layer)) for layer in layers}


def _reading_content(
    model: nn.Module, layers: Sequence[DiscriminantStatistics]
) -> list[DiscriminantStatistics]:
    """The layers for which what the user wrote counts: with ``fit_on="content"`` the earlier ones.

    Ours. What a later layer adds there hardly reaches the answer any more, and its inputs tell
    training data from other text less well (benchmarks/LOG.md).
    """
    numbers = {layer: layer_number(layer.key) or 0 for layer in layers}
    names = {module: name for name, module in model.named_modules()}
    end = CONTENT_UNTIL * n_blocks(names.values(), [names[layer] for layer in layers_of(model)])
    return [layer for layer in layers if layer.config.fit_on == "content" and numbers[layer] < end]


def most_tokens(d_in: int) -> int:
    """Tokens of each text whose inputs are kept of a layer: the more, the better the direction.

    Args:
        d_in: input channels of the layer.
    """
    return max(MOST_TOKENS, MOST_VALUES // d_in)


class Survey:
    """Keeps the inputs that layers show it.

    Args:
        content: layers for which what the user wrote counts.
        n_passes: forward passes, over which the tokens that are kept are spread.

    Attributes:
        labels: of the rows of the present pass, shape (n_rows, length).
        told: the same with labels behind what the user wrote.
    """

    labels: Tensor
    told: Tensor

    def __init__(self, content: Sequence[InputStatistics] = (), n_passes: int = 1) -> None:
        self.n_passes = n_passes
        self._content = {id(layer) for layer in content}
        self._kept: dict[InputStatistics, list[Tensor]] = {}

    def labels_of(self, statistics: InputStatistics) -> Tensor:
        """Labels behind the tokens that count for a layer."""
        return self.told if id(statistics) in self._content else self.labels

    def __contains__(self, statistics: InputStatistics) -> bool:
        return statistics in self._kept

    def see(self, statistics: InputStatistics, x: Tensor) -> None:
        """Keep inputs of a layer: tokens that count, shape (n_tokens, d_in)."""
        if not len(x):
            return
        most = max(1, round(most_tokens(statistics.d_in) / self.n_passes))
        if len(x) > most:
            x = x[torch.linspace(0, len(x) - 1, most).round().long().to(x.device)]
        self._kept.setdefault(statistics, []).append(x.clone())

    def inputs_of(self, statistics: InputStatistics) -> Tensor:
        """All kept inputs of a layer, float32, shape (n_tokens, d_in)."""
        return torch.cat(self._kept[statistics]).float()


def _fresh_statistics(model: nn.Module) -> list[DiscriminantStatistics]:
    """List the discriminants of the adapters that are about to be trained."""
    keeper = keeper_of(model)  # refuses a model without SLIM layers
    for name in {name for layer in layers_of(model) for name in layer.trained_adapters()}:
        keeper.settle(name)
    fresh = [
        statistics for layer in layers_of(model) for statistics in layer.discriminants().values()
    ]
    if not fresh:
        raise InputError(
            "no adapter that is being trained has a distance that is fitted; give "
            'SlimConfig(distance="discriminant")'
        )
    steps = max(statistics.steps for statistics in fresh)
    if steps:
        raise InputError(
            f"the adapter was trained for {steps} steps with its present distances; fit a fresh "
            "adapter"
        )
    return fresh


def _check_rows(what: str, rows: Sequence[EncodedExample]) -> None:
    bad = next((i for i, row in enumerate(rows) if not n_supervised([row])), None)
    if bad is not None:
        raise InputError(f"row {bad} of the {what} has no token that counts; leave it out")
    n = n_supervised(rows)
    if n < LEAST_TOKENS:
        raise InputError(
            f"the {what} has {n} tokens that count and needs {LEAST_TOKENS}: give more, or "
            'another distance ("whitened")'
        )


def _draw(rows: Sequence[EncodedExample], most: int, seed: int) -> list[EncodedExample]:
    """Draw rows until there are enough rows and tokens; they stay in their order."""
    drawn: list[int] = []
    n_tokens = 0
    for i in random.Random(seed).sample(range(len(rows)), len(rows)):
        if len(drawn) >= N_EXAMPLES and n_tokens >= most:
            break
        drawn.append(i)
        n_tokens += n_supervised([rows[i]])
    return [rows[i] for i in sorted(drawn)]


def _marked(rows: Sequence[EncodedExample], tokenizer: Any) -> Sequence[EncodedExample]:
    """The rows with marks on what the user wrote, as far as the chat template shows it."""
    if all("asked" in row for row in rows):
        return rows
    try:
        return with_asked(rows, tokenizer)
    except UnsupportedModelError:
        return rows


def _without_first(row: EncodedExample) -> EncodedExample:
    """A row whose first token does not count.

    All later tokens attend to it, whatever it is (an attention sink, arXiv 2309.17453), and it
    looks alike in all texts. With experts there, a model changes on every text.
    """
    changed = {**row, "labels": [IGNORED] * 2 + row["labels"][2:]}
    if "asked" in row:
        changed["asked"] = [0, *row["asked"][1:]]
    return changed


def _told(row: EncodedExample) -> EncodedExample:
    """A row with labels behind what the user wrote."""
    return {**row, "labels": told_labels(row)}


def _read(
    model: nn.Module, tokenizer: Any, rows: Sequence[EncodedExample], batch: int, survey: Survey
) -> Iterator[int]:
    """Pass rows through the model, whose layers show their inputs to the survey.

    Yields:
        How many rows were read.
    """
    device = next(model.parameters()).device
    collate = Padded.of(model, tokenizer)
    with _surveyed(model, survey), evaluating(model):
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            inputs = on_device(collate(some), device)
            survey.labels = inputs.pop("labels")
            survey.told = on_device(collate([_told(row) for row in some]), device)["labels"]
            model(**inputs)
            yield start + len(some)


@contextmanager
def _surveyed(model: nn.Module, survey: Survey) -> Iterator[None]:
    keeper = keeper_of(model)
    keeper.survey = survey
    try:
        yield
    finally:
        keeper.survey = None


def _midway(
    layer: DiscriminantStatistics, training: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    """Where a fixed boundary lies along a layer's direction, and the deviation of training data.

    Ours. Few examples leave wide gaps, in which further examples of the same task lie: up to a
    dozen standard deviations away, where other text begins at 26 (benchmarks/LOG.md). Without a gap
    the boundary is ``margin`` standard deviations away.
    """
    raw = training @ layer.direction - layer.offset
    std, mean = torch.std_mean(raw, correction=0)
    reach = max(layer.config.margin, WAY * gap_to_other(training, other))
    return mean + reach * std, std


def _check_reached(layers: Sequence[DiscriminantStatistics], surveys: Sequence[Survey]) -> None:
    for layer in layers:
        if not all(layer in survey for survey in surveys):
            raise InputError(
                f"layer {layer.key!r} reads no token of this text that counts, as a layer for "
                "other input than text does; leave it out of the target modules, or take another "
                'distance ("whitened")'
            )


def _fit(layer: DiscriminantStatistics, training: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    direction, offset = discriminant(training, other)
    if not bool(torch.isfinite(direction).all() and torch.isfinite(offset)):
        raise InputError(
            f"inputs of layer {layer.key!r} are NaN or infinite on this text; load the model "
            "in bfloat16 or float32"
        )
    return direction, offset
