"""Where a SLIM adapter sends text: identity share and distance by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from budwood.checks import need_at_least
from budwood.tune.encoding import Padded, Row
from budwood.tune.observe import observe
from budwood.tune.steps import tell_labels
from budwood.tune.targets import layer_number


@torch.inference_mode()
def routing_rows(
    model: Any, tokenizer: Any, texts: Mapping[str, Sequence[Row]], batch: int = 8
) -> list[dict[str, Any]]:
    """Identity share and distance by layer, for several kinds of text.

    Tokens count whose next one has a label: answers, replies and text, but no prompts.

    Args:
        model: a ``PeftModel`` with a SLIM adapter.
        tokenizer: its padding token is used.
        texts: name → rows.
        batch: rows at a time.

    Returns:
        Dicts of ``text, layer, identity_share, bypassed_share, distance``; a layer's values are
        the means of its projections.

    Raises:
        InputError: ``batch`` is below 1.
    """
    need_at_least(1, batch=batch)
    model.eval()
    collate = Padded.of(model, tokenizer, trim=False)
    found = []
    for name, rows in texts.items():
        with observe(model, supervised=True) as seen:
            try:
                for start in range(0, len(rows), batch):
                    inputs = collate(rows[start : start + batch])
                    tell_labels(model, inputs.pop("labels"))
                    model(**{key: value.to(model.device) for key, value in inputs.items()})
            finally:
                tell_labels(model, None)
        found += [{"text": name, **row} for row in by_layer(seen.rows())]
    return found


def by_layer(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the projections of each layer, in the order of layers.

    Args:
        rows: with ``layer``, a module's name that holds the layer's number, and the values.
    """
    groups: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[layer_number(row["layer"]) or 0].append(row)
    keys = ("identity_share", "bypassed_share", "distance")
    return [
        {"layer": number} | {key: sum(row[key] for row in group) / len(group) for key in keys}
        for number, group in sorted(groups.items())
    ]
