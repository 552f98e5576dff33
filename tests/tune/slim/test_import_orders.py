"""SLIM is known to PEFT whatever is imported first; each order in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from budwood.lazy import import_with
from tests import tiny_chat

ROOT = Path(__file__).parents[3]
ADAPTERS = ROOT / "tests/tune/saved/adapters"

ORDERS = {
    "budwood": """
import budwood.tune
assert not {"peft", "torch", "transformers"} & set(sys.modules)
watching = sys.meta_path[0]
assert importlib.util.find_spec("peft").origin  # to look for it is not to import it
assert watching in sys.meta_path
import peft
assert watching not in sys.meta_path
assert type(peft.__loader__) is type(peft.__spec__.loader) is type(json.__loader__)
""",
    "peft": "import peft, budwood.tune",
    "budwood, Trainer": "import budwood.tune; from transformers import Trainer",
    "Trainer, budwood": "from transformers import Trainer; import budwood.tune",
    "budwood, trl": "import budwood.tune; from trl import SFTTrainer",
    "trl, budwood": "from trl import SFTTrainer; import budwood.tune",
    "SlimConfig": "from budwood.tune import SlimConfig",
    "a part of SLIM": "import budwood.tune.slim.keeper",
    "the tuner": "from budwood.tune.slim.model import SlimModel",
}
LOADS = f"""
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(r"{ADAPTERS}/base")
model = PeftModel.from_pretrained(base, r"{ADAPTERS}/whitened")
assert type(model.base_model).__name__ == "SlimModel"
"""


def run(program: str) -> subprocess.CompletedProcess:
    program = f"import importlib.util, json, sys\n{program}"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)


@pytest.mark.parametrize("order", ORDERS)
def test_an_adapter_loads_whatever_is_imported_first(order):
    done = run(ORDERS[order] + LOADS)
    assert done.returncode == 0, done.stderr


def test_without_budwood_peft_names_the_type():
    """The card of an adapter says what this means."""
    assert run(LOADS).stderr.rstrip().endswith("KeyError: 'SLIM'")


def test_registering_imports_nothing_of_transformers_that_peft_has_not():
    """So that it is safe wherever transformers imports PEFT."""
    done = run("""
import peft
before = set(sys.modules)
import budwood.tune
assert "budwood.tune.config" in sys.modules
new = {name for name in set(sys.modules) - before if not name.startswith("budwood")}
assert not {name.partition(".")[0] for name in new} & {"transformers", "peft", "torch"}, new
""")
    assert done.returncode == 0, done.stderr


def test_a_config_of_another_process_makes_an_adapter():
    done = run("""
import pickle, subprocess
from budwood.tune import SlimConfig
program = '''
import pickle, sys
config = pickle.loads(sys.stdin.buffer.read())
from peft import get_peft_model
from tests import tiny_llm
print(type(get_peft_model(tiny_llm.llama(), config).base_model).__name__)
'''
config = pickle.dumps(SlimConfig(target_modules=["up_proj"]))
done = subprocess.run([sys.executable, "-c", program], input=config, capture_output=True)
assert done.stdout.decode().strip() == "SlimModel", done.stderr.decode()
""")
    assert done.returncode == 0, done.stderr


def test_the_command_from_the_first_import_to_a_saved_adapter(tmp_path):
    """Here `Trainer` brings PEFT in, in the middle of transformers' own imports."""
    tiny_chat.save(tmp_path / "base")
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(4)]
    tiny_chat.write_lines(tmp_path / "rows.jsonl", rows)
    words = ["tune", "rows.jsonl", "--output", "out", "--model", "base", "--steps", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "budwood.cli", *words],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages: one imports the other in its middle."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    (tmp_path / "package_a.py").write_text("done = False\nimport package_b\ndone = True\n")
    (tmp_path / "package_b.py").write_text("from package_a import done\n")
    yield
    for name in ("package_a", "package_b"):
        sys.modules.pop(name, None)


def test_a_module_comes_with_a_package(packages, tmp_path):
    (tmp_path / "with_b.py").write_text("import package_b\nfound = package_b.done\n")
    import_with("package_b", "with_b")
    import_with("package_b", "with_b")  # twice does no harm
    assert "with_b" not in sys.modules
    __import__("package_a")
    assert sys.modules.pop("with_b").found is False
    import_with("package_b", "with_b")
    assert sys.modules.pop("with_b").found is False


def test_a_module_that_brings_its_package_in(packages, tmp_path):
    (tmp_path / "package_b.py").write_text("")
    (tmp_path / "with_b.py").write_text("import package_b\nfound = 1\n")
    import_with("package_b", "with_b")
    assert __import__("with_b").found == 1
    sys.modules.pop("with_b")
