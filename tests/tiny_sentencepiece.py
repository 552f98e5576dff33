"""Tokenizers that put a space in front of each text, as SentencePiece's do: Llama 2, Mistral, …."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' if m['role'] == "
    "'user' else ' ' + m['content'] + ' ' + eos_token }}{% endfor %}"
)
TEMPLATES = {"zephyr": ZEPHYR, "llama-2": LLAMA_2}
SPECIAL = ["<unk>", "<s>", "</s>"]
_LETTERS = "▁\n []/<>|?.,abcdefghijklmnopqrstuvwxyzINSTABQ"
_JOINED = ("t h", "th e", "▁ the", "▁ a", "▁ i", "▁i s", "o u", "▁ [", "▁ Q")
MERGES = [(first, second) for first, second in (pair.split(" ") for pair in _JOINED)]
VOCABULARY = {
    word: i for i, word in enumerate([*SPECIAL, *_LETTERS, *("".join(pair) for pair in MERGES)])
}
KINDS = ("default", "legacy", "not legacy", "prepend")


def tokenizer(kind: str = "default", template: str = "zephyr"):
    """A tokenizer of one of ``KINDS``, with one of ``TEMPLATES``."""
    if kind == "prepend":  # as converted by older versions
        inner = Tokenizer(models.BPE(VOCABULARY, MERGES, unk_token="<unk>", fuse_unk=True))
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        inner.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
        made = PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    else:
        options = {} if kind == "default" else {"legacy": kind == "legacy"}
        made = LlamaTokenizer(vocab=VOCABULARY, merges=MERGES, **options)
    made.chat_template = TEMPLATES[template]
    made.pad_token = "</s>"
    return made


class Slow:
    """A tokenizer without offsets, as those that are written in Python."""

    def __init__(self, inner) -> None:
        self._inner = inner
        self.is_fast = False

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __call__(self, *given, **options):
        if "return_offsets_mapping" in options:
            raise NotImplementedError("return_offset_mapping is not available")
        return self._inner(*given, **options)
