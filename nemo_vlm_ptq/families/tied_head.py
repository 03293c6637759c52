"""Whether the output layer is the embedding: what the checkpoint holds decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import list_tensors


def make_config_completer(
    head: str, aliases: Sequence[tuple[str, str]], *, default: bool
) -> Callable[[Path, dict[str, Any]], dict[str, Any]]:
    """Return the function that completes tie_word_embeddings in a family's config.

    transformers loads the output layer of a checkpoint that has one, whatever its config says.
    Servers read tie_word_embeddings, of text_config where there is one.

    Args:
        head: published prefix of the output layer.
        aliases: from the names of other transformers versions to published names.
        default: value that transformers takes for a missing tie_word_embeddings.
    """

    def complete_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        text = config.get("text_config", {})
        if not isinstance(text, dict):
            return config
        stated = config.get("tie_word_embeddings", default) or text.get("tie_word_embeddings")
        is_tied = bool(stated) and f"{head}weight" not in list_tensors(folder, aliases)
        tied = {"tie_word_embeddings": is_tied}
        return config | tied | ({"text_config": text | tied} if text else {})

    return complete_config
