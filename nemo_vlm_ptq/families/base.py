"""What a family is: a record of facts and a few small functions, no base class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nemo_vlm_ptq.mapping.layouts import Sizes
from nemo_vlm_ptq.mapping.rows import Drop, Row

if TYPE_CHECKING:
    import PIL.Image
    import torch

IMAGE, TEXT = 2, 1  # values of a modality mask; 0 is padding


@dataclass(frozen=True)
class Decoder:
    """Facts of a Llama-like decoder, defaults filled in."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    rope_theta: float
    max_positions: int

    def sizes(self, vocab_multiple: int) -> Sizes:
        """What the layouts need, with the vocabulary padded to a multiple."""
        rows = -(-self.vocab // vocab_multiple) * vocab_multiple
        return Sizes(self.heads, self.kv_heads, self.head_dim, self.vocab, rows)

    def shapes(self, rows: tuple[Row, ...]) -> dict[str, tuple[int, ...]]:
        """Published decoder name -> shape, for every layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        by_layout = {
            "qkv": ((query, self.hidden), (key, self.hidden), (key, self.hidden)),
            "gated": ((self.ffn, self.hidden), (self.ffn, self.hidden)),
            "vocab": ((self.vocab, self.hidden),),
            "replicate": ((self.hidden,),),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for row in rows:
            width = query if "attention" in row.megatron else self.ffn
            parts = by_layout.get(row.layout, ((self.hidden, width),))
            for name, shape in zip(row.hf, parts, strict=True):
                for layer in range(self.layers if row.layered else 1):
                    shapes[name.replace("{i}", str(layer))] = shape
        return shapes


@dataclass(frozen=True)
class Sample:
    """One question made ready for the model.

    input_ids: [S] int64, image positions already expanded to one id per image token;
    is_image: [S] bool, True where an image feature stands;
    pixels: what the vision path takes, [images, ...], or None for text only.
    """

    id: str
    input_ids: torch.Tensor
    is_image: torch.Tensor
    pixels: torch.Tensor | None


class Prepare(Protocol):
    """(id, question, picture or pixels or None, answer) -> Sample in the family's prompt."""

    def __call__(
        self,
        name: str,
        question: str,
        image: PIL.Image.Image | torch.Tensor | None = None,
        answer: str = "",
    ) -> Sample:
        """One sample."""


@dataclass(frozen=True)
class ModelFamily:
    """One family: how its files are named, what its decoder is, and how it looks at an image.

    Fields that are functions take the parsed config.json (`config`) or the model folder.
    """

    name: str
    architectures: tuple[str, ...]
    decoder_prefix: str  # what stands before `model.` and `lm_head.` in published names
    trtllm_architecture: Literal["LlamaForCausalLM", "Phi3ForCausalLM"]
    rows: tuple[Row, ...]
    aliases: tuple[tuple[str, str], ...]
    drops: tuple[Drop, ...]
    decoder: Callable[[Mapping[str, Any]], Decoder]
    text_config: Callable[[Mapping[str, Any]], Any]  # transformers config of the decoder alone
    vision_shapes: Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]]
    build_vision: Callable[..., Any]  # (config, tensors) -> module: pixels -> [images, tokens, H]
    preparer: Callable[[Path, Mapping[str, Any]], Prepare]
    image_tokens: Callable[[Mapping[str, Any]], tuple[int, int]]  # (id, tokens of one image)
    tokenizer: Callable[[Path], Any]
