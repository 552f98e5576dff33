"""Fine-tune a language model from data to a saved adapter: what ``budwood tune`` does."""

from __future__ import annotations

import dataclasses
import difflib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood import records
from budwood.checks import need_int
from budwood.errors import InputError
from budwood.files import need_parent
from budwood.hub import hub_or_cache
from budwood.loading import (
    NO_CODE,
    SMOLLM2,
    SMOLLM2_ID,
    Loaded,
    bare_name,
    check_one_direction,
    is_file_name,
    is_path,
    load_language_model,
)
from budwood.progress import Progress, silent
from budwood.runs import RunFolder, refuse_other_files
from budwood.tune.data.encoding import EncodedExample, encode, longest_for, n_supervised, token_rows
from budwood.tune.data.examples import Example, examples_of
from budwood.tune.data.self_generated import cached_texts
from budwood.tune.methods import attach, parse_tuner
from budwood.tune.methods.base import Tuner
from budwood.tune.saved.files import RECORD_FILE
from budwood.tune.saved.loading import load_adapter, need_adapter
from budwood.tune.training.run import (
    WITHOUT_EFFECT,
    check_trainable,
    fingerprint,
    processes,
    run_identity,
    train,
)
from budwood.tune.training.settings import Settings, default_lr, settings_from
from budwood.tune.training.trainer import Probe

if TYPE_CHECKING:
    from transformers import TrainingArguments

TEXTS_FILE = "own.json"


@dataclass(frozen=True)
class FinetuneResult:
    """What :func:`finetune` made.

    Attributes:
        model: the ``PeftModel`` with the trained adapter, in evaluation mode. Its base model is
            the one that was given, with unchanged weights.
        tokenizer: of the model.
        model_name: name of the base model in records.
        output: folder of the adapter, for ``PeftModel.from_pretrained``.
        history: rows with ``step``, ``loss``, ``lr``, ``grad_norm``, ``seconds``, and for SLIM
            ``identity_share`` and ``distance``.
        n_examples: examples that were trained on.
        n_left_out: examples that were longer than ``max_length``.
        n_trained_parameters: parameters of the adapter.
        settings: how it was trained, with the learning rate that was used.
        best_step: the step after which the validation loss was lowest; None without validation.
        was_complete: whether the folder held the finished run already, so nothing was trained.
    """

    model: Any
    tokenizer: Any
    model_name: str
    output: Path
    history: list[dict[str, Any]]
    n_examples: int
    n_left_out: int
    n_trained_parameters: int
    settings: Settings
    best_step: int | None
    was_complete: bool


