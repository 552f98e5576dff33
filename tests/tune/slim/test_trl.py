"""TRL's SFTTrainer, with packing and without."""

from __future__ import annotations

import pytest
import torch

from budwood.tune import SlimLinear
from budwood.tune.slim.state import InputStatistics
from tests import tiny_llm as tiny
from tests import tiny_trl
from tests.tiny_llm import states

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")

LENGTHS = [3, 9, 5, 7, 4, 8, 6, 10]


def rows():
    from datasets import Dataset

    ids = torch.randint(3, tiny.N_WORDS, (8, 10), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": [ids[i, :n].tolist() for i, n in enumerate(LENGTHS)]})


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"packing": False},
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": False, "activation_checkpointing": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("given", ["config", "model"])
def test_sft_trainer(options, given, tmp_path, monkeypatch):
    from trl import SFTConfig, SFTTrainer

    counted = []
    take = InputStatistics.take

    def counting(self):
        counted.append((self.key, int(self.gathered().count.sum())))
        return take(self)

    monkeypatch.setattr(InputStatistics, "take", counting)
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        max_length=13 if options["packing"] else 16,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": not options["packing"]},
        **options,
    )
    given = (
        {"model": tiny.llama(), "peft_config": tiny.config()}
        if given == "config"
        else {"model": tiny.slim()}
    )
    trainer = SFTTrainer(
        args=arguments, train_dataset=rows(), processing_class=tiny_trl.tokenizer(), **given
    )
    trainer.train()
    layers = [one for one in trainer.model.modules() if isinstance(one, SlimLinear)]
    assert len(layers) == 9 and counted
    first = [n for key, n in counted if key == layers[0].slim_key]
    n_rows = len(LENGTHS) if not options["packing"] else -(-sum(LENGTHS) // 13)
    assert sum(first) == sum(LENGTHS) - n_rows  # all but the last of a row, and no padding, once
    assert any(v.abs().max() > 0 for k, v in states(trainer.model).items() if "slim_out" in k)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("off", [True, False])
def test_dpo_switches_dropout_off(off, tmp_path):
    model = tiny.trained(dropout=0.5)
    trainer = tiny_trl.trainer("dpo", model, tmp_path, disable_dropout=off)
    trainer.model.train()
    passes = [trainer.model(**tiny.batch()).logits for _ in range(2)]
    assert torch.equal(*passes) is off
