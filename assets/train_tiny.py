"""Trains a tiny model of `assets/` on the synthetic scenes: llava, vila or phi.

The ten questions of a scene form one packed sequence: the image once, then the questions in blocks
of equal width that attend to the image and to themselves. The loss is on answer tokens only.
Vision modules are the package's own, decoders are transformers'. The JSON files of the model folder
are written by hand, except tokenizer.json; the script writes that and the weights. The quickstart
of the model evaluates the result.

Legend: B scenes, Q questions of a scene, S tokens, N image tokens, H hidden size, V vocabulary.
"""

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_data import QUESTIONS_PER_SCENE, SETUPS, load_scenes, make_tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.data import scenes
from nemo_vlm_ptq.families import FAMILIES, read_config
from nemo_vlm_ptq.families.hd_transform import global_view_and_crops
from nemo_vlm_ptq.families.phi import PhiVision

TEST_SCENES = 250
PEAK_LEARNING_RATE = 1e-3
WARMUP_STEPS = 400
LOG_INTERVAL = 500  # steps
ASSETS = Path(__file__).resolve().parent


class VisionLanguageModel(nn.Module):
    """Vision module of the package and decoder of transformers, in float32."""

    def __init__(self, name: str, config: dict[str, Any], processor: dict[str, Any]) -> None:
        super().__init__()
        self.vision = FAMILIES[name].make_vision_module(config)
        self.decoder = AutoModelForCausalLM.from_config(FAMILIES[name].text_config(config))
        for parameter_name, parameter in self.vision.named_parameters():
            if parameter_name.endswith("GN"):
                nn.init.normal_(parameter, std=0.02)
        self.register_buffer("mean", 255 * torch.tensor(processor["image_mean"]))
        self.register_buffer("std", 255 * torch.tensor(processor["image_std"]))
        self.float()

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the features [B,N,H] of images [B,side,side,3] uint8."""
        pixel_values = ((images - self.mean) / self.std).permute(0, 3, 1, 2)
        if not isinstance(self.vision, PhiVision):
            return self.vision.encode_views(pixel_values)
        side = self.vision.side
        rows = pixel_values.shape[-1] // side
        return self.vision.encode_views(global_view_and_crops(pixel_values, side), rows, rows)


class FixedRotaryEmbedding(nn.Module):
    """Precomputed rotary cosines and sines of constant positions."""

    def __init__(self, rotary: nn.Module, positions: Tensor) -> None:
        super().__init__()
        cos, sin = rotary(torch.zeros(1, device=positions.device), positions)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor, position_ids: Any = None, **_: Any) -> tuple[Tensor, Tensor]:
        """Return cosines and sines in the dtype of x."""
        return self.cos.to(x.dtype), self.sin.to(x.dtype)


class PackedLayout:
    """Layout of a packed sequence: ids before the questions, attention mask, positions."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any], device: str) -> None:
        preprocess = FAMILIES[name].make_preprocessor(folder, config)
        sample = preprocess("", "Q", scenes.draw("train-000000"))
        length = int(sample.is_image.nonzero()[-1]) + 1
        self.prefix_ids = sample.input_ids[:length].clamp(min=0).to(device)
        self.is_image = sample.is_image[:length].to(device)
        width = SETUPS[name].block_width
        place = torch.arange(length + QUESTIONS_PER_SCENE * width, device=device)
        slot = torch.where(place < length, -1, (place - length) // width)
        self.positions = torch.where(slot < 0, place, length + (place - length) % width)[None]
        visible = (slot[None] == slot[:, None]) | (slot[None] < 0)
        self.mask = (visible & (place[None] <= place[:, None]))[None, None]  # [1,1,S,S]
        self.prefix_length, self.block_width = length, width


def answer_logits(
    model: VisionLanguageModel, layout: PackedLayout, images: Tensor, blocks: Tensor, starts: Tensor
) -> Any:
    """Return the logits [B,Q,2,V] of the answer token and the end token, for B scenes."""
    features = model.encode_images(images)
    embeddings = model.decoder.get_input_embeddings()
    prefix = embeddings(layout.prefix_ids).to(features.dtype).expand(len(images), -1, -1).clone()
    prefix[:, layout.is_image] = features
    questions = embeddings(blocks.flatten(1).int()).to(features.dtype)
    hidden = model.decoder.model(
        inputs_embeds=torch.cat([prefix, questions], 1),
        attention_mask=layout.mask,
        position_ids=layout.positions,
        use_cache=False,
    ).last_hidden_state
    hidden = hidden[:, layout.prefix_length :].unflatten(
        1, (QUESTIONS_PER_SCENE, layout.block_width)
    )
    places = starts.long()[..., None] + torch.arange(-1, 1, device=starts.device)
    selected = hidden.gather(2, places[..., None].expand(-1, -1, -1, hidden.shape[-1]))
    return model.decoder.lm_head(selected)


def quick_accuracy(
    model: VisionLanguageModel, layout: PackedLayout, data: list[Tensor], shift: int
) -> float:
    """Return the accuracy with each scene's questions on the image `shift` scenes later."""
    images, blocks, starts, labels = data
    with torch.inference_mode():
        logits = answer_logits(model, layout, images.roll(-shift, 0), blocks, starts)
    correct = (logits.argmax(-1) == labels).all(-1)
    return correct[labels[..., 0] >= 0].float().mean().item()


def make_optimizer(model: VisionLanguageModel) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=fused)


