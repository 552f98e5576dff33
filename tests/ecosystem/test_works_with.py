"""Other libraries around a pruned model: answers as from ``generate``, or from a run by hand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch

from budwood.prune import attach
from tests.ecosystem import tiny

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def answered(model, processor, *numbers, **options):
    """New tokens of a pruned batch and what was kept."""
    batch = tiny.inputs(processor, *numbers)
    with attach(model, keep=tiny.KEEP, processor=processor, **options) as session:
        output = model.generate(**batch, **GREEDY)
    return output[:, batch["input_ids"].shape[1] :], [image.kept for image in session.report]


def by_hand(model, processor, number, kept):
    batch = tiny.inputs(processor, number)
    ids, pixels = batch["input_ids"][0], batch["pixel_values"]
    return tiny.greedy_by_hand(model, ids, pixels, kept, GREEDY["max_new_tokens"])


def test_generate(loaded):
    """What the other tests compare with."""
    model, processor = loaded
    answers, kept = answered(model, processor, 0, 1)
    for number in range(2):
        assert torch.equal(answers[number], by_hand(model, processor, number, kept[number]))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline(loaded, batch_size):
    from transformers import pipeline

    model, processor = loaded
    processor.tokenizer.padding_side = "left"
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    given = [tiny.chat(number) for number in range(3)]
    whole = ask(text=given, return_full_text=False, generate_kwargs=GREEDY)
    with attach(model, keep=tiny.KEEP, processor=processor) as session:
        said = ask(
            text=given, return_full_text=False, generate_kwargs=GREEDY, batch_size=batch_size
        )
        assert all(image.n_after == tiny.KEEP for image in session.report)
    for number, (row, full) in enumerate(zip(said, whole)):
        expected = answered(model, processor, number)[0]
        text = processor.batch_decode(expected, skip_special_tokens=True)[0]
        assert row[0]["generated_text"].strip() == text.strip()
        assert row[0]["generated_text"] != full[0]["generated_text"]


def test_a_thread_per_request_with_a_streamer(loaded):
    """As `transformers serve` does it."""
    from transformers import TextIteratorStreamer

    model, processor = loaded
    expected = []
    for number in range(4):
        tokens, (kept,) = answered(model, processor, number)
        expected.append((processor.batch_decode(tokens)[0], kept))

    def request(number):
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
        options = {**tiny.inputs(processor, number), **GREEDY, "streamer": streamer}
        thread = Thread(target=model.generate, kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text, session.call_of(streamer).report[0].kept

    with (
        attach(model, keep=tiny.KEEP, processor=processor) as session,
        ThreadPoolExecutor(4) as pool,
    ):
        found = list(pool.map(request, [number % 4 for number in range(24)]))
    for number, (text, kept) in enumerate(found):
        assert text.strip() == expected[number % 4][0].strip()
        assert torch.equal(kept, expected[number % 4][1])


def test_peft(loaded):
    import peft

    model, processor = loaded
    whole, _ = answered(model, processor, 0, 1)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config)
    adapted, kept = answered(wrapped, processor, 0, 1)
    assert not torch.equal(adapted, whole)
    with wrapped.disable_adapter():
        assert torch.equal(answered(wrapped, processor, 0, 1)[0], whole)
    merged = wrapped.merge_and_unload()
    for number in range(2):
        assert torch.equal(adapted[number], by_hand(merged, processor, number, kept[number]))


def test_four_bit(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    folder = tiny.save_wide(tmp_path)  # its kernels for the CPU want widths in steps of 32
    plain, processor = tiny.load(folder)
    skipped = ["lm_head", "multi_modal_projector"]
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    model, _ = tiny.load(folder, quantization_config=config, dtype=torch.float32)
    attention = model.model.vision_tower.encoder.layers[-2].self_attn
    assert type(attention.k_proj).__name__ == "Linear4bit"
    answers, kept = answered(model, processor, 0, 1)
    for number in range(2):
        assert torch.equal(answers[number], by_hand(model, processor, number, kept[number]))
    assert not torch.equal(answers, answered(plain, processor, 0, 1)[0])


@pytest.mark.parametrize("llm", ["cpu", "disk"])
def test_offload(folder, tmp_path, llm):
    """Accelerate moves weights in before each module runs, and its hooks wrap `forward`."""
    from accelerate import cpu_offload, disk_offload

    model, processor = tiny.load(folder)
    expected, kept = answered(model, processor, 0, 1)
    if llm == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path / "weights", execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.device.type == "meta"
    found, found_kept = answered(model, processor, 0, 1)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, found_kept, kept))


def test_device_map(folder, tmp_path):
    """Parts of the model on disk, as `device_map` puts them there when memory is short."""
    model, processor = tiny.load(folder)
    expected, kept = answered(model, processor, 0, 1)
    model, _ = tiny.load(
        folder,
        device_map={
            "model.vision_tower": "cpu",
            "model.multi_modal_projector": "cpu",
            "model.language_model": "disk",
            "lm_head": "cpu",
        },
        offload_folder=tmp_path,
    )
    assert model.get_input_embeddings().weight.device.type == "meta"
    found, found_kept = answered(model, processor, 0, 1)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, found_kept, kept))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing(loaded, reentrant):
    model, processor = loaded
    model.train()
    batch = tiny.inputs(processor, 0, 1)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :-4] = -100

    def step():
        model.zero_grad()
        with attach(model, keep=tiny.KEEP, forward=True, processor=processor) as session:
            loss = model(**batch).loss
            loss.backward()
        assert [image.n_after for image in session.report] == [tiny.KEEP] * 2
        return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = step()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    loss_again, gradients_again = step()
    torch.testing.assert_close(loss_again, loss)
    assert any("multi_modal" in name for name in gradients_again)
    for name, gradient in gradients_again.items():
        torch.testing.assert_close(gradient, gradients[name])
