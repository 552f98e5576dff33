"""What pruning inside the LLM refuses."""

from __future__ import annotations

import pytest
import torch

from budwood.errors import InputError
from budwood.prune.inside import FastV, PyramidDrop, attach_inside
from tests.contract.models import BUILDERS, words


def test_a_method_is_a_name_or_a_schedule():
    model = BUILDERS["llava"]().model
    for method in (FastV, 3, None):
        with pytest.raises(InputError, match="is not a schedule; give one of fastv, pyramiddrop"):
            attach_inside(model, method=method)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("schedule", [FastV, PyramidDrop])
def test_average_is_a_bool(schedule):
    with pytest.raises(InputError, match="average=0.5; give True or False"):
        schedule(average=0.5)


def test_what_counts_the_whole_prompt_is_refused():
    case = BUILDERS["llava"]()
    batch = case.batch([words(3, 1), 2, words(5, 2)])
    with attach_inside(case.model, method=FastV(layer=1), keep=0.6):
        with pytest.raises(InputError, match="no longer match labels"):
            case.model(**batch, labels=batch["input_ids"])
        with pytest.raises(InputError, match="logits_to_keep as positions"):
            case.model(**batch, logits_to_keep=torch.tensor([4]))
        assert case.model(**batch, logits_to_keep=1).logits.shape[1] == 1
