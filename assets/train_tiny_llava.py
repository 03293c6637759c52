"""Trains the tiny LLaVA of `assets/tiny-llava` on the synthetic scenes, and measures it.

The ten questions of a scene are trained in one packed sequence: the image once, then the questions
in blocks of equal width that see the image and themselves. The loss is on answer tokens only.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from nemo_vlm_ptq import scenes

PROMPT = "USER: <image>\n{question}\nAnswer the question using a single word or phrase. ASSISTANT:"
BEFORE, AFTER = PROMPT.split("<image>")
SPECIALS = ("<s>", "</s>", "<pad>", "<image>")
SLOTS = 10  # questions of a scene, at most
WIDTH = 34  # tokens of a question's block: makes the packed length, 408, a multiple of 8
TEST_SCENES = 250
SETTINGS = Path(__file__).resolve().parent / "tiny-llava"  # holds the written-by-hand .json files
CONFIG = json.loads((SETTINGS / "config.json").read_text())
PIXELS = json.loads((SETTINGS / "preprocessor_config.json").read_text())


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of the scenes' words that puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    asked = scenes.questions("train", 3000).values()
    texts = [PROMPT.format(question=q["question"]) + f" {q['answer']}" for q in asked]
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["text_config"]["vocab_size"],
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def encode_scenes(ids: range, split: str, tokenizer: Tokenizer) -> tuple[np.ndarray, ...]:
    """Images [N,64,64,3], question blocks [N,SLOTS,WIDTH], answer starts and labels [N,SLOTS,2]."""
    images = np.zeros((len(ids), 64, 64, 3), np.uint8)
    blocks = np.full((len(ids), SLOTS, WIDTH), CONFIG["pad_token_id"], np.int16)
    starts = np.ones((len(ids), SLOTS), np.int16)
    labels = np.full((len(ids), SLOTS, 2), -100, np.int16)
    for row, index in enumerate(ids):
        images[row] = scenes.draw(f"{split}-{index:06d}")
        for slot, q in enumerate(scenes.questions(split, 1, index).values()):
            text = AFTER.format(question=q["question"]) + f" {q['answer']}</s>"
            tokens = tokenizer.encode(text, add_special_tokens=False).ids
            blocks[row, slot, : len(tokens)] = tokens
            starts[row, slot] = len(tokens) - 2  # every answer is one token, then </s>
            labels[row, slot] = tokens[-2:]
    return images, blocks, starts, labels


def load_scenes(split: str, count: int, tokenizer: Tokenizer, device: str) -> list[Tensor]:
    """`encode_scenes` of a split's first scenes, made by all cores, on the device."""
    chunks = [range(i, min(i + 500, count)) for i in range(0, count, 500)]
    encode = partial(encode_scenes, split=split, tokenizer=tokenizer)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        parts = pool.map(encode, chunks, chunksize=1)
    return [torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*parts, strict=True)]


