"""Fine-tune a language model so that it learns the task and forgets little else: SLIM.

Importing this package makes the adapter type ``SLIM`` known to PEFT; everything else is PEFT's:
``peft.get_peft_model(model, SlimConfig())``, ``Trainer``, ``save_pretrained``,
``PeftModel.from_pretrained``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from budwood.errors import MissingPackageError

try:
    import peft as _peft  # noqa: F401
except ImportError as error:
    raise MissingPackageError(
        f"budwood.tune needs PEFT ({error}): pip install 'budwood[tune]'"
    ) from error

from budwood.tune.config import SlimConfig
from budwood.tune.fitting import fit_discriminant
from budwood.tune.layer import SlimLayer, SlimLinear
from budwood.tune.model import SlimModel, register
from budwood.tune.observe import LayerRouting, Recorder, observe
from budwood.tune.steps import commit, tell_labels

if TYPE_CHECKING:
    from budwood.tune.callback import SlimCallback
    from budwood.tune.export import LoraExport, export_lora
    from budwood.tune.finetuning import FinetuneResult, finetune
    from budwood.tune.settings import Settings

__all__ = [
    "FinetuneResult",
    "LayerRouting",
    "LoraExport",
    "Recorder",
    "Settings",
    "SlimCallback",
    "SlimConfig",
    "SlimLayer",
    "SlimLinear",
    "SlimModel",
    "commit",
    "export_lora",
    "finetune",
    "fit_discriminant",
    "observe",
    "tell_labels",
]

_HOMES = {
    "FinetuneResult": "finetuning",
    "LoraExport": "export",
    "Settings": "settings",
    "SlimCallback": "callback",
    "export_lora": "export",
    "finetune": "finetuning",
}

register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
