"""`push_to_hub`: what is uploaded, what the card says, and what is refused. The hub is a fake."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from typer.testing import CliRunner

from budwood import records
from budwood.cli import app
from budwood.errors import InputError
from budwood.tune import finetune, push_to_hub
from budwood.tune.saved import publish
from tests import tiny_chat

ROWS = [{"question": "Is it wet?", "choices": ["no", "yes"], "answer": 1}] * 8
SCORES = {"group": "target", "task": "test", "metric": "accuracy", "n": 24}
SCORES |= {"before": 0.25, "after": 0.75, "difference": 0.5, "low": 0.375, "high": 0.625}
BASE = "org/base"


@pytest.fixture
def hub(monkeypatch):
    """A hub that takes everything; files by name of the last upload."""
    taken = {}

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        taken.clear()
        taken.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        return SimpleNamespace(repo_id=repo_id, private=private)

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(publish, "why_offline", lambda: None)
    return taken


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    parent = tmp_path_factory.mktemp("push")
    data = parent / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options: dict[str, Any] = {
        "rank": 2,
        "steps": 2,
        "batch": 4,
        "max_length": 300,
        "save_every": 1,
    }
    options |= {"method": "slim:n_experts=3+texts=8", "tokenizer": tiny_chat.tokenizer()}
    finetune(tiny_chat.model(), data, parent / "tuned", **options)
    return parent / "tuned"


@pytest.fixture
def scores(tmp_path, trained):
    record = records.new_record("tune eval", [SCORES], seed=0, config={"adapter": trained.name})
    return records.write(record, tmp_path / "scores.json")


def card_of(taken):
    return ModelCard(taken["README.md"].decode())


def test_the_adapter_goes_up_and_nothing_else_of_the_run(hub, trained):
    before = {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    push_to_hub(trained, "me/tuned", base_model=BASE)
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    assert set(hub) == {weights, config, "record.json", "README.md"}
    assert hub[weights] == (trained / weights).read_bytes()
    assert json.loads(hub[config])["base_model_name_or_path"] == BASE
    assert before == {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}


def test_the_card_names_base_data_learning_and_forgetting(hub, trained, scores):
    push_to_hub(trained, "me/tuned", base_model=BASE, scores=scores)
    card = card_of(hub)
    facts = card.data.to_dict()
    assert facts["base_model"] == BASE and facts["library_name"] == "peft"
    assert {"budwood", "slim"} <= set(facts["tags"])
    assert "| Data | train.jsonl |" in card.text and "| Examples | 8 |" in card.text
    assert "0.250 | 0.750 | +0.500 [+0.375, +0.625]" in card.text
    assert 'from_pretrained("me/tuned")' in card.text and "import budwood.tune" in card.text
    assert str(trained.parent) not in hub["README.md"].decode() + hub["record.json"].decode()


def test_a_card_by_hand_is_kept(hub, trained, scores):
    written = "---\nlibrary_name: peft\n---\n\n# Mine\n\n## Training\n\nFor two minutes.\n"
    before = (trained / "README.md").read_text()
    try:
        (trained / "README.md").write_text(written)
        push_to_hub(trained, "me/tuned", base_model=BASE, scores=scores)
    finally:
        (trained / "README.md").write_text(before)
    text = hub["README.md"].decode()
    assert text.startswith(written.rstrip()) and text.count("## Training") == 1
    assert "## Learning and forgetting" in text


def test_hub_datasets_are_linked(hub, trained):
    file = trained / "record.json"
    before = file.read_text()
    try:
        record = json.loads(before)
        record["config"]["data"] = ["org/questions:main", "org/questions:other", "more.jsonl"]
        file.write_text(json.dumps(record))
        push_to_hub(trained, "me/tuned", base_model=BASE)
    finally:
        file.write_text(before)
    assert card_of(hub).data.to_dict()["datasets"] == ["org/questions"]


def test_what_cannot_be_pushed_is_refused(hub, trained, scores, tmp_path, monkeypatch):
    def refused(message, *args, **options):
        with pytest.raises(InputError, match=message):
            push_to_hub(*args, **{"base_model": BASE, **options})
        assert not hub

    refused("no adapter in", tmp_path, "me/tuned")
    refused("no id of the hub", trained, "me/too/many")
    refused("nobody else can load", trained, "me/tuned", base_model=str(tmp_path))
    other = json.loads(scores.read_text())
    other["config"]["adapter"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(other))
    refused("scores of the adapter another", trained, "me/tuned", scores=tmp_path / "other.json")
    refused("is a record of tune", trained, "me/tuned", scores=trained / "record.json")
    monkeypatch.setattr(publish, "why_offline", lambda: "HF_HUB_OFFLINE is set")
    refused("cannot push to me/tuned: HF_HUB_OFFLINE", trained, "me/tuned")


def test_a_hub_that_refuses_says_what_to_do(hub, trained, monkeypatch):
    def create_repo(self, *_, **options):
        raise OSError("403 Forbidden")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    with pytest.raises(InputError, match="403 Forbidden; log in with `hf auth login`"):
        push_to_hub(trained, "me/tuned", base_model=BASE)


def test_the_command(hub, trained, scores):
    command = ["tune", "push", str(trained), "me/tuned", "--base", BASE, "--scores", str(scores)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "## Learning and forgetting" in hub["README.md"].decode()


def test_training_asks_the_hub_first(hub, tmp_path, monkeypatch):
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps(ROWS[0]) + "\n")
    command = ["tune", str(data), "--output", str(tmp_path / "out"), "--push-to-hub"]
    monkeypatch.setattr(publish, "why_offline", lambda: "HF_HUB_OFFLINE is set")
    result = CliRunner().invoke(app, [*command, "me/tuned"])
    assert result.exit_code == 2 and "HF_HUB_OFFLINE" in result.stderr
    assert not (tmp_path / "out").exists()
