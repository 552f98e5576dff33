"""What a SLIM adapter is made of, as a PEFT config. Importing this module registers it with PEFT.

PEFT reads a config before it needs the tuner, so that making a config is what registers the tuner.
This module is imported while PEFT is, at times by transformers' own modules in the middle of their
import. So it imports nothing of transformers but what PEFT has imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

from budwood.checks import need_bool, need_int, need_number
from budwood.errors import InputError, OptionError, UnknownNameError
from budwood.tune.saved.card import say_how_to_load
from budwood.tune.saved.files import register_old_names

FORMAT = 3
"""Version of the saved format. It rises when an older reader would misread an adapter.

1: weights are ``slim_in`` and ``slim_out``. 2: they are ``slim_in.weight`` and ``slim_out.weight``.
3: alpha is null where it follows ``rank_pattern``; before, it followed where it was 2 · r.
"""
CHOICES = {
    "distance": ("max", "rms", "whitened", "discriminant"),
    "fit_on": ("supervised", "content", "all"),
    "yield_at": ("block", "module"),
    "boundary": ("running", "fixed"),
    "merge_inference": ("expectation", "mask"),
}
"""Options with a fixed set of values."""
SWITCHES = (
    "router",
    "clustering",
    "yielding",
    "merging",
    "merge_rescale",
    "use_rslora",
    "expert_bias",
)
"""Options that are True or False."""
TOKENS_PER_DIRECTION = 10
"""Supervised tokens for each direction of the whitened distance; fewer would overfit it."""
FEWEST_DIRECTIONS = 8
"""Directions of the whitened distance for the smallest data sets."""
FEWEST_FITTED = 32
"""Supervised tokens from which the distance is the discriminant."""
ALPHA = 16.0
"""alpha of the recommended config, at any rank: Adam changes every weight by as much, and so the
layer's output in proportion to alpha. With less, a token's two experts learn slowly."""
FIXED: dict[str, Any] = {"fit_on": "content", "margin": 1.0, "skip_first": 0.2}
"""Options that go with a fixed boundary."""
MARGIN_INFERENCE = 1.0
"""Margin at inference that goes with the discriminant and a running boundary."""
LORA_NAMES = {
    "bias": "SLIM never trains the base model's own biases; expert_bias=True gives experts one",
    "init_lora_weights": "A starts as LoRA's does and B at zero",
    "layer_replication": "SLIM does not replicate layers",
    "lora_alpha": "it is called alpha here",
    "lora_bias": "it is called expert_bias here",
    "lora_dropout": "it is called dropout here",
    "lora_rank": "it is called r here",
    "rank": "it is called r here",
    "use_dora": "SLIM has no magnitude vector",
    "use_rank_stabilized": "it is called use_rslora here",
}
"""Names of LoRA's options that SLIM does not have, and what to say to those who use them."""


class SlimType(str):
    """A stand-in for a member of ``peft.PeftType``, an enum that cannot be extended."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The plain name, as of an enum member."""
        return str.__str__(self)

    @property
    def name(self) -> str:
        """The plain name, as of an enum member."""
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.name}"  # as of an enum member; PEFT's status cuts it at the dot


SLIM = SlimType("SLIM")
PREFIX = "slim_"
"""How the names of SLIM's modules in a layer begin."""
TUNER = "budwood.tune.slim.model"
"""The module with the tuner, which registers it."""
T = TypeVar("T")


def _with_hints(cls: type[T]) -> type[T]:
    """Let a dataclass name the option that was meant, where it gets an unknown one."""
    names = [part.name for part in dataclasses.fields(cls)]  # type: ignore[arg-type]
    plain: Any = cls.__init__

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **options: Any) -> None:
        for name in options:
            if name not in names:
                # PEFT looks for these words where it reads the config of a newer version.
                raise OptionError(f"got an unexpected keyword argument {_hint(name, names)}")
        plain(self, *args, **options)

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


