"""A question about a picture as a model's inputs, and its output as an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from budwood.errors import InputError, UnsupportedModelError

GREEDY = {"do_sample": False, "num_beams": 1}
_PLACEHOLDERS = ("image_token", "video_token", "boi_token")
"""Names under which processors have the tokens that stand for pictures."""


def check_question(question: str) -> str:
    """Strip white space from a question.

    Raises:
        InputError: nothing is left, or it is no text.
    """
    if not isinstance(question, str):
        raise InputError(f"question is a {type(question).__name__}; give text")
    text = question.strip()
    if not text:
        raise InputError("the question is empty; ask something about the picture")
    return text


Turns: TypeAlias = Sequence[tuple[str, str]]
"""Earlier turns of a chat about a picture: questions and their answers."""


def render(processor: Any, question: str, before: Turns = ()) -> str:
    """Write the prompt of a chat about a picture with the chat template.

    Args:
        processor: the model's.
        question: of the last turn.
        before: the turns before it; the picture is in the first.

    Raises:
        UnsupportedModelError: the processor has no chat template.
    """
    tokenizer = processor.tokenizer
    if not (getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)):
        raise UnsupportedModelError(
            "the model's processor has no chat template, so its prompt format is unknown; give an "
            "instruction-tuned model that has one"
        )
    chat: list[dict[str, Any]] = []
    for asked, answer in before:
        chat += [_said("user", asked), _said("assistant", answer)]
    chat.append(_said("user", question))
    chat[0]["content"].insert(0, {"type": "image"})
    return processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def prepare(
    processor: Any,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    device: torch.device | str = "cpu",
    before: Sequence[Turns] | None = None,
) -> dict[str, Any]:
    """Make the inputs of ``model.generate``: one row per question about one picture each.

    Example::

        out = model.generate(**prepare(processor, [image], ["What is on the table?"]))

    Args:
        processor: the model's, with a chat template.
        images: RGB pictures, one per question.
        questions: what is asked.
        device: where the tensors go.
        before: earlier turns of each row's chat; None for single questions.

    Returns:
        Tensors by name, padded on the left: ``input_ids`` of shape (n_questions, n_tokens), ….

    Raises:
        UnsupportedModelError: the processor has no chat template.
        InputError: a question or turn has a placeholder of pictures in its text.
    """
    turns = before or [()] * len(questions)
    _refuse_placeholders(processor, questions, turns)
    prompts = [render(processor, *chat) for chat in zip(questions, turns, strict=True)]
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


def _refuse_placeholders(processor: Any, questions: Sequence[str], before: Sequence[Turns]) -> None:
    texts = [*questions, *(text for chat in before for turn in chat for text in turn)]
    for name in _PLACEHOLDERS:
        token = getattr(processor, name, None)
        if isinstance(token, str) and any(token in text for text in texts):
            raise InputError(
                f"the question contains {token!r}, which stands for a picture in a prompt; leave "
                "it out"
            )


def answers(processor: Any, sequences: Tensor, n_prompt: int) -> list[str]:
    """Decode what was generated after prompts of ``n_prompt`` tokens, one string a row."""
    new = processor.tokenizer.batch_decode(sequences[:, n_prompt:], skip_special_tokens=True)
    return [text.strip() for text in new]
