"""Names to classes, lazily, with help for the ones that are misspelt."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import pytest

from budwood.errors import UnknownNameError
from budwood.prune import METHODS, Method
from budwood.registry import Entry, Registry


def test_get_imports_on_first_use():
    registry = Registry("number", {"fraction": "fractions:Fraction", "absent": "no.such:Thing"})
    assert registry.get("fraction") is Fraction
    assert registry.names() == ("fraction", "absent")
    assert "absent" in registry and len(registry) == 2 and list(registry) == ["fraction", "absent"]
    with pytest.raises(ModuleNotFoundError):
        registry.get("absent")


def test_unknown_names_say_what_is_known():
    registry = Registry("method", {"adav": int, "random": str})
    with pytest.raises(UnknownNameError) as caught:
        registry.get("Adv")
    assert str(caught.value) == "unknown method 'Adv', did you mean 'adav'? known: adav, random"
    with pytest.raises(UnknownNameError) as caught:
        registry.get("zzz")
    assert str(caught.value) == "unknown method 'zzz'; known: adav, random"
    with pytest.raises(UnknownNameError):
        registry.get(3)  # type: ignore[arg-type]


def test_register():
    registry = Registry("method", {"adav": int})
    registry.register("mine", float)
    registry.register("mine", float)  # the same again, as on a reload
    assert registry.get("mine") is float
    with pytest.raises(ValueError, match="'mine' is taken"):
        registry.register("mine", str)
    with pytest.raises(ValueError, match="must be 'module:attribute'"):
        registry.register("other", "budwood.prune")


def test_a_name_without_a_target_can_only_be_checked():
    registry = Registry("model", {"sprout": Entry("a small one"), "other": Entry("another")})
    registry.check("sprout")
    with pytest.raises(UnknownNameError, match="did you mean 'sprout'"):
        registry.check("sproot")
    with pytest.raises(LookupError, match="model 'sprout' has no target"):
        registry.get("sprout")


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_is_complete(name):
    method = METHODS.get(name)
    assert issubclass(method, Method)
    assert method.name == name
    assert method.source and method.__doc__
    assert isinstance(method.needs_text, bool) and isinstance(method.needs_saliency, bool)
    assert method() == method()  # a frozen dataclass, to be used as a key


def test_import_is_light():
    # A command line that shows its help should not wait for torch.
    code = "import sys, budwood, budwood.prune; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
