"""Fine-tune a language model so that it learns a task and keeps what it knew: SLIM.

:func:`finetune` goes from data to a saved adapter. Importing this package makes the adapter type
``SLIM`` known to PEFT, at once or as soon as PEFT is imported, for a Trainer of your own:
``peft.get_peft_model(model, SlimConfig())``, ``Trainer``, ``save_pretrained``,
``PeftModel.from_pretrained``.

To read first: :mod:`budwood.tune.equations`, then :mod:`budwood.tune.config`. Imports run one way:
``equations``, ``base_model``, ``saved``, ``config``, ``data``, ``tasks``, ``slim``, ``training``,
``methods``, ``evaluate`` and ``finetuning`` each import only those before them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from budwood import optional
from budwood.lazy import import_with, lazy_exports

optional.check("peft", "budwood.tune")

if TYPE_CHECKING:
    from budwood.tune.config import SlimConfig as SlimConfig
    from budwood.tune.finetuning import FinetuneResult as FinetuneResult
    from budwood.tune.finetuning import finetune as finetune
    from budwood.tune.saved.loading import load_adapted as load_adapted
    from budwood.tune.saved.publish import push_to_hub as push_to_hub
    from budwood.tune.slim.export import LoraExport as LoraExport
    from budwood.tune.slim.export import export_lora as export_lora
    from budwood.tune.slim.fitting import fit_discriminant as fit_discriminant
    from budwood.tune.slim.fused_experts import SlimExperts as SlimExperts
    from budwood.tune.slim.keeper import SlimCallback as SlimCallback
    from budwood.tune.slim.keeper import SlimLayer as SlimLayer
    from budwood.tune.slim.keeper import commit as commit
    from budwood.tune.slim.keeper import tell_labels as tell_labels
    from budwood.tune.slim.layer import SlimLinear as SlimLinear
    from budwood.tune.slim.model import SlimModel as SlimModel
    from budwood.tune.slim.observe import LayerRouting as LayerRouting
    from budwood.tune.slim.observe import Recorder as Recorder
    from budwood.tune.slim.observe import observe as observe
    from budwood.tune.training.settings import Settings as Settings

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "FinetuneResult": "finetuning",
        "LayerRouting": "slim.observe",
        "LoraExport": "slim.export",
        "Recorder": "slim.observe",
        "Settings": "training.settings",
        "SlimCallback": "slim.keeper",
        "SlimConfig": "config",
        "SlimExperts": "slim.fused_experts",
        "SlimLayer": "slim.keeper",
        "SlimLinear": "slim.layer",
        "SlimModel": "slim.model",
        "commit": "slim.keeper",
        "export_lora": "slim.export",
        "finetune": "finetuning",
        "fit_discriminant": "slim.fitting",
        "load_adapted": "saved.loading",
        "observe": "slim.observe",
        "push_to_hub": "saved.publish",
        "tell_labels": "slim.keeper",
    },
)

import_with("peft", "budwood.tune.config")