def finetune(
    model: Any,
    data: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    method: str = "slim",
    rank: int = 4,
    eval_data: Any = None,
    tokenizer: Any = None,
    args: Settings | TrainingArguments | None = None,
    style: str = "cloze",
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
    texts_file: str | os.PathLike[str] | None = None,
    record: bool = True,
    probe: Probe | None = None,
    **settings: Any,
) -> FinetuneResult:
    """Fine-tune a causal language model on data, and save the adapter.

    The same call continues an interrupted run from its last checkpoint; after a finished run it
    loads the adapter. The steps are: fit the method's options to the amount of data, attach the
    adapter, write the self-generated text that SLIM's discriminant needs, train, set the adapter
    strength, save.

    Example::

        result = finetune("smollm2", "train.jsonl", "tuned", steps=40, lr=3e-3)
        result.model.generate(...)

    Args:
        model: a causal language model of transformers, or a hub id or directory; ``"smollm2"`` is
            SmolLM2-135M-Instruct.
        data: a ``datasets.Dataset``, a path to JSON lines, a JSON array, CSV or Parquet, a hub id,
            a list of these, a DataFrame of pandas, or dicts in a list or from a generator. Rows are
            ``{"messages": […]}``, ``{"conversations": […]}``, ``{"prompt": …, "completion": …}``
            (texts or lists of messages), ``{"instruction": …, "output": …}``, ``{"question": …,
            "choices": […], "answer": index or letter}``, ``{"question": …, "answer": text}``,
            ``{"text": …}``, or tokens as ``{"input_ids": …, "labels": …}``; with messages also
            ``tools``. The loss is on the assistant's turns, the completion, the answer, or the
            whole text.
        output: folder of the run, new or empty, or that of the same run; its parent must exist.
            None for the ``output_dir`` of ``args``.
        method: ``"slim"`` or another of ``budwood ls tuners``, with options as in
            ``"slim:n_experts=4+beta=2"``.
        rank: rank of the adapter, or of each expert.
        eval_data: held-out examples, in the same forms. Their loss is measured before training and
            every ``eval_every`` steps; the adapter with the lowest is kept, and with ``patience``
            training ends early.
        tokenizer: of the model; None to load it by the model's ``name_or_path``.
        args: how to train: :class:`Settings`, or a ``TrainingArguments`` (such as TRL's
            ``SFTConfig``), whose fields count where they differ from their defaults. For a default
            of theirs give it by name, such as ``lr=5e-5, seed=42``.
        style: how questions with choices are asked, ``"cloze"`` or ``"listed"``.
        device: for a model that is loaded by name: a torch device, or ``"auto"``.
        dtype: for a model that is loaded by name: as in :func:`budwood.load`.
        progress: called during the slow parts.
        texts_file: JSON file of self-generated text, which runs on the same model can share; None
            for one in the folder.
        record: write ``record.json``, which ``budwood bench show`` prints.
        probe: measures the model every ``probe_every`` steps, for the history.
        settings: fields of :class:`Settings` that replace those of ``args``, such as ``lr``,
            ``steps``, ``epochs``, ``batch`` and ``seed``.

    Returns:
        The model with its adapter, the history, and what was trained on.

    Raises:
        InputError: the data, a setting or the model cannot be used.
        UnknownNameError: there is no such method, schedule or style.
        UnsupportedModelError: the tokenizer's chat template cannot be used for the data.
        OutputError: the folder holds something else, its parent is missing, or another process is
            at this run.
        DivergedError: the loss, a gradient or a layer's input was NaN or infinite.
    """
    chosen, arguments = _settings_of(args, settings)
    folder = _output_of(output, args)
    tuner = parse_tuner(method)  # these refuse bad input before a model is loaded
    need_int(1, rank=rank)
    data, eval_data = (list(one) if isinstance(one, Iterator) else one for one in (data, eval_data))
    examples = token_rows(data) if _is_encoded(data) else examples_of(data, style)
    held_out = _held_out(eval_data, style, chosen)
    refuse_other_files(folder)
    model, tokenizer = _model_of(model, tokenizer, device, dtype, args, progress)
    check_trainable(model)
    chosen = dataclasses.replace(chosen, lr=chosen.lr or default_lr(model))
    rows, n_left_out = _encoded(examples, tokenizer, model, chosen.max_length)
    eval_rows = []
    if held_out:
        eval_rows, _ = _encoded(held_out, tokenizer, model, chosen.max_length, "held-out examples")
    tuner = tuner.fitted_to(n_supervised(rows)).suited_to(tokenizer)
    name = _name_of(model)
    identity = (name, model, method, chosen, rank, fingerprint(rows), arguments)
    identity = (*identity, fingerprint(eval_rows) if eval_rows else None, tuner.defaults)
    with _attached(tuner, model, rank, chosen.seed) as adapted:
        with processes(model).main_process_first():
            run = RunFolder(folder, run_identity(*identity), WITHOUT_EFFECT, (TEXTS_FILE,))
        was_complete = run.is_complete
        if was_complete:
            adapted = _saved(adapted.unload(), run)
        n_parameters = tuner.n_trained(adapted)
        file = Path(texts_file).expanduser() if texts_file else folder / TEXTS_FILE
        texts = _texts(run, tuner, adapted, tokenizer, file, progress)
        if not was_complete and run.last_checkpoint() is None:
            tuner.prepare(adapted, tokenizer, rows, texts, progress)
        options = {**tuner.training(texts), "arguments": arguments, "probe": probe}
        options["eval_rows"] = eval_rows
        history = train(adapted, tokenizer, rows, chosen, run, **options, progress=progress)
        result = FinetuneResult(
            model=adapted.eval(),
            tokenizer=tokenizer,
            model_name=name,
            output=folder,
            history=history,
            n_examples=len(rows),
            n_left_out=n_left_out,
            n_trained_parameters=n_parameters,
            settings=chosen,
            best_step=_best_step(history),
            was_complete=was_complete,
        )
    if record and processes(model).is_main_process and not (folder / RECORD_FILE).exists():
        _write_record(result, method, rank, _data_names(data))
    return result