def train(
    model: VisionLanguageModel,
    layout: PackedLayout,
    options: Any,
    data: list[Tensor],
    test: list[Tensor],
) -> None:
    """Train with warm-up and cosine decay over the time of options.minutes."""
    images, blocks, starts, labels = data
    device = images.device
    optimizer = make_optimizer(model)
    forward = torch.compile(answer_logits) if options.compile else answer_logits
    start = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1:
        progress = (time.monotonic() - start) / (60 * options.minutes)
        decay = 0.01 + 0.99 * (1 + math.cos(math.pi * min(1, progress))) / 2
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * decay * min(1, (step + 1) / WARMUP_STEPS)
        batch = torch.randint(len(images), (options.batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(model, layout, images[batch], blocks[batch], starts[batch])
        target = labels[batch].long().flatten()
        loss = functional.cross_entropy(logits.float().flatten(0, 2), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % LOG_INTERVAL == 0:
            with torch.autocast(device.type, torch.bfloat16):
                correct, swapped = (quick_accuracy(model, layout, test, shift) for shift in (0, 1))
            seconds = time.monotonic() - start
            print(
                f"step {step} {seconds:.0f} s {step * options.batch / seconds:.0f} scenes/s "
                f"loss {loss.item():.4f} test {correct:.4f} swapped {swapped:.4f}",
                flush=True,
            )


def save_weights(name: str, model: VisionLanguageModel, folder: Path) -> None:
    """Write model.safetensors in bfloat16 with published names, one file per sub-folder."""
    prefix = FAMILIES[name].decoder_prefix
    state = {prefix + key: tensor for key, tensor in model.decoder.state_dict().items()}
    state |= model.vision.published_parameters()
    for part in FAMILIES[name].subfolders:
        part_prefix = f"{part}/" if part else ""
        tensors = {
            key.removeprefix(part_prefix): tensor.detach().bfloat16().cpu().contiguous()
            for key, tensor in state.items()
            if key.rpartition("/")[0] == part
        }
        save_file(tensors, folder / part / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Parse the options, train, and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=sorted(SETUPS))
    parser.add_argument("--minutes", type=float, default=6.0, help="training time")
    parser.add_argument("--scenes", type=int, default=400_000, help="training scenes")
    parser.add_argument("--batch", type=int, default=256, help="scenes per step")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    options = parser.parse_args()
    name, setup = options.family, SETUPS[options.family]
    folder = ASSETS / f"tiny-{name}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.manual_seed(0)
    config = FAMILIES[name].complete_config(folder, read_config(folder))
    tokenizer = make_tokenizer(name, config)
    tokenizer.save(str(folder / FAMILIES[name].decoder_subfolder / "tokenizer.json"))
    start = time.monotonic()
    data = load_scenes(name, "train", options.scenes, tokenizer, device)
    test = load_scenes(name, "test", TEST_SCENES, tokenizer, device)
    print(f"{options.scenes} scenes drawn in {time.monotonic() - start:.0f} s", flush=True)
    processor = read_json_object(folder / setup.processor_folder / "preprocessor_config.json")
    model = VisionLanguageModel(name, config, processor).to(device)
    layout = PackedLayout(name, folder, config, device)
    model.decoder.model.rotary_emb = FixedRotaryEmbedding(
        model.decoder.model.rotary_emb, layout.positions
    )
    train(model, layout, options, data, test)
    save_weights(name, model, folder)


if __name__ == "__main__":
    main()