def _hint(name: str, names: list[str]) -> str:
    if name in LORA_NAMES:
        return f"{name!r}: {LORA_NAMES[name]}"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    saved = {"slim_version", "base", *(part.name for part in dataclasses.fields(PeftConfig))}
    known = ", ".join(one for one in names if one not in saved)
    return f"{name!r}; {hint}known: {known}"


@_with_hints
@dataclass
class SlimConfig(PeftConfig):
    """Options of a SLIM adapter: a mixture of LoRA and identity experts on frozen linear layers.

    This is a reconstruction of SLIM (NAACL 2025) from public summaries. **Open** marks what they
    leave unsaid; the value is our reading. **Ours** marks an addition.

    Two ways to a config:

    - ``SlimConfig()`` with ``peft.get_peft_model`` and a ``Trainer`` needs nothing else. It yields
      by the ``"whitened"`` distance, which knows the training data alone.
    - :meth:`recommended` is what ``budwood.tune.finetune``, ``budwood tune`` and the benchmark's
      ``slim`` row train. Unless there is next to no data it takes the ``"discriminant"``
      distance, which has to be fitted before training (:func:`budwood.tune.fit_discriminant`).

    ``finetune`` adds two steps before training: it lets the base model write the text that the
    discriminant needs, and fits the discriminant.

    Attributes: Most important options
        r: rank of one LoRA expert.
        alpha: the experts' output is scaled by alpha / r; None for 2 · r, with the r of each layer
            (``rank_pattern``). Open. :meth:`recommended` has 16, with which the experts learn
            faster.
        n_experts: LoRA experts, ≥ 1.
        n_identity: identity experts. They add nothing and take routing weight from the others, so
            that tokens unlike the training data bypass the adapter.
        distance: how a token's distance from the training data is measured. ``"discriminant"``
            (ours) is the position between training data and other text; it forgets least and is
            fitted before training. ``"whitened"`` (ours) respects correlations between channels.
            ``"max"`` over channels is the paper's, ``"rms"`` over channels is ours. All are
            standardised by running training statistics.
        target_modules: names or a regular expression as in PEFT; None for the MLP projections of
            the later layers (see ``skip_first``).

    Attributes: Remaining parts of the paper
        top_k: experts that a token keeps, 1 ≤ top_k ≤ n_experts + n_identity.
        router: a linear router. Without it all experts weigh the same and yielding alone decides.
        clustering: several centres per layer; False for one running mean. **It has no effect** with
            ``"discriminant"``, which has no centres, and with ``"whitened"`` no measured benefit
            (benchmarks/LOG.md, 2026-11-23).
        n_clusters: centres per layer. Open. No effect wherever ``clustering`` has none.
        momentum: fraction that a centre moves by in one optimiser step, in (0, 1]. Open. It also
            moves the statistics that standardise every distance, unless the boundary is fixed.
        yielding: far from the training data, LoRA experts give way to identity experts.
        beta: strength of yielding, ≥ 0. Open.
        merging: random masks on rows of B and columns of A in training.
        merge_p: fraction of B·A that is masked, in [0, 1).
        merge_rescale: divide the masked B·A by 1 − merge_p, as DARE does. Open.
        merge_inference: ``"expectation"`` scales B·A, ``"mask"`` applies the last mask. Open.
        l1: coefficient of the L1 penalty on A and B, ≥ 0. Open. **0.05 gives the same results** as
            the default (benchmarks/LOG.md, 2026-11-23).

    Attributes: Our own additions
        skip_first: fraction of the layers, from the input on, that get no experts, in [0, 1). It
            counts where neither ``target_modules`` nor ``layers_to_transform`` is given.
        n_directions: dimensions of the whitened distance, at most the layer's input channels. Give
            less than a tenth of the supervised tokens, as :meth:`recommended` does. No effect with
            other distances.
        fit_on: tokens that the statistics describe. ``"supervised"``: those whose next token has a
            label; of TRL's DPO and KTO the chosen answers, of GRPO and RLOO what the model wrote.
            ``"content"``: also what the user wrote, without the chat template, in the first 70 %
            of the model's layers. It takes a fixed boundary, since only
            :func:`budwood.tune.fit_discriminant` knows these tokens.
            ``"all"``: all but padding. ``"learnt"`` is an older spelling of the former.
        yield_at: ``"block"``: all modules of an MLP yield by the distance of its input.
            ``"module"``: each yields by the distance of its own input.
        boundary: where tokens begin to yield. ``"running"``: ``margin`` standard deviations from
            the training data, as they are at that step. ``"fixed"``, for ``"discriminant"``:
            half-way to other text, or ``margin`` standard deviations away if that is farther. It
            is set before training, so that nothing that is learnt can move it over other text.
        expert_bias: the LoRA experts of a layer share a bias, of which a token gets as much as the
            weight that it gives them. It is a further column of B, masked and penalised with it.
        margin: standard deviations of the distance that still count as training data; 1.5 includes
            about nine of ten training tokens.
        margin_inference: the margin at inference; None for ``margin``. A lower one lets fewer
            tokens reach the experts than in training.
        seed: of the masks, of the first centres and of the directions of ``"whitened"``. Keep it as
            it is in a saved adapter.

    Attributes: As in PEFT
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers.
        modules_to_save: further modules to train and save whole.
        target_parameters: names of the fused weights of a mixture-of-experts model, such as
            ``"mlp.experts.gate_up_proj"``, to adapt beside ``target_modules``. The default targets
            include them.
        trainable_token_indices: rows of the input embedding to train, or module → rows.
        dropout: fraction of the input of A that is zeroed in training, in [0, 1). The router and
            the distance see the whole input.
        use_rslora: scale by alpha / √r in place of alpha / r.
        rank_pattern: module name or regular expression → r of these layers. alpha stays as it is.
        alpha_pattern: the same for alpha.

    Attributes: Set by budwood
        slim_version: format of a saved adapter; configs of older ones are brought up to date.
        base: the base model of a saved adapter.

    Raises:
        InputError: a value is outside its range.
        UnknownNameError: an option with fixed values has another one.
        OptionError: there is no such option; it is a ``TypeError`` as well.
    """

    # Most important
    r: int = 4
    alpha: float | None = None
    n_experts: int = 8
    n_identity: int = 2
    distance: str = "whitened"
    target_modules: list[str] | set[str] | str | None = None
    # Remaining parts of the paper
    top_k: int = 2
    router: bool = True
    clustering: bool = True
    n_clusters: int = 8
    momentum: float = 0.05
    yielding: bool = True
    beta: float = 4.0
    merging: bool = True
    merge_p: float = 0.5
    merge_rescale: bool = False
    merge_inference: str = "expectation"
    l1: float = 0.01
    # Our own additions
    skip_first: float = 0.4
    n_directions: int = 128
    fit_on: str = "supervised"
    yield_at: str = "block"
    boundary: str = "running"
    expert_bias: bool = False
    margin: float = 1.5
    margin_inference: float | None = None
    seed: int = 0
    # As in PEFT
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    # Set by budwood
    slim_version: int = FORMAT
    base: dict[str, Any] | None = field(default=None, repr=False)

    def __new__(cls, *args: Any, **options: Any) -> Any:
        importlib.import_module(TUNER)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SLIM  # type: ignore[assignment]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.fit_on == "learnt":
            self.fit_on = "supervised"
        self._check_version()
        self._check_switches()
        self._check_counts()
        self._check_ranges()
        self._check_patterns()
        self._check_choices()
        self._bring_up_to_date()

    @classmethod
    def recommended(cls, n_supervised_tokens: int, *, r: int = 4, **options: Any) -> SlimConfig:
        """Make the config that ``finetune``, ``budwood tune`` and the benchmark's SLIM row train.

        The distance is the discriminant. Its boundary is fixed before training, and what the user
        wrote counts as training data too, since answers depend on it. Experts begin after the first
        fifth of the layers. alpha is 16, and there is no dynamic merging, whose expectation
        halves what was learnt (benchmarks/LOG.md, 2026-11-30). Below 32 supervised tokens, too few
        for a discriminant, the distance is the whitened one with a direction for every ten tokens.

        Args:
            n_supervised_tokens: tokens of one pass over the training data whose label is not −100.
            r: rank of one LoRA expert.
            options: other options of :class:`SlimConfig`; they take precedence. ``task_type`` is
                ``"CAUSAL_LM"`` unless given.

        Raises:
            InputError: the number of tokens is negative, or an option is outside its range.
            UnknownNameError: an option with fixed values has another one.
            OptionError: there is no such option.
        """
        need_int(0, n_supervised_tokens=n_supervised_tokens)
        wanted = n_supervised_tokens // TOKENS_PER_DIRECTION
        n_directions = min(cls.n_directions, max(FEWEST_DIRECTIONS, wanted))
        defaults: dict[str, Any] = {
            "task_type": "CAUSAL_LM",
            "n_directions": n_directions,
            "distance": "discriminant" if n_supervised_tokens >= FEWEST_FITTED else "whitened",
            "merging": False,
            "alpha": ALPHA,
        }
        merged = {**defaults, **options}
        if merged["distance"] == "discriminant":
            merged = {"boundary": "fixed", **merged}
            if merged["boundary"] == "fixed":
                merged = {**FIXED, **merged}
            elif "margin" not in merged:
                merged = {"margin_inference": MARGIN_INFERENCE, **merged}
        return cls(r=r, **merged)

    @property
    def scale(self) -> float:
        """Factor on the experts' output: alpha / r, or alpha / √r with ``use_rslora``."""
        alpha = 2.0 * self.r if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def n_total(self) -> int:
        """Number of LoRA and identity experts."""
        return self.n_experts + self.n_identity

    @property
    def rank(self) -> int:
        """Rank of all LoRA experts together."""
        return self.n_experts * self.r

    @property
    def n_centres(self) -> int:
        """Centres per layer, 1 without clustering."""
        return self.n_clusters if self.clustering else 1

    @property
    def kept(self) -> int:
        """Experts that a token keeps; all of them without a router."""
        return self.top_k if self.router else self.n_total

    def for_layer(self, key: str) -> SlimConfig:
        """The config of one layer: this one, with what the patterns say about the layer.

        Args:
            key: name of the layer in the model.
        """
        changes: dict[str, Any] = {}
        r = _matching(self.rank_pattern, key)
        if r is not None:
            changes["r"] = r
        alpha = _matching(self.alpha_pattern, key)
        if alpha is not None:
            changes["alpha"] = alpha
        return dataclasses.replace(self, **changes) if changes else self

    def margin_of(self, training: bool) -> float:
        """The margin in training, or at inference."""
        if training or self.margin_inference is None:
            return self.margin
        return self.margin_inference

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        base = getattr(self, "base_at_hand", None)  # set by SlimModel
        saved = self if base is None else dataclasses.replace(self, base=base)
        if saved is not self:
            saved.auto_mapping = self.auto_mapping
        PeftConfig.save_pretrained(saved, save_directory, **kwargs)
        say_how_to_load(Path(save_directory))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        """Read a config, saved alone or with an adapter, whose files are checked in passing.

        Raises:
            InputError: a file in the directory is malformed or truncated, or the config belongs to
                an adapter whose weights are missing.
        """
        from budwood.tune.saved.files import check_adapter_files

        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir() and not _is_config_alone(folder):
            check_adapter_files(folder)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def _check_version(self) -> None:
        if self.slim_version > FORMAT:
            raise InputError(
                f"the adapter has format {self.slim_version}, this version of budwood reads up to "
                f"{FORMAT}; upgrade budwood"
            )

    def _bring_up_to_date(self) -> None:
        """Turn a config of an older format into one of the present, with the same scales."""
        if self.slim_version < 3 and self.alpha == 2.0 * self.r:
            self.alpha = None
        self.slim_version = FORMAT

    def _check_switches(self) -> None:
        need_bool(**{name: getattr(self, name) for name in SWITCHES})

    def _check_counts(self) -> None:
        need_int(None, n_experts=self.n_experts)
        if self.n_experts < 1:
            raise InputError(
                f"n_experts={self.n_experts} with n_identity={self.n_identity}: identity experts "
                "alone add nothing; give at least 1 LoRA expert"
            )
        for name in ("r", "top_k", "n_clusters", "n_directions"):
            need_int(1, **{name: getattr(self, name)})
        need_int(0, n_identity=self.n_identity)
        need_int(None, seed=self.seed)
        if self.top_k > self.n_total:
            raise InputError(
                f"top_k={self.top_k} is above the number of experts, {self.n_experts} LoRA + "
                f"{self.n_identity} identity = {self.n_total}; give at most {self.n_total}"
            )

    def _check_ranges(self) -> None:
        for name in ("alpha", "beta", "l1"):
            value = getattr(self, name)
            if name != "alpha" or value is not None:
                need_number(lambda v: 0 <= v < math.inf, "number of at least 0", **{name: value})
        need_number(math.isfinite, "finite number", margin=self.margin)
        if self.margin_inference is not None:
            need_number(math.isfinite, "finite number", margin_inference=self.margin_inference)
        need_number(lambda v: 0 < v <= 1, "number above 0 and up to 1", momentum=self.momentum)
        names = ("merge_p", "skip_first", "dropout")
        fractions = {name: getattr(self, name) for name in names}
        need_number(lambda v: 0 <= v < 1, "fraction in [0, 1)", **fractions)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise InputError(
                f"layers_to_transform={self.layers_to_transform!r} has no effect beside "
                "target_modules as a regular expression; write the layers into the expression, or "
                "give a list of names"
            )
        if self.target_parameters and self.layers_to_transform is not None:
            raise InputError(
                f"layers_to_transform={self.layers_to_transform!r} has no effect beside "
                "target_parameters; give the full names of the weights, layer by layer"
            )

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise InputError(
                    f"{name}={getattr(self, name)!r}; give a dict of names of layers, such as "
                    '{"down_proj": 8}'
                )
        for name, value in self.rank_pattern.items():
            need_int(1, **{f"rank_pattern[{name!r}]": value})
        for name, value in self.alpha_pattern.items():
            checked = {f"alpha_pattern[{name!r}]": value}
            need_number(lambda v: 0 <= v < math.inf, "number of at least 0", **checked)

    def _check_choices(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UnknownNameError(
                    f"unknown {name} {getattr(self, name)!r}; give {' or '.join(allowed)}"
                )
        if self.fit_on == "content" and self.boundary != "fixed":
            raise InputError(
                "fit_on='content' takes boundary='fixed': a training step does not know "
                "which tokens the user wrote"
            )
        if self.boundary == "fixed" and self.distance != "discriminant":
            raise InputError(
                f"boundary='fixed' and distance={self.distance!r}, which does not know where other "
                "text begins; leave boundary out, or take distance='discriminant'"
            )


def _matching(pattern: Mapping[str, Any], key: str) -> Any:
    """The value of the first name or regular expression that matches the end of a layer's name."""
    for name, value in pattern.items():
        if re.match(rf"(.*\.)?({name})$", key):
            return value
    return None


def _is_config_alone(folder: Path) -> bool:
    """Whether a directory holds a config that was saved without an adapter."""
    from budwood.tune.saved.files import CONFIG_FILE, PICKLED_FILE, WEIGHTS_FILE

    if (folder / WEIGHTS_FILE).exists() or (folder / PICKLED_FILE).exists():
        return False
    try:
        saved = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(saved, dict) and saved.get("base") is None


# ``peft.register_peft_method`` refuses names outside PEFT's enum.
PEFT_TYPE_TO_CONFIG_MAPPING[SLIM] = SlimConfig  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[SLIM] = PREFIX  # type: ignore[index]
register_old_names()
