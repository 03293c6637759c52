"""Trains a tiny model of `assets/` on the synthetic scenes: llava, vila or phi.

The ten questions of a scene are trained in one packed sequence: the image once, then the questions
in blocks of equal width that see the image and themselves. The loss is on answer tokens only.
Towers and projectors are the package's own modules, decoders are transformers'. The folder's JSON
is written by hand but for tokenizer.json; the script writes that and the weights. The quickstart of
the model measures what came of it.
"""

import argparse
import math
import multiprocessing
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.data import scenes
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX
from nemo_vlm_ptq.families import FAMILIES, read_config, vila
from nemo_vlm_ptq.families.phi_vision import PhiVision, global_view_and_crops

SLOTS = 10  # questions of a scene, at most
TEST_SCENES = 250
RATE = 1e-3  # peak learning rate
REPORT = 500  # steps between reports
HERE = Path(__file__).resolve().parent
SPECIALS = ("<s>", "</s>", "<pad>")
ASK = "\n{question}" + PROMPT_SUFFIX


@dataclass(frozen=True)
class Kind:
    """What is particular to a family here.

    after: the prompt behind the image, answer included; start: a <s> stands before it too; end:
    the token that ends an answer; width: tokens of a question's block; specials: tokens besides
    <s>, </s> and <pad>; size: side of the image; pixels: sub-folder of the image processor.
    """

    after: str
    end: str
    width: int
    specials: tuple[str, ...] = ()
    start: bool = False
    size: int = scenes.SIZE
    pixels: str = ""


KINDS = {
    "llava": Kind(ASK + " ASSISTANT: {answer}", "</s>", 34, specials=("<image>",)),
    "vila": Kind(ASK + " ASSISTANT: {answer}", "</s>", 34, size=72, pixels="vision_tower"),
    "phi": Kind(
        ASK + "<|end|>\n<|assistant|>\n{answer}",
        "<|end|>",
        38,
        specials=("<|user|>", "<|end|>", "<|assistant|>"),
        start=True,
    ),
}


class Net(nn.Module):
    """Tower and projector as the package has them, and transformers' decoder, in float32."""

    def __init__(self, name: str, config: dict[str, Any], pixels: dict[str, Any]) -> None:
        super().__init__()
        self.vision = FAMILIES[name].make_vision_module(config)
        self.decoder = AutoModelForCausalLM.from_config(FAMILIES[name].text_config(config))
        for text, parameter in self.vision.named_parameters():
            if text.endswith("GN"):
                nn.init.normal_(parameter, std=0.02)
        self.register_buffer("mean", 255 * torch.tensor(pixels["image_mean"]))
        self.register_buffer("std", 255 * torch.tensor(pixels["image_std"]))
        self.float()

    def features(self, images: Tensor) -> Tensor:
        """[B,side,side,3] uint8 -> image tokens [B,N,H]."""
        pixels = ((images - self.mean) / self.std).permute(0, 3, 1, 2)
        if not isinstance(self.vision, PhiVision):
            return self.vision.project(pixels)
        side = self.vision.side
        rows = pixels.shape[-1] // side
        return self.vision.project(global_view_and_crops(pixels, side), rows, rows)


