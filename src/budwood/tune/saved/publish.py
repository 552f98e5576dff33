"""Put a saved adapter on the Hugging Face hub, with a card that says what it learnt and forgot."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from budwood import records
from budwood.errors import InputError, first_line
from budwood.hub import why_offline
from budwood.loading import is_path
from budwood.tune.saved.card import CARD_FILE, loading_lines
from budwood.tune.saved.files import (
    CONFIG_FILE,
    PICKLED_FILE,
    RECORD_FILE,
    WEIGHTS_FILE,
    check_adapter_files,
)

_FILES = (CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE, RECORD_FILE)
_BOILERPLATE = "[More Information Needed]"
"""In the card that PEFT writes, and nobody has filled in."""
_TRAINED = (
    ("method", "Method"),
    ("rank", "Rank"),
    ("params", "Trained parameters"),
    ("data", "Data"),
    ("n_examples", "Examples"),
    ("steps", "Steps"),
    ("epochs", "Epochs"),
    ("batch", "Batch"),
    ("lr", "Peak learning rate"),
    ("schedule", "Schedule"),
    ("seed", "Seed"),
)


def push_to_hub(
    adapter: str | os.PathLike[str],
    repo_id: str,
    *,
    scores: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload an adapter that ``finetune`` made, and a model card with its data and its scores.

    Config, weights, the record of the training and the card are uploaded; checkpoints and texts
    are not. A card that was written by hand stays, with our sections at its end. The folder itself
    does not change. A repository that exists gets a new commit.

    Example::

        push_to_hub("tuned", "me/tuned", scores="scores.json")

    Args:
        adapter: its folder.
        repo_id: id of a model repository, such as ``"me/tuned"``; made if there is none.
        scores: record of ``budwood tune eval`` on this adapter, for the card.
        base_model: hub id of the base model, where the adapter names a local folder.
        private: make a new repository private; None for the account's default.
        token: of the hub; None for the one of ``hf auth login``.

    Returns:
        The address of the repository.

    Raises:
        InputError: the adapter, the record or the base model cannot be published, or the hub
            refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    folder = Path(adapter).expanduser()
    check_push(folder, repo_id, scores=scores, base_model=base_model)
    with tempfile.TemporaryDirectory() as staging:
        _stage(folder, Path(staging), repo_id, scores, base_model)
        api = HfApi(token=token)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo.repo_id,
                folder_path=staging,
                commit_message="Adapter and card, by budwood",
            )
        except (HfHubHTTPError, LocalTokenNotFoundError, HFValidationError, OSError) as error:
            raise InputError(
                f"cannot push to {repo_id}: {first_line(error)}; log in with `hf auth login`, or "
                "give an id that you may write to"
            ) from error
    return str(repo)


def check_push(
    adapter: str | os.PathLike[str],
    repo_id: str,
    *,
    scores: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
) -> None:
    """Refuse, before anything is uploaded, what :func:`push_to_hub` refuses.

    Args:
        adapter: as there, and so are the others.
        repo_id: id of the repository.
        scores: record of ``budwood tune eval``.
        base_model: hub id of the base model.

    Raises:
        InputError: see :func:`push_to_hub`.
    """
    folder = Path(adapter).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(
            f"there is no adapter in {adapter}; give a folder that `budwood tune` made"
        )
    check_adapter_files(folder)
    _base_of(folder, base_model)
    if scores is not None:
        _scores(scores, folder)
    check_hub(repo_id)


def check_hub(repo_id: str) -> None:
    """Refuse a malformed id, and a hub that does not answer.

    Raises:
        InputError: the id is malformed, or the hub does not answer.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no id of the hub; give one such as me/tuned") from error
    reason = why_offline()
    if reason is not None:
        raise InputError(f"cannot push to {repo_id}: {reason}")


def _stage(
    folder: Path,
    staging: Path,
    repo_id: str,
    scores: str | os.PathLike[str] | None,
    base_model: str | None,
) -> None:
    """Copy what is uploaded; the base model's name and the card are written anew."""
    for name in _FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staging / name)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = _base_of(folder, base_model)
    (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    training = records.read(folder / RECORD_FILE) if (folder / RECORD_FILE).is_file() else None
    rows = _scores(scores, folder) if scores is not None else []
    card = _card(folder, repo_id, config, training, rows)
    (staging / CARD_FILE).write_text(card, encoding="utf-8")


def _card(
    folder: Path,
    repo_id: str,
    config: dict[str, Any],
    training: records.Record | None,
    rows: Sequence[records.Row],
) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    kind = str(config.get("peft_type", "adapter"))
    data = [] if training is None else training.config.get("data") or []
    ours = [loading_lines(repo_id)] if kind == "SLIM" else []
    ours += [_training_section(training)] if training is not None else []
    ours += [_scores_section(rows)] if rows else []
    written = folder / CARD_FILE
    if written.is_file() and _BOILERPLATE not in (text := written.read_text(encoding="utf-8")):
        new = [part for part in ours if part.splitlines()[0] not in text]
        return "\n\n".join([text.rstrip(), *new]) + "\n"
    base = config["base_model_name_or_path"]
    facts = ModelCardData(
        base_model=base,
        library_name="peft",
        tags=["budwood", kind.lower()],
        # Without the configuration behind the colon.
        datasets=list(dict.fromkeys(name.partition(":")[0] for name in data if "/" in name))
        or None,
    )
    title = f"# {repo_id.rpartition('/')[2]}"
    about = (
        f"A {kind} adapter for [{base}](https://huggingface.co/{base}), trained with "
        "[budwood](https://pypi.org/project/budwood)."
    )
    head = f"---\n{facts.to_yaml()}\n---"
    return str(ModelCard("\n\n".join([head, title, about, *ours]) + "\n"))


def _training_section(record: records.Record) -> str:
    config = record.config
    lines = ["## Training", "", "| | |", "|---|---|"]
    for key, name in _TRAINED:
        value = config.get(key)
        if value in (None, [], 0):
            continue
        shown = ", ".join(value) if isinstance(value, list) else value
        lines.append(f"| {name} | {f'{shown:,}' if isinstance(shown, int) else shown} |")
    measured = [row["eval_loss"] for row in record.rows if "eval_loss" in row]
    if measured:
        lines.append(f"| Validation loss | {measured[0]:.3f} before, {min(measured):.3f} after |")
    versions = ", ".join(f"{name} {v}" for name, v in record.versions.items() if v)
    return "\n".join([*lines, f"| Versions | {versions} |"])


def _scores_section(rows: Sequence[records.Row]) -> str:
    lines = [
        "## Learning and forgetting",
        "",
        "Scores of the base model (before) and with this adapter (after), by `budwood tune eval`. "
        "The interval is of the difference, 95 %, a paired bootstrap over items. `target` is what "
        "it was trained for, the rest is what it should not forget.",
        "",
        "| | task | metric | items | before | after | difference |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        numbers = [_number(row.get(key), spec) for key, spec in _SPECS]
        before, after, difference, low, high = numbers
        interval = f" [{low}, {high}]" if low and high else ""
        names = " | ".join(str(row.get(key, "")) for key in ("group", "task", "metric", "n"))
        lines.append(f"| {names} | {before} | {after} | {difference}{interval} |")
    return "\n".join(lines)


_SPECS = (
    ("before", ".3f"),
    ("after", ".3f"),
    ("difference", "+.3f"),
    ("low", "+.3f"),
    ("high", "+.3f"),
)


def _number(value: Any, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _base_of(folder: Path, given: str | None) -> str:
    """Hub id of the base model.

    Raises:
        InputError: it is a folder of this machine.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    base = given or config.get("base_model_name_or_path") or ""
    if not base or is_path(base):
        named = f"is the local folder {base}" if base else "has no name"
        raise InputError(
            f"the base model of {folder} {named}, which nobody else can load; give its hub id "
            "(base_model, --base)"
        )
    return base


def _scores(source: str | os.PathLike[str], folder: Path) -> list[records.Row]:
    record = records.read(source)
    if record.name != "tune eval":
        raise InputError(
            f"{source} is a record of {record.name}; give one of `budwood tune eval … --out FILE`"
        )
    named = record.config.get("adapter")
    if named != folder.resolve().name:
        raise InputError(
            f"{source} has the scores of the adapter {named}, and this one is "
            f"{folder.resolve().name}; measure it with `budwood tune eval {folder} … --out FILE`"
        )
    return list(record.rows)
