"""``python -m budwood.evaluate.lm_eval``: lm-eval's command with ``--model budwood``.

lm-eval has no entry point for models of other packages, so its command is started from here.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM

from budwood.errors import BudwoodError
from budwood.evaluate.pruned import LOADING, PRUNING, load_pruned, need_batch, refuse_unknown

_Base: Any = HFMultimodalLM
"""Untyped: what lm-eval puts around the class hides it from type checkers."""


def _arguments() -> tuple[str, ...]:
    """Names in ``--model_args``: ours, and those of ``hf-multimodal`` that do not load a model."""
    own = (*LOADING, *PRUNING)
    theirs = ("batch_size", "max_batch_size", "max_length", "truncation", "add_bos_token")
    pictures = inspect.signature(HFMultimodalLM.__init__).parameters
    skipped = ("self", "kwargs", *own)
    known = inspect.signature(HFLM.__init__).parameters
    return (*own, *(n for n in theirs if n in known), *(n for n in pictures if n not in skipped))


@register_model("budwood")
class PrunedMultimodal(_Base):
    """``hf-multimodal`` with pruning attached.

    Args:
        pretrained: ``"sprout"``, ``"sprout-256"``, a directory or a hub id.
        batch_size: questions at a time.
        given: options of :func:`budwood.evaluate.load_pruned`, and ``hf-multimodal``'s own.

    Raises:
        BudwoodError: an argument does not exist or has a wrong value.
    """

    def __init__(self, pretrained: str = "sprout", batch_size: Any = 1, **given: Any) -> None:
        refuse_unknown(given, _arguments(), "lm-eval's model 'budwood'")
        size = need_batch(batch_size)
        given.pop("max_batch_size", None)  # of batch_size=auto, which is refused
        if given.get("device") == "cuda:0":  # lm-eval's default, GPU or not
            given["device"] = "auto"
        own = {name: given.pop(name) for name in (*LOADING, *PRUNING) if name in given}
        loaded = load_pruned(pretrained, **own)
        self.session = loaded.session
        super().__init__(pretrained=loaded.model, batch_size=size, **given)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> PrunedMultimodal:
        """Make the model from ``--model_args``, which win over ``--device`` and ``--batch_size``.

        Args:
            arg_dict: of ``--model_args``.
            additional_config: what lm-eval adds; its own models fail on what is given in both.
        """
        return cls(**{**(additional_config or {}), **arg_dict})


def main() -> int:
    """Run lm-eval's command.

    Returns:
        Exit status: 2 after an error in what was given, which is printed.
    """
    try:
        cli_evaluate()
    except BudwoodError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
