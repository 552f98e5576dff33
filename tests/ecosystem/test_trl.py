"""TRL's trainers on a pruned model: losses, scores and gradients against a run by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from budwood.errors import AttachError
from budwood.prune import attach
from tests.ecosystem import tiny

pytest.importorskip("trl", reason="TRL is not installed")
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)
COMMON = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,  # so that gradients can be compared
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


class Gradients(TrainerCallback):
    """What the optimiser gets in each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )


def assert_same_gradients(loss, model, expected):
    """The gradient of a loss by hand, on a copy of the model, is what the optimiser got."""
    model.zero_grad()
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and any("multi_modal" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


def assert_same_loss(found, model, batch, kept):
    """The loss of a batch with one picture a row is that by hand, which is returned."""
    total = 0.0
    for row, image in enumerate(kept):
        seen = batch["attention_mask"][row].bool()
        pixels = batch["pixel_values"][row : row + 1]
        scores, places = tiny.scores_by_hand(model, batch["input_ids"][row][seen], pixels, image)
        total -= scores[batch["labels"][row][seen][places] != -100].sum()
    # The trainer counts labels before it calls the model, so those of dropped tokens too.
    loss = total / (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-4)
    return loss


def prompts(n):
    from datasets import Dataset

    rows = [
        {
            "prompt": [{"role": "user", "content": tiny.QUESTIONS[i % 4]}],
            "image": tiny.picture(i),
        }
        for i in range(n)
    ]
    return Dataset.from_list(rows)


def make_grpo(model, processor, folder, **options):
    # Half of the words end an answer, so that answers have unequal lengths.
    model.generation_config.eos_token_id = list(range(5, 45))
    arguments = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "temperature": 0.7,
        "loss_type": "grpo",
        "beta": 0.0,
        **COMMON,
        **options,
    }
    gradients = Gradients()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(c[0]["content"])) for c in completions],
        args=GRPOConfig(output_dir=str(folder), **arguments),
        train_dataset=prompts(4),
        processing_class=processor,
        callbacks=[gradients],
    )
    return trainer, gradients


def record(trainer, name, session, kept):
    """Note a model, arguments, result and report of each call of a trainer's method."""
    method = getattr(trainer, name)

    def recording(model, *args, **kwargs):
        before = copy.deepcopy(model)  # not attached
        result = method(model, *args, **kwargs)
        kept.append((before, args, kwargs, result, [image.kept for image in session.report]))
        return result

    setattr(trainer, name, recording)


def test_grpo(loaded, tmp_path):
    model, processor = loaded
    torch.manual_seed(0)
    trainer, gradients = make_grpo(model, processor, tmp_path)
    scored, losses = [], []
    with attach(model, keep=tiny.KEEP, forward=True, processor=processor) as session:
        record(trainer, "_get_per_token_logps_and_entropies", session, scored)
        record(trainer, "_compute_loss", session, losses)
        trainer.train()
    assert len(scored) == len(losses) == len(gradients.steps) == 2
    n_different = 0
    for (before, (ids, mask, n_last), pictures, (found, *_), kept), step, gradient in zip(
        scored, losses, gradients.steps
    ):
        assert [len(image) for image in kept] == [tiny.KEEP] * 8
        advantages, seen = step[1][0]["advantages"], mask[:, -n_last:].bool()
        assert seen.sum(1).unique().numel() > 1 and (mask[:, 0] == 0).any()  # padded on both sides
        by_row = []
        for row in range(8):
            n_answer = int(seen[row].sum())
            scores, _ = tiny.scores_by_hand(
                before,
                ids[row][mask[row].bool()],
                pictures["pixel_values"][row : row + 1],
                kept[row],
                0.7,
            )
            torch.testing.assert_close(
                found[row][seen[row]], scores[-n_answer:], rtol=1e-4, atol=1e-4
            )
            ratio = (scores[-n_answer:] - scores[-n_answer:].detach()).exp()
            by_row.append(-(advantages[row] * ratio).mean())
            n_different += n_answer
        loss = torch.stack(by_row).mean()
        torch.testing.assert_close(step[3], loss, rtol=1e-4, atol=1e-5)
        assert_same_gradients(loss, before, gradient)
    assert n_different > 16


