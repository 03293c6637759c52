"""Trains assets/tiny-qwen3-vl on the hard level of the synthetic scenes.

The questions of a scene form one packed sequence: the scene's image, the next scene's image, then
the questions in blocks of equal width. Those about one image attend to the first image and to
themselves, those about two to both. The loss is on answer tokens only. The JSON files of the model
folder are written by hand, except tokenizer.json; the script writes that and the weights, and
prints the accuracy in 16 bit and with rounded weights.

Legend: B scenes, Q questions of a scene, S tokens.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hard_data import (
    BEFORE,
    IMAGE_ID,
    SINGLES,
    SLOTS,
    START_ID,
    STOP_ID,
    WIDTH,
    Data,
    answer_places,
    load_scenes,
    make_tokenizer,
    question_types,
)
from qwen3_vl_model import Model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from nemo_vlm_ptq.families.mrope import mrope_positions

WARMUP_STEPS = 400
LOG_SECONDS = 30
FOLDER = Path(__file__).resolve().parent / "tiny-qwen3-vl"
WEIGHTS = "model.safetensors"


class PackedLayout:
    """Layout of a packed sequence: ids before the questions, attention mask, rotary angles."""

    def __init__(self, model: Model, tokenizer: Any, device: str) -> None:
        vision = model.visual
        tokens, side = (vision.side // vision.merge) ** 2, vision.side
        image = [START_ID, *[IMAGE_ID] * tokens, STOP_ID]
        before = tokenizer.encode(BEFORE).ids
        prefix = torch.tensor(before + 2 * image)
        first, length = len(before) + len(image), len(prefix)
        grids = torch.tensor([[1, side, side]] * 2)
        positions = mrope_positions(prefix == IMAGE_ID, grids, vision.merge)
        place = torch.arange(length + SLOTS * WIDTH)
        slot = torch.where(place < length, -1, (place - length) // WIDTH)
        last = torch.where(slot < SINGLES, first, length) - 1  # of the prefix, that is seen
        following = positions[:, last] + 1 + ((place - length) % WIDTH)[None]
        following[:, :length] = positions
        before_it = (slot[None] < 0) & (place[None] <= last[:, None])
        visible = (slot[None] == slot[:, None]) | before_it
        visible = torch.where(slot[:, None] < 0, slot[None] < 0, visible)
        self.mask = (visible & (place[None] <= place[:, None])).to(device)
        self.angles = tuple(angle.to(device) for angle in model.angles(following))
        self.prefix = prefix.to(device)
        self.image_places = (prefix == IMAGE_ID).nonzero()[:, 0].to(device)


def answer_logits(
    model: Model, layout: PackedLayout, images: Tensor, blocks: Tensor, starts: Tensor
) -> Tensor:
    """Return the logits [B,Q,ANSWER_TOKENS,V] of the answers of B scenes."""
    prefix = layout.prefix.expand(len(images), -1)
    ids = torch.cat([prefix, blocks.flatten(1).long()], 1)
    hidden = model(images, ids, layout.image_places, layout.angles, layout.mask)
    hidden = hidden[:, len(layout.prefix) :].unflatten(1, (SLOTS, WIDTH))
    places = answer_places(starts)[..., None].expand(-1, -1, -1, hidden.shape[-1])
    return functional.linear(hidden.gather(2, places), model.language_model.embed_tokens.weight)


def pairs(images: Tensor, indices: Tensor) -> Tensor:
    """Return the images [B,2,side,side,3] of scenes and of those after them."""
    return torch.stack((images[indices], images[indices + 1]), 1)


@torch.inference_mode()
def correct_answers(
    model: Model, layout: PackedLayout, data: Data, shift: int, batch: int = 50
) -> Tensor:
    """Return whether each answer is right [N,Q], with the images `shift` scenes later."""
    found, count = [], len(data.blocks)
    for rows in torch.arange(count, device=data.images.device).split(batch):
        images = pairs(data.images, (rows + shift) % count)
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = answer_logits(model, layout, images, data.blocks[rows], data.starts[rows])
        labels = data.labels[rows]
        found.append(((logits.argmax(-1) == labels) | (labels < 0)).all(-1))
    return torch.cat(found)


def accuracy(correct: Tensor, data: Data, kind: int | None = None) -> float:
    """Return the accuracy in percent, of one type of questions or of all."""
    chosen = data.types >= 0 if kind is None else data.types == kind
    return 100 * correct[chosen].float().mean().item()


def make_optimizer(model: Model) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=fused)


def train(model: Model, layout: PackedLayout, options: Any, data: Data, test: Data) -> None:
    """Train with warm-up and cosine decay over the time of options.minutes; save at times."""
    device = data.images.device
    optimizer = make_optimizer(model)
    forward: Callable = torch.compile(answer_logits) if options.compile else answer_logits
    step, progress, logged = 0, 0.0, 0.0
    start = time.monotonic()
    while progress < 1:
        seconds = time.monotonic() - start
        progress = seconds / (60 * options.minutes)
        decay = 0.01 + 0.99 * (1 + math.cos(math.pi * min(1, progress))) / 2
        for group in optimizer.param_groups:
            group["lr"] = options.rate * decay * min(1, (step + 1) / WARMUP_STEPS)
        rows = torch.randint(len(data.blocks), (options.batch,), device=device)
        images = pairs(data.images, rows)
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(model, layout, images, data.blocks[rows], data.starts[rows])
        target = data.labels[rows].long().flatten()
        loss = functional.cross_entropy(logits.float().flatten(0, 2), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if seconds > logged + LOG_SECONDS or step == 100:
            logged = seconds
            own = accuracy(correct_answers(model, layout, test, 0), test)
            rate = step * options.batch / seconds
            line = f"step {step} {seconds:.0f} s {rate:.0f} scenes/s loss {loss.item():.4f}"
            print(f"{line} test {own:.2f} %", flush=True)
            save_weights(model)


def save_weights(model: Model) -> None:
    """Write model.safetensors in bfloat16 with published names."""
    tensors = {
        f"model.{name}": tensor.detach().bfloat16().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, FOLDER / WEIGHTS, metadata={"format": "pt"})


def load_weights(model: Model) -> None:
    """Read the weights back, rounded to bfloat16 as they are."""
    tensors = load_file(FOLDER / WEIGHTS)
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})


@torch.no_grad()
def round_decoder(model: Model, bits: int, group: int | None) -> None:
    """Round the decoder's linears to the nearest of symmetric levels, per output row or group."""
    most = 2 ** (bits - 1) - 1
    for module in model.language_model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            grouped = module.weight.unflatten(1, (-1, group or module.in_features))
            scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-8) / most
            module.weight.copy_(((grouped / scale).round() * scale).flatten(1))


def report(model: Model, layout: PackedLayout, test: Data, types: list[str]) -> None:
    """Print accuracy by type of question, own and swapped image, then with rounded weights."""
    load_weights(model)
    own = correct_answers(model, layout, test, 0)
    swapped = correct_answers(model, layout, test, len(test.blocks) // 2)
    print("| question type | questions | own image, % | swapped image, % |", flush=True)
    for kind, name in [*enumerate(types), (None, "all")]:
        count = int((test.types >= 0).sum() if kind is None else (test.types == kind).sum())
        values = [accuracy(one, test, kind) for one in (own, swapped)]
        print(f"| {name} | {count} | {values[0]:.2f} | {values[1]:.2f} |", flush=True)
    for bits, group in ((8, None), (4, 128), (4, None), (3, 128)):
        load_weights(model)
        round_decoder(model, bits, group)
        rounded = correct_answers(model, layout, test, 0)
        lost, won = int((own & ~rounded).sum()), int((rounded & ~own).sum())
        print(
            f"decoder at {bits} bit, {group or 'row'}: {accuracy(rounded, test):.2f} % "
            f"({lost} answers lost, {won} won)",
            flush=True,
        )
    load_weights(model)


@torch.no_grad()
def compare_with_transformers(model: Model, layout: PackedLayout, test: Data, text: Any) -> None:
    """Print the difference of logits from transformers' model, loaded from the folder."""
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    other = Qwen3VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    processor = Qwen2VLImageProcessorPil.from_pretrained(FOLDER)
    model.float()
    rows = torch.zeros(1, dtype=torch.long, device=test.images.device)
    inputs = pairs(test.images, rows), test.blocks[rows], test.starts[rows]
    packed = answer_logits(model, layout, *inputs)[0].cpu()
    for slot, images in ((0, 1), (SINGLES, 2)):
        start = int(test.starts[0, slot])
        pixels = processor(list(test.images[:images].cpu().numpy()), return_tensors="pt")
        one = [START_ID, *[IMAGE_ID] * (len(layout.image_places) // 2), STOP_ID]
        question = test.blocks[0, slot, :start].tolist()
        ids = torch.tensor([[*text.encode(BEFORE).ids, *images * one, *question]])
        found = other(input_ids=ids, mm_token_type_ids=(ids == IMAGE_ID).int(), **pixels).logits
        difference = (found[0, -1] - packed[slot, 0]).abs().max().item()
        print(f"difference from transformers, {images} images: {difference:.2g}", flush=True)


def main() -> None:
    """Parse the options, train, save and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6.5, help="training time")
    parser.add_argument("--scenes", type=int, default=300_000, help="training scenes")
    parser.add_argument("--tests", type=int, default=500, help="test scenes")
    parser.add_argument("--batch", type=int, default=256, help="scenes per step")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config = json.loads((FOLDER / "config.json").read_text())
    tokenizer = make_tokenizer(config["text_config"]["vocab_size"])
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    start, types = time.monotonic(), question_types()
    data = load_scenes("train", options.scenes, tokenizer, types, device)
    test = load_scenes("test", options.tests, tokenizer, types, device)
    print(f"{options.scenes} scenes drawn in {time.monotonic() - start:.0f} s", flush=True)
    model = Model(config).to(device)
    layout = PackedLayout(model, tokenizer, device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {tokenizer.get_vocab_size()} tokens, {device}", flush=True)
    train(model, layout, options, data, test)
    save_weights(model)
    report(model, layout, test, types)
    compare_with_transformers(model, layout, test, tokenizer)


if __name__ == "__main__":
    main()