class Packed:
    """The fixed layout of packed sequences: image prompt, attention mask and positions."""

    def __init__(self, tokenizer: Tokenizer, device: str) -> None:
        self.head = torch.tensor(tokenizer.encode(BEFORE).ids, device=device)
        shared = len(self.head) + CONFIG["image_seq_length"]
        place = torch.arange(shared + SLOTS * WIDTH, device=device)
        slot = torch.where(place < shared, -1, (place - shared) // WIDTH)
        self.positions = torch.where(slot < 0, place, shared + (place - shared) % WIDTH)[None]
        seen = (slot[None] == slot[:, None]) | (slot[None] < 0)
        self.mask = (seen & (place[None] <= place[:, None]))[None, None]  # [1,1,T,T]
        self.shared = shared
        self.mean = 255 * torch.tensor(PIXELS["image_mean"], device=device)
        self.std = 255 * torch.tensor(PIXELS["image_std"], device=device)


def answer_logits(
    model: LlavaForConditionalGeneration,
    packed: Packed,
    images: Tensor,
    blocks: Tensor,
    starts: Tensor,
) -> Tensor:
    """Logits [B,SLOTS,2,V] of the answer and the </s> after it, of B scenes."""
    tower, language = model.model.vision_tower, model.model.language_model
    pixels = ((images - packed.mean) / packed.std).permute(0, 3, 1, 2)
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:  # vision_feature_layer is -2
        hidden = layer(hidden, None)
    features = model.model.multi_modal_projector(hidden[:, 1:])
    head = language.embed_tokens(packed.head).expand(len(images), -1, -1)
    asked = language.embed_tokens(blocks.flatten(1).int())
    hidden = language(
        inputs_embeds=torch.cat([head.to(features.dtype), features, asked.to(features.dtype)], 1),
        attention_mask=packed.mask,
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    hidden = hidden[:, packed.shared :].unflatten(1, (SLOTS, WIDTH))
    where = starts.long()[..., None] + torch.arange(-1, 1, device=starts.device)
    return model.lm_head(hidden.gather(2, where[..., None].expand(-1, -1, -1, hidden.shape[-1])))


def quick_accuracy(
    model: LlavaForConditionalGeneration, packed: Packed, data: list[Tensor], shift: int
) -> float:
    """The share of answers right, each scene's questions asked of the image `shift` scenes on."""
    images, blocks, starts, labels = data
    with torch.inference_mode():
        logits = answer_logits(model, packed, images.roll(-shift, 0), blocks, starts)
    right = (logits.argmax(-1) == labels).all(-1)
    return right[labels[..., 0] >= 0].float().mean().item()


def train(
    model: LlavaForConditionalGeneration,
    packed: Packed,
    options: argparse.Namespace,
    data: list[Tensor],
    test: list[Tensor],
) -> None:
    """AdamW with warm-up and a cosine over the time allowed; saves every minute and at the end."""
    images, blocks, starts, labels = data
    device = images.device
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=device.type == "cuda")
    forward = torch.compile(answer_logits) if options.compile else answer_logits
    begun = saved = time.monotonic()
    step, done = 0, 0.0
    while done < 1:
        done = max((time.monotonic() - begun) / (60 * options.minutes), step / options.steps)
        wave = 0.01 + 0.99 * (1 + math.cos(math.pi * min(1, done))) / 2
        rate = options.rate * wave * min(1, (step + 1) / 400)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pick = torch.randint(len(images), (options.batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(model, packed, images[pick], blocks[pick], starts[pick])
        loss = functional.cross_entropy(logits.float().flatten(0, 2), labels[pick].long().flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % options.report == 0:
            with torch.autocast(device.type, torch.bfloat16):
                right, swapped = (quick_accuracy(model, packed, test, shift) for shift in (0, 1))
            seconds = time.monotonic() - begun
            print(
                f"step {step} {seconds:.0f} s {step * options.batch / seconds:.0f} scenes/s "
                f"loss {loss.item():.4f} test {right:.4f} swapped {swapped:.4f}",
                flush=True,
            )
            if time.monotonic() - saved > 60:
                save_weights(model, options.out)
                saved = time.monotonic()
    save_weights(model, options.out)


def published_name(name: str) -> str:
    """The name that the published LLaVA-1.5 files give a weight of a transformers 5 model."""
    name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def write_settings(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes everything of the Hugging Face folder but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() != SETTINGS:
        for path in SETTINGS.glob("*.json"):
            shutil.copy(path, folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def save_weights(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Writes model.safetensors in bf16 under the published names."""
    state = {published_name(k): v.bfloat16().contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def evaluate(folder: Path, device: str, scene_count: int) -> None:
    """Prints exact match of the saved folder, bf16 greedy, with right and swapped images."""
    model, report = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    if any(report.values()):
        raise SystemExit(f"the folder does not load cleanly: {report}")
    model.to(device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    asked = list(scenes.questions("test", scene_count).values())
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(asked)} test questions")
    for shift in (0, 1):
        right = defaultdict(list)
        for start in range(0, len(asked), 256):
            batch = asked[start : start + 256]
            rows = [(int(q["imageId"].rpartition("-")[2]) + shift) % scene_count for q in batch]
            images = [scenes.draw(f"test-{row:06d}") for row in rows]
            texts = [PROMPT.format(question=q["question"]) for q in batch]
            inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
            inputs = inputs.to(device, torch.bfloat16)
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            answers = processor.batch_decode(
                tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for q, answer in zip(batch, answers, strict=True):
                right[q["types"]["detailed"]].append(answer.strip() == q["answer"])
        every = [hit for hits in right.values() for hit in hits]
        print(f"{'swapped' if shift else 'right'} images: {100 * np.mean(every):.2f} %")
        for kind, hits in sorted(right.items()):
            print(f"  {kind} {len(hits)} {100 * np.mean(hits):.1f}")


def main() -> None:
    """Reads the options, trains, saves, and evaluates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("assets/tiny-llava"))
    parser.add_argument("--minutes", type=float, default=6.0, help="time to train for, at most")
    parser.add_argument("--steps", type=int, default=10**9, help="steps to train for, at most")
    parser.add_argument("--scenes", type=int, default=400_000, help="training scenes")
    parser.add_argument("--batch", type=int, default=256, help="scenes a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--report", type=int, default=500, help="steps between reports")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--evaluate-only", action="store_true")
    parser.add_argument("--test-scenes", type=int, default=TEST_SCENES)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not options.evaluate_only:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        write_settings(options.out, tokenizer)
        begun = time.monotonic()
        data = load_scenes("train", options.scenes, tokenizer, device)
        test = load_scenes("test", options.test_scenes, tokenizer, device)
        print(f"{options.scenes} scenes drawn in {time.monotonic() - begun:.0f} s", flush=True)
        model = LlavaForConditionalGeneration(LlavaConfig.from_dict(CONFIG)).to(
            device, torch.float32
        )
        train(model, Packed(tokenizer, device), options, data, test)
    evaluate(options.out, device, options.test_scenes)


if __name__ == "__main__":
    main()
