"""The part of a saved adapter's model card that says how to load it."""

from __future__ import annotations

from pathlib import Path

CARD_FILE = "README.md"
HEADING = "## Load this adapter"


def loading_lines(adapter: str = "this folder or hub id") -> str:
    """The section, for an adapter of this name."""
    return f"""{HEADING}

PEFT knows the type SLIM once `budwood.tune` is imported; without that line it stops with
`KeyError: 'SLIM'`. Install it with `pip install "budwood[tune]"`.

```python
import budwood.tune  # before the adapter is loaded
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{adapter}")
```"""


def say_how_to_load(folder: Path) -> None:
    """Add the import that SLIM needs to the model card that PEFT has written, once.

    Args:
        folder: of the adapter. An adapter with a name of its own has no card: that of the folder
            above is taken.
    """
    for card in (folder / CARD_FILE, folder.parent / CARD_FILE):
        if card.is_file() and _is_pefts(text := card.read_text(encoding="utf-8")):
            if HEADING not in text:
                card.write_text(_inserted(text), encoding="utf-8")
            return


def _is_pefts(text: str) -> bool:
    """Whether a card is that of a PEFT adapter, and not the readme of some folder."""
    front = text.split("\n---", 1)[0]
    return text.startswith("---") and "library_name: peft" in front


def _inserted(text: str) -> str:
    """The card with our part in front of its second heading, or at its end."""
    place = text.find("\n## ")
    if place < 0:
        return f"{text.rstrip()}\n\n{loading_lines()}\n\n"
    return f"{text[: place + 1]}{loading_lines()}\n\n{text[place + 1 :]}"
