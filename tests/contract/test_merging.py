"""Methods that merge tokens: their features reach the LLM, each in the place of its token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from budwood.prune import Extras, Method, Selection, attach, encode, select
from tests.contract import oracle
from tests.contract.models import IMAGE, ROW_IMAGES, words

GREEDY = {"max_new_tokens": 4, "do_sample": False}
MERGING = ("adav+", "visionzip", "prumerge-plus")


@dataclass(frozen=True)
class Doubled(Method):
    """Keep the last tokens, last first, and hand over twice their features."""

    name: ClassVar[str] = "doubled"
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    source: ClassVar[str] = "a test"
    seen: ClassVar[list[Extras]] = []

    def choose(self, visual, text, saliency, keep, generator=None, extras=None):
        self.seen.append(extras)
        indices = torch.arange(len(visual) - 1, len(visual) - 1 - keep, -1)
        return Selection(indices, features=2 * visual[indices].float())


def test_select_sorts_features_with_their_indices():
    visual = torch.randn(9, 3, dtype=torch.float64)
    got = select(visual, None, torch.ones(9), keep=4, method=Doubled())
    assert got.indices.tolist() == [5, 6, 7, 8]
    assert torch.equal(got.features, (2 * visual[5:].float()).double())


def embeddings(case, single, reports):
    """Input embeddings of a row, those of kept candidates doubled."""
    embeds = oracle.embeddings(case, single)
    before = oracle.kept_positions(case, single, [])
    kept = oracle.kept_positions(case, single, reports)
    newlines = oracle.kept_positions(case, single, [nothing(report) for report in reports])
    chosen = [i for i in kept.tolist() if i not in {*before.tolist(), *newlines.tolist()}]
    embeds[chosen] *= 2
    return embeds[kept], kept


def nothing(report):
    """A report of the same image that kept no candidate."""

    class Nothing:
        n_before, n_fixed, kept = report.n_before, report.n_fixed, report.kept[:0]
        kind = report.kind

    return Nothing


@pytest.mark.parametrize("encoded", [False, True])
def test_merged_features_equal_oracle(case, batch, encoded):
    pictures = encode(case.model, batch) if encoded else None
    options = {"output_logits": True, "return_dict_in_generate": True}
    with attach(case.model, keep=6, method=Doubled(), encoded=pictures) as session:
        output = case.model.generate(**batch, **GREEDY, **options)
    for row, images in enumerate(ROW_IMAGES):
        single = oracle.row_of(batch, case, row, images)
        embeds, kept = embeddings(case, single, session.report[images])
        positions = oracle.coordinates(case, single, kept)
        hidden = oracle.hidden(case, single, kept, embeds[None], positions)
        expected = case.model.lm_head(hidden[:, -1])[0]
        torch.testing.assert_close(output.logits[0][row], expected, rtol=1e-3, atol=1e-3)


def test_merged_features_pass_gradients_on(case):
    batch = case.batch([words(3, 1), 0, words(5, 2)])
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][batch["input_ids"] == IMAGE] = -100
    with attach(case.model, keep=3, method=Doubled(), forward=True):
        loss = case.model(**batch).loss
        loss.backward()
    encoder = [
        p
        for n, p in case.model.named_parameters()
        if any(part in n for part in ("multi_modal", "merger", "connector"))
    ]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder)
    case.model.zero_grad(set_to_none=True)
    with torch.no_grad(), attach(case.model, keep=3, method=Doubled(), forward=True):
        torch.testing.assert_close(case.model(**batch).loss, loss.detach())


def test_extras_are_those_of_the_candidates(case, batch):
    """Boxes are the report's. Keys, where a family gives them, are in the order of the LLM."""
    pictures = encode(case.model, batch)
    Doubled.seen.clear()
    with attach(case.model, keep=3, method=Doubled()) as session:
        case.model.generate(**batch, **GREEDY)
    for extras, report, keys in zip(Doubled.seen, session.report, pictures.keys, strict=True):
        assert torch.equal(extras.boxes, report.boxes)
        assert sum(rows * columns for rows, columns in extras.grids) == report.n_before
        assert report.grid is None or extras.grids == (report.grid,)
        if keys is None:
            assert extras.keys is None
        else:
            torch.testing.assert_close(extras.keys, keys)
            assert len(keys) == report.n_before


def test_keys_are_in_the_order_of_the_llm(cases):
    case = cases["llava_next"]
    batch = case.batch([words(3, 1), 2, words(5, 2)])
    attention = case.model.model.vision_tower.encoder.layers[-2].self_attn
    seen = []
    handle = attention.k_proj.register_forward_hook(lambda _m, _i, output: seen.append(output))
    pictures = encode(case.model, batch)
    handle.remove()
    places = oracle.packed_places(case, batch["image_sizes"][0], 5)
    expected = seen[0][:, 1:].flatten(0, 1)[places[places >= 0]]
    assert torch.equal(pictures.keys[0].flatten(1), expected)
    assert pictures.keys[0].shape[1] == attention.num_heads


@pytest.mark.parametrize("merging", MERGING)
def test_keeping_everything_merges_nothing(case, batch, merging):
    before = case.model.generate(**batch, **GREEDY)
    with attach(case.model, keep=1.0, method=merging):
        assert torch.equal(case.model.generate(**batch, **GREEDY), before)


@pytest.mark.parametrize("merging", MERGING)
def test_rows_of_a_batch_equal_single_rows(case, batch, merging):
    with attach(case.model, keep=5, method=merging):
        together = case.model.generate(**batch, **GREEDY)
        for row, images in enumerate(ROW_IMAGES):
            single = oracle.row_of(batch, case, row, images)
            alone = case.model.generate(**single, **GREEDY)
            assert torch.equal(together[row, -4:], alone[0, -4:])
