"""What a family is: a record of facts and a few small functions, no base class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.parameter_map.entries import IgnoredTensor, ParameterEntry
from nemo_vlm_ptq.parameter_map.sharding import HeadSizes

if TYPE_CHECKING:
    import PIL.Image
    import torch

IMAGE, TEXT = 2, 1  # values of a modality mask; 0 is padding


@dataclass(frozen=True)
class LongRope:
    """Rotary frequencies divided by one list of factors, by another in sequences over `original`.

    short, long: [head_dim / 2]; scale multiplies cosine and sine at every length.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    scale: float


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
    long_rope: LongRope | None = None

    def sizes(self, vocab_multiple: int) -> HeadSizes:
        """What the layouts need, with the vocabulary padded to a multiple."""
        parameter_map = -(-self.vocab // vocab_multiple) * vocab_multiple
        return HeadSizes(self.heads, self.kv_heads, self.head_dim, self.vocab, parameter_map)

    def shapes(self, parameter_map: tuple[ParameterEntry, ...]) -> dict[str, tuple[int, ...]]:
        """Published decoder name -> shape, for every layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        by_layout = {
            "qkv": ((query, self.hidden), (key, self.hidden), (key, self.hidden)),
            "gated": ((self.ffn, self.hidden), (self.ffn, self.hidden)),
            "vocab": ((self.vocab, self.hidden),),
            "replicate": ((self.hidden,),),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for row in parameter_map:
            width = query if "attention" in row.megatron_name else self.ffn
            subfolders = by_layout.get(row.sharding, ((self.hidden, width),))
            if row.is_fused:
                subfolders = ((sum(part[0] for part in subfolders), self.hidden),)
            for name, shape in zip(row.hf_names, subfolders, strict=True):
                for layer in range(self.layers if row.per_layer else 1):
                    shapes[name.replace("{i}", str(layer))] = shape
        return shapes


@dataclass(frozen=True)
class ImageInputs:
    """Images as the family's Hugging Face processor gives them.

    views: [images,3,h,w], or [images,views,3,h,w] where an image is cut into several;
    sizes: [images,2] int64 height and width, for families whose images differ in tokens.
    """

    pixel_values: torch.Tensor
    image_sizes: torch.Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> ImageInputs:
        """Views on a device in a dtype; sizes stay where they are, they are only counted with."""
        from nemo_vlm_ptq.utils.pinned_memory import to_device

        return ImageInputs(to_device(self.pixel_values, device).to(dtype), self.image_sizes)

    def part(self, start: int, stop: int | None = None) -> ImageInputs:
        """Images from `start` to `stop`."""
        sizes = None if self.image_sizes is None else self.image_sizes[start:stop]
        return ImageInputs(self.pixel_values[start:stop], sizes)


@dataclass(frozen=True)
class Sample:
    """One question made ready for the model.

    input_ids: [S] int64, image positions already expanded to one id per image token;
    is_image: [S] bool, True where an image feature stands;
    pixels: the images, in the order of their tokens, or None for text only.
    """

    id: str
    input_ids: torch.Tensor
    is_image: torch.Tensor
    pixels: ImageInputs | None


@dataclass(frozen=True)
class ImagePlaceholders:
    """Where images stand in published ids.

    is_image: [S] bool; repeat: image tokens that one such id becomes; images: how many they are.
    """

    is_image: torch.Tensor
    repeat: int
    images: int


class Preprocess(Protocol):
    """(id, question, picture or pixels or None, answer) -> Sample in the family's prompt.

    Pixels are those of an earlier sample of the same picture.
    """

    def __call__(
        self,
        name: str,
        question: str,
        image: PIL.Image.Image | ImageInputs | None = None,
        answer: str = "",
    ) -> Sample:
        """One sample."""


Config = Mapping[str, Any]


@dataclass(frozen=True)
class ModelFamily:
    """One family: how its files are named, what its decoder is, and how it looks at an image.

    Fields that are functions take the parsed config.json (`config`) or the model folder.
    """

    name: str
    architectures: tuple[str, ...]
    decoder_prefix: str  # what stands before `model.` and `lm_head.` in published names
    trtllm_architecture: Literal["LlamaForCausalLM", "Phi3ForCausalLM"]
    parameter_map: tuple[ParameterEntry, ...]
    name_aliases: tuple[tuple[str, str], ...]  # (pattern, replacement): other vintages' names
    ignored_tensors: tuple[IgnoredTensor, ...]
    decoder: Callable[[Config], Decoder]
    text_config: Callable[[Config], Any]  # transformers config of the decoder alone
    make_vision_module: Callable[[Config], Any]  # module without weights: Pixels -> features [tokens,H]
    make_preprocessor: Callable[[Path, Config], Preprocess]
    # (config, ids [S] as published, pixels of the images left) -> where images stand
    find_placeholders: Callable[[Config, Any, ImageInputs | None], ImagePlaceholders]
    trtllm_vision_type: str  # model type of TensorRT-LLM's multimodal builder
    # tokens of an image; None where they depend on its size
    tokens_per_image: Callable[[Config], int] | None = None
    subfolders: tuple[str, ...] = (
        "",
    )  # sub-folders that hold a checkpoint each: names are PART/NAME
    nemo_supported: bool = False  # NeMo 2 has a model class for it
    # config.json of the folder with what its parts' own say; may refuse
    complete_config: Callable[[Path, dict[str, Any]], dict[str, Any]] = lambda _, config: config

    @property
    def decoder_subfolder(self) -> str:
        """The sub-folder of the decoder, "" for the model folder itself."""
        return self.decoder_prefix.rpartition("/")[0]

    def vision_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Published name -> shape of tower, projector and the like."""
        import torch

        with torch.device("meta"):
            module = self.make_vision_module(config)
        return {name: tuple(tensor.shape) for name, tensor in module.published_parameters().items()}

    def build_vision(
        self,
        config: Config,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The vision module on a device with published tensors in it; others are left.

        dtype: that of the tensors unless told.
        """
        import torch
        from transformers.initialization import no_init_weights

        from nemo_vlm_ptq.utils.pinned_memory import copy_pinned

        with no_init_weights(), torch.device(device):  # random ones take seconds
            module = self.make_vision_module(config)
        module.to(dtype or next(iter(tensors.values())).dtype).eval().requires_grad_(False)
        for name, parameter in module.published_parameters().items():
            copy_pinned(parameter.data, tensors[name])
        return module

    def decoder_config(self, config: Config) -> dict[str, Any]:
        """The config.json that lies beside the decoder: the whole one, or its part's."""
        return dict(config[f"{self.decoder_subfolder}_cfg"] if self.decoder_subfolder else config)


def expand_placeholders(
    name: str, ids: Sequence[int], mark: int, counts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [S] with the k-th `mark` repeated counts[k] times, and where those stand [S] bool.

    Raises:
        UserError: there are more marks or fewer than counts, in the sample of that name.
    """
    import torch

    short = torch.tensor(ids, dtype=torch.int64)
    marks = short == mark
    check_placeholder_count(name, int(marks.sum()), len(counts))
    times = torch.ones_like(short)
    times[marks] = torch.tensor(counts, dtype=torch.int64)
    input_ids = short.repeat_interleave(times)
    return input_ids, input_ids == mark


def check_placeholder_count(name: str, found: int, images: int) -> None:
    """Each image of a sample has one mark in its prompt, which puts it there.

    Raises:
        UserError: there are others, or fewer.
    """
    if found < images:
        raise UserError(
            "the tokenizer makes no image token of the prompt's mark: the model's config and its "
            "tokenizer do not belong together"
        )
    if found > images:
        raise UserError(
            f"question {name!r} has marks of images in its own text or answer ({found} in its "
            f"prompt, with {images} images); take them out, images get theirs by themselves"
        )