def test_grpo_generates_and_scores_with_the_same_tokens(loaded, tmp_path):
    model, processor = loaded
    torch.manual_seed(0)
    trainer, _ = make_grpo(model, processor, tmp_path)
    chosen = {"generate": [], "forward": []}
    with attach(model, keep=tiny.KEEP, forward=True, processor=processor) as session:
        for name in chosen:
            original = getattr(model, name)

            def noting(*args, name=name, original=original, **kwargs):
                output = original(*args, **kwargs)
                if kwargs.get("pixel_values") is not None:
                    chosen[name].append([image.kept for image in session.report])
                return output

            setattr(model, name, noting)
        trainer.train()
    assert len(chosen["generate"]) == len(chosen["forward"]) == 2
    for generated, scored in zip(chosen["generate"], chosen["forward"]):
        assert len(generated) == 8
        # In between, the trainer shuffles the rows.
        assert sorted(map(torch.Tensor.tolist, generated)) == sorted(
            map(torch.Tensor.tolist, scored)
        )


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_a_trainer_that_is_made_later_is_refused(loaded, tmp_path, kind):
    """It replaces forward, and would train on all visual tokens."""
    model, processor = loaded
    with attach(model, keep=tiny.KEEP, forward=True, processor=processor):
        if kind == "grpo":
            trainer, _ = make_grpo(model, processor, tmp_path)
        else:
            trainer, _ = make_sft(model, processor, tmp_path, completions(4))
        with pytest.raises(AttachError, match="after the trainer is made"):
            trainer.train()


def completions(n):
    from datasets import Dataset

    rows = [
        {
            "prompt": [{"role": "user", "content": tiny.QUESTIONS[i % 4]}],
            "completion": [
                {"role": "assistant", "content": ["bell", "the ball is there", "red"][i % 3]}
            ],
            "image": tiny.picture(i),
        }
        for i in range(n)
    ]
    return Dataset.from_list(rows)


def conversations(n):
    from datasets import Dataset

    rows = [
        {
            "messages": [
                {"role": "user", "content": tiny.QUESTIONS[i % 4]},
                {"role": "assistant", "content": ["bell", "the ball is there", "red"][i % 3]},
            ],
            "image": tiny.picture(i),
        }
        for i in range(n)
    ]
    return Dataset.from_list(rows)


def make_sft(model, processor, folder, data, **options):
    gradients = Gradients()
    arguments = {"per_device_train_batch_size": 3, "max_length": None, **COMMON, **options}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), **arguments),
        train_dataset=data,
        processing_class=processor,
        callbacks=[gradients],
    )
    return trainer, gradients


@pytest.mark.parametrize("data", [completions, conversations])
def test_sft(loaded, tmp_path, data):
    model, processor = loaded
    trainer, gradients = make_sft(model, processor, tmp_path, data(6))
    losses = []
    with attach(model, keep=tiny.KEEP, forward=True, processor=processor) as session:
        record(trainer, "compute_loss", session, losses)
        trainer.train()
    assert len(losses) == len(gradients.steps) == 2
    for (before, (batch, *_), options, found, kept), gradient in zip(losses, gradients.steps):
        assert [len(image) for image in kept] == [tiny.KEEP] * 3
        assert (batch["attention_mask"][:, -1] == 0).any()
        loss = assert_same_loss(found, before, batch, kept)
        assert options["num_items_in_batch"] == (batch["labels"][:, 1:] != -100).sum()
        assert_same_gradients(loss, before, gradient)


@pytest.mark.parametrize("late", [True, False])
def test_sft_of_an_adapter(loaded, tmp_path, late):
    """PEFT calls `forward` of the model inside, and none of its hooks."""
    import peft

    model, processor = loaded
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    losses = []
    if not late:
        with attach(adapted, keep=tiny.KEEP, forward=True, processor=processor):
            trainer, _ = make_sft(adapted, processor, tmp_path, completions(6))
            with pytest.raises(AttachError, match="after the trainer is made"):
                trainer.train()
        return
    trainer, _ = make_sft(adapted, processor, tmp_path, completions(6))
    with attach(adapted, keep=tiny.KEEP, forward=True, processor=processor) as session:
        record(trainer, "compute_loss", session, losses)
        trainer.train()
    assert len(losses) == 2
    for before, (batch, *_), _, found, kept in losses:
        assert_same_loss(found, before.merge_and_unload(), batch, kept)


def test_a_trainer_stays_usable_after_detaching(loaded, tmp_path):
    model, processor = loaded
    trainer, _ = make_sft(model, processor, tmp_path, completions(6), eval_strategy="no")
    with attach(model, keep=tiny.KEEP, forward=True, processor=processor):
        trainer.train()
    torch.manual_seed(0)
    whole = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    with attach(model, keep=1.0, forward=True, processor=processor):
        same = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    with attach(model, keep=tiny.KEEP, forward=True, processor=processor):
        fewer = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert abs(whole - same) < 1e-4 < abs(whole - fewer)
