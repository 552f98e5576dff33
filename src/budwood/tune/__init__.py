"""Fine-tune a language model so that it learns a task and keeps what it knew: SLIM.

:func:`finetune` goes from data to a saved adapter. Importing this package registers the adapter
type ``SLIM`` with PEFT, for a Trainer of your own: ``peft.get_peft_model(model, SlimConfig())``,
``Trainer``, ``save_pretrained``, ``PeftModel.from_pretrained``.

To read first: :mod:`budwood.tune.equations`, then :mod:`budwood.tune.config`. Imports run one way:
``equations``, ``base_model``, ``saved``, ``config``, ``data``, ``tasks``, ``slim``, ``training``,
``methods``, ``evaluate`` and ``finetuning`` each import only those before them.
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
from budwood.tune.slim.fused_experts import SlimExperts
from budwood.tune.slim.keeper import SlimCallback, SlimLayer, commit, tell_labels
from budwood.tune.slim.layer import SlimLinear
from budwood.tune.slim.model import SlimModel, register
from budwood.tune.slim.observe import LayerRouting, Recorder, observe

if TYPE_CHECKING:
    from budwood.tune.finetuning import FinetuneResult, finetune
    from budwood.tune.saved.loading import load_adapted
    from budwood.tune.saved.publish import push_to_hub
    from budwood.tune.slim.export import LoraExport, export_lora
    from budwood.tune.slim.fitting import fit_discriminant
    from budwood.tune.training.settings import Settings

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
        "LoraExport": "slim.export",
        "Settings": "training.settings",
        "export_lora": "slim.export",
        "finetune": "finetuning",
        "fit_discriminant": "slim.fitting",
        "load_adapted": "saved.loading",
        "push_to_hub": "saved.publish",
    },
)

register()
