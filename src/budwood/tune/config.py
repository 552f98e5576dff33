"""What a SLIM adapter is made of, as a PEFT config."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from peft import PeftConfig

from budwood.errors import InputError, UnknownNameError
from budwood.tune.clustering import DISTANCES

FORMAT = 1
"""Version of what is saved, raised when an older reader would be misled."""
INFERENCE = ("expectation", "mask")
YIELD_AT = ("block", "module")
FIT_ON = ("learnt", "all")


class SlimType(str):
    """A stand-in for a member of ``peft.PeftType``, an enum that can't be added to."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The plain name, as of an enum member."""
        return str(self)

    @property
    def name(self) -> str:
        """The plain name, as of an enum member."""
        return str(self)


SLIM = SlimType("SLIM")


@dataclass
class SlimConfig(PeftConfig):
    """A mixture of LoRA and identity experts on frozen linear layers.

    A reconstruction of SLIM (NAACL 2025) from public summaries; what they leave open is marked
    **open** with the reading taken. Each of the six parts can be switched off:
    ``n_identity=0``, ``router=False``, ``clustering=False``, ``yielding=False``,
    ``merging=False``, ``l1=0``.

    Attributes:
        r: rank of one LoRA expert.
        alpha: the experts' output is scaled by alpha / r. Open.
        n_experts: LoRA experts, ≥ 1.
        n_identity: identity experts: bypasses that add nothing and take weight from the others.
        top_k: experts that a token keeps, 1 ≤ top_k ≤ n_experts + n_identity.
        router: a linear router; off, all experts weigh the same and yielding alone tells them
            apart.
        clustering: several centres a layer; off, a single running mean.
        n_clusters: centres a layer. Open.
        momentum: share that a centre moves by in one optimiser step, in (0, 1]. Open.
        yielding: tokens far from the training data lean towards the identity experts.
        distance: ``"max"`` over channels (the paper's), ``"rms"`` over channels (ours),
            ``"whitened"`` (ours): with the correlations between channels, in a random subspace; or
            ``"discriminant"`` (ours): on the way to other text, for which an adapter is fitted
            before training (:func:`budwood.tune.fit_discriminant`). All are standardised by running
            training statistics.
        n_directions: of that subspace, at most the layer's input channels; ours. Give less than a
            tenth of the tokens that the training data has to learn, as ``budwood tune`` does.
        fit_on: what counts as training data: ``"learnt"``, the tokens whose next one is learnt, or
            ``"all"`` but padding. Open; the former is ours.
        yield_at: ``"block"``: all modules of an MLP yield by the distance of its input (ours), or
            ``"module"``: each by that of its own input.
        beta: strength of yielding, ≥ 0. Open.
        margin: standard deviations of distance beyond the mean that count as inside, 1.5 for some 9
            of 10 training tokens; ours.
        margin_inference: the same at inference, None for ``margin``; ours. Less lets in fewer
            tokens than the experts were trained on.
        merging: random masks on rows of B and columns of A in training.
        merge_p: share of B·A that is masked, in [0, 1).
        merge_rescale: divide the masked B·A by 1 − merge_p, as DARE does. Open.
        merge_inference: ``"expectation"`` scales B·A, ``"mask"`` applies the last mask drawn. Open.
        l1: coefficient of the L1 penalty, ≥ 0. Open.
        seed: of masks, of the start of the centres and of the directions of ``"whitened"``; not to
            be changed in a saved adapter.
        target_modules: names or a regular expression as in PEFT; None takes the MLP projections.
        exclude_modules: names or a regular expression as in PEFT.
        skip_first: share of the layers, from the input on, that are left alone where neither
            target modules nor layers are named, in [0, 1); ours.
        layers_to_transform: indices of the layers to adapt, as in PEFT.
        layers_pattern: name of the list of layers, as in PEFT.
        modules_to_save: further modules to train and save whole.
        slim_version: format of a saved adapter; left alone by users.
        base: what a saved adapter was made for; left alone by users.

    Raises:
        InputError: a value is outside its range.
        UnknownNameError: an unknown distance or behaviour at inference.
    """

    r: int = 16
    alpha: float = 32.0
    n_experts: int = 8
    n_identity: int = 2
    top_k: int = 2
    router: bool = True
    clustering: bool = True
    n_clusters: int = 8
    momentum: float = 0.05
    yielding: bool = True
    distance: str = "whitened"
    n_directions: int = 128
    fit_on: str = "learnt"
    yield_at: str = "block"
    beta: float = 4.0
    margin: float = 1.5
    margin_inference: float | None = None
    merging: bool = True
    merge_p: float = 0.5
    merge_rescale: bool = False
    merge_inference: str = "expectation"
    l1: float = 0.01
    seed: int = 0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    skip_first: float = 0.4
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    slim_version: int = FORMAT
    base: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SLIM  # type: ignore[assignment]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check_version()
        self._check_switches()
        self._check_counts()
        self._check_ranges()
        known = {"distance": DISTANCES, "fit_on": FIT_ON, "yield_at": YIELD_AT}
        known["merge_inference"] = INFERENCE
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise UnknownNameError(
                    f"unknown {name} {getattr(self, name)!r}; give {' or '.join(allowed)}"
                )

    @property
    def n_total(self) -> int:
        """LoRA and identity experts."""
        return self.n_experts + self.n_identity

    @property
    def rank(self) -> int:
        """Rank of all LoRA experts together."""
        return self.n_experts * self.r

    @property
    def n_centres(self) -> int:
        """Centres a layer, 1 without clustering."""
        return self.n_clusters if self.clustering else 1

    @property
    def kept(self) -> int:
        """Experts that a token keeps; all of them without a router."""
        return self.top_k if self.router else self.n_total

    def margin_of(self, training: bool) -> float:
        """The margin in training, or at inference."""
        if training or self.margin_inference is None:
            return self.margin
        return self.margin_inference

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        base = getattr(self, "base_at_hand", None)  # noted by the tuner, of the model it is in
        shown = self if base is None else dataclasses.replace(self, base=base)
        if shown is not self:
            shown.auto_mapping = self.auto_mapping
        PeftConfig.save_pretrained(shown, save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        """Read the config of a saved adapter, and look whether the adapter beside it is whole.

        A config that was saved by itself is read by ``peft.PeftConfig.from_pretrained``.

        Raises:
            InputError: the files in the directory are malformed or truncated.
        """
        from budwood.tune.files import check_adapter_files

        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_adapter_files(folder)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def _check_version(self) -> None:
        if self.slim_version > FORMAT:
            raise InputError(
                f"adapter has format {self.slim_version}, this version of budwood reads up to "
                f"{FORMAT}; upgrade budwood"
            )

    def _check_switches(self) -> None:
        for name in ("router", "clustering", "yielding", "merging", "merge_rescale"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InputError(f"{name}={value!r}; give True or False")

    def _check_counts(self) -> None:
        if _is_int(self.n_experts) and self.n_experts < 1:
            raise InputError(
                f"n_experts={self.n_experts} with n_identity={self.n_identity}: identity experts "
                "alone add nothing; give at least 1 LoRA expert"
            )
        least = {"r": 1, "n_experts": 1, "n_identity": 0, "top_k": 1, "n_clusters": 1}
        least |= {"n_directions": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if not _is_int(value) or value < low:
                raise InputError(f"{name}={value!r}; give an int of at least {low}")
        if not _is_int(self.seed):
            raise InputError(f"seed={self.seed!r}; give an int")
        if self.top_k > self.n_total:
            raise InputError(
                f"top_k={self.top_k} is above the number of experts, {self.n_experts} LoRA + "
                f"{self.n_identity} identity = {self.n_total}; give at most {self.n_total}"
            )

    def _check_ranges(self) -> None:
        numbers = ["alpha", "beta", "l1", "margin", "momentum", "merge_p", "skip_first"]
        if self.margin_inference is not None:
            numbers.append("margin_inference")
        for name in numbers:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise InputError(f"{name}={value!r}; give a number")
        for name in ("alpha", "beta", "l1"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name}={value!r}; give a finite number of at least 0")
        for name in ("margin", "margin_inference"):
            if name in numbers and not math.isfinite(getattr(self, name)):
                raise InputError(f"{name}={getattr(self, name)!r}; give a finite number")
        if not 0 < self.momentum <= 1:
            raise InputError(f"momentum={self.momentum!r}; give a number in (0, 1]")
        for name in ("merge_p", "skip_first"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)!r}; give a share in [0, 1)")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise InputError(
                f"layers_to_transform={self.layers_to_transform!r} has no effect beside "
                "target_modules as a regular expression; say both in it, or give a list of names"
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
