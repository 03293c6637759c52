"""The record that describes a model family, and the types of its inputs.

A family is data and a few functions, not a class to inherit from: what differs between families is
visible in one file, and nothing is overridden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch

from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.parameter_map.entries import IgnoredTensor, ParameterEntry
from nemo_vlm_ptq.utils.pinned_memory import copy_pinned, to_device

if TYPE_CHECKING:
    import PIL.Image

IMAGE, TEXT = 2, 1  # values of a modality mask; 0 is padding

Config = Mapping[str, Any]


@dataclass(frozen=True)
class ImageInputs:
    """Preprocessed images, as the family's Hugging Face image processor returns them.

    pixel_values: [images,3,h,w]; [tiles,3,h,w] if an image is cut into tiles, which count as
        images here; [images,views,3,h,w] if it is split into views; or [patches,C], the patches of
        all images, with grids.
    image_sizes: [images,2] int64, height and width; only for families whose number of tokens
        depends on the size of the image.
    grids: [images,3] int64, patches of each image in time, height and width (image_grid_thw).
    pixel_mask: [tiles,h,w], 0 at padding; only for families with tiles that are padded.
    patch_positions: [images,patches,2] int64, column and row of each patch, -1 at padding; only for
        families with patches that are padded: [images,patches,C].
    """

    pixel_values: torch.Tensor
    image_sizes: torch.Tensor | None = None
    grids: torch.Tensor | None = None
    pixel_mask: torch.Tensor | None = None
    patch_positions: torch.Tensor | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.pixel_values if self.grids is None else self.grids)

    def to(self, device: torch.device, dtype: torch.dtype) -> ImageInputs:
        """Return the images with pixel_values on a device; sizes stay on the host."""
        return replace(self, pixel_values=to_device(self.pixel_values, device).to(dtype))

    def to_meta(self) -> ImageInputs:
        """Return the images without the values of pixels."""
        return replace(self, pixel_values=self.pixel_values.to("meta"))

    def slice(self, start: int, stop: int | None = None) -> ImageInputs:
        """Return the images from `start` to `stop`."""
        sizes = None if self.image_sizes is None else self.image_sizes[start:stop]
        if self.grids is None:
            mask, places = (
                None if tensor is None else tensor[start:stop]
                for tensor in (self.pixel_mask, self.patch_positions)
            )
            pixels = self.pixel_values[start:stop]
            return ImageInputs(pixels, sizes, pixel_mask=mask, patch_positions=places)
        ends = [0, *self.grids.prod(dim=1).cumsum(dim=0).tolist()]
        last = len(self) if stop is None else min(stop, len(self))
        patches = self.pixel_values[ends[start] : ends[last]]
        return ImageInputs(pixel_values=patches, image_sizes=sizes, grids=self.grids[start:stop])


@dataclass(frozen=True)
class Sample:
    """Model inputs of one question.

    id: id of the question.
    input_ids: [S] int64, with one id for each image token.
    is_image: [S] bool, True at image tokens.
    images: the images in the order of their tokens; None for text only.
    positions: [3,S] int64, temporal, height and width, for families with such positions.
    """

    id: str
    input_ids: torch.Tensor
    is_image: torch.Tensor
    images: ImageInputs | None
    positions: torch.Tensor | None = None


@dataclass(frozen=True)
class ImagePlaceholders:
    """Image placeholders among the input ids of the published model.

    is_image: [S] bool, True at placeholders.
    tokens_per_placeholder: image tokens that one placeholder expands to.
    num_images: images that the placeholders stand for.
    """

    is_image: torch.Tensor
    tokens_per_placeholder: int
    num_images: int


AnyImage: TypeAlias = "PIL.Image.Image | ImageInputs"


class Preprocess(Protocol):
    """Function that builds the sample of a question in the prompt format of the family."""

    def __call__(
        self,
        sample_id: str,
        question: str,
        images: AnyImage | Sequence[AnyImage] | None = None,
        answer: str = "",
        *,
        max_pixels: int | None = None,
    ) -> Sample:
        """Return the sample of a question.

        Args:
            sample_id: id of the sample, for error messages.
            question: the text of the question.
            images: the image, or a list in order; an image, or the `images` of an earlier sample
                with that image alone.
            answer: appended to the prompt, for calibration.
            max_pixels: area that each image is resized to at most, where the family takes any size.
        """


@dataclass(frozen=True)
class ModelFamily:
    """One model family: names and shapes of its tensors, its decoder, prompt and vision module.

    Functions take the parsed config.json (`config`), the model folder (`folder`), or both.
    """

    name: str
    architectures: tuple[str, ...]
    # prefixes of the published decoder names, in place of `model.` and of `lm_head.`
    body_prefix: str
    head_prefix: str
    # "" if TensorRT-LLM's engines do not know the decoder
    trtllm_architecture: Literal["LlamaForCausalLM", "Phi3ForCausalLM", ""]
    parameter_map: Callable[[Decoder], tuple[ParameterEntry, ...]]
    # (pattern, replacement): from the names of other transformers versions to published names
    name_aliases: tuple[tuple[str, str], ...]
    ignored_tensors: tuple[IgnoredTensor, ...]
    decoder: Callable[[Config], Decoder]
    # transformers config of the decoder alone
    text_config: Callable[[Config], Any]
    # uninitialized module: ImageInputs -> features [image tokens,hidden]
    make_vision_module: Callable[[Config], Any]
    make_preprocessor: Callable[[Path, Config], Preprocess]
    # (config, published ids [S], images not assigned yet) -> placeholders of the next images
    find_placeholders: Callable[[Config, Any, ImageInputs | None], ImagePlaceholders]
    # model type in TensorRT-LLM's multimodal builder; "" if it has none
    trtllm_vision_type: str
    # (config, is_image [S], images) -> positions [3,S] of a sample's tokens
    positions: Callable[[Config, torch.Tensor, ImageInputs | None], torch.Tensor] | None = None
    # pixels of an image that become one token, for families that take images of any size
    pixels_per_token: Callable[[Config], int] | None = None
    # None if the number of tokens depends on the size of the image
    tokens_per_image: Callable[[Config], int] | None = None
    # at most, where it does, with the published image processors
    most_tokens_per_image: int = 2880
    # whether an image is cut into tiles, each of which is an entry of pixel_values
    is_tiled: bool = False
    # whether samples have their tiles padded to the same number, with pixel_attention_mask
    pads_tiles: bool = False
    # whether an image is its patches, padded to the same number, with image_position_ids
    pads_patches: bool = False
    # whether a question may be about several images
    takes_several_images: bool = True
    # (class of the same models that is not supported, the repository to take instead)
    other_repositories: tuple[tuple[str, str], ...] = ()
    # sub-folders with a checkpoint each; their tensors are named SUBFOLDER/NAME
    subfolders: tuple[str, ...] = ("",)
    # model type of the vision tower, where another family has the same architecture
    tower: str = ""
    # whether NeMo 2 has a model class for the family
    nemo_supported: bool = False
    # config.json of the folder merged with those of its sub-folders; may raise UserError
    complete_config: Callable[[Path, dict[str, Any]], dict[str, Any]] = lambda _, config: config

    def published_decoder_name(self, name: str) -> str:
        """Return the published name of a tensor of transformers' causal language model."""
        body = name.removeprefix("model.")
        if body != name:
            return self.body_prefix + body
        return self.head_prefix + name.removeprefix("lm_head.")

    @property
    def decoder_prefix(self) -> str:
        """Prefix of the published decoder names before `model.` and `lm_head.`."""
        return self.head_prefix.removesuffix("lm_head.")

    @property
    def decoder_subfolder(self) -> str:
        """Sub-folder of the decoder checkpoint, "" for the model folder itself."""
        return self.head_prefix.rpartition("/")[0]

    def vision_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Return the published name and shape of every tensor of the vision module."""
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
        """Build the vision module on a device and load its weights.

        Args:
            config: the parsed config.json.
            tensors: tensors by published name; those that the module lacks are ignored.
            device: device of the module.
            dtype: dtype of the module; that of the tensors if None.
        """
        from transformers.initialization import no_init_weights

        with no_init_weights(), torch.device(device):  # random initialization takes seconds
            module = self.make_vision_module(config)
        dtype = dtype or next(iter(tensors.values())).dtype
        for stored in module.state_dict(keep_vars=True).values():
            if stored.is_floating_point():  # other buffers, as rotary frequencies, stay in float32
                stored.data = stored.data.to(dtype)
        module.eval().requires_grad_(False)
        for name, parameter in module.published_parameters().items():
            copy_pinned(parameter.data, tensors[name])
        return module

    def decoder_config(self, config: Config) -> dict[str, Any]:
        """Return the config.json of the folder that holds the decoder checkpoint."""
        return dict(config[f"{self.decoder_subfolder}_cfg"] if self.decoder_subfolder else config)
