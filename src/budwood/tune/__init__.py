"""Fine-tune a language model so that it learns a task and keeps what it knew: SLIM.

:func:`finetune` goes from data to a saved adapter. Importing this package registers the adapter
type ``SLIM`` with PEFT, for a Trainer of your own: ``peft.get_peft_model(model, SlimConfig())``,
``Trainer``, ``save_pretrained``, ``PeftModel.from_pretrained``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from budwood import optional
from budwood.lazy import lazy_exports

try:
    import peft as _peft  # noqa: F401
except ImportError as error:
    raise optional.missing_package("peft", "budwood.tune", error) from error

from budwood.tune.config import SlimConfig
from budwood.tune.fused import SlimExperts
from budwood.tune.layer import SlimLinear
from budwood.tune.model import SlimModel, register
from budwood.tune.observe import LayerRouting, Recorder, observe
from budwood.tune.steps import SlimCallback, SlimLayer, commit, tell_labels

if TYPE_CHECKING:
    from budwood.tune.export import LoraExport, export_lora
    from budwood.tune.finetuning import FinetuneResult, finetune
    from budwood.tune.fitting import fit_discriminant
    from budwood.tune.loading import load_adapted
    from budwood.tune.publish import push_to_hub
    from budwood.tune.settings import Settings

__all__ = [
    "FinetuneResult",
    "LayerRouting",
    "LoraExport",
    "Recorder",
    "Settings",
    "SlimCallback",
    "SlimConfig",
    "SlimExperts",
    "SlimLayer",
    "SlimLinear",
    "SlimModel",
    "commit",
    "export_lora",
    "finetune",
    "fit_discriminant",
    "load_adapted",
    "observe",
    "push_to_hub",
    "tell_labels",
]

__getattr__, __dir__, _ = lazy_exports(
    __name__,
    {
        "FinetuneResult": "finetuning",
        "LoraExport": "export",
        "Settings": "settings",
        "export_lora": "export",
        "finetune": "finetuning",
        "fit_discriminant": "fitting",
        "load_adapted": "loading",
        "push_to_hub": "publish",
    },
)

register()
