"""The Tune tab: base and tuned model side by side, and what a record says of forgetting."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood import optional, records
from budwood.app import markup
from budwood.app.models import Models
from budwood.app.uploads import uploaded
from budwood.errors import AttachError, InputError

if TYPE_CHECKING:
    from budwood.loading import Loaded

PROMPTS = {
    "a general question": "Why is the sky blue?",
    "a question as in examples/tune": (
        "What is the occupation of Orlan Tebb?\nA. a blacksmith\nB. a carpenter\nC. a potter\n"
        "D. a baker"
    ),
}
"""Prompts to start from."""
MOST_TOKENS = 128
FORGETTING = {
    "kl_chat": "divergence from the base model on its replies, nats per token",
    "kl_text": "divergence from the base model on text, nats per token",
    "perplexity": "perplexity of text",
}
"""Keys of a record's rows, the preferred one first, with axis labels."""
LEARNING = {"target": "accuracy on the tasks, %", "validation": "accuracy on validation, %"}
"""The same of what was learnt."""
LOW, HIGH = (213, 94, 0), (120, 190, 240)
"""Colours of the token with the least weight on identity experts, and of that with the most."""


def reply(models: Models, prompt: str, n_tokens: float) -> str:
    """Let the base and the tuned model reply to a prompt.

    Args:
        models: of the page.
        prompt: of the user.
        n_tokens: longest reply, in tokens.

    Returns:
        HTML: both replies, that of the tuned model and the prompt with a colour for each token.

    Raises:
        BudwoodError: the prompt is empty, or there is no tuned model.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty; ask something")
    with models.tuned.held() as loaded:
        import torch

        from budwood.tune.data.template import prompt_tokens
        from budwood.tune.slim.observe import identity_by_token

        given = torch.tensor(prompt_tokens(loaded.tokenizer, prompt.strip()))
        tuned = _generate(loaded, given, int(n_tokens))
        with loaded.model.disable_adapter():
            base = _generate(loaded, given, int(n_tokens))
        try:
            shares = identity_by_token(loaded.model, tuned).tolist()
        except AttachError:  # an adapter without identity experts, such as LoRA
            shares = None
        words = [loaded.tokenizer.decode([token]) for token in tuned.tolist()]
        said = loaded.tokenizer.decode(base[len(given) :], skip_special_tokens=True)
    left = f"<h2>Base model</h2>{markup.paragraph(said)}"
    right = f"<h2>Tuned model</h2>{_coloured(words, shares, len(given))}"
    return markup.status(markup.pair(left, right))


def curve(file: str | None) -> tuple[Any, str]:
    """Draw learning against forgetting, from a record of ``budwood bench tune``.

    Args:
        file: the uploaded record.

    Returns:
        A figure of plotly: a point for each row, a line for each method with several; and HTML with
        a table of the same numbers.

    Raises:
        BudwoodError: there is no file, or it is no such record.
        MissingPackageError: plotly is not installed.
    """
    if file is None:
        raise InputError("there is no record; upload a JSON file of `budwood bench tune --out`")
    with uploaded(file):
        rows = [row for row in records.read(file).rows if row.get("method") is not None]
        x, y = _key(file, rows, FORGETTING), _key(file, rows, LEARNING)
    graph = optional.need("plotly.graph_objects", "a curve")
    figure = graph.Figure()
    for method, points in _by_method(rows).items():
        figure.add_scatter(
            x=[row[x] for row in points],
            y=[100 * row[y] for row in points],
            error_y={"type": "data", "array": [100 * (row.get(f"{y}_std") or 0) for row in points]},
            mode="lines+markers",
            marker={"size": 9},
            name=method,
        )
    figure.update_layout(
        xaxis_title=_wrapped(f"forgetting: {FORGETTING[x]}"),
        yaxis_title=_wrapped(f"learning: {LEARNING[y]}"),
        margin={"t": 50, "r": 20, "l": 60},
        template="plotly_white",
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
    )
    heads = ("method", LEARNING[y], FORGETTING[x])
    cells = [(str(row["method"]), f"{100 * row[y]:.1f}", f"{row[x]:.2f}") for row in rows]
    return figure, markup.status(markup.table("Numbers of the record", heads, cells))


def _wrapped(title: str) -> str:
    """In lines that a phone has room for."""
    return "<br>".join(textwrap.wrap(title, 34))


def _generate(loaded: Loaded, tokens: Any, n_new: int) -> Any:
    """The prompt and a greedy reply, int64, shape (n_tokens,)."""
    import torch

    ids = tokens[None].to(loaded.model.device)
    with torch.inference_mode():
        output = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=min(n_new, MOST_TOKENS),
            pad_token_id=loaded.tokenizer.eos_token_id,
        )
    return output[0].cpu()


def _coloured(words: Sequence[str], shares: Sequence[float] | None, n_prompt: int) -> str:
    """Prompt and reply with a colour for each token, and the weights as a table to open."""
    if shares is None:
        note = "The adapter has no identity experts, so there are no colours."
        return markup.paragraph("".join(words[n_prompt:])) + markup.paragraph(note)
    low, high = min(shares), max(shares)
    spans = [_span(word, share, low, high) for word, share in zip(words, shares)]
    parts = {"Prompt": spans[:n_prompt], "Reply": spans[n_prompt:]}
    shown = "".join(
        f'<h3>{name}</h3><p class="budwood-tokens">{"".join(part)}</p>'
        for name, part in parts.items()
    )
    rows = [(repr(word), f"{share:.0%}") for word, share in zip(words, shares)]
    listed = markup.table("Weight on identity experts", ("token", "weight"), rows)
    scale = (
        f"<p>Weight on identity experts: {low:.0%}"
        f'<span class="budwood-scale" style="background: linear-gradient(90deg, rgb{LOW}, '
        f'rgb{HIGH})"></span>{high:.0%}. Blue tokens are routed around the experts.</p>'
    )
    return f"{shown}{scale}<details><summary>Weights as a table</summary>{listed}</details>"


def _span(word: str, share: float, low: float, high: float) -> str:
    place = (share - low) / (high - low or 1)
    colour = tuple(round(first + place * (last - first)) for first, last in zip(LOW, HIGH))
    title = f"{share:.0%} on identity experts"
    return f'<span style="background: rgb{colour}" title="{title}">{escape(word)}</span>'


def _key(file: str, rows: Sequence[records.Row], known: dict[str, str]) -> str:
    """The first of the keys that all rows have a number for."""
    for key in known:
        if rows and all(records.is_finite(row.get(key)) for row in rows):
            return key
    raise InputError(
        f"{Path(file).name} has no numbers under {' or '.join(known)}; give a record of `budwood "
        "bench tune`"
    )


def _by_method(rows: Sequence[records.Row]) -> dict[str, list[records.Row]]:
    groups: dict[str, list[records.Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.get("lr") or 0):
        groups[str(row["method"])].append(row)
    return groups
