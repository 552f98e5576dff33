"""A question about a picture as a model's inputs, and its output as an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from budwood.errors import InputError, UnsupportedModelError

GREEDY = {"do_sample": False, "num_beams": 1}


def check_question(question: str) -> str:
    """Strip white space from a question.

    Raises:
        InputError: nothing is left.
    """
    text = question.strip()
    if not text:
        raise InputError("the question is empty; ask something about the picture")
    return text


def render(processor: Any, question: str) -> str:
    """Write the prompt of one user turn, a picture and a question, with the chat template.

    Raises:
        UnsupportedModelError: the processor has no chat template.
    """
    tokenizer = processor.tokenizer
    if not (getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)):
        raise UnsupportedModelError(
            "the model's processor has no chat template, so its prompt format is unknown; give an "
            "instruction-tuned model that has one"
        )
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    return processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def prepare(
    processor: Any,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Make the inputs of ``model.generate``: one row per question about one picture each.

    Example::

        out = model.generate(**prepare(processor, [image], ["What is on the table?"]))

    Args:
        processor: the model's, with a chat template.
        images: RGB pictures, one per question.
        questions: what is asked.
        device: where the tensors go.

    Returns:
        Tensors by name, padded on the left: ``input_ids`` of shape (n_questions, n_tokens), ….

    Raises:
        UnsupportedModelError: the processor has no chat template.
    """
    prompts = [render(processor, question) for question in questions]
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:  # masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    # A template that writes the first token itself must not get a second one.
    starts = tokenizer.bos_token is not None and prompts[0].startswith(tokenizer.bos_token)
    batch = processor(
        images=list(images),
        text=prompts,
        padding=True,
        padding_side="left",
        add_special_tokens=not starts,
        return_tensors="pt",
    )
    return dict(batch.to(device))


def answers(processor: Any, sequences: Tensor, n_prompt: int) -> list[str]:
    """Decode what was generated after prompts of ``n_prompt`` tokens, one string a row."""
    new = processor.tokenizer.batch_decode(sequences[:, n_prompt:], skip_special_tokens=True)
    return [text.strip() for text in new]
