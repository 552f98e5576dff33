"""Statistics count the tokens that a trainer trains on, by its own masks, and no others."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from budwood.tune import SlimLinear, tell_labels
from budwood.tune.slim import token_watch as tokens
from budwood.tune.slim.state import InputStatistics
from budwood.tune.slim.trainer_labels import trained_labels
from tests import tiny_llm as tiny
from tests import tiny_trl

third_party = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:trl"
)


@pytest.fixture
def counted(monkeypatch):
    """Tokens that each optimiser step added to the statistics of a layer, by its name."""
    found: dict[str, list[int]] = {}
    take = InputStatistics.take

    def counting(self):
        found.setdefault(self.key, []).append(int(self.gathered().distance[0]))
        return take(self)

    monkeypatch.setattr(InputStatistics, "take", counting)
    return found


def n_labels(labels) -> int:
    """Tokens whose next token has a label."""
    return int((labels[:, 1:] != -100).sum())


def expected(kind: str, inputs: dict) -> int:
    if kind == "dpo":
        chosen, rejected = inputs["completion_mask"].chunk(2)
        assert rejected.any()
        return int(chosen.sum())
    if kind == "kto":
        by_row = inputs["completion_mask"].sum(1)
        return int(by_row[torch.as_tensor(inputs["label"], dtype=torch.bool)].sum())
    if kind == "sft":
        return n_labels(inputs["labels"])
    return int(inputs["completion_mask"].sum())


KINDS = {
    "dpo": ("dpo", {}),
    "dpo, accumulated": ("dpo", {"gradient_accumulation_steps": 2}),
    "dpo, checkpointing": ("dpo", {"gradient_checkpointing": True}),
    "dpo, all losses": ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "dpo, precomputed": ("dpo", {"precompute_ref_log_probs": True}),
    "kto": ("kto", {}),
    "grpo": ("grpo", {}),
    "grpo, no reference": ("grpo", {"beta": 0.0}),
    "rloo": ("rloo", {}),
    "sft": ("sft", {}),
    "sft, whole": ("sft", {"completion_only_loss": False}),
    "sft, smoothed": ("sft", {"label_smoothing_factor": 0.1}),
    "sft, padding-free": ("sft", {"padding_free": True, "max_length": None}),
    "sft, packed": ("sft", {"packing": True, "max_length": 13}),
    "sft, wrapped": (
        "sft",
        {"packing": True, "packing_strategy": "wrapped", "max_length": 13},
    ),
}


@third_party
@pytest.mark.parametrize("name", KINDS)
def test_trl(name, counted, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    kind, options = KINDS[name]
    options = {"gradient_checkpointing": False, **options}
    model = tiny.trained()
    counted.clear()
    trainer = tiny_trl.trainer(kind, model, tmp_path, **options)
    seen = tiny_trl.recorded(trainer)
    trainer.train()
    held = [one for one in model.modules() if isinstance(one, SlimLinear) and one.slim_clusters]
    assert set(counted) == {one.slim_key for one in held} and len(held) == 3
    per_step = len(seen) // trainer.args.max_steps
    wanted = [
        sum(expected(kind, inputs) for inputs in seen[i : i + per_step])
        for i in range(0, len(seen), per_step)
    ]
    assert per_step == trainer.args.gradient_accumulation_steps and min(wanted) > 0
    assert all(found == wanted for found in counted.values())


@third_party
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_masks_that_compiling_hides_are_told(kind, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed")
    model = tiny.trained()
    # As in a graph, without the time that compiling takes.
    monkeypatch.setattr(tokens, "trained_labels", lambda: (None, False))
    in_graph = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(tokens.TokenWatch, "_in_graph", in_graph, raising=False)
    trainer = tiny_trl.trainer(kind, model, tmp_path, gradient_checkpointing=False)
    if kind == "sft":
        trainer.train()
        return
    with pytest.warns(UserWarning, match="torch.compile hides the masks of DPOTrainer"):
        trainer.train()


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}], ids=str)
@pytest.mark.parametrize("loss", [None, "func"])
def test_labels_that_a_trainer_keeps_to_itself(options, loss, counted, tmp_path):
    batch = tiny.batch(n=8)
    batch["labels"][:, :4] = -100
    data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    model = tiny.slim()

    def by_hand(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    kwargs = {"compute_loss_func": by_hand} if loss else {}
    Trainer(model=model, args=arguments, train_dataset=data, **kwargs).train()
    assert all(sum(found) == n_labels(batch["labels"]) for found in counted.values())
    assert len(counted) == 3


# --- the trainers' masks, by hand ---------------------------------------------------------------


def labels_in(name: str, inputs: dict, **more):
    """What is read from a trainer of some name that computes its loss."""

    def compute_loss(self, model, inputs):
        return trained_labels()

    kind = type(name, (Trainer,), {"__init__": lambda self: None, "compute_loss": compute_loss})
    derived = type("Mine", (kind,), {})
    return derived().compute_loss(None, {**inputs, **more})


IDS = torch.arange(10, 22).view(4, 3)
MASK = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 1, 1], [0, 1, 0]])


def test_rejected_answers_do_not_count():
    labels, first = labels_in("DPOTrainer", {"input_ids": IDS, "completion_mask": MASK})
    assert first and labels.tolist() == [[-100, 11, 12], [-100, -100, 15], *[[-100] * 3] * 2]
    liked = torch.tensor([False, True, True, False])
    inputs = {"input_ids": IDS, "completion_mask": MASK, "label": liked}
    for label in (liked, liked.tolist()):
        labels, first = labels_in("KTOTrainer", {**inputs, "label": label})
        assert first and labels.tolist() == [
            [-100] * 3,
            [-100, -100, 15],
            [-100, 17, 18],
            [-100] * 3,
        ]


@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer"])
def test_what_tools_wrote_does_not_count(name):
    inputs = {"prompt_ids": IDS[:2, :2], "completion_ids": IDS[2:], "completion_mask": MASK[2:]}
    labels, first = labels_in(name, inputs)
    assert first and labels.tolist() == [[-100] * 3 + [17, 18], [-100] * 3 + [20, -100]]
    tools = torch.tensor([[1, 0, 1], [1, 1, 1]])
    labels, _ = labels_in(name, inputs, tool_mask=tools)
    assert labels.tolist() == [[-100] * 4 + [18], [-100] * 3 + [20, -100]]


def test_other_trainers_labels_are_those_of_their_inputs():
    assert labels_in("SFTTrainer", {"labels": IDS}) == (IDS, False)
    for name in ("DPOTrainer", "KTOTrainer", "GRPOTrainer", "SFTTrainer"):
        assert labels_in(name, {"concatenated_input_ids": IDS}) == (None, False)
    assert trained_labels() == (None, False)


# --- without a trainer --------------------------------------------------------------------------


def loop(model, told=None):
    """Two passes of a loop that computes the loss by itself."""
    inputs = tiny.batch()
    labels = inputs.pop("labels")
    model.train()
    for _ in range(2):
        if told is not None:
            tell_labels(model, told)
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()).backward()


def test_tokens_that_no_label_names_are_told():
    model = tiny.slim()
    with pytest.warns(UserWarning, match="trained without labels.*tell_labels") as seen:
        loop(model)
    assert len(seen) == 1
    loop(tiny.slim(fit_on="all"))
    loop(tiny.slim(yielding=False))
    loop(tiny.slim(), told=tiny.batch()["labels"])


def test_labels_that_do_not_fit_are_told():
    with pytest.warns(UserWarning, match=r"labels of shape \(4, 12\) for 36 tokens"):
        loop(tiny.slim(), told=tiny.batch(length=12)["labels"])


def test_shifted_labels():
    model = tiny.slim().train()
    inputs = tiny.batch()
    labels = inputs.pop("labels")
    labels[:, :4] = -100
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    model(**inputs, labels=labels, shift_labels=shifted).loss.backward()
    layer = next(one for one in model.modules() if isinstance(one, SlimLinear))
    by_labels = int(layer.statistics("default").gathered().count.sum())
    model.zero_grad()
    layer.keeper.forget_gathered()
    model(**inputs, shift_labels=shifted).logits.sum().backward()
    assert int(layer.statistics("default").gathered().count.sum()) == by_labels == n_labels(labels)
