"""The LoRA that `budwood tune export-lora` writes answers in vLLM as in PEFT."""

from __future__ import annotations

import json
import random

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from budwood.cli import app
from tests import tiny_chat
from tests.vllm.tiny import TEXT, engine

N_NEW = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, and the LoRA of a SLIM adapter that was trained on it."""
    here = tmp_path_factory.mktemp("tuned")
    given = ("initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")
    sizes = {name: size for name, size in TEXT.items() if name not in given}
    base = tiny_chat.save(here / "base", **sizes)
    draw = random.Random(0)
    rows = [tiny_chat.question(draw, 3) for _ in range(12)]
    train = tiny_chat.write_lines(here / "train.jsonl", rows)
    tuned, lora = here / "tuned", here / "lora"
    run("tune", train, "--model", base, "--output", tuned, "--steps", 12, "--lr", 3e-2)
    run("tune", "export-lora", tuned, "--output", lora, "--calibration", train, "--model", base)
    return base, lora


def run(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output


def test_it_answers_as_in_peft(folders):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    base, lora = folders
    rank = json.loads((lora / "adapter_config.json").read_text())["r"]
    tokens = AutoTokenizer.from_pretrained(base)
    prompts = [tokens(text)["input_ids"] for text in ("Which is the moon?", "What is an oak tree")]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    plain = [greedy(model, ids) for ids in prompts]
    tuned = peft.PeftModel.from_pretrained(model, lora).eval()
    expected = [greedy(tuned, ids) for ids in prompts]
    assert [ids for ids, _ in plain] != [ids for ids, _ in expected], "the adapter must matter"

    given = [{"prompt_token_ids": ids} for ids in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=N_NEW, ignore_eos=True, logprobs=0)
    with engine(base, enable_lora=True, max_lora_rank=rank, limit_mm_per_prompt={}) as llm:
        for request, wanted in ((LoRARequest("lora", 1, str(lora)), expected), (None, plain)):
            outputs = llm.generate(given, sampling, lora_request=request, use_tqdm=False)
            for output, (ids, logprobs) in zip(outputs, wanted, strict=True):
                answer = output.outputs[0]
                assert list(answer.token_ids) == ids
                found = [at[one].logprob for at, one in zip(answer.logprobs, ids, strict=True)]
                assert found == pytest.approx(logprobs, abs=1e-3)


@torch.no_grad()
def greedy(model, ids):
    """An answer and the log-probability of each of its tokens."""
    row, logprobs = torch.tensor([ids]), []
    for _ in range(N_NEW):
        scores = model(input_ids=row).logits[0, -1].log_softmax(-1)
        best = scores.argmax()
        logprobs.append(scores[best].item())
        row = torch.cat((row, best.view(1, 1)), 1)
    return row[0, len(ids) :].tolist(), logprobs