def _settings_of(
    args: Settings | TrainingArguments | None, given: Mapping[str, Any]
) -> tuple[Settings, dict[str, Any]]:
    """Settings, and further arguments for the Trainer."""
    from transformers import TrainingArguments

    known = [one.name for one in dataclasses.fields(Settings)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"unknown setting {name!r}; {hint}known: {', '.join(known)}")
    if args is None or isinstance(args, Settings):
        return dataclasses.replace(args or Settings(), **given), {}
    if not isinstance(args, TrainingArguments):
        kind = type(args).__name__
        raise InputError(f"args is a {kind}; give Settings or transformers' TrainingArguments")
    return settings_from(args, given)


def _held_out(eval_data: Any, style: str, settings: Settings) -> Sequence[Any]:
    """Held-out examples; none without validation."""
    if eval_data is None:
        for name in ("eval_every", "patience"):
            if getattr(settings, name):
                raise InputError(
                    f"{name}={getattr(settings, name)} needs held-out examples; give eval_data "
                    "(--eval)"
                )
        return ()
    return token_rows(eval_data) if _is_encoded(eval_data) else examples_of(eval_data, style)


def _output_of(output: str | os.PathLike[str] | None, args: Any) -> Path:
    """The folder of the run; that of the arguments must not be another one."""
    named = getattr(args, "output_dir", None)
    named = None if named == "trainer_output" else named  # the Trainer's default
    if output is None:
        output = named
    if not output:
        raise InputError("there is no output; give the folder that the adapter goes to")
    folder = Path(output).expanduser()
    if named and Path(named).expanduser().absolute() != folder.absolute():
        raise InputError(f"output is {os.fspath(output)!r} and args.output_dir {named!r}; give one")
    need_parent(folder)
    return folder


def _is_encoded(data: Any) -> bool:
    """Whether the data are tokens already."""
    columns = getattr(data, "column_names", None)
    if (
        columns is None
        and isinstance(data, (list, tuple))
        and data
        and isinstance(data[0], Mapping)
    ):
        columns = data[0]
    return isinstance(columns, (list, Mapping)) and {"input_ids", "labels"} <= set(columns)


def _encoded(
    examples: Sequence[Any], tokenizer: Any, model: Any, max_length: int, what: str = "examples"
) -> tuple[list[EncodedExample], int]:
    """Tokenised examples that fit the model, and how many were left out."""
    longest = longest_for(model, max_length)
    if isinstance(examples[0], Example):
        encoded = encode(examples, tokenizer, longest, what)
        rows, n_left_out = encoded.rows, encoded.n_too_long
        if encoded.note:
            warnings.warn(encoded.note, stacklevel=3)
    else:
        rows = [row for row in examples if len(row["input_ids"]) <= longest]
        n_left_out = len(examples) - len(rows)
        if not rows:
            raise InputError(f"all {n_left_out} {what} are longer than {longest} tokens")
    _check_ids(rows, tokenizer, model)
    if n_left_out:
        warnings.warn(
            f"left out {n_left_out} of {n_left_out + len(rows)} {what} of more than {longest} "
            "tokens",
            stacklevel=3,
        )
    return rows, n_left_out


def _check_ids(rows: Sequence[EncodedExample], tokenizer: Any, model: Any) -> None:
    """Refuse tokens that the model does not have."""
    n_tokens = model.get_input_embeddings().weight.shape[0]
    highest = max(max(*row["input_ids"], *row["labels"]) for row in rows)
    if highest >= n_tokens:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise InputError(
            f"the data have token {highest} ({token!r}), and the model {n_tokens} embeddings; call "
            "model.resize_token_embeddings(len(tokenizer)), or give the model's own tokenizer"
        )


