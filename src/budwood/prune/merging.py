"""What the LLM gets of an image: the kept tokens, with dropped ones merged in by some methods."""

from __future__ import annotations

import torch
from torch import Tensor

from budwood.prune.families.base import Layout
from budwood.prune.methods.base import Selection


def kept_features(image: Tensor, layout: Layout, selection: Selection, kept: Tensor) -> Tensor:
    """Features that go to the LLM.

    Choosing is not differentiated through: a merged feature passes its gradient on to the kept
    token's own. Only the first level is merged.

    Args:
        image: of all tokens, shape (n_features, d_model), or with levels between,
            (n_features, n_levels, d_model).
        layout: of the image.
        selection: what a method chose of the candidates.
        kept: chosen and fixed tokens, as ``layout.kept`` gives them, shape (n_kept,).

    Returns:
        Shape (n_kept, d_model), or with levels between.
    """
    left = image[kept]
    if selection.features is None:
        return left
    where = selection.indices
    if layout.candidates is not None:
        chosen = layout.candidates.to(kept.device, non_blocking=True)[where]
        where = torch.searchsorted(kept, chosen)
    else:
        where = torch.arange(len(kept), device=kept.device)
    first = left if left.ndim == 2 else left[:, 0]
    merged = first.index_copy(0, where, selection.features)
    if left.ndim == 3:
        merged = torch.cat((merged[:, None], left[:, 1:]), dim=1)
    return left + (merged - left).detach() if left.requires_grad else merged
