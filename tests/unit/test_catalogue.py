"""The tables of names say the same as the classes behind them."""

from __future__ import annotations

import torch

from budwood import catalogue
from budwood.points import ADAPTERS, ENCODERS
from budwood.points import METHODS as ADAPTATIONS
from budwood.prune import FAMILIES, METHODS
from budwood.tune.methods import METHODS as TUNERS

REGISTRIES = {
    "PRUNING_METHODS": METHODS,
    "FAMILIES": FAMILIES,
    "TUNERS": TUNERS,
    "ENCODERS": ENCODERS,
    "ADAPTATIONS": ADAPTATIONS,
}


def test_every_name_is_registered_and_described():
    for table, registry in REGISTRIES.items():
        entries = getattr(catalogue, table)
        assert registry.names() == tuple(entries)
        for name, entry in entries.items():
            assert registry.get(name) is not None
            assert entry.summary or table == "ENCODERS"
            assert "\n" not in entry.summary


def test_pruning_methods():
    for name, entry in catalogue.PRUNING_METHODS.items():
        method = METHODS.get(name)
        needs = {
            "text": method.needs_text,
            "saliency": method.needs_saliency,
            "keys": method.needs_keys,
            "grid": method.needs_grid,
        }
        reads = ", ".join(signal for signal, needed in needs.items() if needed)
        assert entry.facts["reads"] == (reads or "nothing")
        assert entry.facts["merges"] == ("yes" if method.merges else "no")
        assert entry.source == method.source


def test_adaptations_say_what_they_see():
    for name, entry in catalogue.ADAPTATIONS.items():
        assert entry.facts["sees"] == ADAPTERS.get(ADAPTATIONS.get(name).adapter).sees


def test_encoders():
    with torch.device("meta"):
        for name, entry in catalogue.ENCODERS.items():
            spec = ENCODERS.get(name)
            assert entry.facts["text"] == spec.make().text
            if spec.hub:
                hub = {"weights": spec.hub.repo, "file": spec.hub.file, "licence": spec.hub.licence}
                assert hub.items() <= entry.facts.items()
            else:
                assert entry.facts["weights"] == "this package"


def test_models_are_of_known_families():
    families = {entry.facts["family"] for entry in catalogue.MODELS.values()}
    assert families <= set(catalogue.FAMILIES)
