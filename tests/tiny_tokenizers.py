"""Tokenizers that know characters alone, in the forms that are published with models."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

LLAMA = ("<unk>", "<s>", "</s>")


def write_llama(folder: Path, marks=(), kind: str = "LlamaTokenizer", size: int = 499) -> Tokenizer:
    """Like Llama 2's: spaces are ▁, one stands before each text, and <s> before that.

    marks: special tokens; the first has the id `size`. kind: its class in tokenizer_config.json.
    """
    letters = [chr(code) for code in range(33, 127)]
    vocab = [*LLAMA, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    vocab += [f"filler{index}" for index in range(size - len(vocab))]
    tokens = Tokenizer(
        BPE(
            {token: id for id, token in enumerate(vocab)},
            [],
            byte_fallback=True,
            unk_token=LLAMA[0],
        )
    )
    tokens.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return _write(folder, tokens, LLAMA[1], [*LLAMA, *marks], kind)


def write_llama_3(folder: Path, marks) -> Tokenizer:
    """Like Llama 3's: bytes, and nothing before a text; the first of the marks begins texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(BPE({token: id for id, token in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _write(folder, tokens, None, marks, "PreTrainedTokenizerFast", bos_token=marks[0])


def _write(folder, tokens, begin, marks, kind, **settings):
    tokens.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    if begin is not None:
        pair = (begin, tokens.token_to_id(begin))
        tokens.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[pair]
        )
        settings |= {"bos_token": begin, "unk_token": LLAMA[0], "add_bos_token": True}
    folder.mkdir(parents=True, exist_ok=True)
    tokens.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} | settings))
    return tokens