class Fixed(nn.Module):
    """Rotary cosines and sines of positions that never change."""

    def __init__(self, rotary: nn.Module, positions: Tensor) -> None:
        super().__init__()
        cos, sin = rotary(torch.zeros(1, device=positions.device), positions)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor, position_ids: Any = None, **_: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines in the dtype of x."""
        return self.cos.to(x.dtype), self.sin.to(x.dtype)


def make_tokenizer(name: str, config: dict[str, Any]) -> Tokenizer:
    """A byte-level BPE tokenizer of the scenes' words that puts <s> before every text."""
    kind = KINDS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    asked = scenes.questions("train", 3000).values()
    before = {"llava": "USER: ", "vila": vila.VICUNA.partition("{mark}")[0], "phi": ""}[name]
    texts = [before + kind.after.format(question=q["question"], answer=q["answer"]) for q in asked]
    trainer = trainers.BpeTrainer(
        vocab_size=FAMILIES[name].text_config(config).vocab_size,
        special_tokens=[*SPECIALS, *kind.specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def encode_scenes(ids: range, name: str, split: str, tokenizer: Tokenizer) -> tuple[Any, ...]:
    """Images [N,side,side,3], question blocks [N,SLOTS,width], where answers start and what they
    and their ends are [N,SLOTS,2]."""
    kind = KINDS[name]
    end = tokenizer.token_to_id(kind.end)
    images = np.zeros((len(ids), kind.size, kind.size, 3), np.uint8)
    blocks = np.full((len(ids), SLOTS, kind.width), 2, np.int16)
    starts = np.ones((len(ids), SLOTS), np.int16)
    labels = np.full((len(ids), SLOTS, 2), -100, np.int16)
    for row, index in enumerate(ids):
        picture = scenes.draw(f"{split}-{index:06d}")
        images[row] = picture.resize((kind.size, kind.size), Resampling.BICUBIC)
        for slot, q in enumerate(scenes.questions(split, 1, index).values()):
            text = kind.after.format(question=q["question"], answer=q["answer"])
            tokens = [*tokenizer.encode(text, add_special_tokens=kind.start).ids, end]
            blocks[row, slot, : len(tokens)] = tokens
            starts[row, slot] = len(tokens) - 2  # every answer is one token, then its end
            labels[row, slot] = tokens[-2:]
    return images, blocks, starts, labels


def load_scenes(name: str, split: str, count: int, tokenizer: Any, device: str) -> list[Tensor]:
    """`encode_scenes` of a split's first scenes, made by all cores, on the device."""
    chunks = [range(i, min(i + 500, count)) for i in range(0, count, 500)]
    encode = partial(encode_scenes, name=name, split=split, tokenizer=tokenizer)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        parts = pool.map(encode, chunks, chunksize=1)
    return [torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*parts, strict=True)]


class Packed:
    """The fixed layout of packed sequences: ids before the questions, attention, positions."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any], device: str) -> None:
        prepare = FAMILIES[name].make_preprocessor(folder, config)
        sample = prepare("", "Q", scenes.draw("train-000000"))
        stop = int(sample.is_image.nonzero()[-1]) + 1
        self.ids = sample.input_ids[:stop].clamp(min=0).to(device)
        self.is_image = sample.is_image[:stop].to(device)
        width = KINDS[name].width
        place = torch.arange(stop + SLOTS * width, device=device)
        slot = torch.where(place < stop, -1, (place - stop) // width)
        self.positions = torch.where(slot < 0, place, stop + (place - stop) % width)[None]
        seen = (slot[None] == slot[:, None]) | (slot[None] < 0)
        self.mask = (seen & (place[None] <= place[:, None]))[None, None]  # [1,1,T,T]
        self.shared, self.width = stop, width


def answer_logits(net: Net, packed: Packed, images: Tensor, blocks: Tensor, starts: Tensor) -> Any:
    """Logits [B,SLOTS,2,V] of the answer and the end after it, of B scenes."""
    features = net.features(images)
    table = net.decoder.get_input_embeddings()
    head = table(packed.ids).to(features.dtype).expand(len(images), -1, -1).clone()
    head[:, packed.is_image] = features
    asked = table(blocks.flatten(1).int()).to(features.dtype)
    hidden = net.decoder.model(
        inputs_embeds=torch.cat([head, asked], 1),
        attention_mask=packed.mask,
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    hidden = hidden[:, packed.shared :].unflatten(1, (SLOTS, packed.width))
    where = starts.long()[..., None] + torch.arange(-1, 1, device=starts.device)
    chosen = hidden.gather(2, where[..., None].expand(-1, -1, -1, hidden.shape[-1]))
    return net.decoder.lm_head(chosen)


def quick_accuracy(net: Net, packed: Packed, data: list[Tensor], shift: int) -> float:
    """The share of answers right, each scene's questions asked of the image `shift` scenes on."""
    images, blocks, starts, labels = data
    with torch.inference_mode():
        logits = answer_logits(net, packed, images.roll(-shift, 0), blocks, starts)
    right = (logits.argmax(-1) == labels).all(-1)
    return right[labels[..., 0] >= 0].float().mean().item()


def train(net: Net, packed: Packed, options: Any, data: list[Tensor], test: list[Tensor]) -> None:
    """AdamW with warm-up and a cosine over the time allowed; saves at the end."""
    images, blocks, starts, labels = data
    device = images.device
    matrices = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=device.type == "cuda")
    forward = torch.compile(answer_logits) if options.compile else answer_logits
    begun = time.monotonic()
    step, done = 0, 0.0
    while done < 1:
        done = (time.monotonic() - begun) / (60 * options.minutes)
        wave = 0.01 + 0.99 * (1 + math.cos(math.pi * min(1, done))) / 2
        rate = RATE * wave * min(1, (step + 1) / 400)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pick = torch.randint(len(images), (options.batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(net, packed, images[pick], blocks[pick], starts[pick])
        loss = functional.cross_entropy(logits.float().flatten(0, 2), labels[pick].long().flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % REPORT == 0:
            with torch.autocast(device.type, torch.bfloat16):
                right, swapped = (quick_accuracy(net, packed, test, shift) for shift in (0, 1))
            seconds = time.monotonic() - begun
            print(
                f"step {step} {seconds:.0f} s {step * options.batch / seconds:.0f} scenes/s "
                f"loss {loss.item():.4f} test {right:.4f} swapped {swapped:.4f}",
                flush=True,
            )


def save_weights(name: str, net: Net, folder: Path) -> None:
    """Writes model.safetensors in bf16 under the published names, a file a sub-folder."""
    prefix = FAMILIES[name].decoder_prefix
    state = {prefix + key: tensor for key, tensor in net.decoder.state_dict().items()}
    state |= net.vision.published_parameters()
    for part in FAMILIES[name].subfolders:
        start = f"{part}/" if part else ""
        own = {
            key.removeprefix(start): tensor.detach().bfloat16().cpu().contiguous()
            for key, tensor in state.items()
            if key.rpartition("/")[0] == part
        }
        save_file(own, folder / part / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Reads the options, trains, and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=sorted(KINDS))
    parser.add_argument("--minutes", type=float, default=6.0, help="time to train for, at most")
    parser.add_argument("--scenes", type=int, default=400_000, help="training scenes")
    parser.add_argument("--batch", type=int, default=256, help="scenes a step")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    options = parser.parse_args()
    name, kind = options.family, KINDS[options.family]
    folder = HERE / f"tiny-{name}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.manual_seed(0)
    config = FAMILIES[name].complete_config(folder, read_config(folder))
    tokenizer = make_tokenizer(name, config)
    tokenizer.save(str(folder / FAMILIES[name].decoder_subfolder / "tokenizer.json"))
    begun = time.monotonic()
    data = load_scenes(name, "train", options.scenes, tokenizer, device)
    test = load_scenes(name, "test", TEST_SCENES, tokenizer, device)
    print(f"{options.scenes} scenes drawn in {time.monotonic() - begun:.0f} s", flush=True)
    pixels = read_json_object(folder / kind.pixels / "preprocessor_config.json")
    net = Net(name, config, pixels).to(device)
    packed = Packed(name, folder, config, device)
    net.decoder.model.rotary_emb = Fixed(net.decoder.model.rotary_emb, packed.positions)
    train(net, packed, options, data, test)
    save_weights(name, net, folder)


if __name__ == "__main__":
    main()
