"""Tokenizers of single characters, in the file formats that are published with models."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

LLAMA_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


def write_llama(
    folder: Path, special_tokens=(), tokenizer_class: str = "LlamaTokenizer", size: int = 499
) -> Tokenizer:
    """Write a tokenizer like that of Llama 2: ▁ for spaces, and <s> and ▁ before each text.

    Args:
        folder: the folder of the files.
        special_tokens: additional special tokens; the first has the id `size`.
        tokenizer_class: value in tokenizer_config.json.
        size: size of the vocabulary without special_tokens.
    """
    letters = [chr(code) for code in range(33, 127)]
    vocab = [*LLAMA_SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    vocab += [f"filler{index}" for index in range(size - len(vocab))]
    tokenizer = Tokenizer(
        BPE(
            {token: id for id, token in enumerate(vocab)},
            [],
            byte_fallback=True,
            unk_token=LLAMA_SPECIAL_TOKENS[0],
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special_tokens = [*LLAMA_SPECIAL_TOKENS, *special_tokens]
    return _write(folder, tokenizer, LLAMA_SPECIAL_TOKENS[1], special_tokens, tokenizer_class)


def write_llama_3(folder: Path, special_tokens) -> Tokenizer:
    """Write a tokenizer like that of Llama 3: bytes, and nothing before a text.

    The first of special_tokens is the bos_token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: id for id, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer_class = "PreTrainedTokenizerFast"
    bos_token = special_tokens[0]
    return _write(folder, tokenizer, None, special_tokens, tokenizer_class, bos_token=bos_token)


def _write(folder, tokenizer, prefix, special_tokens, tokenizer_class, **settings):
    """Write tokenizer.json and tokenizer_config.json; prefix: token before each text, or None."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special_tokens])
    if prefix is not None:
        pair = (prefix, tokenizer.token_to_id(prefix))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A", pair=f"{prefix} $A {prefix} $B", special_tokens=[pair]
        )
        unk_token = LLAMA_SPECIAL_TOKENS[0]
        settings |= {"bos_token": prefix, "unk_token": unk_token, "add_bos_token": True}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": tokenizer_class} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer
