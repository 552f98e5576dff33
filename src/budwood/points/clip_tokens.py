"""CLIP's tokenizer, built from the merges that ship, so that local checkpoints need no hub.

Source: Learning Transferable Visual Models From Natural Language Supervision (arXiv 2103.00020);
OpenAI's vocabulary (MIT), which open_clip, SLIP, ULIP and EVA-CLIP share.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

MERGES = Path(__file__).parent / "weights" / "clip_merges.txt.gz"
MARKS = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer() -> Any:
    """The tokenizer as one of transformers: 49,408 tokens, of which the last two are `MARKS`."""
    from transformers import CLIPTokenizer

    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    merges = [(left, right) for left, right in map(str.split, lines)]
    letters = _letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), *MARKS]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)  # type: ignore[arg-type]


def _letters() -> list[str]:
    """A printable character for each byte, in the order of the vocabulary: the printable first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    n_others = 256 - len(printable)
    return [chr(code) for code in (*printable, *range(256, 256 + n_others))]