def _model_of(
    model: Any, tokenizer: Any, device: str, dtype: str, args: Any, progress: Progress
) -> tuple[Any, Any]:
    """The model and its tokenizer, loaded where they are given by name."""
    if isinstance(tokenizer, (str, os.PathLike)):
        raise InputError(
            f"tokenizer is the name {os.fspath(tokenizer)!r}; give the tokenizer itself, such as "
            "AutoTokenizer.from_pretrained(name)"
        )
    if isinstance(model, (str, os.PathLike)) or model is None:
        name = SMOLLM2 if model is None else os.fspath(model)
        progress(0, 1, f"loading {name}")
        on_cpu = device == "auto" and getattr(args, "use_cpu", False)
        device = "cpu" if on_cpu else _device_of_process(device)
        loaded = load_language_model(name, device, dtype)
        return loaded.model, tokenizer or loaded.tokenizer
    for name, value in (("device", device), ("dtype", dtype)):
        if value != "auto":
            raise InputError(
                f"{name}={value!r} is for a model by name, and a model object is used where and as "
                f"it is; leave {name} out, or move the model first"
            )
    if hasattr(model, "peft_config"):
        raise InputError(
            "the model has an adapter already; give its base model, such as model.unload()"
        )
    if not hasattr(model, "generate") or not hasattr(model, "config"):
        kind = type(model).__name__
        raise InputError(f"model is a {kind}; give a causal language model of transformers")
    check_one_direction(model, f"the {type(model).__name__}")
    if getattr(args, "use_cpu", False) and model.device.type != "cpu":
        raise InputError(f"args.use_cpu is set and the model is on {model.device}; move it first")
    return model, tokenizer or _tokenizer_of(model)


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer by the name of a model."""
    from transformers import AutoTokenizer

    from budwood.sprout.model import load_llm_tokenizer

    name = getattr(model, "name_or_path", "")
    try:
        if not name:
            raise OSError("it was not loaded by a name")
        if name == SMOLLM2_ID:
            return load_llm_tokenizer()
        hub = hub_or_cache(name, "tokenizer_config.json", what="tokenizer")
        with nullcontext() if is_path(name) else hub:
            return AutoTokenizer.from_pretrained(name, **NO_CODE)
    except (InputError, OSError, ValueError, ImportError) as error:
        called = f" {name!r}" if name else ""
        raise InputError(f"the model{called} has no tokenizer at hand; give tokenizer=…") from error


def _name_of(model: Any) -> str:
    """What records call a model: without the directories above it."""
    return bare_name(getattr(model, "name_or_path", "") or model.config.model_type)


def _device_of_process(device: str) -> str:
    """Each process that a launcher starts has a GPU of its own."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "auto" and rank and torch.cuda.is_available() else device


@contextmanager
def _attached(tuner: Tuner, model: Any, rank: int, seed: int) -> Iterator[Any]:
    """The model with a fresh adapter; an error leaves the user's model as it was before.

    ``use_cache``, which the Trainer switches off, is restored in any case.
    """
    children = [(parent, dict(parent.named_children())) for parent in model.modules()]
    modes = [(module, module.training) for module in model.modules()]
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]
    use_cache = getattr(model.config, "use_cache", None)
    adapted = None
    try:
        adapted = attach(tuner, model, rank, seed)
        yield adapted
    except BaseException:
        if adapted is not None:
            adapted.unload()
        for parent, named in children:  # what was attached in part cannot be unloaded
            for name, child in named.items():
                setattr(parent, name, child)
        vars(model).pop("peft_config", None)
        for module, mode in modes:
            module.training = mode
        for weight, requires_grad in trained:
            weight.requires_grad_(requires_grad)
        raise
    finally:
        if use_cache is not None:
            model.config.use_cache = use_cache


def _best_step(history: Sequence[Mapping[str, Any]]) -> int | None:
    """The first of the steps with the lowest validation loss, the start left out."""
    measured = [row for row in history if "eval_loss" in row and row["step"]]
    return min(measured, key=lambda row: row["eval_loss"])["step"] if measured else None


def _saved(model: Any, run: RunFolder) -> Any:
    """The adapter of a finished run on its base model."""
    need_adapter(run.path)
    return load_adapter(Loaded(_name_of(model), model, None), run.path, trainable=True).model


def _texts(
    run: RunFolder, tuner: Tuner, adapted: Any, tokenizer: Any, file: Path, progress: Progress
) -> list[EncodedExample]:
    """The self-generated texts that the run still needs; one process writes them."""
    needed = tuner.kl_on_texts or run.last_checkpoint() is None
    with processes(adapted).main_process_first():
        if run.is_complete or not (tuner.n_texts and needed):
            return []
        return cached_texts(file, adapted, tokenizer, tuner.n_texts, progress)


def _data_names(data: Any) -> list[str]:
    """Hub ids, and files without their folders; none for data that were given as objects."""
    given = data if isinstance(data, (list, tuple)) else [data]
    if not all(isinstance(one, (str, os.PathLike)) for one in given):
        return []
    names = [os.fspath(one) for one in given]
    return [Path(name).name if is_file_name(name) else name for name in names]


def _write_record(result: FinetuneResult, method: str, rank: int, data: list[str]) -> None:
    config = {"model": result.model_name, "method": method, "rank": rank}
    config |= {"params": result.n_trained_parameters, "n_examples": result.n_examples}
    config |= {"data": data}
    config |= dataclasses.asdict(result.settings)
    record = records.new_record("tune", result.history, seed=result.settings.seed, config=config)
    records.write(record, result.output / RECORD_FILE)
